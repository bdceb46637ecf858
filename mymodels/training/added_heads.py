"""Heads for a folder whose own code has a base model only: a file of code beside it, written as a person would write it."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel

from ..checkpoints.load_errors import clear_load_errors
from ..forward_calls import as_mapping, logits_of, names_argument
from ..library_logging import only_errors_logged
from ..messages import first_line

ENDINGS = {
    "classification": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
_INPUTS = ("attention_mask", "token_type_ids")

_TEXT = '''\
"""Heads on {body}."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from .{module} import {body}


class {stem}WithHead(PreTrainedModel):
    """`{body}` with a linear layer on its hidden states."""

    config_class = {body}.config_class
    base_model_prefix = "model"
    _no_split_modules = {body}._no_split_modules

    def __init__(self, config: Any, outputs: int):
        super().__init__(config)
        self.model = {body}(config)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear({width}, outputs)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.classifier:
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif module is not self:
            self.model._init_weights(module)

    def states(self, input_ids: torch.Tensor, **inputs: torch.Tensor | None) -> torch.Tensor:
        """The last hidden states, `[batch, length, width]`."""
        given = {{name: value for name, value in inputs.items() if value is not None}}
        return self.dropout(self.model(input_ids, **given)[0])


class {stem}ForSequenceClassification({stem}WithHead):
    """A label for each row, of the mean of the states over the tokens."""

    def __init__(self, config: Any):
        super().__init__(config, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
{arguments}        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """
        Args:
            labels: a class per row, `[batch]`.
        """
        states = self.states(input_ids{passed})
{mean}
        logits = self.classifier(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class {stem}ForTokenClassification({stem}WithHead):
    """A label for each token."""

    def __init__(self, config: Any):
        super().__init__(config, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
{arguments}        labels: torch.Tensor | None = None,
    ) -> TokenClassifierOutput:
        """
        Args:
            labels: a class per token, `[batch, length]`; -100 is left out.
        """
        logits = self.classifier(self.states(input_ids{passed}))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)


class {stem}ForQuestionAnswering({stem}WithHead):
    """The start and the end of an answer."""

    def __init__(self, config: Any):
        super().__init__(config, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
{arguments}        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
    ) -> QuestionAnsweringModelOutput:
        """
        Args:
            start_positions, end_positions: the first and the last token of each answer, `[batch]`.
        """
        start_logits, end_logits = self.classifier(self.states(input_ids{passed})).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            first = nn.functional.cross_entropy(start_logits, start_positions)
            loss = (first + nn.functional.cross_entropy(end_logits, end_positions)) / 2
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start_logits, end_logits=end_logits)
'''
_MEAN = """\
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        share = attention_mask[..., None].to(states.dtype)
        pooled = (states * share).sum(1) / share.sum(1).clamp(min=1)"""


def own_base_model(auto_map: Mapping[str, Any] | None, kind: str) -> str | None:
    """`module.Class` of a folder's own base model, if its code has that but no head of this kind."""
    found = (auto_map or {}).get("AutoModel")
    if kind not in ENDINGS or f"AutoModel{ENDINGS[kind]}" in (auto_map or {}):
        return None
    return found if isinstance(found, str) and "--" not in found else None


@contextlib.contextmanager
def heads_added(path: Path, source: Any, raw: Mapping[str, Any], trust_remote_code: bool) -> Iterator[Path]:
    """A temporary copy of a folder with heads on its own base model; weights are links.

    Raises:
        ValueError: the base model returns no hidden state for each token.
    """
    with only_errors_logged(), clear_load_errors(source):
        body = AutoModel.from_pretrained(path, trust_remote_code=trust_remote_code)
    module, _, name = str(raw["auto_map"]["AutoModel"]).rpartition(".")
    stem = name.removesuffix("Model") or name
    inputs = [argument for argument in _INPUTS if names_argument(body, argument)]
    text = _TEXT.format(
        module=module,
        body=name,
        stem=stem,
        width=_width(body, source),
        arguments="".join(f"        {argument}: torch.Tensor | None = None,\n" for argument in inputs),
        passed="".join(f", {argument}={argument}" for argument in inputs),
        mean=_MEAN if "attention_mask" in inputs else "        pooled = states.mean(1)",
    )
    with tempfile.TemporaryDirectory(prefix="mymodels-heads-") as scratch:
        folder = Path(scratch) / f"{path.name}_with_heads"
        folder.mkdir()
        for file in filter(Path.is_file, path.iterdir()):
            if file.suffix in (".py", ".json"):
                shutil.copyfile(file, folder / file.name)
            else:
                os.symlink(file.resolve(), folder / file.name)
        (folder / f"heads_of_{module}.py").write_text(text, encoding="utf-8")
        heads = {f"AutoModel{ending}": f"heads_of_{module}.{stem}{ending}" for ending in ENDINGS.values()}
        config = {**raw, "auto_map": {**heads, **raw["auto_map"]}}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield folder


@torch.no_grad()
def _width(body: PreTrainedModel, source: Any) -> int:
    name = type(body).__name__
    try:
        outputs = as_mapping(body.eval()(torch.ones(1, 3, dtype=torch.long)))
    except Exception as error:  # custom code can raise anything
        raise ValueError(
            f"{source}: no head can be put on {name}, whose forward fails on tokens: {first_line(error)}"
        ) from None
    states = outputs.get("last_hidden_state", logits_of(outputs))
    if not isinstance(states, torch.Tensor) or states.ndim != 3 or states.shape[:2] != (1, 3):
        raise ValueError(
            f"{source}: no head can be put on {name}, which returns no hidden state for each token: give the class a head of "
            "its own, and name it in auto_map of config.json"
        )
    return states.shape[-1]

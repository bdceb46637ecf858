"""Adapts the models to vLLM, which builds only the base model and computes pooling and heads itself.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from .compat import readable, rename_while_loading
from .padding import packed_lengths

logger = logging.get_logger(__name__)


def served_class(config: PretrainedConfig) -> str | None:
    """Under vLLM: the name of the class that was saved, "" if unknown. Otherwise None."""
    if config._attn_implementation != "vllm":
        return None
    return config.architectures[0] if config.architectures else ""


def pools_for_vllm(forward: Callable) -> Callable:
    """Decorate a stack's `forward`: apply `self.adapt_outputs` to its outputs, if it is set (only under vLLM).

    A forward hook would not run, as vLLM calls `forward` directly.
    """

    @wraps(forward)
    def adapted(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        if self.adapt_outputs is not None:
            outputs.last_hidden_state = self.adapt_outputs(self, outputs.last_hidden_state, kwargs["position_ids"])
        return outputs

    return adapted


class FirstTokenLinear(nn.Linear):
    """A classifier for vLLM's pooled vectors, `[sequences, 1, width]`."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states[:, 0])


def adapt_decoder(model: PreTrainedModel) -> None:
    """At the end of a decoder's `__init__`: under vLLM, a classifier returns each sequence's last state at all its tokens."""
    served = served_class(model.config)
    if served is None or not served.endswith(("ForSequenceClassification", "Model")):
        return
    if served.endswith("Model"):
        logger.warning_once(
            "vLLM by default makes embeddings from the first token, which in a decoder attends to no other token: "
            'pass --pooler-config \'{"pooling_type": "LAST"}\', or "MEAN"'
        )
        return
    rename_while_loading(served, r"^score\.", "classifier.")  # vLLM's name for such a head
    model.adapt_outputs = _last_state_per_token


def _last_state_per_token(model: Any, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    lengths = lengths_of_row(position_ids)
    ends = torch.tensor(lengths, device=hidden_states.device).cumsum(0) - 1
    return repeat_per_token(hidden_states[0, ends], lengths)


def adapt_encoder(model: Any, pool: Callable) -> None:
    """At the end of an encoder's `__init__`: under vLLM, each sequence's pooled vector is returned at all its tokens."""
    served = served_class(model.config)
    if served is None:
        return
    if served.endswith("ForTokenClassification"):
        model.pooler = None  # not in its weights
    elif not served.endswith(("ForSequenceClassification", "Model")):
        raise ValueError(
            f"vLLM cannot serve {served}: it has no such head. Load the folder with AutoModel, "
            "AutoModelForSequenceClassification or AutoModelForTokenClassification, save it, and serve that"
        )
    elif served.endswith("Model") and model.config.pooling == "pooler":
        logger.warning_once(
            "vLLM pools the last hidden states itself, as it does for a stock BERT: the dense layer of "
            "pooling='pooler' is not applied to embeddings"
        )
        return
    if model.pooler is not None:
        model.adapt_outputs = partial(_pool_per_token, pool)


def _pool_per_token(
    pool: Callable, model: Any, hidden_states: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    position_ids = position_ids.view(1, -1)
    if model.config.pooling in ("pooler", "cls"):
        first = torch.arange(position_ids.shape[1], device=position_ids.device) - position_ids[0]
        return model.pooler(hidden_states[0, first.clamp(min=0)][:, None], None)[None]
    lengths = lengths_of_row(position_ids)
    return repeat_per_token(pool(model.pooler, model.config, hidden_states, None, lengths), lengths)


def lengths_of_row(position_ids: torch.Tensor) -> list[int]:
    """Lengths of the sequences in vLLM's single row.

    Raises:
        ValueError: in a compiled graph, where the lengths cannot be read.
    """
    if not readable():
        raise ValueError("this pooling needs vLLM's eager mode: add --enforce-eager, or enforce_eager=True for LLM")
    return packed_lengths(position_ids, None) or [position_ids.shape[1]]


def repeat_per_token(pooled: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Repeat one vector per sequence, `[sequences, width]`, for each of its tokens, `[1, tokens, width]`.

    vLLM's pooler (first token, last token or mean) then returns that vector.
    """
    return pooled.repeat_interleave(torch.tensor(lengths, device=pooled.device), dim=0)[None]

"""What vLLM needs beyond the models' code: it builds the base model alone and does a head's work itself.

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
    """Under vLLM, which builds the base model alone and does a head's work itself: the class that was saved, by name."""
    if config._attn_implementation != "vllm":
        return None
    return config.architectures[0] if config.architectures else ""


def pools_for_vllm(forward: Callable) -> Callable:
    """Around a stack's `forward`: change its outputs by `self.adapt_outputs`, which is None but under vLLM.

    No forward hook could: vLLM calls `forward` itself.
    """

    @wraps(forward)
    def adapted(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        if self.adapt_outputs is not None:
            outputs.last_hidden_state = self.adapt_outputs(self, outputs.last_hidden_state, kwargs["position_ids"])
        return outputs

    return adapted


class FirstTokenLinear(nn.Linear):
    """A classifier as vLLM calls it: its pooled vectors come as `[sequences, 1, width]`."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states[:, 0])


def adapt_decoder(model: PreTrainedModel) -> None:
    """At the end of a decoder's `__init__`: under vLLM, a classifier's last state stands at every token of its sequence."""
    served = served_class(model.config)
    if served is None or not served.endswith(("ForSequenceClassification", "Model")):
        return
    if served.endswith("Model"):
        logger.warning_once(
            "vLLM makes embeddings of a base model's first token unless told otherwise, which here has seen nothing "
            'else: pass --pooler-config \'{"pooling_type": "LAST"}\', or "MEAN"'
        )
        return
    rename_while_loading(served, r"^score\.", "classifier.")  # vLLM's own name of any such head
    model.adapt_outputs = _last_state_everywhere


def _last_state_everywhere(model: Any, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    lengths = lengths_of_row(position_ids)
    ends = torch.tensor(lengths, device=hidden_states.device).cumsum(0) - 1
    return spread(hidden_states[0, ends], lengths)


def adapt_encoder(model: Any, pool: Callable) -> None:
    """At the end of an encoder's `__init__`: under vLLM, what `pool` makes of a sequence stands at each of its tokens."""
    served = served_class(model.config)
    if served is None:
        return
    if served.endswith("ForTokenClassification"):
        model.pooler = None  # which its weights do not have
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
        model.adapt_outputs = partial(_pooled_everywhere, pool)


def _pooled_everywhere(
    pool: Callable, model: Any, hidden_states: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    position_ids = position_ids.view(1, -1)
    if model.config.pooling in ("pooler", "cls"):
        first = torch.arange(position_ids.shape[1], device=position_ids.device) - position_ids[0]
        return model.pooler(hidden_states[0, first.clamp(min=0)][:, None], None)[None]
    lengths = lengths_of_row(position_ids)
    return spread(pool(model.pooler, model.config, hidden_states, None, lengths), lengths)


def lengths_of_row(position_ids: torch.Tensor) -> list[int]:
    """Lengths of the sequences in the one row that vLLM runs.

    Raises:
        ValueError: in a compiled graph, where they cannot be read, and where padding may follow.
    """
    if not readable():
        raise ValueError("this pooling needs vLLM's eager mode: add --enforce-eager, or enforce_eager=True for LLM")
    return packed_lengths(position_ids, None) or [position_ids.shape[1]]


def spread(pooled: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Repeat a vector per sequence, `[sequences, width]`, at each of its tokens, `[1, tokens, width]`.

    vLLM's pooler, which takes the first token, the last or the mean, then finds that vector.
    """
    return pooled.repeat_interleave(torch.tensor(lengths, device=pooled.device), dim=0)[None]

"""MyBert's layer mix and poolings: one vector per sequence.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig

from .padding import unpacked
from .vllm_adapter import served_class


class MyBertLayerMix(nn.Module):
    """Softmax-weighted mean of layers (ELMo's scalar mix, arXiv 1802.05365, without its overall scale)."""

    def __init__(self, num_layers: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_layers))

    def forward(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        shares = self.weights.softmax(dim=0)
        return sum(share * layer for share, layer in zip(shares, layers))


class MyBertPooler(nn.Module):
    """`pooling="pooler"`, stock BERT's: the first token through a dense layer and tanh."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class MyBertClsPooling(nn.Module):
    """`pooling="cls"`: the first token, unchanged."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        return hidden_states[:, 0]


class MyBertMeanPooling(MyBertClsPooling):
    """`pooling="mean"`: the mean over the tokens, without padding."""

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        share = token_mask.to(hidden_states.dtype)
        share = share / share.sum(dim=1, keepdim=True).clamp(min=1)  # [B, T, 1]
        return (hidden_states * share).sum(dim=1)


class MyBertMaxPooling(MyBertClsPooling):
    """`pooling="max"`: the maximum of each feature over the tokens, without padding."""

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        largest = hidden_states.masked_fill(~token_mask, torch.finfo(hidden_states.dtype).min).amax(dim=1)
        return largest.masked_fill(~token_mask.any(dim=1), 0.0)  # 0 for a row of padding only, as for the mean


class MyBertAttentionPooling(nn.Module):
    """`pooling="attention"`: a mean weighted by a learned score per token (after arXiv 1703.03130: one hop, a linear score)."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        # the bias has no effect on softmax, but is in the checkpoints; vLLM drops weights named `score.bias`
        self.score = nn.Linear(config.hidden_size, 1, bias=served_class(config) is None)

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        scores = self.score(hidden_states)  # under autocast in fewer bits than the hidden states
        scores = scores.masked_fill(~token_mask, torch.finfo(scores.dtype).min)
        return (hidden_states * scores.softmax(dim=1)).sum(dim=1)


POOLINGS = {
    "pooler": MyBertPooler,
    "cls": MyBertClsPooling,
    "mean": MyBertMeanPooling,
    "max": MyBertMaxPooling,
    "attention": MyBertAttentionPooling,
}


def pool(
    pooler: nn.Module,
    config: PretrainedConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lengths: list[int] | None,
) -> torch.Tensor:
    """One vector per row, or per sequence where rows are packed with sequences of `lengths`."""
    if lengths is not None:
        attention_mask = unpacked(hidden_states.new_ones(hidden_states.shape[:2]), lengths)
        hidden_states = unpacked(hidden_states, lengths)
    if attention_mask is None:
        token_mask = hidden_states.new_ones(1, hidden_states.shape[1], 1, dtype=torch.bool)
    elif attention_mask.ndim == 2:
        token_mask = attention_mask.to(hidden_states.device, torch.bool)[..., None]  # [B, T, 1]
    elif config.pooling in ("pooler", "cls"):
        token_mask = None
    else:
        raise ValueError(
            f"pooling={config.pooling!r} needs attention_mask of shape [batch, length] to leave padding out, "
            f"but got {list(attention_mask.shape)}"
        )
    return pooler(hidden_states, token_mask)

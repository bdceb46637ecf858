"""Attention functions (eager, sliding-window, on packed sequences), rotary positions, masks, room in a cache.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import copy
from collections.abc import Callable
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig

from .compat import (
    TRANSFORMERS_ATTENTION,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    readable,
)

LARGE_PAST = 1 << 18  # keys of one layer, in numbers, that take longer to copy than to see that they need not be copied


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain torch, for `attn_implementation="eager"`, the only implementation that returns weights.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, kv_heads, keys, head_dim]`; each key/value head serves `heads // kv_heads` query heads.
        attention_mask: added to the scores, broadcastable to `[batch, heads, queries, keys]`.

    Returns:
        The mixed values `[batch, queries, heads, head_dim]` and the weights `[batch, heads, queries, keys]`.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def rotary_cos_sin(
    position_ids: torch.Tensor, head_dim: int, rope_theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary positions (RoFormer, arXiv 2104.09864), `[batch, length, head_dim]` each.

    Computed from `position_ids` (`[batch, length]`) at each call: a table kept as a buffer would not survive loading
    on the meta device under transformers 5.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None].float() * rope_theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_of(
    config: PretrainedConfig, position_ids: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`rotary_cos_sin` for this config; None if it has no rotary positions."""
    if config.position_embedding_type != "rope":
        return None
    return rotary_cos_sin(position_ids, config.head_dim, config.rope_theta, dtype)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys `[batch, heads, length, head_dim]` by position; dimension i pairs with i + head_dim / 2."""
    first, second = states.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (states * cos[:, None] + rotated * sin[:, None]).to(states.dtype)  # under autocast, cos is float32


def norm_heads(norm: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Normalise each head in the dtype of the norm's weight; under autocast, `states` may have fewer bits."""
    return norm(states.to(norm.weight.dtype)).to(states.dtype)


class ALL_ATTENTION_FUNCTIONS:
    """transformers' attention functions, each wrapped in `attend`; vLLM's is returned unchanged."""

    @staticmethod
    def get_interface(name: str, default: Callable) -> Callable:
        function = TRANSFORMERS_ATTENTION.get_interface(name, default)
        return function if name == "vllm" else partial(attend, function)


def attend(
    function: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Any = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call an attention `function` in its fastest form: sequence by sequence, in blocks, or as it is.

    With `output_attentions`, calls `eager_attention_forward` instead. Shapes as in `eager_attention_forward`.
    """
    if output_attentions:
        return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if packing is not None:
        return attend_packed(function, packing, module, query, key, value, None, **kwargs)
    if attention_mask is None and attends_in_blocks(module.config, query, kwargs.get("sliding_window")):
        return attend_in_blocks(function, module, query, key, value, None, **kwargs)
    return function(module, query, key, value, attention_mask, **kwargs)


def attend_packed(
    function: Callable,
    packing: Any,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Call an attention `function` on the sequences of a `Packing`, neighbours of equal length as one batch.

    Shapes as in `eager_attention_forward`.
    """
    window = kwargs.get("sliding_window")
    kwargs.pop("position_ids", None)  # of the whole row
    start, pieces = 0, []
    for length, count in packing.groups:
        rows = slice(start, start := start + length * count)
        parts = [states[0, :, rows].unflatten(1, (count, length)).transpose(0, 1) for states in (query, key, value)]
        in_blocks = window is not None and length > window
        run: Callable[..., Any] = partial(attend_in_blocks, function) if in_blocks else function
        pieces.append(run(module, *parts, None, **kwargs)[0].flatten(0, 1))
    return torch.cat(pieces)[None], None


def attends_in_blocks(config: PretrainedConfig, states: torch.Tensor, window: int | None) -> bool:
    """Whether `attend_in_blocks` computes a layer with this window for `states` `[batch, heads, length, …]`: no mask needed."""
    if window is None or config._attn_implementation != "sdpa" or not readable():
        return False
    return states.device.type == "cpu" and states.shape[2] > window


def attend_in_blocks(
    function: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    sliding_window: int,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Sliding-window attention in O(length × window), by an attention `function`.

    A block of queries sees its own keys and the `sliding_window - 1` before them. Shapes as in `eager_attention_forward`.
    """
    rows, length = query.shape[0], query.shape[2]
    size = min(length, max(sliding_window, 64))
    blocks, before = -(-length // size), sliding_window - 1
    fill = blocks * size - length
    query = nn.functional.pad(query, (0, 0, 0, fill)).unflatten(2, (blocks, size))  # [B, H, blocks, size, D]
    key, value = (  # [B, K, blocks, before + size, D]
        nn.functional.pad(states, (0, 0, before, fill)).unfold(2, before + size, size).transpose(-1, -2)
        for states in (key, value)
    )
    parts = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    seen = torch.ones(size, before + size, dtype=torch.bool, device=query.device).triu().tril(before)
    seen = seen.repeat(rows, blocks, 1, 1)
    seen[:, 0, :, :before] = False  # no keys precede the first block
    kwargs["sliding_window"] = sliding_window
    mixed, _ = function(module, *parts, seen.flatten(0, 1)[:, None], **kwargs)  # [B × blocks, size, H, D]
    return mixed.unflatten(0, (rows, blocks)).flatten(1, 2)[:, :length], None


def positions_in_cache(
    layers: list[Any], inputs_embeds: torch.Tensor, past_key_values: Any, given: torch.Tensor | None
) -> torch.Tensor:
    """Cache positions `[length]` of the input, after those that the cache of `layers` holds; `given` if it is not None."""
    if given is not None:
        return given
    past = 0
    if past_key_values is not None:
        past = past_key_values.get_seq_length(layers[0].self_attn.layer_idx if layers else 0)
    return torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past


MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def masks_by_layer_type(
    config: PretrainedConfig,
    layers: list[Any],
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    past_key_values: Any,
    position_ids: torch.Tensor | None,
    cache_position: torch.Tensor,
    output_attentions: bool = False,
) -> dict[str, torch.Tensor | None]:
    """A causal mask for each layer type, None for a type that needs no mask. A dict is returned unchanged.

    Must be called before a cache is created: transformers detects packed sequences only without a cache.

    Args:
        layers: the layers that run in this process; not all of them under pipeline parallelism.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    first = layers[0].self_attn.layer_idx if layers else 0
    in_blocks = set()
    if not output_attentions:
        in_blocks = _types_in_blocks(config, inputs_embeds, attention_mask, past_key_values, position_ids, first)
    of_type: dict[str, int] = {}  # in a pipeline: the first own layer of each type, whose cache has its length
    if len(layers) < config.num_hidden_layers:
        of_type = {layer.layer_type: layer.self_attn.layer_idx for layer in reversed(layers)}
    given = {
        "config": with_eager_attention(config) if output_attentions else config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
        "cache_position": cache_position,
    }
    masks = dict.fromkeys(in_blocks)
    for kind in set(config.layer_types) - in_blocks:
        masks[kind] = MASKS[kind](**given, layer_idx=of_type.get(kind))
    return masks


def _types_in_blocks(
    config: PretrainedConfig,
    states: torch.Tensor,
    attention_mask: Any,
    past_key_values: Any,
    position_ids: torch.Tensor | None,
    layer_idx: int,
) -> set[str]:
    """The layer types that `attend_in_blocks` computes: sliding ones, on rows without padding and with an empty cache."""
    if not attends_in_blocks(config, states[:, None], config.sliding_window):
        return set()
    if past_key_values is not None and (
        type(past_key_values) is not DynamicCache or past_key_values.get_seq_length(layer_idx) > 0
    ):
        return set()
    if attention_mask is None:
        one_sequence = position_ids is None or past_key_values is not None  # otherwise rows may be packed
    else:
        one_sequence = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        one_sequence = one_sequence and bool(attention_mask.all())
    return {"sliding_attention"} & set(config.layer_types) if one_sequence else set()


def bidirectional_mask(
    config: PretrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    sequence_ids: torch.Tensor | None,
    output_attentions: bool = False,
) -> torch.Tensor | None:
    """The attention mask of an encoder, or None if it needs no mask.

    Args:
        attention_mask: as passed to the model; from a dict by layer type, the mask is returned unchanged.
        sequence_ids: `[batch, length]`, the number of each token's sequence in packed rows; tokens attend to tokens of
            the same number only.
    """
    if isinstance(attention_mask, dict):
        return attention_mask["full_attention"]
    apart = {}
    if sequence_ids is not None:
        apart["and_mask_function"] = lambda batch, head, q, kv: sequence_ids[batch, q] == sequence_ids[batch, kv]
    config = with_eager_attention(config) if output_attentions else config
    return create_bidirectional_mask(config, inputs_embeds, attention_mask, **apart)


def with_eager_attention(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of the config with eager attention, so that masks are made in the form that eager attention needs."""
    config = copy.copy(config)
    config._attn_implementation_internal = "eager"
    return config


class CacheRooms:
    """Tensors that begin with the keys and values of a cache and have room for more: a step need not copy the past.

    A step writes only behind what the cache holds. Where this does not hold the tensors of the last step (the first time,
    or after it was reordered, cropped or copied), there are none.

    Attributes:
        last: the keys and values after the last step, of all layers.
    """

    def __init__(self) -> None:
        self.last: list[torch.Tensor] = []
        self._rooms: list[torch.Tensor] = []

    def of(self, past: list[torch.Tensor]) -> list[torch.Tensor]:
        """One for each tensor `[batch, kv_heads, length, head_dim]` of `past`; none if they are small, or not `last`."""
        length = past[0].shape[2]
        same = len(past) == len(self.last) and all(map(is_, past, self.last))
        if not same or past[0].numel() < LARGE_PAST:
            self._rooms = []
        elif [each.data_ptr() for each in past] != [each.data_ptr() for each in self._rooms] or (
            length == self._rooms[0].shape[2]
        ):
            self._rooms = [nn.functional.pad(each, (0, 0, 0, length // 8 + 32)) for each in past]
        return self._rooms

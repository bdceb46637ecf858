"""Attention, and sequences without padding: what both models share of it.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .kernels import ROW_BY_ROW
from .layers import hooks_everywhere, is_watched, readable


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
    """Attention written out, for `attn_implementation="eager"`: the only one that returns its weights.

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


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn queries or keys `[batch, heads, length, head_dim]` by their positions; half i pairs with half i + d/2."""
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (states * cos[:, None] + turned * sin[:, None]).to(states.dtype)  # autocast: states may be narrower


def packed_sequence_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """Number the sequences packed in each row: a new one starts wherever positions do not go on by one.

    `[[0, 1, 2, 0, 1]]` → `[[0, 0, 0, 1, 1]]`.
    """
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return nn.functional.pad(starts, (1, 0)).cumsum(-1)


def packed_lengths(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> list[int] | None:
    """Lengths of the sequences packed in rows of `position_ids` `[batch, length]`, row by row.

    None if each row is one sequence, if a mask says what sees what, or in a graph that is exported.
    """
    if position_ids is None or attention_mask is not None or EXPORTING() or torch.jit.is_tracing():
        return None
    return _read_lengths(position_ids)


@torch.compiler.disable  # a compiled model stops here to look, rather than take packed sequences for one
def _read_lengths(position_ids: torch.Tensor) -> list[int] | None:
    ids = packed_sequence_ids(position_ids)
    if not ids[:, -1:].any():
        return None
    return [length for row in ids for length in row.bincount().tolist()]


EXPORTING = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # the first: torch 2.7 and newer


def counts_padding(labels: torch.Tensor | None, attention_mask: Any) -> bool:
    """Whether some label other than -100 is for an output at padding, so that padding has to be computed too."""
    if labels is None or not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != labels.shape:
        return False
    return readable() and bool(((labels != -100) & (attention_mask == 0)).any())


def unpacked(packed: torch.Tensor, lengths: list[int], padding_value: float = 0) -> torch.Tensor:
    """Sequences of `lengths` out of packed rows `[batch, length, …]`, each in a row of its own, padded on the right."""
    return nn.utils.rnn.pad_sequence(packed.flatten(0, 1).split(lengths), True, padding_value)


def lengths_for_engine(position_ids: torch.Tensor) -> list[int]:
    """Lengths of the sequences in the one row that vLLM runs.

    Raises:
        ValueError: in a compiled graph, where they cannot be read, and where padding may follow.
    """
    if not readable():
        raise ValueError("this pooling needs vLLM's eager mode: add --enforce-eager, or enforce_eager=True for LLM")
    return packed_lengths(position_ids, None) or [position_ids.shape[1]]


def spread(pooled: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """A vector per sequence, `[sequences, width]`, at each of its tokens, `[1, tokens, width]`.

    An engine that pools by a rule of its own, first token, last token or mean, then comes to that vector.
    """
    return pooled.repeat_interleave(torch.tensor(lengths, device=pooled.device), dim=0)[None]


CONTAINERS = {nn.ModuleList, nn.ModuleDict, nn.ParameterDict, nn.ParameterList, nn.Embedding}
# libraries whose modules stand for one `nn.Linear`, `nn.Embedding` or head: adapters, quantised matrices
ADAPTED = ("peft.", "torchao.", "torch.ao.", "bitsandbytes.", "optimum.", "hqq.")


def takes_packed(model: nn.Module, home: str) -> bool:
    """Whether each module of `model` gives the same for tokens laid end to end, and nobody sees how they are laid.

    Not with a hook anywhere, a replaced `forward`, or a module that is not known: it might look at several tokens.

    Args:
        home: the file, by `__module__`, whose classes are known beside torch's and those of adapters.
    """
    if hooks_everywhere():
        return False
    for module in model.modules():
        # FSDP makes a class of its own from each it shards
        kind = next(base for base in type(module).__mro__ if not base.__module__.startswith("torch.distributed."))
        known = kind in ROW_BY_ROW or kind in CONTAINERS or kind.__module__ == home or module is model
        if not (known or isinstance(module, nn.Identity) or kind.__module__.startswith(ADAPTED)) or is_watched(module):
            return False
    return True


def may_skip_padding(
    model: nn.Module, labels: torch.Tensor | None, attention_mask: Any, wanted: bool | None = None
) -> bool:
    """Whether a head that reads every token may have zeros for the states at padding.

    Only if `labels` are given, none of which counts there: without them it is unknown what becomes of the outputs, which
    transformers' Trainer for one compares with labels itself (`label_smoothing_factor`).

    Args:
        wanted: the caller's own choice, which is taken.
    """
    if wanted is not None:
        return wanted
    if labels is None or counts_padding(labels, attention_mask):
        return False
    return not hooks_everywhere() and not any(is_watched(module) for module in model.modules())


class Packing:
    """Sequences laid end to end in one row, `[1, tokens]`, without padding, and the way back.

    Nothing is computed for padding, and each sequence attends to itself alone, without a mask.

    Args:
        lengths: tokens of each sequence, in their order in the row.
        shape: `(batch, length)` of what they come from.
        index: `[tokens]`, where each token stands in the flattened `[batch * length]`; None: in this very order.
    """

    def __init__(self, lengths: list[int], shape: tuple[int, int], index: torch.Tensor | None = None):
        self.shape, self.index, self.tokens = shape, index, sum(lengths)
        self.groups = [(length, len(list(same))) for length, same in groupby(lengths)]  # neighbours of one length

    @classmethod
    def find(
        cls, shape: tuple[int, int], attention_mask: Any, lengths: list[int] | None, right_padded: bool = False
    ) -> "Packing | None":
        """What a batch of `shape` holds, longest sequence first, or packed rows of sequences of `lengths`.

        None where nothing is gained or the mask says more than where padding is: no padding, or some amid the tokens.
        """
        if lengths is not None:
            return cls(lengths, shape)
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != shape or attention_mask.all():
            return None
        mask = attention_mask.bool()
        runs = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1)
        if (runs != 1).any() or (right_padded and not mask[:, 0].all()):
            return None
        ordered, order = mask.sum(dim=1).sort(descending=True, stable=True)
        rows, columns = mask[order].nonzero(as_tuple=True)
        index, lengths = order[rows] * shape[1] + columns, ordered.tolist()
        # oneDNN compiles kernels for each number of rows and keeps them, in the end half a gigabyte. So that numbers
        # recur, some tokens (at most 1 in 16) are there twice: as one more sequence, which `put` leaves out.
        step = 1 if torch.is_grad_enabled() else max(1, (1 << len(index).bit_length()) // 32)
        rest = -len(index) % step
        packing = cls(lengths + [rest] * (rest > 0), shape, torch.cat((index, index[:rest])))
        packing.tokens = len(index)
        return packing

    def take(self, padded: torch.Tensor | None) -> torch.Tensor | None:
        """`[batch, length, …]` → `[1, tokens, …]`; a batch of one row counts for all, None stays None."""
        if padded is None:
            return None
        flat = padded.expand(self.shape[0], *padded.shape[1:]).flatten(0, 1)
        return (flat if self.index is None else flat[self.index])[None]

    def put(self, packed: torch.Tensor) -> torch.Tensor:
        """`[1, tokens, width]` → `[batch, length, width]`, with zeros for padding."""
        flat = packed[0]
        if self.index is not None:
            index, flat = self.index[: self.tokens], flat[: self.tokens]
            flat = flat.new_zeros(self.shape[0] * self.shape[1], flat.shape[-1]).index_copy(0, index, flat)
        return flat.unflatten(0, self.shape)


def find_packing(
    model: PreTrainedModel,
    home: str,
    given: torch.Tensor,
    attention_mask: Any,
    lengths: list[int] | None,
    outputs_wanted: tuple[bool, bool],
    skip_padding: bool,
    right_padded: bool = False,
) -> Packing | None:
    """How to run a batch without padding: where values can be read at no cost, and nobody sees how tokens are laid.

    Args:
        home: see `takes_packed`.
        given: `[batch, length, …]`, the input.
        lengths: of sequences packed in its rows, if they are.
        outputs_wanted: whether each layer's attentions and states are asked for.
        skip_padding: False: for rows of `lengths` only, which have no padding.
    """
    if lengths is None and not skip_padding:
        return None
    implementation = model.config._attn_implementation
    needed = lengths is not None and "flash" in implementation  # which takes no mask that keeps sequences apart
    fast = given.device.type == "cpu" and implementation == "sdpa"
    if not (fast or needed) or not readable() or any(outputs_wanted):
        return None
    packing = Packing.find(tuple(given.shape[:2]), attention_mask, lengths, right_padded)
    return packing if packing is None or needed or takes_packed(model, home) else None


def attend_apart(
    function: Callable,
    packing: Packing,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention `function` on a batch of one row, sequence by sequence, those of one length together.

    Shapes as in `eager_attention_forward`.
    """
    window = kwargs.get("sliding_window")
    kwargs.pop("position_ids", None)  # of the whole row
    start, pieces = 0, []
    for length, count in packing.groups:
        rows = slice(start, start := start + length * count)
        parts = [states[0, :, rows].unflatten(1, (count, length)).transpose(0, 1) for states in (query, key, value)]
        if window is not None and length > window:
            pieces.append(attend_in_blocks(function, module, *parts, None, **kwargs)[0].flatten(0, 1))
        else:
            pieces.append(function(module, *parts, None, **kwargs)[0].flatten(0, 1))
    return torch.cat(pieces)[None], None


def attends_in_blocks(config: PretrainedConfig, states: torch.Tensor, window: int | None) -> bool:
    """Whether a layer with this sliding window takes rows `[batch, heads, length, …]` in blocks, and needs no mask."""
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
    """An attention `function` on the last `sliding_window` tokens of each, in time that grows with the length and not with its square.

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
    seen[:, 0, :, :before] = False  # nothing is before the first block
    kwargs["sliding_window"] = sliding_window
    mixed, _ = function(module, *parts, seen.flatten(0, 1)[:, None], **kwargs)  # [B × blocks, size, H, D]
    return mixed.unflatten(0, (rows, blocks)).flatten(1, 2)[:, :length], None

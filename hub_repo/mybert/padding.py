"""Running a model without padding: sequences laid end to end in one row.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import functools
import inspect
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .base import HOOKS, hooks_everywhere, is_hooked
from .compat import EXPORTING, readable
from .tokenwise import calls_of_class, stack_keeps_tokens_apart, treats_tokens_alone


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


def lengths_in_rows(states: torch.Tensor, position_ids: torch.Tensor | None, attention_mask: Any) -> list[int] | None:
    """`packed_lengths` of an input or its states `[batch, length, …]`, for which one row of positions may stand for all."""
    if position_ids is None:
        return None
    return packed_lengths(position_ids.expand(states.shape[0], -1), attention_mask)


def sequence_ids_in_rows(
    states: torch.Tensor, position_ids: torch.Tensor | None, attention_mask: Any, read: bool = True
) -> torch.Tensor | None:
    """`packed_sequence_ids` of an input whose rows are packed, or may be and cannot be read; else None.

    Args:
        read: False: look at no value, where it is known that one row is not to be taken apart.
    """
    if position_ids is None or attention_mask is not None:
        return None
    if readable() and not (read and lengths_in_rows(states, position_ids, attention_mask)):
        return None
    return packed_sequence_ids(position_ids.expand(states.shape[0], -1))


def counts_padding(labels: torch.Tensor | None, attention_mask: Any) -> bool:
    """Whether some label other than -100 is for an output at padding, so that padding has to be computed too."""
    if labels is None or not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != labels.shape:
        return False
    return readable() and bool(((labels != -100) & (attention_mask == 0)).any())


def unpacked(packed: torch.Tensor, lengths: list[int], padding_value: float = 0) -> torch.Tensor:
    """Sequences of `lengths` out of packed rows `[batch, length, …]`, each in a row of its own, padded on the right."""
    return nn.utils.rnn.pad_sequence(packed.flatten(0, 1).split(lengths), True, padding_value)


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
    return not hooks_everywhere() and not any(map(is_watched, _modules_of(model)))


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


# whose hooks move, gather or cast tensors, or ask for their gradient (with gradient checkpointing), whatever their
# shape; accelerate's replace `forward` for that
NOT_LOOKING = ("accelerate.", "deepspeed.", "torch.distributed.", "transformers.distributed.")
NOT_LOOKING += ("transformers.integrations.tensor_parallel", "transformers.modeling_utils")


def _made_by(function: Any) -> str:
    function = function.func if isinstance(function, partial) else getattr(function, "__func__", function)
    return str(getattr(function, "__module__", ""))


def is_watched(module: nn.Module) -> bool:
    """Whether somebody might see how tokens are laid out: hooks, or a replaced `forward`, by others than `NOT_LOOKING`."""
    if not is_hooked(module):
        return False
    own = vars(module)
    for hooks in HOOKS:
        if own.get(hooks) and not all(_made_by(hook).startswith(NOT_LOOKING) for hook in own[hooks].values()):
            return True
    forward = own.get("forward")
    if forward is None:
        return False
    if not _made_by(forward).startswith(NOT_LOOKING):
        return True
    hook, before = (
        own.get("_hf_hook"),
        own.get("_old_forward"),
    )  # accelerate's: a caller's own may be among them, or below
    replaced_before = before is not None and getattr(before, "__func__", None) is not type(module).forward
    parts = getattr(hook, "hooks", (hook,))
    return replaced_before or any(not type(part).__module__.startswith("accelerate.") for part in parts if part)


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """`model.modules()`, without their names, which take most of its time."""
    found, seen = [model], {model}
    for module in found:  # which grows
        for child in module._modules.values():
            if child is not None and child not in seen:
                found.append(child)
                seen.add(child)
    return found


def takes_packed(model: nn.Module) -> bool:
    """Whether each module of `model` computes each token by itself, and nobody sees how they are laid out.

    Looked at anew at each call, since any module may be hooked, patched or replaced. A `pooler` is called with padding,
    outside.
    """
    if hooks_everywhere():
        return False
    pooler = getattr(model, "pooler", None)
    apart = {model, *(_modules_of(pooler) if isinstance(pooler, nn.Module) else ())}
    calls: dict[type, frozenset[str] | None] = {}
    for module in _modules_of(model):
        if is_watched(module):
            return False
        if module in apart:
            continue
        kind = type(module)
        if kind not in calls:
            calls[kind] = calls_of_class(kind)
        called = calls[kind]
        if called is None or (called and not treats_tokens_alone(module, called)):
            return False
    return True


def skips_padding(forward: Callable | None = None, *, right_padded: bool = False) -> Any:
    """Decorate a method that runs a model's layers: where it is faster, it gets the tokens without padding between them.

    It gets them in one row, `[1, tokens]`, with a dict of masks that are None, and an argument `packing` for `attend`.
    Its `last_hidden_state` then has zeros at padding. Not under compilation, with a cache, with other outputs wanted,
    or where somebody could see the difference (`takes_packed`).

    Args:
        right_padded: only with padding on the right.
    """
    if forward is None:
        return partial(skips_padding, right_padded=right_padded)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    names = [parameter.name for parameter in parameters]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    @functools.wraps(forward)
    def packed(self: PreTrainedModel, *args: Any, skip_padding: bool = True, **kwargs: Any) -> Any:
        given = defaults | dict(zip(names, args)) | kwargs
        packing = _find_packing(self, forward, given, skip_padding, right_padded)
        if packing is None:
            return forward(self, **given)
        states: Any = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if given.get("position_ids") is None:
            given["position_ids"] = torch.arange(states.shape[1], device=states.device)[None]
        for name in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids"):
            given[name] = packing.take(given.get(name))
        given["attention_mask"] = dict.fromkeys(getattr(self.config, "layer_types", ["full_attention"]))
        outputs = forward(self, **given, packing=packing)
        outputs.last_hidden_state = packing.put(outputs.last_hidden_state)
        return outputs

    return packed


def _find_packing(
    model: Any, forward: Callable, given: dict[str, Any], skip_padding: bool, right_padded: bool
) -> Packing | None:
    config, implementation = model.config, model.config._attn_implementation
    states = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if not isinstance(states, torch.Tensor) or states.numel() == 0 or not readable():
        return None
    attention_mask, position_ids = given.get("attention_mask"), given.get("position_ids")
    flash = "flash" in implementation
    if not flash and (states.device.type != "cpu" or implementation != "sdpa"):
        return None
    if "use_cache" in given and any(model._cache_wanted(given["use_cache"], given.get("past_key_values"))):
        return None
    if position_ids is None and states.shape[1] > _position_limit(config):
        return None
    lengths = lengths_in_rows(states, position_ids, attention_mask)
    needed = flash and lengths is not None  # it takes no mask that keeps sequences apart
    if not needed and (flash or (lengths is None and not skip_padding)):
        return None
    if any(model._outputs_wanted(given.get("output_attentions"), given.get("output_hidden_states"))):
        return None
    packing = Packing.find(tuple(states.shape[:2]), attention_mask, lengths, right_padded)
    if packing is None or needed or (stack_keeps_tokens_apart(model, forward) and takes_packed(model)):
        return packing
    return None


def _position_limit(config: Any) -> float:
    unlimited = getattr(config, "position_embedding_type", None) in ("rope", "none")
    return float("inf") if unlimited else config.max_position_embeddings

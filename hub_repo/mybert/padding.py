"""Run a model without padding: sequences are concatenated in one row.

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

from .base import HOOKS, has_global_hooks, is_hooked
from .compat import EXPORTING, readable
from .tokenwise import calls_are_unpatched, calls_of_class, stack_is_tokenwise


def packed_sequence_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """Number the sequences packed in each row: a new one starts where a position is not the previous one plus 1.

    `[[0, 1, 2, 0, 1]]` → `[[0, 0, 0, 1, 1]]`.
    """
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return nn.functional.pad(starts, (1, 0)).cumsum(-1)


def packed_lengths(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> list[int] | None:
    """Lengths of the sequences packed in rows of `position_ids` `[batch, length]`, row by row.

    None if each row is one sequence, if there is an attention mask, or while exporting or tracing.
    """
    if position_ids is None or attention_mask is not None or EXPORTING() or torch.jit.is_tracing():
        return None
    return _read_lengths(position_ids)


@torch.compiler.disable  # a graph break, so that a compiled model also detects packed sequences
def _read_lengths(position_ids: torch.Tensor) -> list[int] | None:
    ids = packed_sequence_ids(position_ids)
    if not ids[:, -1:].any():
        return None
    return [length for row in ids for length in row.bincount().tolist()]


def lengths_in_rows(states: torch.Tensor, position_ids: torch.Tensor | None, attention_mask: Any) -> list[int] | None:
    """`packed_lengths` of an input or its states `[batch, length, …]`; one row of `position_ids` applies to all rows."""
    if position_ids is None:
        return None
    return packed_lengths(position_ids.expand(states.shape[0], -1), attention_mask)


def sequence_ids_in_rows(
    states: torch.Tensor, position_ids: torch.Tensor | None, attention_mask: Any, read: bool = True
) -> torch.Tensor | None:
    """`packed_sequence_ids` of an input whose rows are packed, or whose positions cannot be read; otherwise None.

    Args:
        read: False: do not read positions; return None if they could be read.
    """
    if position_ids is None or attention_mask is not None:
        return None
    if readable() and not (read and lengths_in_rows(states, position_ids, attention_mask)):
        return None
    return packed_sequence_ids(position_ids.expand(states.shape[0], -1))


def has_labels_at_padding(labels: torch.Tensor | None, attention_mask: Any) -> bool:
    """Whether a label other than -100 is at padding, which then must be computed too."""
    if labels is None or not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != labels.shape:
        return False
    return readable() and bool(((labels != -100) & (attention_mask == 0)).any())


def unpacked(packed: torch.Tensor, lengths: list[int], padding_value: float = 0) -> torch.Tensor:
    """The sequences of packed rows `[batch, length, …]`, each in a row of its own, padded on the right."""
    return nn.utils.rnn.pad_sequence(packed.flatten(0, 1).split(lengths), True, padding_value)


def may_skip_padding(
    model: nn.Module, labels: torch.Tensor | None, attention_mask: Any, wanted: bool | None = None
) -> bool:
    """Whether a head that reads every token can skip padding, so that states there are 0.

    Only with `labels` that are -100 at all padding. Without labels, the caller may use the outputs at padding;
    transformers' Trainer does with `label_smoothing_factor`.

    Args:
        wanted: the caller's choice; returned unless None.
    """
    if wanted is not None:
        return wanted
    if labels is None or has_labels_at_padding(labels, attention_mask):
        return False
    return not has_global_hooks() and not any(map(layout_is_visible, _modules_of(model)))


class Packing:
    """Maps a padded batch to one row of concatenated sequences without padding, `[1, tokens]`, and back.

    Nothing is computed for padding, and each sequence attends only to itself, without a mask.

    Args:
        lengths: tokens of each sequence, in their order in the row.
        shape: `(batch, length)` of the batch.
        index: `[tokens]`, the place of each token in the flattened batch `[batch * length]`; None: the same order.
    """

    def __init__(self, lengths: list[int], shape: tuple[int, int], index: torch.Tensor | None = None):
        self.shape, self.index, self.tokens = shape, index, sum(lengths)
        self.groups = [(length, len(list(same))) for length, same in groupby(lengths)]  # neighbours of equal length

    @classmethod
    def find(
        cls, shape: tuple[int, int], attention_mask: Any, lengths: list[int] | None, right_padded: bool = False
    ) -> "Packing | None":
        """The packing of a batch of `shape`, longest sequence first, or of rows already packed with `lengths`.

        None if there is no padding, or if the mask is not a contiguous run of tokens in each row.
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
        # oneDNN compiles and caches kernels for each number of rows, up to half a gigabyte. To use fewer different
        # numbers, some tokens (at most 1 in 16) are repeated as one more sequence, which `put` drops.
        step = 1 if torch.is_grad_enabled() else max(1, (1 << len(index).bit_length()) // 32)
        rest = -len(index) % step
        packing = cls(lengths + [rest] * (rest > 0), shape, torch.cat((index, index[:rest])))
        packing.tokens = len(index)
        return packing

    def take(self, padded: torch.Tensor | None) -> torch.Tensor | None:
        """`[batch, length, …]` → `[1, tokens, …]`; a batch of one row is expanded, None is returned as None."""
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


# modules whose hooks only move, gather or cast tensors, or request gradients, whatever the shape; accelerate's replace
# `forward` for that
IGNORES_LAYOUT = ("accelerate.", "deepspeed.", "torch.distributed.", "transformers.distributed.")
IGNORES_LAYOUT += ("transformers.integrations.tensor_parallel", "transformers.modeling_utils")


def _defining_module(function: Any) -> str:
    function = function.func if isinstance(function, partial) else getattr(function, "__func__", function)
    return str(getattr(function, "__module__", ""))


def layout_is_visible(module: nn.Module) -> bool:
    """Whether hooks or a replaced `forward`, except those of `IGNORES_LAYOUT`, could see how tokens are laid out."""
    if not is_hooked(module):
        return False
    own = vars(module)
    for hooks in HOOKS:
        if own.get(hooks) and not all(
            _defining_module(hook).startswith(IGNORES_LAYOUT) for hook in own[hooks].values()
        ):
            return True
    forward = own.get("forward")
    if forward is None:
        return False
    if not _defining_module(forward).startswith(IGNORES_LAYOUT):
        return True
    # accelerate's hook and the `forward` that it replaced; either may be, or contain, the caller's
    hook, before = own.get("_hf_hook"), own.get("_old_forward")
    replaced_before = before is not None and getattr(before, "__func__", None) is not type(module).forward
    parts = getattr(hook, "hooks", (hook,))
    return replaced_before or any(not type(part).__module__.startswith("accelerate.") for part in parts if part)


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """`model.modules()`, faster because it builds no names."""
    found, seen = [model], {model}
    for module in found:  # grows in the loop
        for child in module._modules.values():
            if child is not None and child not in seen:
                found.append(child)
                seen.add(child)
    return found


def can_run_packed(model: nn.Module) -> bool:
    """Whether every module of `model` computes tokens independently, and no hook sees their layout.

    Not cached, since any module may be hooked, patched or replaced between calls. A `pooler` is excluded: it is called
    on padded states.
    """
    if has_global_hooks():
        return False
    pooler = getattr(model, "pooler", None)
    apart = {model, *(_modules_of(pooler) if isinstance(pooler, nn.Module) else ())}
    calls: dict[type, frozenset[str] | None] = {}
    for module in _modules_of(model):
        if layout_is_visible(module):
            return False
        if module in apart:
            continue
        kind = type(module)
        if kind not in calls:
            calls[kind] = calls_of_class(kind)
        called = calls[kind]
        if called is None or (called and not calls_are_unpatched(module, called)):
            return False
    return True


def skips_padding(forward: Callable | None = None, *, right_padded: bool = False) -> Any:
    """Decorate a method that runs a model's layers: where that is faster, pass it the tokens without padding.

    It receives one row, `[1, tokens]`, a dict of masks that are None, and an argument `packing` for `attend`. The
    returned `last_hidden_state` has zeros at padding. Does not apply under compilation, with a cache, if hidden states
    or attentions are requested, or if the difference could be observed (`can_run_packed`).

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
    needed = flash and lengths is not None  # flash attention takes no mask that separates sequences
    if not needed and (flash or (lengths is None and not skip_padding)):
        return None
    if any(model._outputs_wanted(given.get("output_attentions"), given.get("output_hidden_states"))):
        return None
    packing = Packing.find(tuple(states.shape[:2]), attention_mask, lengths, right_padded)
    if packing is None or needed or (stack_is_tokenwise(model, forward) and can_run_packed(model)):
        return packing
    return None


def _position_limit(config: Any) -> float:
    unlimited = getattr(config, "position_embedding_type", None) in ("rope", "none")
    return float("inf") if unlimited else config.max_position_embeddings

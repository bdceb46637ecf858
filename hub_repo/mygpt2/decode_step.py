"""One token per row through all blocks of MyGPT2 as one call, on the CPU.

A step of generation reads every weight, which drives everything else out of the processor's caches. So Python takes two to
six times as long between the products as in a loop of its own. Here Python only looks whether anything was changed; the
rest is TorchScript, in 0.87 of the time with int8 weights and 0.93 in float32 (one row, one thread, AMD EPYC).

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import functools
import sys
from collections.abc import Sequence
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache
from transformers.activations import ACT2FN

from .attention import CacheRooms, apply_rotary
from .base import HOOKS
from .decoding import (
    HELPERS,
    has_released_attention,
    holds_keys,
    is_known,
    is_one_token,
    is_only_forward,
    is_stock,
)
from .int8_layers import Int8Linear, joint_forms
from .int8_products import Forms, Levels, Outliers, RowTable, levels_of, packed_product, row_product, top_level
from .products import LARGE, batched, compiled, count_product, fastest, in_parts, one_dnn, parts_of, turned

ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "silu", "relu", "relu2")
# what is computed here without a call; another function in its place is called
KINDS: dict[Any, int] = {type(ACT2FN[name]): place for place, name in enumerate(ACTIVATIONS)}
FORWARDS: dict[Any, Any] = {kind: kind.forward for kind in (nn.LayerNorm, nn.RMSNorm, *KINDS)}
WAYS: dict[Any, int] = {nn.functional.linear: 0, one_dnn: -1, turned: -2}


class Linear(NamedTuple):
    """A linear layer, or some of them with one int8 weight."""

    biases: list[torch.Tensor]  # of each layer, or none
    weight: torch.Tensor | None  # float32; None if it is int8
    way: int  # how the float32 weight is multiplied: one of WAYS, or the number of parts for `in_parts`
    packed: int = -1  # place of the int8 weight among the packed ones
    levels: Levels | None = None  # of states for the packed weight
    outliers: Outliers | None = None
    table: RowTable | None = None  # the int8 weight for one row, instead of a packed one


class Norm(NamedTuple):
    """A `nn.LayerNorm` or `nn.RMSNorm`."""

    is_rms: bool
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float | None


class Block(NamedTuple):
    """What a block multiplies with. Each list of layers has the same input; with int8 weights, they may be one."""

    input_norm: Norm
    projections: list[Linear]  # query, key and value
    head_norms: list[Norm]  # of queries and keys, or none
    scaling: float
    output: Linear
    mlp_norm: Norm
    up: list[Linear]  # with a gated MLP, the gate is the first half or the first layer
    is_gated: bool
    activation: int  # place in ACTIVATIONS
    down: Linear


def _linear(
    states: torch.Tensor,
    layer: Linear,
    packed: "list[torch.classes.quantized.LinearPackedParamsBase]",  # type: ignore[name-defined]
) -> torch.Tensor:
    bias: torch.Tensor | None = None
    if len(layer.biases) == 1:
        bias = layer.biases[0]
    elif len(layer.biases) > 1:
        bias = torch.cat(layer.biases)
    weight, levels, table = layer.weight, layer.levels, layer.table
    if table is not None:
        return row_product(states, table, bias)
    if levels is not None:
        return packed_product(states, packed[layer.packed], bias, levels, None, layer.outliers)
    assert weight is not None
    if layer.way > 0:
        return in_parts(states, weight, bias, layer.way)
    if layer.way == 0:
        return nn.functional.linear(states, weight, bias)
    zero = weight.new_zeros([1])
    added = (zero if bias is None else bias).expand(len(states), len(weight))
    if layer.way == -1:  # this form of oneDNN's product, unlike the one in `one_dnn`, can be written in TorchScript
        return torch.ops.mkldnn._linear_pointwise(states, added, weight, None, "add")
    product = torch.ops.mkldnn._linear_pointwise(weight, zero.expand(len(weight), len(states)), states, None, "add")
    return product.t().contiguous().add_(added)


def _norm(states: torch.Tensor, norm: Norm) -> torch.Tensor:
    if norm.is_rms:
        return nn.functional.rms_norm(states, [states.size(-1)], norm.weight, norm.eps)
    eps = norm.eps
    return nn.functional.layer_norm(states, [states.size(-1)], norm.weight, norm.bias, 1e-5 if eps is None else eps)


def _activate(states: torch.Tensor, activation: int) -> torch.Tensor:
    if activation == 0:
        return nn.functional.gelu(states, approximate="tanh")
    if activation == 1:
        return nn.functional.gelu(states)
    if activation == 2:
        return nn.functional.silu(states)
    states = nn.functional.relu(states)
    return states if activation == 3 else torch.square(states)


def _appended(room: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
    room.narrow(2, length, 1).copy_(new)
    return room.narrow(2, 0, length + 1)


def _step(
    states: torch.Tensor,
    blocks: list[Block],
    packed: "list[torch.classes.quantized.LinearPackedParamsBase]",  # type: ignore[name-defined]
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    rooms: list[torch.Tensor],
    masks: list[torch.Tensor | None],
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """All blocks for states `[batch, width]`; also returns keys and values `[batch, kv_heads, past + 1, head_dim]`."""
    rows = len(states)
    new_keys: list[torch.Tensor] = []
    new_values: list[torch.Tensor] = []
    for i, block in enumerate(blocks):
        normed = _norm(states, block.input_norm)
        projected = [_linear(normed, layer, packed) for layer in block.projections]
        kv_heads, head_dim = keys[i].size(1), keys[i].size(3)
        projected = [each.view(rows, -1, 1, head_dim) for each in projected]
        if len(projected) == 1:
            heads = projected[0].size(1) - 2 * kv_heads
            projected = projected[0].split([heads, kv_heads, kv_heads], dim=1)
        query, key, value = projected[0], projected[1], projected[2]
        if len(block.head_norms) > 0:
            query, key = _norm(query, block.head_norms[0]), _norm(key, block.head_norms[1])
        if rotary is not None:
            cos, sin = rotary
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if len(rooms) > 0:  # these begin with all keys, then all values, and what is returned is a part of them
            length = keys[i].size(2)
            key, value = _appended(rooms[i], key, length), _appended(rooms[len(blocks) + i], value, length)
        else:
            key, value = torch.cat([keys[i], key], 2), torch.cat([values[i], value], 2)
        new_keys.append(key)
        new_values.append(value)
        query = query.view(rows, kv_heads, -1, head_dim)  # heads that share keys are queries of one head
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, masks[i], scale=block.scaling)
        states = states + _linear(mixed.reshape(rows, -1), block.output, packed)

        normed = _norm(states, block.mlp_norm)
        wide = _linear(normed, block.up[0], packed)
        if not block.is_gated:
            wide = _activate(wide, block.activation)
        elif len(block.up) == 1:
            gate, up = wide.chunk(2, dim=-1)
            wide = _activate(gate, block.activation) * up
        else:
            wide = _activate(wide, block.activation) * _linear(normed, block.up[1], packed)
        states = states + _linear(wide, block.down, packed)
    return states, new_keys, new_values


MISSING = object()
PRIVATE = {"_packed", "_joint", "_repacks"}  # attributes of modules that count here, as all public ones do
_PLANS: "WeakKeyDictionary[DynamicCache, _Plan]" = WeakKeyDictionary()  # of generations


def in_one_call(
    layers: list[Any],
    hidden_states: torch.Tensor,
    masks: dict[str, torch.Tensor | None],
    cache: Any,
    output_hidden_states: bool,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, list[Any]]:
    """Hidden states `[batch, length, width]` after `layers`, and none of these; or, where it does not apply, what was given."""
    given = hidden_states, layers
    if output_hidden_states or not is_one_token(hidden_states, kwargs) or not is_stock(cache):
        return given
    if not layers or not all(map(has_released_attention, layers)):
        return given
    rows, attentions = len(hidden_states), [layer.self_attn for layer in layers]
    if len({each.layer_idx for each in attentions}) < len(layers) or not all(
        each.sliding_window is None and holds_keys(cache, each.layer_idx, rows, each.head_dim) for each in attentions
    ):
        return given
    configs = {id(each.config): each.config for each in attentions}  # mostly one, whose attributes are slow to read
    if any(config._attn_implementation != "sdpa" for config in configs.values()):
        return given
    caches = [cache.layers[each.layer_idx] for each in attentions]
    if len(set(map(id, caches))) < len(caches):
        return given
    own_masks = [masks[layer.layer_type] for layer in layers]
    length = caches[0].keys.shape[2] + 1
    for mask in own_masks:
        if mask is not None and (
            type(mask) is not torch.Tensor or mask.shape not in ((1, 1, 1, length), (rows, 1, 1, length))
        ):
            return given
    plan = _PLANS.get(cache)
    if plan is None or not plan.holds(layers, rows):
        plan = _Plan(layers, rows)
        if not plan.blocks:
            return given
        _PLANS[cache] = plan
    plan.count_products()
    past = [each.keys for each in caches], [each.values for each in caches]
    rooms = plan.rooms.of(past[0] + past[1])
    arguments = hidden_states[:, 0], plan.blocks, plan.packed, *past, rooms, own_masks, kwargs["rotary"]
    try:
        states, keys, values = compiled(_step)(*arguments)
    except RuntimeError:  # as of shapes that do not fit: the modules raise a clearer one
        return given
    for each, key, value in zip(caches, keys, values):
        each.keys, each.values = key, value
    plan.rooms.last = keys + values
    return states[:, None], []


class _Plan:
    """The tensors of all blocks for a number of rows, and what must not change while they are used.

    To compare these takes a tenth of the time that it takes to collect the tensors. Values of float weights may change: they
    are read where they are.

    Attributes:
        blocks, packed: arguments of `_step`; without blocks, these layers need their modules.
        rooms: where the next keys and values are written.
    """

    def __init__(self, layers: list[Any], rows: int):
        self.blocks: list[Block] = []
        self.packed: list[Any] = []
        self.rooms = CacheRooms()
        self._layers, self._given = layers, (rows, torch.get_num_threads())
        self._linears: list[Any] = []
        # each dict has this value under this name; separate lists, as they are compared by C functions, for speed
        self._dicts: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._hooks: tuple[list[dict[str, Any]], list[str]] = [], []
        self._modules: list[nn.Module] = []
        self._tensors: list[tuple[torch.Tensor, int, int]] = []
        self._floats: list[torch.Tensor] = []
        for layer in layers:
            block = self._block(layer, rows)
            if block is None:
                self.blocks.clear()
                return
            self.blocks.append(block)
        for forward in {type(layer.self_attn).forward for layer in layers}:
            self._watch(vars(sys.modules[forward.__module__]), HELPERS)
        for layer in layers:
            for module in layer.modules():
                self._watch_module(module)
        self._kinds: list[Any] = list(map(type, self._modules))
        self._functions = {kind: (kind.forward, kind.__call__) for kind in self._kinds}

    def _watch(self, own: dict[str, Any], expected: dict[str, Any]) -> None:
        self._dicts += [own] * len(expected)
        self._names += expected
        self._values += expected.values()

    def _watch_module(self, module: Any) -> None:
        own = vars(module)
        self._modules.append(module)
        self._hooks[0].extend([own] * len(HOOKS))
        self._hooks[1].extend(HOOKS)
        self._watch(
            own,
            {
                "forward": MISSING,
                "_compiled_call_impl": MISSING,
                **{name: own[name] for name in own if name[0] != "_" or name in PRIVATE},
            },
        )
        for group in (own["_modules"], own["_parameters"]):
            self._watch(group, group)
        for each in own["_parameters"].values():
            if each is not None and each.dtype is torch.int8:  # used as packed copies
                self._tensors.append((each, each.data_ptr(), each._version))
            elif each is not None and type(module) in (nn.LayerNorm, nn.RMSNorm):  # one in another dtype casts
                self._floats.append(each)

    def holds(self, layers: list[Any], rows: int) -> bool:
        """Whether these are the same layers, unchanged."""
        if layers != self._layers or self._given != (rows, torch.get_num_threads()) or any(map(dict.get, *self._hooks)):
            return False
        if not all(map(is_, map(dict.get, self._dicts, self._names, repeat(MISSING)), self._values)):
            return False
        if not all(map(is_, map(type, self._modules), self._kinds)):
            return False
        if any(tensor.dtype is not torch.float32 for tensor in self._floats):
            return False
        for tensor, address, version in self._tensors:
            if tensor.data_ptr() != address or tensor._version != version:
                return False
        return all((kind.forward, kind.__call__) == functions for kind, functions in self._functions.items())

    def count_products(self) -> None:
        """Count the products of this step, after some of which weights are moved into huge pages."""
        for layer in self._linears:
            if type(layer) is Int8Linear:
                layer.count_product()
                return  # all of them are moved together
            if layer.weight.numel() >= LARGE:
                count_product(layer.weight)

    def _block(self, layer: Any, rows: int) -> Block | None:
        if not is_known(layer) or not is_only_forward(type(layer).__call__, type(layer).forward):
            return None
        attention, mlp = layer.self_attn, layer.mlp
        parts, mlp_parts = attention._modules, mlp._modules
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [attention.q_norm, attention.k_norm] if attention.qk_norm else []
        plain = all(
            FORWARDS.get(type(each)) is type(each).forward and len(each.normalized_shape) == 1 for each in norms
        )
        activation = _activation(mlp.act_fn)
        if activation < 0 or type(vars(attention).get("scaling")) is not float or not plain:
            return None
        up = [mlp.gate_proj, mlp.up_proj] if (is_gated := "gate_proj" in mlp_parts) else [mlp.up_proj]
        together = [[parts["q_proj"], parts["k_proj"], parts["v_proj"]], [attention.o_proj], up, [mlp.down_proj]]
        linears = [self._together(each, rows) for each in together]
        if not all(linears):
            return None
        projections, output, up_linears, down = linears
        input_norm, mlp_norm, *head_norms = map(_as_norm, norms)
        first = (input_norm, projections, head_norms, attention.scaling, output[0])
        return Block(*first, mlp_norm, up_linears, is_gated, activation, down[0])

    def _together(self, layers: Sequence[Any], rows: int) -> list[Linear]:
        """Layers with the same input, int8 ones as one; none if a product has no form here."""
        self._linears += layers
        if len(layers) > 1 and all(type(layer) is Int8Linear for layer in layers) and (joint := joint_forms(layers)):
            return [self._int8(layers, joint, rows)]
        linears = [self._linear(layer, rows) for layer in layers]
        return [] if None in linears else [each for each in linears if each is not None]

    def _linear(self, layer: Any, rows: int) -> Linear | None:
        if type(layer) is Int8Linear:
            return self._int8([layer], layer.forms(), rows)
        weight, biases = layer.weight, [] if layer.bias is None else [layer.bias]
        if weight.numel() < LARGE:
            return Linear(biases, weight, 0)
        if not weight.is_contiguous():
            return None
        threads = torch.get_num_threads()
        product = fastest(rows, weight.shape[1], threads)
        way = parts_of(weight.shape[0], threads) or WAYS[one_dnn] if product is batched else WAYS[product]
        return Linear(biases, weight, way)

    def _int8(self, layers: Sequence[Int8Linear], forms: Forms, rows: int) -> Linear:
        biases, table = [each.bias for each in layers if each.bias is not None], forms.table(layers, rows)
        if table is not None:
            return Linear(biases, None, 0, table=table)
        self.packed.append(forms.packed(layers))
        levels = levels_of(forms.bits, top_level())
        return Linear(biases, None, 0, len(self.packed) - 1, levels, forms.outliers)


def _activation(module: Any) -> int:
    """The place of an activation in ACTIVATIONS; -1 if it is another one."""
    kind, function = type(module), module.__dict__.get("act")
    place = KINDS.get(kind, -1)
    if place < 0 or kind.forward is not FORWARDS[kind]:
        return -1
    if place == 0 and isinstance(function, functools.partial) and function.keywords == {"approximate": "tanh"}:
        function = function.func
    elif place != 1:
        return place if function is None else -1
    return place if function is nn.functional.gelu else -1


def _as_norm(norm: Any) -> Norm:
    parameters, eps = norm._parameters, norm.eps
    return Norm(
        type(norm) is nn.RMSNorm, parameters["weight"], parameters.get("bias"), None if eps is None else float(eps)
    )

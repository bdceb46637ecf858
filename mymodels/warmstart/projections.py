"""Transforms of attention and MLP: heads, key/value heads, width, gate."""

import re
from functools import cache, partial

import torch
from transformers import PretrainedConfig

from ..checkpoints import CheckpointError
from .conversion import LAYER_NAME, Change, same
from .lazy_tensor import Value, constant

_MLP_IN = {"mygpt2": ("mlp.up_proj", "mlp.gate_proj"), "mybert": ("intermediate.dense",)}
_MLP_OUT = {"mygpt2": "mlp.down_proj", "mybert": "output.dense"}
WIDENING = ("pad", "split")


def attention(change: Change) -> None:
    """Fewer or more key/value heads: the mean over each group (GQA, arXiv 2305.13245, section 2.1), or copies."""
    source, target = change.source, change.target
    parts = {"mygpt2": "self_attn.{}_proj", "mybert": "attention.self.{}"}[change.kind]
    names = {"mygpt2": "qkv", "mybert": ("query", "key", "value")}[change.kind]
    heads, head_dim = source.num_attention_heads, _head_dim(source)
    now = target.num_attention_heads, _head_dim(target)
    prefixes = [name for name in change.tensors if LAYER_NAME.match(name)]
    if (heads, head_dim) != now:
        step = f"read as {now[0]} heads of {now[1]}, was {heads} of {head_dim}"
        for name in prefixes:
            if any(f".{parts.format(part)}." in name for part in names):
                if heads * head_dim == now[0] * now[1]:
                    change.tensors[name] = change.tensors[name].then(step, same, kind="approximate")
                else:
                    change.drop(name, f"{now[0]} heads of {now[1]} are needed, the source has {heads} of {head_dim}")
        return
    if change.kind != "mygpt2" or source.num_key_value_heads == target.num_key_value_heads:
        return
    old, new = source.num_key_value_heads, target.num_key_value_heads
    repeated = new % old == 0
    step = f"{old} key/value heads {'repeated' if repeated else 'mean-pooled'} to {new}"
    for name in prefixes:
        if re.search(r"\.self_attn\.[kv]_proj\.", name):
            value = change.tensors[name]
            change.tensors[name] = value.then(
                step,
                lambda tensor: regroup(tensor, old, new, heads),
                (new * head_dim, *value.shape[1:]),
                kind="exact" if repeated else "approximate",
                resized=True,
            )


def _head_dim(config: PretrainedConfig) -> int:
    own = getattr(config, "head_dim", None) if config.model_type == "mygpt2" else None
    return own or config.hidden_size // config.num_attention_heads


def regroup(tensor: torch.Tensor, old: int, new: int, heads: int) -> torch.Tensor:
    """`[old * D, …]` of `old` key/value heads → `[new * D, …]`, for `heads` query heads."""
    by_head = tensor.view(old, -1, *tensor.shape[1:])
    if new % old == 0:
        return by_head.repeat_interleave(new // old, dim=0).flatten(0, 1)
    if old % new:  # neither divides the other: expand to one per query head first
        by_head = by_head.repeat_interleave(heads // old, dim=0)
    groups = by_head.view(new, -1, *by_head.shape[1:])
    return groups.double().mean(dim=1).flatten(0, 1)


def mlp(change: Change) -> None:
    """Dense ↔ gated, wider, narrower."""
    if change.kind == "mygpt2" and change.source.mlp_type != change.target.mlp_type:
        for layer in change.each_layer():
            _convert_gate(change, f"{layer}mlp.")
    old, new = change.source.intermediate_size, change.target.intermediate_size
    if old != new and change.widen not in WIDENING:
        raise CheckpointError(f"widen={change.widen!r} is none of {', '.join(WIDENING)}")
    if old != new:
        for layer in change.each_layer():
            inner = [f"{layer}{part}" for part in _MLP_IN[change.kind] if f"{layer}{part}.weight" in change.tensors]
            resize = _narrow if new < old else _pad if change.widen == "pad" else _split
            if inner and f"{layer}{_MLP_OUT[change.kind]}.weight" in change.tensors:
                resize(change, inner, f"{layer}{_MLP_OUT[change.kind]}.weight", old, new)


def _convert_gate(change: Change, layer: str) -> None:
    tensors = change.tensors
    if change.target.mlp_type == "dense":  # down(act(gate) * up) → down(act(gate))
        for name in ("weight", "bias"):
            change.drop(f"{layer}up_proj.{name}", "the target's MLP has no gate")
            if f"{layer}gate_proj.{name}" in tensors:
                gate = tensors.pop(f"{layer}gate_proj.{name}")
                tensors[f"{layer}up_proj.{name}"] = gate.then(
                    "the gate projection, without up_proj", same, kind="approximate"
                )
        return
    exact = change.has_parameter(f"{layer}up_proj.bias")
    for name in ("weight", "bias"):  # down(act(up)) → down(act(gate) * 1)
        if f"{layer}up_proj.{name}" in tensors:
            value, step = tensors.pop(f"{layer}up_proj.{name}"), "becomes the gate"
            tensors[f"{layer}gate_proj.{name}"] = value.then(step, same, kind="exact" if exact else "approximate")
            if exact:
                fill = float(name == "bias")
                what = f"{'ones' if fill else 'zeros'}: the gate is multiplied by 1"
                tensors[f"{layer}up_proj.{name}"] = constant(value.shape, fill, value, what)
    if exact and f"{layer}gate_proj.weight" in tensors and f"{layer}up_proj.bias" not in tensors:
        gate = tensors[f"{layer}gate_proj.weight"]
        tensors[f"{layer}up_proj.bias"] = constant((gate.shape[0],), 1.0, gate, "ones: the gate is multiplied by 1")


def _pad(change: Change, inner: list[str], outer: str, old: int, new: int) -> None:
    step, std = f"{new - old} units added with zero outputs", change.target.initializer_range
    tensors = change.tensors
    for name in inner:
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = weight.then(
            step,
            lambda t: torch.cat((t, torch.randn(new - old, t.shape[1]).mul(std).to(t))),
            (new, weight.shape[1]),
            resized=True,
            partly_new=True,
        )
        if bias := tensors.get(f"{name}.bias"):
            tensors[f"{name}.bias"] = bias.then(
                step, lambda t: torch.cat((t, t.new_zeros(new - old))), (new,), resized=True, partly_new=True
            )
    shape = (tensors[outer].shape[0], new)
    tensors[outer] = tensors[outer].then(
        step, lambda t: torch.cat((t, t.new_zeros(t.shape[0], new - old)), dim=1), shape, resized=True, partly_new=True
    )


def _split(change: Change, inner: list[str], outer: str, old: int, new: int) -> None:
    """Net2WiderNet (arXiv 1511.05641): some units are repeated, with their output weights divided among the copies."""
    index = torch.arange(new) * old // new
    shares = 1.0 / torch.bincount(index, minlength=old).double()[index]
    tensors, step = change.tensors, f"{old} units split into {new}"
    for name in [f"{name}.{part}" for name in inner for part in ("weight", "bias")]:
        if value := tensors.get(name):
            tensors[name] = value.then(step, lambda t: t[index], (new, *value.shape[1:]), resized=True)
    shape = (tensors[outer].shape[0], new)
    tensors[outer] = tensors[outer].then(step, lambda t: t[:, index].double() * shares, shape, resized=True)


def _narrow(change: Change, inner: list[str], outer: str, old: int, new: int) -> None:
    tensors, step = change.tensors, f"the {new} of {old} units with the largest norms"
    writer = tensors[outer]
    weights = [w for name in inner if (w := tensors[f"{name}.weight"]).sources]  # not a constant up_proj

    @cache
    def index() -> torch.Tensor:
        size = writer.compute().double().norm(dim=0)
        for weight in weights:
            size = size * weight.compute().double().norm(dim=1)
        return size.topk(new).indices.sort().values

    narrowed = partial(Value.then, step=step, kind="approximate", resized=True, using=(*weights, writer))
    for name in [f"{name}.{part}" for name in inner for part in ("weight", "bias")]:
        if value := tensors.get(name):
            tensors[name] = narrowed(value, change=lambda t: t[index()], shape=(new, *value.shape[1:]))
    tensors[outer] = narrowed(writer, change=lambda t: t[:, index()], shape=(writer.shape[0], new))

"""One function for each way in which a target differs from its source. Each rewrites the table of tensors-to-be."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from ..checkpoints import CheckpointError
from .sources import HEADS
from .values import Value, constant

LAYER = {"mygpt2": "model.layers.{}.", "mybert": "bert.encoder.layer.{}."}
_LAYER_NAME = re.compile(r"^(model\.layers|bert\.encoder\.layer)\.(\d+)\.(.*)$")
_LAYER_NUMBER = re.compile(r"(?<=layer|ayers)\.\d+\.")
_MLP_IN = {"mygpt2": ("mlp.up_proj", "mlp.gate_proj"), "mybert": ("intermediate.dense",)}
_MLP_OUT = {"mygpt2": "mlp.down_proj", "mybert": "output.dense"}
_POSITIONS = {"mygpt2": "model.embed_positions.weight", "mybert": "bert.embeddings.position_embeddings.weight"}
_BY_TOKEN = {
    "mygpt2": ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"),
    "mybert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "cls.predictions.bias"),
}
LAYER_CHOICES = ("every", "first", "last")
WIDENING = ("pad", "split")
POSITION_GROWTH = ("tile", "interpolate")


class TokenVectors(NamedTuple):
    """Pretrained vectors for some tokens."""

    tokens: torch.Tensor  # their numbers
    table: torch.Tensor  # a row for each of them
    name: str  # where they come from
    size: int  # how many vectors there were


@dataclass
class Change:
    """A source on its way to a target."""

    tensors: dict[str, Value]  # under our names
    source: PretrainedConfig
    target: PretrainedConfig
    wanted: set[str]  # the target's parameters
    fresh: Callable[[str], Value]  # what a parameter of the target starts with when nothing is loaded
    why: dict[str, tuple[str, str]]  # the source's tensors that get lost → why, and whether that is "exact"
    layers: str | Sequence[int] = "every"
    widen: str = "pad"
    positions: str = "tile"
    token_rows: list[list[int]] | None = None  # per token of the target, the source's tokens it is the mean of
    vectors: TokenVectors | None = None
    pools: bool = False  # whether the target makes one vector of a text
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.target.model_type

    def drop(self, name: str, why: str, kind: str = "approximate") -> None:
        """Take a tensor out. Where it is used nowhere else, the report will say why."""
        if name in self.tensors:
            for source in self.tensors.pop(name).sources:
                self.why.setdefault(source, (why, kind))

    def wants(self, name: str) -> bool:
        """Whether the target has such a parameter, in whatever layer."""
        return _LAYER_NUMBER.sub(".0.", name) in self._patterns

    @cached_property
    def _patterns(self) -> set[str]:
        return {_LAYER_NUMBER.sub(".0.", name) for name in self.wanted}

    def each_layer(self) -> list[str]:
        return [LAYER[self.kind].format(i) for i in range(self.source.num_hidden_layers)]


def tie(change: Change) -> None:
    """Tied ↔ untied head."""
    head, embeddings = HEADS[change.kind]
    if change.source.tie_word_embeddings:
        change.drop(head, "the source ties it to the token embeddings", "exact")
        if not change.target.tie_word_embeddings and embeddings in change.tensors:
            change.tensors[head] = change.tensors[embeddings].then("copied, the target's head is untied", _same)
    elif change.target.tie_word_embeddings:
        change.drop(head, "the target ties its head to the token embeddings")


def norms(change: Change) -> None:
    """LayerNorm → RMSNorm, exact where the target has room for it (after SliceGPT, arXiv 2401.15024, section 3.1).

    LayerNorm is RMSNorm of a centred input. Everything that writes to the residual stream is centred, so that the
    stream is; and a norm's bias goes, through the matrices that read it, into their biases.
    """
    if change.kind != "mygpt2" or change.source.norm_type == change.target.norm_type:
        return
    tensors = change.tensors
    if change.target.norm_type == "layernorm":
        for name in [name for name in tensors if name.endswith("norm.weight")]:
            tensors[name] = tensors[name].then("LayerNorm centres, RMSNorm did not", _same, kind="approximate")
        return
    for name in [name for name in tensors if name.endswith(("q_norm.weight", "k_norm.weight"))]:
        tensors[name] = tensors[name].then("RMSNorm does not centre, LayerNorm did", _same, kind="approximate")
    for layer in change.each_layer():
        _fold(change, f"{layer}input_layernorm", [f"{layer}self_attn.{part}_proj" for part in "qkv"])
        _fold(change, f"{layer}post_attention_layernorm", [f"{layer}mlp.{part}_proj" for part in ("up", "gate")])
    _fold(change, "model.norm", ["lm_head"])
    head_is_exact = not change.target.tie_word_embeddings or not change.wants("lm_head.weight")
    if change.wants("lm_head.weight") and not (head_is_exact and change.wants("lm_head.bias")):
        change.notes.append("the step to RMSNorm is exact with tie_word_embeddings=False and lm_head_bias=True")
    for name, dim in _writers(change):
        if name in tensors:
            # a tied head would need the rows that are not centred
            kind = "exact" if dim == 0 or head_is_exact or "tokens" not in name else "approximate"
            tensors[name] = tensors[name].then("centred", partial(_centre, dim=dim), kind=kind)


def _writers(change: Change) -> list[tuple[str, int]]:
    writers = [(f"{layer}{part}.{kind}", 0) for layer in change.each_layer() for part in ("self_attn.o_proj", "mlp.down_proj") for kind in ("weight", "bias")]  # fmt: skip
    return [("model.embed_tokens.weight", 1), ("model.embed_positions.weight", 1), *writers]


def _centre(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    wide = tensor.double()
    return wide - wide.mean(dim=dim, keepdim=True)


def _fold(change: Change, norm: str, readers: list[str]) -> None:
    tensors, bias = change.tensors, change.tensors.get(f"{norm}.bias")
    if bias is None:
        return
    del tensors[f"{norm}.bias"]
    lost = "RMSNorm has no bias, and nothing that reads it has room for one"
    for source in bias.sources:
        change.why.setdefault(source, (lost, "approximate"))
    for reader in readers:
        weight = tensors.get(f"{reader}.weight")
        if weight is None or not change.wants(f"{reader}.bias"):
            continue
        own = tensors.get(f"{reader}.bias") or constant((weight.shape[0],), 0.0, weight, "")
        folded = partial(_add_product, weight=weight, vector=bias)
        tensors[f"{reader}.bias"] = own.then("the norm's bias folded in", folded, using=(weight, bias))


def _add_product(bias: torch.Tensor, weight: Value, vector: Value) -> torch.Tensor:
    return bias.double() + weight.compute().double() @ vector.compute().double()


def choose_layers(choice: str | Sequence[int], have: int, want: int) -> list[int]:
    """The source's layer for each of the target's.

    Raises:
        CheckpointError: `choice` is not one of the words, or a list that does not fit.
    """
    if isinstance(choice, str):
        if choice not in LAYER_CHOICES:
            raise CheckpointError(f"layers={choice!r} is none of {', '.join(LAYER_CHOICES)} or a list of layers")
        if choice == "every":
            return [i * have // want for i in range(want)]
        shift = 0 if choice == "first" else have - want
        return [min(max(i + shift, 0), have - 1) for i in range(want)]
    chosen = list(choice)
    if len(chosen) != want or not all(isinstance(i, int) and 0 <= i < have for i in chosen):
        raise CheckpointError(
            f"layers={chosen} must name {want} layers, one for each of the target's, from 0 to {have - 1}"
        )
    return chosen


def layers(change: Change) -> None:
    """Fewer layers: some are chosen. More: blocks are added beside those they copy.

    An added block of MyGPT2 writes zeros to the residual stream (LLaMA Pro, arXiv 2401.02415), so it changes nothing
    until it is trained. MyBert's norms come after the sum, so there it is a copy (stacking, Gong et al., ICML 2019).
    """
    have, want = change.source.num_hidden_layers, change.target.num_hidden_layers
    chosen = choose_layers(change.layers, have, want)
    if chosen == list(range(have)):
        return
    by_layer: dict[int, dict[str, Value]] = {}
    for name in list(change.tensors):
        if found := _LAYER_NAME.match(name):
            by_layer.setdefault(int(found[2]), {})[found[3]] = change.tensors[name]
            if int(found[2]) not in chosen:
                change.drop(name, "its layer is not among the chosen ones")
            else:
                del change.tensors[name]
    pre_norm = change.kind == "mygpt2"
    kept_all = sorted(set(chosen)) == list(range(have)) and chosen == sorted(chosen)
    seen: set[int] = set()
    for to, origin in enumerate(chosen):
        for rest, value in by_layer.get(origin, {}).items():
            name = LAYER[change.kind].format(to) + rest
            if origin not in seen:
                step, kind = ("", "exact") if kept_all else ("a chosen layer", "approximate")
                change.tensors[name] = value.then(step, _same, kind=kind if pre_norm or not kept_all else "approximate")
            elif pre_norm and re.match(r"(self_attn\.o_proj|mlp\.down_proj)\.", rest):
                change.tensors[name] = constant(value.shape, 0.0, value, "zeros: the added block changes nothing")
            else:
                kind = "exact" if pre_norm and kept_all else "approximate"
                change.tensors[name] = value.then("copied into an added block", _same, kind=kind)
        seen.add(origin)
    if change.source.model_type == "mygpt2" and change.target.scale_attn_by_inverse_layer_idx:
        change.notes.append("scale_attn_by_inverse_layer_idx divides the scores of a layer by its new number")


def attention(change: Change) -> None:
    """Fewer or more key/value heads: the mean over each group (GQA, arXiv 2305.13245, section 2.1), or copies."""
    source, target = change.source, change.target
    parts = {"mygpt2": "self_attn.{}_proj", "mybert": "attention.self.{}"}[change.kind]
    names = {"mygpt2": "qkv", "mybert": ("query", "key", "value")}[change.kind]
    heads, head_dim = source.num_attention_heads, _head_dim(source)
    now = target.num_attention_heads, _head_dim(target)
    prefixes = [name for name in change.tensors if _LAYER_NAME.match(name)]
    if (heads, head_dim) != now:
        step = f"read as {now[0]} heads of {now[1]}, was {heads} of {head_dim}"
        for name in prefixes:
            if any(f".{parts.format(part)}." in name for part in names):
                if heads * head_dim == now[0] * now[1]:
                    change.tensors[name] = change.tensors[name].then(step, _same, kind="approximate")
                else:
                    change.drop(name, f"{now[0]} heads of {now[1]} are wanted, the source has {heads} of {head_dim}")
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
    if old % new:  # neither divides the other: through one for each query head
        by_head = by_head.repeat_interleave(heads // old, dim=0)
    groups = by_head.view(new, -1, *by_head.shape[1:])
    return groups.double().mean(dim=1).flatten(0, 1)


def mlp(change: Change) -> None:
    """Dense ↔ gated, wider, narrower."""
    if change.kind == "mygpt2" and change.source.mlp_type != change.target.mlp_type:
        for layer in change.each_layer():
            _regate(change, f"{layer}mlp.")
    old, new = change.source.intermediate_size, change.target.intermediate_size
    if old != new and change.widen not in WIDENING:
        raise CheckpointError(f"widen={change.widen!r} is none of {', '.join(WIDENING)}")
    if old != new:
        for layer in change.each_layer():
            inner = [f"{layer}{part}" for part in _MLP_IN[change.kind] if f"{layer}{part}.weight" in change.tensors]
            resize = _narrow if new < old else _pad if change.widen == "pad" else _split
            if inner and f"{layer}{_MLP_OUT[change.kind]}.weight" in change.tensors:
                resize(change, inner, f"{layer}{_MLP_OUT[change.kind]}.weight", old, new)


def _regate(change: Change, layer: str) -> None:
    tensors = change.tensors
    if change.target.mlp_type == "dense":  # down(act(gate) * up) → down(act(gate))
        for name in ("weight", "bias"):
            change.drop(f"{layer}up_proj.{name}", "the target's MLP has no gate")
            if f"{layer}gate_proj.{name}" in tensors:
                gate = tensors.pop(f"{layer}gate_proj.{name}")
                tensors[f"{layer}up_proj.{name}"] = gate.then(
                    "the gate, without what it gated", _same, kind="approximate"
                )
        return
    exact = change.wants(f"{layer}up_proj.bias")
    for name in ("weight", "bias"):  # down(act(up)) → down(act(gate) * 1)
        if f"{layer}up_proj.{name}" in tensors:
            value, step = tensors.pop(f"{layer}up_proj.{name}"), "becomes the gate"
            tensors[f"{layer}gate_proj.{name}"] = value.then(step, _same, kind="exact" if exact else "approximate")
            if exact:
                fill = float(name == "bias")
                what = f"{'ones' if fill else 'zeros'}: the gate passes as it is"
                tensors[f"{layer}up_proj.{name}"] = constant(value.shape, fill, value, what)
    if exact and f"{layer}gate_proj.weight" in tensors and f"{layer}up_proj.bias" not in tensors:
        gate = tensors[f"{layer}gate_proj.weight"]
        tensors[f"{layer}up_proj.bias"] = constant((gate.shape[0],), 1.0, gate, "ones: the gate passes as it is")


def _pad(change: Change, inner: list[str], outer: str, old: int, new: int) -> None:
    step, std = f"{new - old} units added that write zeros", change.target.initializer_range
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
    """Net2WiderNet (arXiv 1511.05641): some units are there several times and share what they wrote."""
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
    weights, writer = [tensors[f"{name}.weight"] for name in inner], tensors[outer]

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


def positions(change: Change) -> None:
    """A longer or shorter table of learned positions, or none."""
    name = _POSITIONS[change.kind]
    had, wants = (getattr(c, "position_embedding_type", "learned") for c in (change.source, change.target))
    if change.kind == "mygpt2" and had != wants:
        change.drop(name, f"position_embedding_type={wants!r} has no table")
        if had == "none" and wants == "learned":
            shape = (change.target.max_position_embeddings, change.target.hidden_size)
            like = change.tensors["model.embed_tokens.weight"]
            change.tensors[name] = constant(shape, 0.0, like, "zeros: the source knows no positions")
        return
    value = change.tensors.get(name)
    if value is None or value.shape[0] == change.target.max_position_embeddings:
        return
    old, new = value.shape[0], change.target.max_position_embeddings
    if new < old:
        change.tensors[name] = value.rows(f"cut from {old} to {new} positions", slice(0, new))
    elif change.positions == "tile":
        change.tensors[name] = value.rows(f"{old} positions tiled to {new}", [i % old for i in range(new)])
    elif change.positions == "interpolate":
        change.tensors[name] = value.then(
            f"{old} positions interpolated to {new}",
            lambda t: _stretch(t, new),
            (new, value.shape[1]),
            kind="approximate",
            resized=True,
        )
    else:
        raise CheckpointError(f"positions={change.positions!r} is none of {', '.join(POSITION_GROWTH)}")


def _stretch(table: torch.Tensor, length: int) -> torch.Tensor:
    by_feature = table.double().t()[None]
    return torch.nn.functional.interpolate(by_feature, size=length, mode="linear", align_corners=True)[0].t()


def vocabulary(change: Change) -> None:
    """More, fewer, or other tokens, wherever there is a row for each."""
    old, new, rows = change.source.vocab_size, change.target.vocab_size, change.token_rows
    if rows is None and old == new:
        return
    for name in _BY_TOKEN[change.kind]:
        value = change.tensors.get(name)
        if value is None or value.shape[0] != old:
            continue
        shape = (new, *value.shape[1:])
        if rows is not None:
            fresh = any(len(pieces) != 1 for pieces in rows)
            kept = sum(len(pieces) == 1 for pieces in rows)
            change.tensors[name] = value.then(
                f"rows by token: {kept} of {new} kept",
                lambda t: gather_rows(t, rows),
                shape,
                kind="approximate" if fresh else "exact",
                resized=True,
                partly_new=fresh,
            )
        elif new < old:
            change.tensors[name] = value.rows(f"cut from {old} to {new} tokens", slice(0, new))
        else:
            change.tensors[name] = value.then(
                f"{new - old} tokens added, each the mean of all",
                lambda t: torch.cat((t, t.double().mean(dim=0, keepdim=True).expand(new - old, *t.shape[1:]).to(t))),
                shape,
                resized=True,
                partly_new=True,
            )


def gather_rows(table: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """For each list of row numbers the mean of these rows of `table`; of an empty list, the mean of all."""
    means = {i: pieces for i, pieces in enumerate(rows) if len(pieces) != 1}
    out = table[torch.tensor([pieces[0] if pieces else 0 for pieces in rows])]
    everything = table.double().mean(dim=0).to(table)
    for i, pieces in means.items():
        out[i] = table[pieces].double().mean(dim=0).to(table) if pieces else everything
    return out


def word_vectors(change: Change) -> None:
    """Pretrained vectors into the token embeddings; tokens without one keep what they have."""
    if change.vectors is None:
        return
    tokens, table, name, count = change.vectors
    embeddings, size = HEADS[change.kind][1], change.target.vocab_size
    had = change.tensors.get(embeddings)
    before = had if had is not None and had.shape[0] == size else change.fresh(embeddings)
    file = Value((count, table.shape[1]), table.dtype, lambda: table, (name,))
    change.tensors[embeddings] = before.then(
        f"{len(tokens)} of {size} rows from {name}",
        lambda tensor: tensor.clone().index_copy(0, tokens, table.to(tensor.dtype)),
        kind="approximate",
        using=(file,),
        resized=True,
        partly_new=before.kind == "new",
    )


def token_types(change: Change) -> None:
    """More or fewer segments; an added one begins as the first."""
    name = "bert.embeddings.token_type_embeddings.weight"
    value = change.tensors.get(name)
    new = getattr(change.target, "type_vocab_size", 0)
    if value is not None and value.shape[0] != new:
        old = value.shape[0]
        step = f"{old} token types to {new}" + (", the added ones as the first" if new > old else "")
        change.tensors[name] = value.rows(step, [i if i < old else 0 for i in range(new)])


def unequal_settings(change: Change) -> None:
    """Note the fields without tensors that change what the model computes."""
    fields = {
        "mygpt2": (
            "activation_function", "layer_norm_epsilon", "rope_theta", "scale_attn_weights", "sliding_window",
            "scale_attn_by_inverse_layer_idx", "final_logit_softcapping", "position_embedding_type", "qk_norm",
        ),
        "mybert": ("hidden_act", "layer_norm_eps", "pooling", "layer_mix"),
    }[change.kind]  # fmt: skip
    for name in fields:
        old, new = getattr(change.source, name), getattr(change.target, name)
        rope = "rope" in (change.source.position_embedding_type, change.target.position_embedding_type) if name == "rope_theta" else True  # fmt: skip
        if old != new and rope and (name != "pooling" or change.pools):
            change.notes.append(f"{name} was {old!r} and is {new!r}, which changes what the same weights compute")


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


TRANSFORMS: tuple[Callable[[Change], None], ...] = (
    tie,
    norms,
    attention,
    mlp,
    positions,
    vocabulary,
    word_vectors,
    token_types,
    layers,
    unequal_settings,
)

"""The transforms of `warm_start` by role: heads, depth, width, norms, positions, vocabulary, experts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from ..conversion import Change, same
from ..lazy_tensor import Value
from ..transforms import attention, choose_layers, layers, mlp, norms, positions, tie, vocabulary, word_vectors
from .conventions import permutation
from .placing import Places
from .sides import Side

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"^(model\.layers\.\d+\.mlp\.)experts\.(\d+)\.(.+)$")


@dataclass
class RoleChange(Change):
    """`Change` for any two models: `tensors` is by role; `source` and `target` are results of `terms`."""

    source: Any
    target: Any
    post_norm: bool = False
    normalised: bool = False  # whether the target normalises the weights of the chosen experts to sum 1
    marks: list[tuple[str, str]] = field(default_factory=list)  # regex over roles → why these are approximate
    conventions: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})  # settings of the two sides

    @property
    def kind(self) -> str:
        return "mygpt2"  # roles have its names

    @property
    def is_pre_norm(self) -> bool:
        return not self.post_norm


def terms(side: Side, places: Places, other: Side, other_places: Places, front: str = "") -> SimpleNamespace:
    """The settings of a side as fields of `MyGPT2Config`, for the transforms; unknown ones are taken from the other side.

    Args:
        front: prefix of the list of layers in `places`, such as `"decoder:"`.
    """
    shapes = {
        role: place.layout.read(side.tensors[place.tensor].value, place.part).shape for role, place in places.of.items()
    }

    def size(pattern: str, dim: int = 0) -> int:
        return next((shape[dim] for role, shape in shapes.items() if re.search(pattern, role)), 0)

    numbers = [int(found[1]) for role in shapes if (found := _LAYER.match(role))]
    settings = {**other.settings, **side.settings}
    rows = size(r"\.q_proj\.weight$")
    heads = getattr(side.config, f"{front[:-1]}_attention_heads", None) or settings.get("num_attention_heads") or 1
    head_dim = side.settings.get("head_dim") or (rows // heads if rows else 0)
    kv_rows = size(r"\.k_proj\.weight$")
    gated = any(role.endswith("gate_proj.weight") for role in shapes)
    norm_type = _norm_type(side, places) or _norm_type(other, other_places) or "layernorm"
    return SimpleNamespace(
        model_type="mygpt2", num_attention_heads=heads, head_dim=head_dim or None,
        num_key_value_heads=kv_rows // head_dim if kv_rows and head_dim else heads,
        hidden_size=places.width, num_hidden_layers=max(numbers) + 1 if numbers else 0,
        intermediate_size=size(r"\.(?:up|gate)_proj\.weight$"),
        mlp_type="gated" if gated else "dense", norm_type=norm_type,
        position_embedding_type="learned" if "model.embed_positions.weight" in shapes else settings.get("positions") or "none",
        max_position_embeddings=size(r"^model\.embed_positions\.weight$"), vocab_size=size(r"^model\.embed_tokens\.weight$"),
        initializer_range=getattr(side.config, "initializer_range", 0.02), scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=False, experts=len({f[2] for r in shapes if (f := _EXPERT.match(r))}),
    )  # fmt: skip


def _norm_type(side: Side, places: Places) -> str | None:
    """The norm type from the class of the norms, or from config and biases; None if unknown."""
    norms = [
        place.tensor for role, place in places.of.items() if role.endswith("norm.weight") and ".self_attn." not in role
    ]
    held = [side.tensors[name].holder for name in norms]
    if not norms:
        return None
    if any(role.endswith("norm.bias") for role in places.of) or any("LayerNorm" in name for name in held):
        return "layernorm"
    if any("RMS" in name.upper() for name in held):
        return "rmsnorm"
    if side.model_type == "mygpt2":
        return str(side.config.norm_type)
    return "rmsnorm" if hasattr(side.config, "rms_norm_eps") else None


def fit(change: RoleChange) -> None:
    """Run the transforms that the two sides need."""
    source, target = change.source, change.target
    _conventions(change)
    tie(change)
    _scale_embeddings(change)
    blocks_alike = not any("norm" in pattern for pattern, _ in change.marks)
    simple = not change.post_norm and blocks_alike and "model.embed_norm.weight" not in change.tensors
    if simple and source.norm_type != target.norm_type:
        norms(change)
    elif source.norm_type != target.norm_type:
        change.marks.append((r"norm\.(weight|bias)$", f"{source.norm_type} in the source, {target.norm_type} here"))
    if source.head_dim and target.head_dim:
        attention(change)
        _cross_attention(change)
    to_experts = target.experts and not source.experts
    if source.experts and not target.experts:
        _mean_of_experts(change)
    if not (source.experts and target.experts) and source.intermediate_size and target.intermediate_size:
        mlp(change)
    if target.max_position_embeddings:
        positions(change)
    else:
        change.drop("model.embed_positions.weight", "the target has no table of positions")
    if target.vocab_size:
        vocabulary(change)
    word_vectors(change)
    _token_types(change)
    if to_experts:
        _copy_to_experts(change)
    if source.num_hidden_layers and target.num_hidden_layers:
        layers(change)
    if change.conventions[1].get("norm_offset"):
        _shift_norms(change, -change.conventions[1]["norm_offset"])
    for pattern, step in change.marks:
        for role in [role for role in change.tensors if re.search(pattern, role)]:
            change.tensors[role] = change.tensors[role].then(step, same, kind="approximate")


def _cross_attention(change: RoleChange) -> None:
    """Like `attention`, for the decoder's cross-attention."""
    crossed = {role.replace(".cross_attn.", ".self_attn."): role for role in change.tensors if ".cross_attn." in role}
    if not crossed:
        return
    sub = replace(change, tensors={own: change.tensors.pop(role) for own, role in crossed.items()})
    attention(sub)
    change.tensors |= {crossed[own]: value for own, value in sub.tensors.items()}


def _conventions(change: RoleChange) -> None:
    """Convert weights between the conventions of the two sides: rotary pairs, scales, norms of 1 + weight."""
    theirs, ours = change.conventions
    offsets = [side.get("norm_offset") for side in (theirs, ours)]
    if None in offsets and any(offsets):
        change.marks.append((r"norm\.weight$", "norms of one side add 1 to their weights, those of the other may"))
        change.conventions = ({**theirs, "norm_offset": 0.0}, {**ours, "norm_offset": 0.0})
    elif offsets[0]:
        _shift_norms(change, offsets[0])
    pairs = [side.get("rotary_pairs") for side in (theirs, ours)]
    head_dim = change.source.head_dim
    if None not in pairs and pairs[0] != pairs[1] and head_dim:
        rotated = int(head_dim * theirs.get("rotary_share", ours.get("rotary_share", 1.0)))
        _repair(change, permutation(head_dim, rotated - rotated % 2, to=pairs[1]), f"{pairs[0]} to {pairs[1]}")  # type: ignore[arg-type]
    scales = [side.get("attention_scale") for side in (theirs, ours)]
    normed = any(".q_norm." in role for role in (*change.tensors, *change.parameters))
    if None not in scales and abs(scales[0] / scales[1] - 1) > 1e-6:  # type: ignore[operator]
        ratio = scales[0] / scales[1]  # type: ignore[operator]
        step = f"times {ratio:.4g}, as the source scales attention by {scales[0]:.4g} and the target by {scales[1]:.4g}"
        if change.source.head_dim != change.target.head_dim or normed:
            change.marks.append(
                (r"self_attn\.q_proj\.", f"attention is scaled by {scales[0]:.4g}, here by {scales[1]:.4g}")
            )
        else:
            for role in [role for role in change.tensors if ".self_attn.q_proj." in role]:
                change.tensors[role] = change.tensors[role].then(step, partial(_times, factor=ratio))


def _scale_embeddings(change: RoleChange) -> None:
    """Embeddings for another factor behind them; if the head is tied to them, the last norm takes it back."""
    scales = [side.get("embedding_scale") for side in change.conventions]
    table = change.tensors.get("model.embed_tokens.weight")
    if table is None or None in scales or abs(scales[0] / scales[1] - 1) < 1e-6:  # type: ignore[operator]
        return
    ratio = scales[0] / scales[1]  # type: ignore[operator]
    why = f"the source multiplies embeddings by {scales[0]:.4g}, the target by {scales[1]:.4g}"
    if change.target.head_is_tied:
        last = [role for role in ("model.norm.weight", "model.norm.bias") if role in change.tensors]
        between = any(role.startswith("head.") for role in (*change.tensors, *change.parameters))
        if "model.norm.weight" not in last or between:
            change.notes.append(f"{why}, which changes what the same weights compute")
            change.marks.append((r"^model\.embed_tokens\.", why))
            return
        for role in last:
            step = f"divided by {ratio:.4g}, which the tied head multiplies by"
            change.tensors[role] = change.tensors[role].then(step, partial(_times, factor=1 / ratio))
    change.tensors["model.embed_tokens.weight"] = table.then(
        f"times {ratio:.4g}, as {why}", partial(_times, factor=ratio)
    )


def _times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return (tensor.double() * factor).to(tensor)


def _plus(tensor: torch.Tensor, offset: float) -> torch.Tensor:
    return (tensor.double() + offset).to(tensor)


def _shift_norms(change: RoleChange, offset: float) -> None:
    """Add `offset` to the weights of all norms, also of new ones: a weight of ones is one of zeros in Gemma."""
    step = "plus 1, which the source's norms add" if offset > 0 else "minus 1, which the target's norms add"
    for role in [role for role in change.tensors if role.endswith("norm.weight")]:
        change.tensors[role] = change.tensors[role].then(step, partial(_plus, offset=offset))


def _repair(change: RoleChange, order: list[int], step: str) -> None:
    """Reorder the rows of queries and keys, head by head, for the other rotary pairing."""

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1, len(order), *tensor.shape[1:])[:, order].reshape(tensor.shape)

    for role in [role for role in change.tensors if re.search(r"\.self_attn\.(?:[qk]_proj|[qk]_norm)\.", role)]:
        value = change.tensors[role]
        if value.shape[0] % len(order) == 0:
            change.tensors[role] = value.then(f"rotary pairs from {step}", ordered)


def _token_types(change: Change) -> None:
    name = "model.embed_types.weight"
    value, new = change.tensors.get(name), getattr(change.target, "types", 0)
    if value is not None and new and value.shape[0] != new:
        old = value.shape[0]
        step = f"{old} token types to {new}" + (", the added ones as the first" if new > old else "")
        change.tensors[name] = value.rows(step, [i if i < old else 0 for i in range(new)])


def _copy_to_experts(change: RoleChange) -> None:
    """Initialise each expert as the dense MLP; if routing weights sum to 1, outputs do not change."""
    count = change.target.experts
    kind = "exact" if change.normalised else "approximate"
    step = f"copied into {count} experts" + ("" if change.normalised else ", whose weights need not add up to 1")
    for role in [role for role in change.tensors if re.search(r"^model\.layers\.\d+\.mlp\.\w+_proj\.", role)]:
        value = change.tensors.pop(role)
        for i in range(count):
            change.tensors[role.replace("mlp.", f"mlp.experts.{i}.", 1)] = value.then(step, same, kind=kind)
    for role in (
        [role for role in change.parameters if role.endswith(".mlp.router.weight")] if change.normalised else ()
    ):
        router = change.fresh(role)
        change.tensors[role] = replace(
            router, kind="exact", steps=("new: all experts are equal, so any choice gives the same",)
        )


def _mean_of_experts(change: RoleChange) -> None:
    groups: dict[str, list[Value]] = {}
    for role in list(change.tensors):
        if found := _EXPERT.match(role):
            groups.setdefault(f"{found[1]}{found[3]}", []).append(change.tensors.pop(role))
        elif role.endswith(".mlp.router.weight"):
            change.drop(role, "the target has no experts to choose from")
    for role, values in groups.items():
        rest = values[1:]

        def mean(first: torch.Tensor, rest: list[Value] = rest) -> torch.Tensor:
            total = first.double()
            for value in rest:
                total = total + value.compute().double()
            return total / (len(rest) + 1)

        first = values[0]
        merged = first.then("", mean, using=rest)
        steps = (*(s for s in first.steps if not s.startswith("expert ")), f"the mean of {len(values)} experts")
        change.tensors[role] = Value(
            merged.shape, merged.dtype, merged.compute, merged.sources, steps, "approximate", True
        )


def layer_choice(change: RoleChange) -> list[int]:
    have, want = change.source.num_hidden_layers, change.target.num_hidden_layers
    return change.chosen or (choose_layers(change.layers, have, want) if have and want else [])


_DIFFERENCES: tuple[tuple[str, str, str], ...] = (
    ("activation", "the activation", r"\.(?:up|gate)_proj\."),
    ("positions", "positions", r"self_attn\.[qk]_proj\."),
    ("rope_theta", "rope_theta", r"self_attn\.[qk]_proj\."),
    ("rotary_share", "the rotated share of each head", r"self_attn\.[qk]_proj\."),
    ("logit_scale", "the factor of the logits", r"^lm_head\."),
    ("logit_cap", "the cap of the logits", r"^lm_head\."),
    ("attention_cap", "the cap of attention scores", r"self_attn\.[qk]_proj\."),
    ("residual_scale", "the factor of what each block adds", r"self_attn\.o_proj\.|mlp\.down_proj\."),
    ("parallel_residual", "parallel attention and MLP", r"self_attn\.o_proj\.|mlp\.down_proj\.|layers\.\d+\.\w*norm\."),
    ("norm_place", "the place of the norms", r"self_attn\.o_proj\.|mlp\.down_proj\.|norm\."),
    ("norm_eps", "the norms' epsilon", ""),
    ("sliding_window", "sliding_window", ""),
)


def differences(source: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, str]]]:
    """Differences that no tensor shows, as notes and as marks for the affected roles."""
    notes, marks = [], []
    for name, what, roles in _DIFFERENCES:
        if name == "sliding_window":
            if source.get(name) == target.get(name):
                continue
        elif name not in source or name not in target or source[name] == target[name]:
            continue
        old, new = source.get(name), target.get(name)
        notes.append(
            f"{what}: {old!r} in the source, {new!r} in the target, which changes what the same weights compute"
        )
        if roles:
            marks.append((roles, f"{what}: {old} → {new}"))
    return notes, marks

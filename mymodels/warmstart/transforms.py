"""The transforms: one function for each way in which target and source may differ, which changes `Change.tensors`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import index

import torch

from ..checkpoints import CheckpointError
from .conversion import LAYER, LAYER_NAME, Change, same
from .lazy_tensor import Value, Why, constant
from .projections import attention, mlp
from .sources import HEAD_AND_EMBEDDINGS

_POSITIONS = {"mygpt2": "model.embed_positions.weight", "mybert": "bert.embeddings.position_embeddings.weight"}
_BY_TOKEN = {
    "mygpt2": ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"),
    "mybert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "cls.predictions.bias"),
}
LAYER_CHOICES = ("every", "first", "last")
POSITION_GROWTH = ("tile", "interpolate")


def tie(change: Change) -> None:
    """Tied ↔ untied head."""
    head, embeddings = HEAD_AND_EMBEDDINGS[change.kind]
    if change.source.tie_word_embeddings:
        _join(change, head, embeddings)
        if not change.target.tie_word_embeddings and embeddings in change.tensors:
            change.tensors[head] = change.tensors[embeddings].then("copied, the target's head is untied", same)
    elif change.target.tie_word_embeddings:
        change.drop(head, "the target ties its head to the token embeddings")


def _join(change: Change, head: str, embeddings: str) -> None:
    """Join a tied head that is stored separately with the embeddings; `open_source` has compared them."""
    stored, shared = change.tensors.get(head), change.tensors.get(embeddings)
    if stored is None or shared is None:
        return
    del change.tensors[head]
    change.tensors[embeddings] = replace(shared, sources=(*shared.sources, *stored.sources))


def norms(change: Change) -> None:
    """LayerNorm → RMSNorm, exact if the target has the biases it needs (after SliceGPT, arXiv 2401.15024, section 3.1).

    LayerNorm is RMSNorm of a centred input. All outputs to the residual stream are centred, so that the stream is; a
    norm's bias is multiplied by the matrices that follow it and added to their biases.
    """
    if change.kind != "mygpt2" or change.source.norm_type == change.target.norm_type:
        return
    tensors = change.tensors
    if change.target.norm_type == "layernorm":
        for name in [name for name in tensors if name.endswith("norm.weight")]:
            tensors[name] = tensors[name].then("LayerNorm centres, RMSNorm did not", same, kind="approximate")
        return
    for name in [name for name in tensors if name.endswith(("q_norm.weight", "k_norm.weight"))]:
        tensors[name] = tensors[name].then("RMSNorm does not centre, LayerNorm did", same, kind="approximate")
    for layer in change.each_layer():
        _fold(change, f"{layer}input_layernorm", [f"{layer}self_attn.{part}_proj" for part in "qkv"])
        _fold(change, f"{layer}post_attention_layernorm", [f"{layer}mlp.{part}_proj" for part in ("up", "gate")])
    _fold(change, "model.norm", ["lm_head"])  # before the embeddings, which a tied head uses, are centred
    head_is_exact = not change.target.tie_word_embeddings or not change.has_parameter("lm_head.weight")
    if change.has_parameter("lm_head.weight") and not (head_is_exact and change.has_parameter("lm_head.bias")):
        change.notes.append("the step to RMSNorm is exact with tie_word_embeddings=False and lm_head_bias=True")
    for name, dim in _writers(change):
        if name in tensors:
            # a tied head needs the rows before centring
            kind = "exact" if dim == 0 or head_is_exact or "tokens" not in name else "approximate"
            tensors[name] = tensors[name].then("centred", partial(_centre, dim=dim), kind=kind)


def _writers(change: Change) -> list[tuple[str, int]]:
    writers = [(f"{layer}{part}.{kind}", 0) for layer in change.each_layer() for part in ("self_attn.o_proj", "mlp.down_proj") for kind in ("weight", "bias")]  # fmt: skip
    return [("model.embed_tokens.weight", 1), ("model.embed_positions.weight", 1), *writers]


def _centre(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    wide = tensor if tensor.dtype.itemsize >= 4 else tensor.float()
    return wide - wide.mean(dim=dim, keepdim=True, dtype=torch.float64).to(wide.dtype)


def _fold(change: Change, norm: str, readers: list[str]) -> None:
    tensors, bias = change.tensors, change.tensors.get(f"{norm}.bias")
    if bias is None:
        return
    del tensors[f"{norm}.bias"]
    lost = "RMSNorm has no bias, and the layers after it have none to add it to"
    for source in bias.sources:
        change.why.setdefault(source, Why(lost))
    for reader in readers:
        weight = tensors.get(f"{reader}.weight")
        if reader == "lm_head" and change.target.tie_word_embeddings:
            weight = tensors.get("model.embed_tokens.weight")
        if weight is None or not change.has_parameter(f"{reader}.bias"):
            continue
        own = tensors.get(f"{reader}.bias") or constant((weight.shape[0],), 0.0, weight, "")
        folded = partial(_add_product, weight=weight, vector=bias)
        tensors[f"{reader}.bias"] = own.then("the norm's bias folded in", folded, using=(weight, bias))


def _add_product(bias: torch.Tensor, weight: Value, vector: Value) -> torch.Tensor:
    return bias.float() + weight.compute().float() @ vector.compute().float()


def choose_layers(choice: str | Sequence[int], have: int, want: int) -> list[int]:
    """The source's layer for each layer of the target.

    Raises:
        CheckpointError: `choice` is not in `LAYER_CHOICES`, or a list that does not fit.
    """
    if isinstance(choice, str):
        if choice not in LAYER_CHOICES:
            raise CheckpointError(f"layers={choice!r} is none of {', '.join(LAYER_CHOICES)} or a list of layers")
        if choice == "every":
            return [i * have // want for i in range(want)]
        shift = 0 if choice == "first" else have - want
        return [min(max(i + shift, 0), have - 1) for i in range(want)]
    try:
        chosen = [index(i) for i in choice]
    except TypeError:
        raise CheckpointError(f"layers={choice!r} is none of {', '.join(LAYER_CHOICES)} or a list of layers") from None
    if len(chosen) != want or not all(0 <= i < have for i in chosen):
        raise CheckpointError(
            f"layers={chosen} must name {want} layers, one for each of the target's, from 0 to {have - 1}"
        )
    return chosen


def layers(change: Change) -> None:
    """Fewer layers: some are chosen. More: copies of blocks are added.

    The outputs of an added block of MyGPT2 are zero (LLaMA Pro, arXiv 2401.02415), so it has no effect until it is
    trained. MyBert has post-norm, so an added block is a plain copy (stacking, Gong et al., ICML 2019).
    """
    have, want = change.source.num_hidden_layers, change.target.num_hidden_layers
    chosen = change.chosen = choose_layers(change.layers, have, want)
    if chosen == list(range(have)):
        return
    by_layer: dict[int, dict[str, Value]] = {}
    for name in list(change.tensors):
        if found := LAYER_NAME.match(name):
            by_layer.setdefault(int(found[2]), {})[found[3]] = change.tensors[name]
            if int(found[2]) not in chosen:
                change.drop(name, "its layer is not among the chosen ones", requested=True)
            else:
                del change.tensors[name]
    pre_norm = change.is_pre_norm
    kept_all = sorted(set(chosen)) == list(range(have)) and chosen == sorted(chosen)
    seen: set[int] = set()
    for to, origin in enumerate(chosen):
        for rest, value in by_layer.get(origin, {}).items():
            name = LAYER[change.kind].format(to) + rest
            if origin not in seen:
                step, kind = ("", "exact") if kept_all else ("a chosen layer", "approximate")
                change.tensors[name] = value.then(step, same, kind=kind if pre_norm or not kept_all else "approximate")
            elif pre_norm and re.match(r"((?:self|cross)_attn\.o_proj|mlp\.(experts\.\d+\.)?down_proj)\.", rest):
                change.tensors[name] = constant(value.shape, 0.0, value, "zeros: the added block changes nothing")
            else:
                kind = "exact" if pre_norm and kept_all else "approximate"
                change.tensors[name] = value.then("copied into an added block", same, kind=kind)
        seen.add(origin)
    if change.source.model_type == "mygpt2" and change.target.scale_attn_by_inverse_layer_idx:
        change.notes.append("scale_attn_by_inverse_layer_idx divides the scores of a layer by its new number")


def positions(change: Change) -> None:
    """A longer or shorter table of learned positions, or none."""
    name = _POSITIONS[change.kind]
    old_type, new_type = (getattr(c, "position_embedding_type", "learned") for c in (change.source, change.target))
    if change.kind == "mygpt2" and old_type != new_type:
        change.drop(name, f"position_embedding_type={new_type!r} has no table")
        if old_type == "none" and new_type == "learned":
            shape = (change.target.max_position_embeddings, change.target.hidden_size)
            like = next(iter(change.tensors.values()), None)
            if like is not None:
                change.tensors[name] = constant(shape, 0.0, like, "zeros: the source has no positions")
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
            lambda t: _interpolate(t, new),
            (new, value.shape[1]),
            kind="approximate",
            resized=True,
        )
    else:
        raise CheckpointError(f"positions={change.positions!r} is none of {', '.join(POSITION_GROWTH)}")


def _interpolate(table: torch.Tensor, length: int) -> torch.Tensor:
    by_feature = table.double().t()[None]
    return torch.nn.functional.interpolate(by_feature, size=length, mode="linear", align_corners=True)[0].t()


def vocabulary(change: Change) -> None:
    """More, fewer, or other tokens, in all tensors with a row per token."""
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
    """For each list of row numbers the mean of these rows of `table`; for an empty list, the mean of all rows."""
    means = {i: pieces for i, pieces in enumerate(rows) if len(pieces) != 1}
    out = table[torch.tensor([pieces[0] if pieces else 0 for pieces in rows])]
    everything = table.double().mean(dim=0).to(table)
    for i, pieces in means.items():
        out[i] = table[pieces].double().mean(dim=0).to(table) if pieces else everything
    return out


def word_vectors(change: Change) -> None:
    """Copy pretrained vectors into the token embeddings; other tokens keep their rows."""
    if change.vectors is None:
        return
    tokens, table, name, count = change.vectors
    embeddings, size = HEAD_AND_EMBEDDINGS[change.kind][1], change.target.vocab_size
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
    """More or fewer token types; an added one starts as a copy of the first."""
    name = "bert.embeddings.token_type_embeddings.weight"
    value = change.tensors.get(name)
    new = getattr(change.target, "type_vocab_size", 0)
    if value is not None and value.shape[0] != new:
        old = value.shape[0]
        step = f"{old} token types to {new}" + (", the added ones as the first" if new > old else "")
        change.tensors[name] = value.rows(step, [i if i < old else 0 for i in range(new)])


# fields without tensors that change the outputs of the same weights
_SETTINGS = {
    "mygpt2": (
        "num_attention_heads", "activation_function", "layer_norm_epsilon", "scale_attn_weights", "qk_norm",
        "scale_attn_by_inverse_layer_idx", "final_logit_softcapping", "position_embedding_type",
    ),
    "mybert": ("num_attention_heads", "hidden_act", "layer_norm_eps", "layer_mix"),
}  # fmt: skip


def unequal_settings(change: Change) -> None:
    """Add notes on different config fields that have no tensors."""
    source, target = change.source, change.target
    fields = list(_SETTINGS[change.kind])
    if change.pools and change.kind == "mybert":
        fields.append("pooling")
    if change.kind == "mygpt2" and source.position_embedding_type == target.position_embedding_type == "rope":
        fields.append("rope_theta")
    if change.has_parameter("score.weight"):
        fields.append("pad_token_id")  # it determines the last token of a text
    for name in fields:
        old, new = getattr(source, name), getattr(target, name)
        if old != new:
            change.notes.append(f"{name} was {old!r} and is {new!r}, which changes what the same weights compute")
    if change.kind == "mygpt2":
        _unequal_windows(change)


def _unequal_windows(change: Change) -> None:
    source, target = change.source, change.target
    chosen = change.chosen or list(range(source.num_hidden_layers))
    windows = (
        {"full_attention": None, "sliding_attention": source.sliding_window},
        {
            "full_attention": None,
            "sliding_attention": target.sliding_window,
        },
    )
    seen: set[int] = set()
    for layer, origin in enumerate(chosen[: target.num_hidden_layers]):
        old, new = windows[0][source.layer_types[origin]], windows[1][target.layer_types[layer]]
        if old != new and origin not in seen:  # the outputs of a repeated block are zero
            how = ["all tokens" if window is None else f"{window} tokens" for window in (old, new)]
            change.notes.append(f"layer {layer} saw {how[0]} and sees {how[1]}")
        seen.add(origin)


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

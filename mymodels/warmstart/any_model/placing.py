"""Where a side stores each role: the tensor, its layout, and ambiguities."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..lazy_tensor import Value
from .layouts import Layout, is_usually_stacked, known_arrangement
from .probing import kind_of_module, probed, probed_offset
from .roles import GATE_UP, Role, roles_by_name
from .sides import Side

_IN = re.compile(r"\.(?:[qkv]_proj|gate_proj|up_proj|router)\.weight$")
_OUT = re.compile(r"\.(?:o_proj|down_proj)\.weight$")
_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc")


@dataclass
class Ambiguity:
    """Tensors with several possible readings, of which none was chosen, or one that is only likely.

    Attributes:
        names: the tensors or parameters that are left out for it.
        why: what cannot be known.
        candidates: what the reader chooses from.
        rename: a `rename=` that decides, regex → replacement; empty if none can.
        placed: what decided after all, which is no proof; empty if the names are left out.
        by_names: whether the tensors' whole names may still decide.
    """

    names: tuple[str, ...]
    why: str
    candidates: tuple[str, ...]
    rename: dict[str, str]
    placed: str = ""
    by_names: bool = False


@dataclass
class Place:
    """Where a role is stored: which part of which tensor."""

    tensor: str
    layout: Layout
    part: int


@dataclass
class Places:
    """All roles of a side.

    Attributes:
        of: role → place.
        roles: tensor → its roles, in the order of its parts (of all experts one after the other).
        layouts: tensor → its layout.
        usual: tensors whose arrangement is only usual for their names or code.
        copies: tensor → the tensor with the same role and the same values.
        unknown_offsets: tables of positions of which nothing tells at which row they begin.
    """

    of: dict[str, Place] = field(default_factory=dict)
    roles: dict[str, tuple[str, ...]] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    usual: set[str] = field(default_factory=set)
    copies: dict[str, str] = field(default_factory=dict)
    unknown_offsets: set[str] = field(default_factory=set)
    ambiguous: list[Ambiguity] = field(default_factory=list)
    width: int = 0

    def stacks(self) -> list[str]:
        """The role prefixes of the lists of layers; "" for roles outside of layers, or of the only list."""
        return list(dict.fromkeys(["", *(stack_of(role) for role in self.of)]))

    def stack(self, front: str) -> "Places":
        """The places of one of `stacks`, their roles without it."""
        of = {role[len(front) :]: place for role, place in self.of.items() if stack_of(role) == front}
        return Places(of, width=self.width)


def stack_of(role: str) -> str:
    """The prefix of a role for its list of layers: `"encoder:"`, or ""."""
    return role[: role.find(":") + 1]


def places_of(side: Side, *, prefer: Iterable[str] = ()) -> Places:
    """The places of a side's roles; `prefer`: names that win where two tensors have one role."""
    roles = roles_by_name(side.tensors)
    found = Places(width=_width(side, roles))
    transposed = orientations(side, roles, found.width)
    for name, role in roles.items():
        layout, parts = _layout(side, roles, name, role, transposed.get(name, False), found)
        if layout is None:
            continue
        found.layouts[name], found.roles[name] = layout, parts
    _settle_doubles(side, found, set(prefer))
    for name, parts in found.roles.items():
        for i, part in enumerate(parts):
            found.of[part] = Place(name, found.layouts[name], i)
    return found


def _width(side: Side, roles: dict[str, Role]) -> int:
    """The width of the residual stream, from norms in the layers, the embeddings, or most matrices."""
    norms = Counter(
        side.tensors[name].shape[0]
        for name, role in roles.items()
        if role.layer is not None and role.parts[0].endswith("norm.weight") and ".self_attn." not in role.parts[0]
    )
    table = next((side.tensors[n].shape for n, r in roles.items() if r.parts[0] == "model.embed_tokens.weight"), (0, 0))
    if norms:  # of several towers that of the tokens
        return table[-1] if table[-1] in norms else norms.most_common(1)[0][0]
    if table[-1]:
        return table[-1]
    matrices = [side.tensors[n].shape for n, r in roles.items() if _IN.search(r.parts[0]) or _OUT.search(r.parts[0])]
    sizes = Counter(size for shape in matrices for size in shape)
    return sizes.most_common(1)[0][0] if sizes else 0


def orientations(side: Side, roles: dict[str, Role], width: int) -> dict[str, bool | None]:
    """Matrix → whether it is stored [in, out]; None if unknown.

    The module's class decides if it is known. Otherwise the shapes of non-square matrices do, and square ones follow if
    all of these agree.
    """
    found: dict[str, bool | None] = {}
    square: list[str] = []
    for name, role in roles.items():
        tensor = side.tensors[name]
        if role.leaf == "kernel":
            found[name] = True
        elif len(tensor.shape) != 2 or not (_IN.search(role.parts[0]) or _OUT.search(role.parts[0])):
            found[name] = False
        elif tensor.holder == "Conv1D":
            found[name] = True
        elif tensor.holder.endswith("Linear") or tensor.renamed:
            found[name] = False
        elif tensor.shape[0] == tensor.shape[1]:
            square.append(name)
        else:
            reads = _IN.search(role.parts[0])
            straight, turned = tensor.shape[1 if reads else 0] == width, tensor.shape[0 if reads else 1] == width
            found[name] = turned if straight != turned else None
    shown = {found[n] for n in found if n in roles and _shows(side, roles, n)} - {None}
    for name in square:
        if len(shown) == 1:
            found[name] = next(iter(shown))
        else:
            found[name] = None if shown or roles[name].module in _CONV1D_NAMES else False
    return found


def _shows(side: Side, roles: dict[str, Role], name: str) -> bool:
    """Whether a matrix's shape is evidence of how the side stores matrices."""
    shape, role = side.tensors[name].shape, roles[name]
    if len(shape) != 2 or shape[0] == shape[1] or side.tensors[name].holder or role.leaf == "kernel":
        return False
    return bool(_IN.search(role.parts[0]) or _OUT.search(role.parts[0]))


def _layout(
    side: Side, roles: dict[str, Role], name: str, role: Role, transposed: bool | None, found: Places
) -> tuple[Layout | None, tuple[str, ...]]:
    shape, parts, experts = side.tensors[name].shape, role.parts, 0
    if role.stacked:
        if len(shape) != 3:
            return None, ()
        experts, shape = shape[0], shape[1:]
    if transposed is None:
        linear, kernel = f"{role.module}.{role.leaf}", f"{role.module}.kernel"
        found.ambiguous.append(
            Ambiguity(
                (name,),
                "it is unknown whether it is stored [out, in] as in nn.Linear or [in, out] as in Conv1D",
                (linear, kernel),
                {rf"{re.escape(role.module)}\.{role.leaf}$": kernel},
            )
        )
        return None, ()
    canonical = shape[::-1] if transposed else shape
    offset = 0
    if parts[0].endswith("model.embed_positions.weight"):
        if len(shape) == 3 and shape[0] == 1:
            return None, ()
        known_offset = _position_offset(side, name)
        offset = known_offset or 0
        if known_offset is None:
            found.unknown_offsets.add(name)
    if len(parts) == 1 and GATE_UP[1] in parts[0] and _twice(side, roles, role, canonical, found):
        parts = (parts[0].replace("up_proj", "gate_proj"), parts[0])
    if len(parts) == 1:
        layout = Layout(transposed, (canonical[0],) if canonical else (), experts=experts, offset=offset)
        return layout, _each_expert(parts, experts)
    rows = _rows(side, len(parts), canonical[0], found.width)
    arrangement = _arrangement(side, name, role, len(parts))
    if arrangement is None and rows and is_usually_stacked(role.module, side.tensors[name].code):
        found.usual.add(name)
        arrangement = (1, ())
    blocks, order = arrangement or (1, ())
    if arrangement is None or not rows or any(size % blocks for size in rows):
        found.ambiguous.append(_undivided(name, role, len(parts), known_rows=bool(rows)))
        return None, ()
    return Layout(bool(transposed), rows, blocks, order, experts), _each_expert(parts, experts)


def _position_offset(side: Side, name: str) -> int | None:
    """The row of a table of positions that the first position has; None: unknown."""
    known = side.settings.get("position_offset")
    if known is not None or side.module is None or side.tensors[name].renamed:
        return known
    path = _own_name(side, name).rpartition(".")[0]
    if path not in side.probes:
        try:
            side.module.get_submodule(path)
        except AttributeError:  # no module's parameter
            return None
        side.probes[path] = probed_offset(side.module, path) if path else None
    return side.probes[path]


def _own_name(side: Side, name: str) -> str:
    """A tensor's name in the side's module."""
    sources = side.tensors[name].value.sources
    return sources[0] if sources else name


def _arrangement(side: Side, name: str, role: Role, parts: int) -> tuple[int, tuple[int, ...]] | None:
    """The blocks and the order of a fused tensor's parts, if they are known; None: they are not."""
    tensor = side.tensors[name]
    if (role.module == "in_proj" and tensor.holder == "MultiheadAttention") or name.rpartition(".")[2].startswith(
        "in_proj_"
    ):
        return (1, ())
    if tensor.renamed and role.module in ("qkv_proj", "gate_up_proj"):
        return (1, ())
    heads = side.settings.get("num_key_value_heads", 0)
    new_falcon = bool(getattr(side.config, "new_decoder_architecture", False))
    known = known_arrangement(side.model_type, role.module, parts, heads, new_falcon)
    if known is not None or side.module is None or tensor.renamed:
        return known
    path = _own_name(side, name).rpartition(".")[0]
    try:
        kind = kind_of_module(side.module, path)
    except AttributeError:  # no module's parameter
        return None
    if kind not in side.probes:
        side.probes[kind] = probed(side.module, path, parts)
    found = side.probes[kind]
    return (found[0], () if list(found[1]) == sorted(found[1]) else found[1]) if found else None


def taken_as_stacked(name: str, role: Role, target: str) -> Ambiguity:
    """The note on a fused tensor of the source that was read as is usual for its name, and went to `target`."""
    why = f"{name} is read as stacked, which is usual for this name, and may be interleaved by head"
    candidates = ("qkv_proj (stacked)", "qkv_by_head (interleaved)")
    rename = {rf"\b{re.escape(role.module)}\.": "qkv_by_head."}
    return Ambiguity((target,), why, candidates, rename, "placed by what is usual")


def _undivided(name: str, role: Role, parts: int, *, known_rows: bool) -> Ambiguity:
    """A fused tensor of which nothing tells how its parts are divided."""
    front = name[: -len(f"{role.module}.{role.leaf}")] if role.leaf else name
    if parts == 3:
        why = "its query, key and value may be stacked or interleaved by head, and nothing tells which"
        candidates: tuple[str, ...] = (f"{front}qkv_proj (stacked)", f"{front}qkv_by_head (interleaved)")
        chosen = "qkv_proj."
    else:
        why, candidates, chosen = (
            "nothing tells which part is the gate",
            (f"{front}gate_up_proj (gate first)",),
            "gate_up_proj.",
        )
    if not known_rows:
        why = "nothing tells how many rows each of its parts has: pass config="
    return Ambiguity((name,), why, candidates, {rf"\b{re.escape(role.module)}\.": chosen})


def _each_expert(parts: tuple[str, ...], experts: int) -> tuple[str, ...]:
    if not experts:
        return parts
    return tuple(part.replace("mlp.", f"mlp.experts.{i}.", 1) for i in range(experts) for part in parts)


def _twice(side: Side, roles: dict[str, Role], role: Role, shape: tuple[int, ...], found: Places) -> bool:
    """Whether an MLP's first matrix contains gate and up: it has twice as many rows as the second has inputs."""
    down = role.parts[0].replace(GATE_UP[1], "mlp.down_proj")
    down = down.rpartition(".")[0] + ".weight"
    other = next((side.tensors[n].shape for n, r in roles.items() if r.parts == (down,)), None)
    if other is None or len(other) != 2:
        return False
    inner = other[1] if other[0] == found.width else other[0]
    return shape[0] == 2 * inner


def _rows(side: Side, parts: int, rows: int, width: int) -> tuple[int, ...]:
    heads, kv = (side.settings.get(name, 0) for name in ("num_attention_heads", "num_key_value_heads"))
    if parts == 3 and heads and kv:
        size = side.settings.get("head_dim") or (width // heads if width else rows // (heads + 2 * kv))
        if (heads + 2 * kv) * size == rows:
            return heads * size, kv * size, kv * size
    if parts == 3 and heads and kv and heads != kv:
        return ()
    return (rows // parts,) * parts if rows % parts == 0 else ()


def _settle_doubles(side: Side, found: Places, prefer: set[str]) -> None:
    """Drop a role that several tensors have, unless they are equal or one has the requested name."""
    holding: dict[str, list[str]] = defaultdict(list)
    for name, parts in found.roles.items():
        for part in parts:
            holding[part].append(name)
    for part, names in holding.items():
        names = [name for name in names if name in found.roles]
        if len(names) < 2:
            continue
        wanted = [name for name in names if side.tensors[name].renamed] or [name for name in names if name in prefer]
        keep = wanted[0] if len(wanted) == 1 else names[0]
        others = [name for name in names if name != keep]
        alike = len(wanted) == 1 or all(_equal(side.tensors[keep].value, side.tensors[name].value) for name in others)
        for name in others if alike else names:
            del found.roles[name], found.layouts[name]
            if alike and len(wanted) != 1:
                found.copies[name] = keep
        if not alike:
            rename = {f"^{re.escape(names[0])}$": part}
            found.ambiguous.append(
                Ambiguity((part,), f"several tensors can be {part}", tuple(names), rename, by_names=True)
            )


def _equal(a: Value, b: Value) -> bool:
    return a.shape == b.shape and torch.equal(a.compute(), b.compute())

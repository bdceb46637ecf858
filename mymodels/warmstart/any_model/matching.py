"""Matchers, one function each: they assign source tensors to target tensors by role, by name, by prefix."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..conversion import same
from ..lazy_tensor import Value, Why, constant
from .fitting import RoleChange, differences, fit, layer_choice, terms
from .placing import Ambiguity, Places, places_of, stack_of, taken_as_stacked
from .roles import LEAVES, roles_by_name
from .sides import Side, names_in_order

_WRAPPER = re.compile(
    r"^(?:(?:module|model|transformer|bert|roberta|distilbert|electra|base_model|backbone|net|encoder|decoder|gpt_neox|"
    r"_orig_mod|state_dict|network|core)\.)*$"
)
_LAYER = re.compile(r"^(?:(.*?)\.)?(\d+)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass
class Matching:
    """The state of a matching: which source tensors fill each target tensor.

    Attributes:
        options: fields of `Change`.
        values: target tensor → its value.
        used: source tensors that are assigned.
        why: source tensors that are not assigned → reason.
        unproven: target tensors whose assignment only a run can confirm.
        by: target tensor → the matcher that assigned it.
        layers: role prefix of a list of layers → the source layer for each target layer.
        stacks: path of each list of layers in the target → its role prefix.
        undecided: source tensors with several possible places.
        doubles: roles of several source tensors, reported if no later matcher assigns these.
        squares: square source matrices that are assumed to be stored [out, in].
    """

    source: Side
    target: Side
    options: dict[str, Any]
    values: dict[str, Value] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    why: dict[str, Why] = field(default_factory=dict)
    unproven: set[str] = field(default_factory=set)
    by: dict[str, str] = field(default_factory=dict)
    ambiguous: list[Ambiguity] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layers: dict[str, list[int]] = field(default_factory=dict)
    stacks: dict[str, str] = field(default_factory=dict)
    undecided: set[str] = field(default_factory=set)
    squares: list[str] = field(default_factory=list)
    doubles: list[Ambiguity] = field(default_factory=list)

    def place(self, name: str, value: Value, matcher: str, names: tuple[str, ...] = (), *, proven: bool = True) -> None:
        self.values[name], self.by[name] = value, matcher
        self.used.update(names)
        if not proven:
            self.unproven.add(name)

    def open_targets(self) -> list[str]:
        return [name for name in self.target.tensors if name not in self.values]

    def open_sources(self) -> list[str]:
        return [n for n in self.source.tensors if n not in self.used and n not in self.undecided]


def by_new_name(matching: Matching) -> None:
    """Assign source tensors that `rename=` gave a target's name."""
    for name, tensor in matching.source.tensors.items():
        wanted = tensor.renamed and name in matching.target.tensors
        if wanted and (value := turned(matching, name, name)) is not None:
            matching.place(name, value, "rename", (name,))


def by_role(matching: Matching) -> None:
    """Assign tensors with the same role on both sides, with the transforms that their differences need."""
    source, target, options = matching.source, matching.target, matching.options
    ours = places_of(target)
    theirs = places_of(source, prefer=target.tensors)
    matching.used.update(theirs.copies)
    for copy, kept in theirs.copies.items():
        matching.why[copy] = Why(f"{kept} stands for it", "exact", constant=True)
    unsure_positions = _settle_offsets(matching, theirs, ours)
    shared = {role for role in theirs.of if role in ours.of}
    if not shared and options["vectors"] is None:
        _report_ambiguous(matching, theirs, ours)
        return
    for places, placed in ((theirs, matching.used), (ours, matching.values)):
        places.of = {role: place for role, place in places.of.items() if place.tensor not in placed}
    values = {
        role: place.layout.read(source.tensors[place.tensor].value, place.part) for role, place in theirs.of.items()
    }
    for side, places in ((source, theirs), (target, ours)):
        if any(role.endswith("attention_output_norm.weight") for role in places.of):
            side.settings.setdefault("norm_place", "after the sum")
    if any(side.settings.get("norm_place") == "after the sum" for side in (source, target)):
        for side in (source, target):
            side.settings.setdefault("norm_place", "not known")
    notes, marks = differences(source.settings, target.settings)
    matching.notes += notes
    head_stored, tied = "lm_head.weight" in values, _tied(matching, values)

    def fresh(role: str) -> Value:
        place = ours.of[role]
        return place.layout.read(target.tensors[place.tensor].value, place.part)

    post_norm = any(side.settings.get("norm_place") == "after the sum" for side in (source, target))
    tensors: dict[str, Value] = {}
    unsure_stacks: set[str] = set()
    for front in [front for front in ours.stacks() if front in theirs.stacks()]:
        own_places = theirs.stack(front), ours.stack(front)
        old, new = terms(source, own_places[0], target, own_places[1], front), terms(target, own_places[1], source, own_places[0], front)  # fmt: skip
        new.types = target.tensors[ours.of["model.embed_types.weight"].tensor].shape[0] if "model.embed_types.weight" in ours.of else 0  # fmt: skip
        old.tie_word_embeddings, new.tie_word_embeddings = tied, "lm_head.weight" not in ours.of
        new.head_is_tied = new.tie_word_embeddings and _ties_its_head(target, ours)
        change = RoleChange(
            {role[len(front) :]: value for role, value in values.items() if stack_of(role) == front},
            old, new, set(own_places[1].of), partial(_fresh_in, fresh, front), dict(matching.why),
            post_norm=post_norm or not old.num_hidden_layers,
            normalised=target.settings.get("normalised_top_k") is True, marks=list(marks),
            conventions=(source.settings, target.settings), **{**options, **({"vectors": None} if front else {})},
        )  # fmt: skip
        fit(change)
        tensors |= {front + role: value for role, value in change.tensors.items()}
        chosen = matching.layers[front] = layer_choice(change)
        if len(set(chosen)) < len(chosen) and "norm_place" not in target.settings:
            unsure_stacks.add(front)  # an added block that outputs zeros changes nothing only without a norm after it
        matching.why |= change.why
        matching.notes += [note for note in change.notes if note not in matching.notes]
    if not head_stored and "lm_head.weight" in tensors and "lm_head.weight" not in ours.of:
        del tensors["lm_head.weight"]
    for name, roles in ours.roles.items():
        layer = _LAYER.match(name)
        if layer is not None:
            matching.stacks[layer[1] or ""] = stack_of(roles[0])
    usual = {role for role, place in theirs.of.items() if place.tensor in theirs.usual}
    for name, roles in ours.roles.items():
        parts = [tensors.get(role) for role in roles]
        if name in matching.values or (all(part is None or not part.sources for part in parts) and not any(parts)):
            continue
        value = _written(matching, ours, name, parts, fresh)
        if value is None:
            continue
        unsure = name in ours.usual or any(_origin(matching, role) in usual for role in roles)
        unsure = unsure or not unsure_positions.isdisjoint(roles)
        unsure = unsure or (stack_of(roles[0]) in unsure_stacks and "model.layers." in roles[0])
        alike = name in source.tensors and value.sources == source.tensors[name].value.sources
        stored = _as_stored(matching, theirs, ours, name, value)
        if alike and unsure and stored is not value:
            unsure = False  # fused under one name on both sides: assumed the same arrangement
        value = stored
        matching.place(name, value, "role", proven=not unsure)
        origins = {theirs.of[_origin(matching, role)].tensor for role in roles if _origin(matching, role) in usual}
        if unsure and origins:
            seen = min(origins)
            matching.ambiguous.append(taken_as_stacked(seen, roles_by_name([*source.tensors])[seen], name))
    taken = {own for value in matching.values.values() for own in value.sources}
    for name in theirs.roles:
        own = source.tensors[name].value.sources
        if set(own) & taken:
            matching.used.add(name)
        elif set(own) & matching.why.keys():
            matching.undecided.add(name)
    _report_ambiguous(matching, theirs, ours)


def _settle_offsets(matching: Matching, theirs: Places, ours: Places) -> set[str]:
    """Where only one side's code says at which row a table of positions begins: the roles whose rows may be shifted."""
    unsure = set()
    for role, place in theirs.of.items():
        if not role.endswith("model.embed_positions.weight") or role not in ours.of:
            continue
        own = ours.of[role]
        if place.tensor not in theirs.unknown_offsets and own.tensor not in ours.unknown_offsets:
            continue
        names = place.tensor, own.tensor
        alike = names[0] == names[1] or any(a.endswith(f".{b}") for a, b in (names, names[::-1]))
        same_shape = matching.source.tensors[names[0]].shape == matching.target.tensors[names[1]].shape
        if alike and place.tensor in theirs.unknown_offsets:
            place.layout = theirs.layouts[place.tensor] = replace(place.layout, offset=own.layout.offset)
        elif alike:
            own.layout = ours.layouts[own.tensor] = replace(own.layout, offset=place.layout.offset)
        if alike and same_shape:
            continue
        unsure.add(role)
        rows = f"row {place.layout.offset} of the source as row {own.layout.offset} of the target"
        why = f"nothing tells at which row {' or '.join(dict.fromkeys(names))} begins"
        matching.ambiguous.append(
            Ambiguity(
                (own.tensor,),
                why,
                ("row 0", "row 2 (OPT, BART)", "the row after the padding token's (RoBERTa)"),
                {},
                f"taken {rows}",
            )
        )
    return unsure


def _as_stored(matching: Matching, theirs: Places, ours: Places, name: str, value: Value) -> Value:
    """The original tensor, if splitting and fusing cancel out."""
    stored = next((n for n in theirs.roles if theirs.roles[n] == ours.roles[name]), None)
    if stored is None or value.kind != "exact":
        return value
    layouts = theirs.layouts[stored], ours.layouts[name]
    origin = matching.source.tensors[stored].value
    mechanical = all(
        re.match(r"split in|\d+ fused|transposed|expert \d|\d+ experts|rows before position 0|after \d+ rows", step)
        for step in value.steps
    )
    shape = matching.target.tensors[name].shape
    if (
        not mechanical
        or origin.shape != (shape if layouts[0].transposed == layouts[1].transposed else shape[::-1])
        or value.sources != origin.sources
        or replace(layouts[0], transposed=layouts[1].transposed) != layouts[1]
    ):
        return value
    return origin if layouts[0] == layouts[1] else origin.then("transposed", torch.t, origin.shape[::-1])


def _fresh_in(fresh: Callable[[str], Value], front: str, role: str) -> Value:
    return fresh(front + role)


def _origin(matching: Matching, role: str) -> str:
    """The source's role for a role of the target, by the choice of layers."""
    front = stack_of(role)
    found, chosen = re.match(r"^model\.layers\.(\d+)\.(.*)$", role[len(front) :]), matching.layers.get(front, [])
    if found is None or int(found[1]) >= len(chosen):
        return role
    return f"{front}model.layers.{chosen[int(found[1])]}.{found[2]}"


def _tied(matching: Matching, values: Mapping[str, Value]) -> bool:
    """Whether the source's head is tied to its token embeddings."""
    head, table = values.get("lm_head.weight"), values.get("model.embed_tokens.weight")
    tied = getattr(matching.source.config, "tie_word_embeddings", None)
    if head is not None and table is not None:
        same_values = head.shape == table.shape and torch.equal(head.compute(), table.compute())
        return same_values if tied is None else bool(tied) and same_values
    return tied is not False


def _ties_its_head(target: Side, ours: Places) -> bool:
    """Whether the token embeddings have a second name."""
    table = ours.of.get("model.embed_tokens.weight")
    shared = names_in_order(target.module).values() if target.module is not None else ()
    return table is not None and any(table.tensor in names and len(names) > 1 for names in shared)


def _written(
    matching: Matching, ours: Places, name: str, parts: list[Value | None], fresh: Callable[[str], Value]
) -> Value | None:
    """A target tensor from its parts; parts that the source lacks are zeros for biases, else the target's values."""
    target, layout, roles = matching.target.tensors[name], ours.layouts[name], ours.roles[name]
    filled: list[Value] = []
    for role, part in zip(roles, parts):
        own = fresh(role) if role in ours.of else target.value
        if part is not None and part.shape != own.shape:
            shapes = ["×".join(map(str, shape)) for shape in (part.shape, own.shape)]
            for source in part.sources:
                matching.why.setdefault(source, Why(f"the source's shape {shapes[0]} is not {shapes[1]}"))
            part = None
        if part is None and len(roles) > 1:
            zeros = constant(own.shape, 0.0, own, "zeros, as the source has none")
            part = zeros if role.endswith(".bias") else own
        if part is not None:
            filled.append(part)
    if len(filled) != len(roles) or not any(part.sources or part.steps for part in filled):
        return None
    if not any(part.sources for part in filled) and len(roles) > 1:
        return None
    if layout.offset and filled[0].shape[0] + layout.offset != target.shape[0]:
        return None
    return layout.write(filled, target.shape, target.value)


def _report_ambiguous(matching: Matching, theirs: Places, ours: Places) -> None:
    """Report ambiguities only if the other side needs the tensors concerned."""
    for found in theirs.ambiguous:
        if found.by_names:  # the names may still decide
            matching.doubles.append(found)
            continue
        names = [name for name in found.names if name in matching.source.tensors] or list(found.candidates)
        same_names = [
            n for n in names
            if n in matching.target.tensors and matching.target.tensors[n].shape == matching.source.tensors[n].shape
            and "Conv1D" not in (matching.target.tensors[n].holder, matching.source.tensors[n].holder)
            and n not in matching.values
        ]  # fmt: skip
        if "stacked" in found.why and len(same_names) == len(names):
            continue  # same name on both sides: assumed to be split the same way
        matching.undecided.update(name for name in names if name not in matching.used)
        matching.ambiguous.append(found)
    for found in ours.ambiguous:
        if not found.by_names and not all(name in matching.source.tensors for name in found.names):
            matching.ambiguous.append(found)


def by_name(matching: Matching) -> None:
    """Assign tensors with equal name and shape; in chosen layers, with the number of the source's layer."""
    target = matching.target
    votes = _votes(matching, {name: name for name in target.tensors if name in matching.source.tensors})
    for name in matching.open_targets():
        origin = _source_name(matching, name)
        for seen in (origin, *_other_leaves(origin)):
            if seen in matching.source.tensors and seen not in matching.undecided:
                if seen in matching.used and origin == name:
                    continue
                if (value := turned(matching, seen, name, votes)) is not None:
                    if origin != name:
                        value = value.then("a chosen layer", same, kind="approximate")
                    matching.place(name, value, "name", (seen,))
                elif target.tensors[name].shape != matching.source.tensors[seen].shape:
                    matching.why.setdefault(
                        seen, Why(f"the source's shape {_shape(matching.source, seen)} is not {_shape(target, name)}")
                    )
                break


def _shape(side: Side, name: str) -> str:
    return "×".join(map(str, side.tensors[name].shape)) or "scalar"


def _source_name(matching: Matching, name: str) -> str:
    found = _NUMBER.search(name)
    if found is None:
        return name
    chosen = matching.layers.get(matching.stacks.get(name[: found.start()].rstrip("."), ""), [])
    if chosen == list(range(len(chosen))) or int(found[0]) >= len(chosen):
        return name
    return f"{name[: found.start()]}{chosen[int(found[0])]}{name[found.end() :]}"


def _other_leaves(name: str) -> Iterator[str]:
    path, dot, leaf = name.rpartition(".")
    for other, meaning in LEAVES.items():
        if leaf in LEAVES and meaning == LEAVES[leaf] and other != leaf:
            yield f"{path}{dot}{other}"


def turned(matching: Matching, seen: str, name: str, votes: set[bool] | None = None) -> Value | None:
    """The source's tensor in the shape and orientation of the target's; None if it does not fit or that is unknown.

    Args:
        votes: whether non-square matrices were transposed (True), not (False), or both.
    """
    source, target = matching.source.tensors[seen], matching.target.tensors[name]
    value, shape = source.value, target.shape
    if len(shape) != 2 or not _is_matrix(target.holder):
        return value if value.shape == shape else None
    holder = "Conv1D" if seen.endswith(".kernel") else source.holder
    if _is_matrix(holder):
        turn = (holder == "Conv1D") != (target.holder == "Conv1D")
    elif shape[0] != shape[1]:
        turn = value.shape != shape
    elif votes and len(votes) == 1:
        turn = next(iter(votes))
    elif votes or (target.holder == "Conv1D" and not source.renamed):
        _square(matching, seen, name)
        return None
    else:
        turn = False
        if not source.renamed:
            matching.squares.append(seen)
    if turn and value.shape[::-1] == shape:
        return value.then("transposed", torch.t, shape)
    return value if value.shape == shape and not turn else None


def _is_matrix(holder: str) -> bool:
    return holder == "Conv1D" or holder.endswith("Linear")


def _square(matching: Matching, seen: str, name: str) -> None:
    kernel = f"{name.removesuffix('weight')}kernel"
    why = "it is square, so its shape does not show whether it is stored [out, in] as in nn.Linear or [in, out] as in Conv1D"
    matching.undecided.add(seen)
    matching.ambiguous.append(Ambiguity((seen,), why, (name, kernel), {f"^{re.escape(seen)}$": kernel}))


def _votes(matching: Matching, pairs: Mapping[str, str]) -> set[bool]:
    """Whether non-square matrices of a source without known classes are transposed; `pairs`: target → source."""
    found = set()
    for name, seen in pairs.items():
        a, b = matching.source.tensors[seen], matching.target.tensors[name]
        shows = len(a.shape) == 2 and a.shape[0] != a.shape[1] and _is_matrix(b.holder) and not a.holder
        if shows and a.shape in (b.shape, b.shape[::-1]):
            found.add(a.shape != b.shape)
    return found


def by_prefix(matching: Matching) -> None:
    """Assign tensors whose names are equal after a common prefix."""
    roles = roles_by_name(matching.source.tensors), roles_by_name(matching.target.tensors)
    while True:
        pairs: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        sources: dict[tuple, list[str]] = defaultdict(list)
        for name in matching.open_sources():
            for ending in {tuple(name.split(".")[-2:]), tuple(name.split(".")[-1:])}:
                sources[(*ending, *sorted(matching.source.tensors[name].shape))].append(name)
        for name in matching.open_targets():
            for seen in sources.get((*name.split(".")[-2:], *sorted(matching.target.tensors[name].shape)), ()):
                known = [found[n].parts for found, n in zip(roles, (seen, name)) if n in found]
                if len(known) < 2 or _inside(known[0]) == _inside(known[1]):  # two roles that differ are not a match
                    pairs[_fronts(seen, name)][name] = seen
        usable = {pair: found for pair, found in pairs.items() if not re.search(r"\d", "".join(pair))}
        if not usable:
            return
        best = max(usable, key=lambda pair: (len(usable[pair]), -len(pair[0]) - len(pair[1])))
        rivals = {p for p in usable if len(usable[p]) == len(usable[best]) and usable[p].keys() == usable[best].keys()}
        twins = {
            p for p in usable if p[0] == best[0] and p != best and set(usable[p].values()) == set(usable[best].values())
        }
        if len(rivals) > 1 or twins:
            _several(matching, usable, rivals | twins | {best})
            return
        wrapper = all(_WRAPPER.match(front) for front in best)
        placed, votes = 0, _votes(matching, usable[best])
        for name, seen in usable[best].items():
            if seen in matching.used:
                continue
            if (value := turned(matching, seen, name, votes)) is not None:
                matching.place(name, value, "prefix", (seen,), proven=wrapper)
                placed += 1
        if not placed:
            return


def _inside(roles: tuple[str, ...]) -> tuple[str, ...]:
    """Roles without the prefix of their list of layers."""
    return tuple(role.rpartition(":")[2] for role in roles)


def _fronts(seen: str, name: str) -> tuple[str, str]:
    """The different prefixes of two names that end alike."""
    a, b = seen.split("."), name.split(".")
    shared = 0
    while shared < min(len(a), len(b)) and a[-1 - shared] == b[-1 - shared]:
        shared += 1
    fronts = (a[: len(a) - shared], b[: len(b) - shared])
    return ".".join([*fronts[0], ""]), ".".join([*fronts[1], ""])


def _several(
    matching: Matching, usable: Mapping[tuple[str, str], Mapping[str, str]], pairs: set[tuple[str, str]]
) -> None:
    names = sorted({name for pair in pairs for name in usable[pair]})
    seen = sorted({source for pair in pairs for source in usable[pair].values()})
    front, own = min(pairs)
    matching.undecided.update(seen)
    fronts = tuple(sorted({f"{a or '(top)'} → {b or '(top)'}" for a, b in pairs}))
    matching.ambiguous.append(
        Ambiguity(tuple(names), "several parts of the source have these names", fronts, {f"^{re.escape(front)}": own})
    )

"""The matcher by role: what both sides use for one purpose, with the transforms that their differences call for."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from ..lazy_tensor import Value, Why, constant
from .fitting import RoleChange, differences, fit, layer_choice, terms
from .matching import LAYER, Matching
from .placing import Ambiguity, Places, places_of, stack_of, taken_as_stacked
from .roles import roles_by_name
from .sides import Side, names_in_order


def by_role(matching: Matching) -> None:
    """What both sides have a role for, with the transforms that their differences call for."""
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
    head_stored, tied = "lm_head.weight" in values, _tied(matching, theirs, values)
    if tied is None:
        marks.append((r"^lm_head\.weight$", "the source has no head, which may be its token embeddings"))

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
        old.tie_word_embeddings, new.tie_word_embeddings = tied is not False, "lm_head.weight" not in ours.of
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
            unsure_stacks.add(front)  # an added block that writes zeros changes nothing only if no norm comes after it
        matching.why |= change.why
        matching.notes += [note for note in change.notes if note not in matching.notes]
    if not head_stored and "lm_head.weight" in tensors and "lm_head.weight" not in ours.of:
        del tensors["lm_head.weight"]
    for name, roles in ours.roles.items():
        layer = LAYER.match(name)
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
            unsure = False  # fused on both sides under one name: in one way
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
    """A tensor that was taken apart and put together again the same way, without the two steps."""
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
    """The source's role for one of the target's, by the choice of layers."""
    front = stack_of(role)
    found, chosen = re.match(r"^model\.layers\.(\d+)\.(.*)$", role[len(front) :]), matching.layers.get(front, [])
    if found is None or int(found[1]) >= len(chosen):
        return role
    return f"{front}model.layers.{chosen[int(found[1])]}.{found[2]}"


def _tied(matching: Matching, theirs: Places, values: Mapping[str, Value]) -> bool | None:
    """Whether the source's head is its token embeddings; None: it has no head, and nothing tells."""
    source = matching.source
    head, table = values.get("lm_head.weight"), values.get("model.embed_tokens.weight")
    said = getattr(source.config, "tie_word_embeddings", None)
    if head is not None and table is not None:
        same_values = head.shape == table.shape and torch.equal(head.compute(), table.compute())
        return same_values if said is None else bool(said) and same_values
    if said is not None or table is None:
        return said is not False
    own = theirs.of["model.embed_tokens.weight"].tensor
    if own in source.aliases.values():
        return True
    shapes = (table.shape, table.shape[::-1])
    other = any(t.shape in shapes for name, t in source.tensors.items() if name != own and name not in source.aliases)
    return False if other or source.module is not None else None


def _ties_its_head(target: Side, ours: Places) -> bool:
    """Whether the token embeddings have a second name."""
    table = ours.of.get("model.embed_tokens.weight")
    shared = names_in_order(target.module).values() if target.module is not None else ()
    return table is not None and any(table.tensor in names and len(names) > 1 for names in shared)


def _written(
    matching: Matching, ours: Places, name: str, parts: list[Value | None], fresh: Callable[[str], Value]
) -> Value | None:
    """The target's tensor of its parts; parts that the source lacks are zeros if biases, else what the target had."""
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
    """Ambiguities count only where the other side needs what they are about."""
    for found in theirs.ambiguous:
        if found.by_names:  # the names may tell yet
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
            continue  # both have it under one name: the way it is divided is taken to be one too
        matching.undecided.update(name for name in names if name not in matching.used)
        matching.ambiguous.append(found)
    for found in ours.ambiguous:
        if not found.by_names and not all(name in matching.source.tensors for name in found.names):
            matching.ambiguous.append(found)

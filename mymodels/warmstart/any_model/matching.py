"""Matchers, one function each: they assign source tensors to target tensors by role, by name, by prefix."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..conversion import same
from ..lazy_tensor import Value, Why
from .placing import Ambiguity
from .roles import LEAVES, roles_by_name
from .sides import Side

_WRAPPER = re.compile(
    r"^(?:(?:module|model|transformer|bert|roberta|distilbert|electra|base_model|backbone|net|encoder|decoder|gpt_neox|"
    r"_orig_mod|state_dict|network|core)\.)*$"
)
LAYER = re.compile(r"^(?:(.*?)\.)?(\d+)\.")
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

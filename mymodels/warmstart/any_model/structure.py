"""The matcher for unknown names: both sides are trees of modules, compared by shapes.

Two subtrees are alike if they have the same children with the same shapes. A subtree with exactly one counterpart is
assigned to it. Of several, order decides if it is known and agrees with the order of the unique ones; otherwise none is
assigned, and the report names the candidates. These assignments count as exact only after both models were run.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch

from ..lazy_tensor import Value
from ..transforms import choose_layers
from .matching import Matching
from .placing import Ambiguity
from .roles import roles_by_name
from .sides import Side

_ANCHORS = (
    3  # how often tensors of different shapes must alternate, equally on both sides, for order to count as evidence
)


@dataclass
class Node:
    """A module: its children by name, or a tensor."""

    path: str
    children: "dict[str, Node]" = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    signature: tuple = ()

    def tensors(self) -> "list[Node]":
        return [self] if self.shape is not None else [t for child in self.children.values() for t in child.tensors()]

    @property
    def is_list(self) -> bool:
        return len(self.children) > 1 and all(name.isdigit() for name in self.children)


def tree(side: Side, names: list[str]) -> Node:
    """The tree of these names."""
    root = Node("")
    for name in names:
        node, parts = root, name.split(".")
        for i, part in enumerate(parts):
            node = node.children.setdefault(part, Node(".".join(parts[: i + 1])))
        node.shape = side.tensors[name].shape
    _sign(root)
    return root


def _sign(node: Node) -> tuple:
    if node.shape is not None:
        leaf = node.path.rpartition(".")[2]
        leaf = leaf if leaf in ("weight", "bias") else ""
        node.signature = ("tensor", leaf, *(sorted(node.shape) if len(node.shape) == 2 else node.shape))
    else:
        for child in node.children.values():
            _sign(child)
        children = sorted((child.signature for child in node.children.values()), key=repr)
        node.signature = ("module", *children)
    return node.signature


def by_structure(matching: Matching) -> None:
    """Assign remaining tensors by their place in the tree and their shapes.

    If the names of both sides give most tensors a role, only pairs in which one has no role are assigned.
    """
    _equal_twins(matching.source)
    roles = roles_by_name(matching.source.tensors), roles_by_name(matching.target.tensors)
    speak = all(2 * len(found) > len(side.tensors) for found, side in zip(roles, (matching.source, matching.target)))
    for without in (0, 1) if speak else (None,):
        names = [n for n in matching.open_sources() if n not in matching.source.aliases]
        names = [n for n in names if without != 0 or n not in roles[0]]
        _place_alike(matching, names, [n for n in matching.open_targets() if without != 1 or n not in roles[1]])


def _place_alike(matching: Matching, names: list[str], own: list[str]) -> None:
    source, target = tree(matching.source, names), tree(matching.target, own)
    pairs: list[tuple[Node, Node]] = []
    _match(source, target, matching, pairs)
    leaves = [(a, b) for a, b in pairs if a.shape is not None and b.shape is not None]
    kinds = _orientation(matching, leaves)
    for seen, place in leaves:
        value = _oriented(matching, seen, place, kinds)
        if value is not None:
            matching.place(place.path, value, "structure", (seen.path,), proven=False)


def _equal_twins(side: Side) -> None:
    """Treat a second matrix with equal values, as saved for a tied one, as an alias."""
    shapes: dict[tuple, list[str]] = defaultdict(list)
    for name, tensor in side.tensors.items():
        if len(tensor.shape) == 2 and name not in side.aliases:
            shapes[tensor.shape].append(name)
    for names in shapes.values():
        if len(names) == 2:
            first, second = (side.tensors[name].value.compute() for name in names)
            if torch.equal(first, second) and bool(first.any()):
                side.aliases[names[1]] = names[0]


def _match(source: Node, target: Node, matching: Matching, pairs: list[tuple[Node, Node]]) -> None:
    if source.shape is not None or target.shape is not None:
        if source.signature == target.signature:
            pairs.append((source, target))
        return
    source, target = _without_wrapper(source, target), _without_wrapper(target, source)
    if source.is_list and target.is_list and _kinds(source) == _kinds(target):
        for a, b in zip(_in_order(source), _in_order(target)):
            _match(a, b, matching, pairs)
        return
    if _chosen_layers(source, target, matching, pairs):
        return
    theirs, ours = _by_signature(source), _by_signature(target)
    alike = [s for s in ours if s in theirs]
    single = [s for s in alike if len(ours[s]) == len(theirs[s]) == 1]
    for signature in single:
        _match(theirs[signature][0], ours[signature][0], matching, pairs)
    several = [s for s in alike if s not in single]
    ordered = matching.source.ordered and _same_order(matching)
    for signature in several:
        alike_there, alike_here = theirs[signature], ours[signature]
        by_order = ordered and len(alike_there) == len(alike_here)
        _undecided(matching, alike_there, alike_here, placed=by_order)
        for x, y in zip(alike_there, alike_here) if by_order else ():
            _match(x, y, matching, pairs)
    left = [n for s, nodes in theirs.items() if s not in ours for n in nodes if n.shape is None]
    open_ = [n for s, nodes in ours.items() if s not in theirs for n in nodes if n.shape is None]
    if len(left) == len(open_) == 1:
        _match(left[0], open_[0], matching, pairs)
    elif left and open_:
        _largest(left, open_, matching, pairs)


def _without_wrapper(node: Node, other: Node) -> Node:
    """Descend to a node's only child while its children have more in common with the other's."""
    while len(node.children) == 1 and not node.is_list:
        (child,) = node.children.values()
        if child.shape is not None or _overlap(child, other) <= _overlap(node, other):
            break
        node = child
    return node


def _overlap(a: Node, b: Node) -> int:
    """The number of common tensors of two nodes' children, each paired with its most similar one."""
    pairs = ((common(x, y), i, j) for i, x in enumerate(a.children.values()) for j, y in enumerate(b.children.values()))
    total, taken = 0, (set[int](), set[int]())
    for score, i, j in sorted(pairs, reverse=True):
        if i not in taken[0] and j not in taken[1]:
            taken[0].add(i)
            taken[1].add(j)
            total += score
    return total


def common(a: Node, b: Node) -> int:
    """The number of tensors of equal shape in two subtrees."""
    counts = (Counter(t.signature for t in node.tensors()) for node in (a, b))
    return sum((next(counts) & next(counts)).values())


def _kinds(node: Node) -> list[tuple]:
    return [child.signature for child in _in_order(node)]


def _in_order(node: Node) -> list[Node]:
    return [node.children[name] for name in sorted(node.children, key=int)]


def _by_signature(node: Node) -> dict[tuple, list[Node]]:
    found: dict[tuple, list[Node]] = defaultdict(list)
    for child in node.children.values():
        found[child.signature].append(child)
    return found


def _same_order(matching: Matching) -> bool:
    """Whether registration order is evidence: tensors of different shapes alternate equally on both sides."""
    return any(_alternate_alike(matching, turned) for turned in (False, True))


def _alternate_alike(matching: Matching, turned: bool) -> bool:
    sequences = []
    for side in (matching.source, matching.target):
        shapes = [
            t.shape
            for name, t in side.tensors.items()
            if name not in side.aliases and len(set(t.shape)) == len(t.shape)
        ]
        shapes = [tuple(sorted(shape)) for shape in shapes] if turned else shapes
        sequences.append([shape for i, shape in enumerate(shapes) if i == 0 or shape != shapes[i - 1]])
    short, long = sorted(sequences, key=len)
    inside = any(long[i : i + len(short)] == short for i in range(len(long) - len(short) + 1))
    return inside and len(short) >= _ANCHORS


def _chosen_layers(source: Node, target: Node, matching: Matching, pairs: list[tuple[Node, Node]]) -> bool:
    """Match lists of similar blocks with different lengths."""
    if not (source.is_list and target.is_list) or len(source.children) == len(target.children):
        return False
    kinds = {child.signature for node in (source, target) for child in node.children.values()}
    if len(kinds) != 1:
        return False
    chosen = choose_layers(matching.options["layers"], len(source.children), len(target.children))
    theirs = _in_order(source)
    for own, origin in zip(_in_order(target), chosen):
        _match(theirs[origin], own, matching, pairs)
    return True


def _largest(left: list[Node], open_: list[Node], matching: Matching, pairs: list[tuple[Node, Node]]) -> None:
    """Match the pair of differing children with the most common tensors, if there is only one such pair."""

    scores = sorted(((common(a, b), i, j) for i, a in enumerate(left) for j, b in enumerate(open_)), reverse=True)
    taken: tuple[set[int], set[int]] = (set(), set())
    for score, i, j in scores:
        rivals = [s for s in scores if s[0] == score and (s[1] == i) != (s[2] == j)]
        if not score or rivals or i in taken[0] or j in taken[1]:
            continue
        taken[0].add(i)
        taken[1].add(j)
        _match(left[i], open_[j], matching, pairs)


def _undecided(matching: Matching, theirs: list[Node], ours: list[Node], *, placed: bool) -> None:
    """Report that each of several modules fits each of several places."""
    names = tuple(t.path for node in ours for t in node.tensors())
    if not placed:
        matching.undecided.update(t.path for node in theirs for t in node.tensors())
    a, b = theirs[0], ours[0]
    leaf = a.shape is not None
    rename = {rf"^{re.escape(a.path)}" + ("$" if leaf else r"\."): b.path + ("" if leaf else ".")}
    why = "several of the source's tensors have this place and shape"
    how = "placed by their order alone" if placed else ""
    matching.ambiguous.append(Ambiguity(names, why, tuple(node.path for node in theirs), rename, how))


def _orientation(matching: Matching, leaves: list[tuple[Node, Node]]) -> dict[tuple[str, str], bool | None]:
    """Pair of module classes → whether its non-square matrices are transposed."""
    shown: dict[tuple[str, str], set[bool]] = defaultdict(set)
    for seen, own in leaves:
        if len(seen.shape or ()) == 2 and seen.shape[0] != seen.shape[1]:  # type: ignore[index]
            kinds = _holders(matching, seen, own)
            if "Embedding" not in kinds:
                shown[kinds].add(seen.shape != own.shape)
    return {kinds: next(iter(found)) if len(found) == 1 else None for kinds, found in shown.items()}


def _holders(matching: Matching, seen: Node, own: Node) -> tuple[str, str]:
    return matching.source.tensors[seen.path].holder, matching.target.tensors[own.path].holder


def _oriented(matching: Matching, seen: Node, own: Node, kinds: dict[tuple[str, str], bool | None]) -> Value | None:
    source, target = matching.source.tensors[seen.path], matching.target.tensors[own.path]
    if len(source.shape) != 2:
        return source.value
    holders = _holders(matching, seen, own)
    if all(holders) and ("Conv1D" in holders) and holders[0] != holders[1]:
        turn: bool | None = True
    elif source.shape[0] != source.shape[1]:
        turn = source.shape != target.shape
    elif all(holders):
        turn = False
    else:
        turn = kinds.get(holders, False if holders[1] != "Conv1D" else None)
    if turn is None:
        matching.undecided.add(seen.path)
        kernel = f"{own.path.removesuffix('weight')}kernel"
        matching.ambiguous.append(
            Ambiguity(
                (own.path,), "the matrix is square, so its shape does not show whether it is stored [out, in] or [in, out]",
                (own.path, kernel), {f"^{re.escape(seen.path)}$": own.path},
            )
        )  # fmt: skip
        return None
    return source.value.then("transposed", torch.t, target.shape) if turn else source.value

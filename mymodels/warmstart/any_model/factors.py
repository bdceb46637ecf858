"""Convert a matrix to two low-rank factors, and two factors to their product."""

from collections import defaultdict
from functools import cache

import torch

from ..conversion import same
from ..lazy_tensor import Value
from .matching import Matching
from .placing import places_of
from .roles import roles_by_name
from .sides import Side, Tensor


def by_factors(matching: Matching) -> None:
    """Match two factors on one side with their product on the other, under the same name or role."""
    _into_factors(matching)
    _into_product(matching)


def _pairs(side: Side, names: list[str]) -> dict[str, tuple[str, str]]:
    """Common prefix → the factor applied first [r, in] and the second factor [out, r]."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        path = name.removesuffix(".weight")
        if len(side.tensors[name].shape) == 2:
            groups[path.rpartition(".")[0]].append(name)
    found = {}
    for front, members in groups.items():
        if len(members) != 2 or not front:
            continue
        for first, second in (members, members[::-1]):
            (rank, width), (out, inner) = side.tensors[first].shape, side.tensors[second].shape
            if rank == inner and rank < min(width, out):
                found[front] = (first, second)
                break
    return found


def _matrix(side: Side, other: Side, front: str, shape: tuple[int, ...], names: list[str]) -> str | None:
    """The matrix of a side that corresponds to the other side's factors."""
    wanted = f"{front}.weight"
    roles = roles_by_name([*side.tensors, *other.tensors, wanted])
    same_role = [
        name for name in names
        if name == wanted or (wanted in roles and name in roles and roles[name].parts == roles[wanted].parts)
    ]  # fmt: skip
    usable = [name for name in same_role if shape in (side.tensors[name].shape, side.tensors[name].shape[::-1])]
    return usable[0] if len(usable) == 1 else None


def _into_factors(matching: Matching) -> None:
    source, target = matching.source, matching.target
    for front, (first, second) in _pairs(target, matching.open_targets()).items():
        (rank, width), (out, _) = target.tensors[first].shape, target.tensors[second].shape
        name = _matrix(source, target, front, (out, width), matching.open_sources())
        if name is None:
            continue
        value = source.tensors[name].value
        layout = places_of(source).layouts.get(name)
        if layout is not None and layout.transposed:
            value = value.then("transposed", torch.t, value.shape[::-1])
        if value.shape != (out, width):
            continue
        _place_factors(matching, front, name, value, first, second, rank)


def _place_factors(matching: Matching, front: str, name: str, value: Value, first: str, second: str, rank: int) -> None:
    @cache
    def decomposed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.linalg.svd(value.compute().double(), full_matrices=False)

    sizes = decomposed()[1].square()
    kept = (sizes[:rank].sum() / sizes.sum().clamp_min(1e-300)).item()
    step = f"factors of rank {rank}, which keep {kept:.2%} of the energy"
    root = decomposed()[1][:rank].sqrt()
    right, left = root[:, None] * decomposed()[2][:rank], decomposed()[0][:, :rank] * root
    shapes = (matching.target.tensors[first].shape, matching.target.tensors[second].shape)
    for target, factor, shape in ((first, right, shapes[0]), (second, left, shapes[1])):
        made = value.then(step, lambda _, factor=factor: factor, shape, kind="approximate", resized=True)  # type: ignore[misc]
        matching.place(target, made, "factors", (name,))
    bias = f"{second.removesuffix('.weight')}.bias"
    theirs = f"{name.removesuffix('.weight')}.bias"
    if bias in matching.open_targets() and theirs in matching.open_sources():
        matching.place(bias, matching.source.tensors[theirs].value.then("", same), "factors", (theirs,))


def _into_product(matching: Matching) -> None:
    source, target = matching.source, matching.target
    for front, (first, second) in _pairs(source, matching.open_sources()).items():
        (_, width), (out, _) = source.tensors[first].shape, source.tensors[second].shape
        name = _matrix(target, source, front, (out, width), matching.open_targets())
        if name is None or target.tensors[name].shape != (out, width) or target.tensors[name].holder == "Conv1D":
            continue
        right: Tensor = source.tensors[first]
        product = source.tensors[second].value.then(
            "the product of two factors",
            lambda left, right=right: (left.double() @ right.value.compute().double()).to(left.dtype),  # type: ignore[misc]
            (out, width),
            using=(right.value,),
        )
        biased = f"{first.removesuffix('.weight')}.bias" in source.tensors
        if biased:
            product = product.then("without the bias between the factors", same, kind="approximate")
        matching.place(name, product, "factors", (first, second))
        theirs, bias = (f"{n.removesuffix('.weight')}.bias" for n in (second, name))
        if theirs in matching.open_sources() and bias in matching.open_targets():
            matching.place(bias, source.tensors[theirs].value, "factors", (theirs,))

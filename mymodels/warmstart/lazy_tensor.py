"""`Value`: a tensor to be, which knows what it will be made of and how, and is computed when it is asked for."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch


class Why(NamedTuple):
    """Why a tensor of the source has no place in the target.

    Attributes:
        text: for people.
        kind: `"exact"` if the target computes the same without it.
        constant: whether it is no weight of its own: a mask, or a second name of another tensor.
        requested: whether the caller left it out.
    """

    text: str
    kind: str = "approximate"
    constant: bool = False
    requested: bool = False


KINDS = ("exact", "approximate", "new")  # the worse the later


def worst(kinds: Iterable[str]) -> str:
    return max(kinds, key=KINDS.index, default="exact")


@dataclass(frozen=True)
class Value:
    """A tensor of the target, before it is computed.

    Attributes:
        shape: its shape.
        dtype: of what it is made from.
        compute: makes it.
        sources: names of the source's tensors it is made from; none for a new one.
        steps: what is done to them, for people.
        kind: `"exact"` (the function stays), `"approximate"`, `"new"`.
        resized: whether it has more or fewer rows or columns than its source.
        partly_new: whether some of it comes from no source, so that it must be trained.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], torch.Tensor] = field(repr=False)
    sources: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    kind: str = "exact"
    resized: bool = False
    partly_new: bool = False

    def then(
        self,
        step: str,
        change: Callable[[torch.Tensor], torch.Tensor],
        shape: tuple[int, ...] | None = None,
        *,
        kind: str = "exact",
        using: "Iterable[Value]" = (),
        resized: bool = False,
        partly_new: bool = False,
    ) -> "Value":
        """What `change` makes of this value; `using`: other values that it reads."""
        others = tuple(using)
        sources = dict.fromkeys([*self.sources, *(name for value in others for name in value.sources)])
        return replace(
            self,
            shape=self.shape if shape is None else shape,
            compute=lambda: change(self.compute()),
            sources=tuple(sources),
            steps=(*self.steps, step) if step and step not in self.steps else self.steps,
            kind=worst([self.kind, kind, *(value.kind for value in others)]),
            resized=self.resized or resized,
            partly_new=self.partly_new or partly_new,
        )

    def rows(self, step: str, index: list[int] | slice, *, kind: str = "exact", resized: bool = True) -> "Value":
        """Some of its rows."""
        count = len(range(self.shape[0])[index]) if isinstance(index, slice) else len(index)
        return self.then(step, lambda tensor: tensor[index], (count, *self.shape[1:]), kind=kind, resized=resized)


def constant(shape: tuple[int, ...], fill: float, like: Value, step: str, kind: str = "exact") -> Value:
    """A value made from no source."""
    dtype = like.dtype
    return Value(shape, dtype, lambda: torch.full(shape, fill, dtype=dtype), steps=(step,) if step else (), kind=kind)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity in it; without a copy, which `torch.isfinite` makes."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)  # either is NaN if one is
    return bool(torch.isfinite(low) & torch.isfinite(high))

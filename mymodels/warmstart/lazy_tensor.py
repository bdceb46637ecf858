"""`Value`: a lazy tensor that records its sources and steps, and is computed on demand."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch


class Why(NamedTuple):
    """Why a tensor of the source is not used.

    Attributes:
        text: the reason.
        kind: `"exact"` if the target's outputs are the same without it.
        constant: whether it is not a weight: a mask, or a second name of another tensor.
        requested: whether the caller excluded it.
    """

    text: str
    kind: str = "approximate"
    constant: bool = False
    requested: bool = False


KINDS = ("exact", "approximate", "new")  # from best to worst


def worst(kinds: Iterable[str]) -> str:
    """The last of these in `KINDS`; `"exact"` if there are none."""
    return max(kinds, key=KINDS.index, default="exact")


@dataclass(frozen=True)
class Value:
    """A tensor of the target, before it is computed.

    Attributes:
        shape: its shape.
        dtype: dtype of its source.
        compute: computes the tensor.
        sources: names of the source's tensors that it is computed from; none for a new one.
        steps: what is done to them, in words.
        kind: `"exact"` (the model's function is preserved), `"approximate"` or `"new"`.
        resized: whether it has more or fewer rows or columns than its source.
        partly_new: whether a part of it comes from no source and must be trained.
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
        """The result of `change` on this value; `using`: other values that `change` reads."""
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
        """A selection of its rows."""
        count = len(range(self.shape[0])[index]) if isinstance(index, slice) else len(index)
        return self.then(step, lambda tensor: tensor[index], (count, *self.shape[1:]), kind=kind, resized=resized)


def constant(shape: tuple[int, ...], fill: float, like: Value, step: str, kind: str = "exact") -> Value:
    """A tensor with one value throughout, of the dtype of `like`."""
    dtype = like.dtype
    return Value(shape, dtype, lambda: torch.full(shape, fill, dtype=dtype), steps=(step,) if step else (), kind=kind)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether it has no NaN and no infinity; unlike `torch.isfinite`, without a tensor of the same size."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(
        tensor.float() if tensor.dtype.itemsize == 1 else tensor
    )  # both are NaN if there is a NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))

"""Limits for reading pickles of strangers: no read beyond the file's end, no state that NumPy would trust blindly."""

import pickle
from typing import Any

import numpy as np

_SIMPLE = "?bhilqBHILQefdgFDG"
_SIZED = "SU"  # text, whose length is in the state
_LONGEST = 2**20
_OBJECTS = 63  # the flags of an array of objects


class BoundedReader:
    """A file that refuses to read more bytes than it has, before it allocates them."""

    def __init__(self, file: Any):
        self.file, self.readline = file, file.readline
        try:
            here = file.tell()
            self.end: int | None = file.seek(0, 2)
            file.seek(here)
        except (AttributeError, OSError, ValueError):  # a stream
            self.end = None

    def _check(self, count: int) -> None:
        if self.end is not None and count > self.end - self.file.tell():
            raise pickle.UnpicklingError(f"it needs {count:,} bytes and ends before them: it is truncated or damaged")

    def read(self, count: int = -1) -> bytes:
        self._check(count)
        data: bytes = self.file.read(count)
        return data

    def readinto(self, buffer: Any) -> int:
        self._check(len(buffer))
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def dtype_state(dtype: np.dtype, state: Any) -> tuple:
    """The state of a NumPy type with nothing in it that NumPy takes over unchecked: flags, sizes, offsets.

    Raises:
        UnpicklingError: it is no state that NumPy writes.
    """
    if isinstance(state, tuple) and len(state) in (8, 9) and state[1] in ("<", ">", "=", "|"):
        order, subtype, names, fields, size = state[1:6]
        char, simple = dtype.char, (subtype, names, fields) == (None, None, None)
        small = isinstance(size, int) and 0 <= size <= _LONGEST
        if simple and char in _SIMPLE:
            return (3, order, None, None, None, -1, -1, 0)
        if simple and char in _SIZED and small:
            return (3, order, None, None, None, size, *((4, 8) if char == "U" else (1, 0)))
        if simple and char == "O":
            return (3, "|", None, None, None, -1, -1, _OBJECTS)
        if simple and char in "Mm" and len(state) == 9:
            return (3, order, None, None, None, -1, -1, 0, _unit(state[8]))
        if simple and dtype.isbuiltin == 2 and order != ">":  # ml_dtypes' bfloat16, float8, …: their own state
            return dtype.__reduce__()[2]  # type: ignore[return-value]
        if char == "V" and subtype is None and small and _fit(names, fields, size):
            return (3, "|", None, names, fields, size, 1, 0)
    raise pickle.UnpicklingError(f"its NumPy type {dtype.char!r} is damaged")


def _unit(metadata: Any) -> tuple:
    """The unit of a date or a duration."""
    if isinstance(metadata, tuple) and len(metadata) == 2 and isinstance(metadata[1], tuple) and len(metadata[1]) == 4:
        name, *numbers = metadata[1]
        if isinstance(name, bytes) and all(isinstance(n, int) and 0 < n < 2**31 for n in numbers):
            return ({}, metadata[1])
    raise pickle.UnpicklingError("its NumPy type for dates is damaged")


def _fit(names: Any, fields: Any, size: int) -> bool:
    """Whether the fields of a record are plain and inside it."""
    if (names, fields) == (None, None):
        return True
    if not (isinstance(names, tuple) and isinstance(fields, dict) and set(names) == set(fields)):
        return False
    places = [(field[0], field[1]) for field in fields.values() if isinstance(field, tuple) and len(field) >= 2]
    return len(places) == len(names) and all(
        isinstance(kind, np.dtype) and not kind.hasobject and isinstance(at, int) and 0 <= at <= size - kind.itemsize
        for kind, at in places
    )

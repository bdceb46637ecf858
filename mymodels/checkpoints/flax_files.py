"""Flax's msgpack files (`flax_model.msgpack`), read an array at a time; transformers' models get torch's names and layout."""

from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from .checkpoint import Checkpoint, CheckpointError, TensorInfo
from .foreign_names import from_flax, renamed_checkpoint
from .third_party_formats import import_library, torch_dtype

_NDARRAY, _CHUNKED = 1, "__msgpack_chunked_array__"
_FIXED = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_LENGTHS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_BINARY = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_MAX_DEPTH = 200


class _Array(NamedTuple):
    """The position of an array's bytes in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    size: int  # in bytes


def open_flax(path: Path) -> Checkpoint:
    """Open a file of `flax.serialization`: nested dicts of arrays.

    Raises:
        CheckpointError: it is damaged, or holds an array of a type that torch does not have.
    """
    found = _Reader(path).read()
    info = {name: TensorInfo(array.shape, array.dtype, path.name) for name, (array, _) in found.arrays.items()}
    if not info:
        raise CheckpointError(
            f"{path} holds no arrays, only {', '.join(found.others) or 'nothing'}: it holds no weights"
        )

    def read(name: str) -> torch.Tensor:
        array, pieces = found.arrays[name]
        data = bytearray()
        with path.open("rb") as file:
            for piece in pieces:
                file.seek(piece.begin)
                data += file.read(piece.size)
        flat = torch.frombuffer(data, dtype=array.dtype) if data else torch.empty(0, dtype=array.dtype)
        return flat.reshape(array.shape)

    raw = Checkpoint(path, "Flax", info, read, extras=found.others)
    return renamed_checkpoint(raw, from_flax, "flax_model")


class _Reader:
    def __init__(self, path: Path):
        self.path, self.size = path, path.stat().st_size
        self.msgpack = import_library("msgpack", "flax", path, "a msgpack file of Flax")
        self.arrays: dict[str, tuple[_Array, list[_Array]]] = {}
        self.others: dict[str, Any] = {}

    def read(self) -> "_Reader":
        with self.path.open("rb") as file:
            end = self._value(file, 0, ())
        if end != self.size:
            raise CheckpointError(
                f"{self.path}: its data ends at byte {end:,} of {self.size:,}: copy or download it again"
            )
        return self

    def _unpacker(self, file: BinaryIO, at: int) -> Any:
        """msgpack's unpacker at a position of the file; it reads at most 256 bytes ahead, so no array."""
        file.seek(at)
        return self.msgpack.Unpacker(file, read_size=256, raw=False, strict_map_key=False, max_buffer_size=2**20)

    def _value(self, file: BinaryIO, at: int, name: tuple[str, ...]) -> int:
        """Record the value that begins at byte `at`; returns the position after it."""
        if len(name) > _MAX_DEPTH:
            raise CheckpointError(
                f"{self.path} is nested more than {_MAX_DEPTH} levels deep: it is not a file of weights"
            )
        file.seek(at)
        first = (file.read(1) or b"\xc1")[0]
        if first in _FIXED or first in _LENGTHS:
            return self._extension(file, at, first, ".".join(name))
        if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
            reader = self._unpacker(file, at)
            count = reader.read_map_header()
            at += reader.tell()
            before = set(self.arrays)
            for _ in range(count):
                reader = self._unpacker(file, at)
                key = reader.unpack()
                at = self._value(file, at + reader.tell(), (*name, str(key)))
            if _CHUNKED in (key.rpartition(".")[2] for key in self.others):
                self._join(".".join(name), before)
            return at
        if first in _BINARY:  # bytes, which may be long
            count = int.from_bytes(file.read(_BINARY[first]), "big")
            self.others[".".join(name)] = f"{count:,} bytes"
            return at + 1 + _BINARY[first] + count
        reader = self._unpacker(file, at)
        value = reader.unpack()
        self.others[".".join(name)] = value
        return at + reader.tell()

    def _extension(self, file: BinaryIO, at: int, first: int, name: str) -> int:
        width = _LENGTHS.get(first, 0)
        length = int.from_bytes(file.read(width), "big") if width else _FIXED[first]
        code = file.read(1)[0]
        begin = at + 2 + width
        if begin + length > self.size:
            raise CheckpointError(f"{self.path}: {name!r} ends beyond the file: truncated, copy or download it again")
        if code != _NDARRAY:  # a NumPy scalar or a complex number
            self.others[name] = f"a value of type {code}"
            return begin + length
        reader = self._unpacker(file, begin)
        if reader.read_array_header() != 3:
            raise CheckpointError(f"{self.path}: {name!r} is not an array in Flax's format: copy or download it again")
        shape, kind = reader.unpack(), reader.unpack()
        kind = kind.decode("ascii", "replace") if isinstance(kind, bytes) else str(kind)
        dtype = torch_dtype(kind)
        if dtype is None or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise CheckpointError(f"{self.path}: array {name!r} has the type {kind}, which torch does not have")
        place = begin + reader.tell()
        file.seek(place)
        head = file.read(1)[0]
        if head not in _BINARY:
            raise CheckpointError(f"{self.path}: {name!r} is not an array in Flax's format: copy or download it again")
        count = int.from_bytes(file.read(_BINARY[head]), "big")
        data = place + 1 + _BINARY[head]
        array = _Array(tuple(shape), dtype, data, count)
        if data + count != begin + length or count != int(np.prod(shape, dtype=object)) * dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: array {name!r} of {tuple(shape)} has {count:,} bytes: copy or download it again"
            )
        self.arrays[name] = (array, [array])
        return begin + length

    def _join(self, name: str, before: set[str]) -> None:
        """Join an array of more than a gigabyte, which Flax stores as a dict of its shape and flat pieces."""
        prefix = f"{name}." if name else ""
        if f"{prefix}{_CHUNKED}" not in self.others:
            return
        numbers = [key for key in self.others if key.startswith(f"{prefix}shape.")]
        shape = tuple(self.others[f"{prefix}shape.{i}"] for i in range(len(numbers)))
        names = [key for key in self.arrays if key not in before and key.startswith(f"{prefix}chunks.")]
        pieces = [self.arrays.pop(key)[0] for key in sorted(names, key=lambda key: int(key.rpartition(".")[2]))]
        for key in [key for key in self.others if key.startswith((f"{prefix}shape.", f"{prefix}{_CHUNKED}"))]:
            del self.others[key]
        joined = _Array(shape, pieces[0].dtype, pieces[0].begin, sum(piece.size for piece in pieces))
        if joined.size != int(np.prod(shape, dtype=object)) * joined.dtype.itemsize:
            raise CheckpointError(f"{self.path}: the pieces of {name!r} do not make {shape}: copy or download it again")
        self.arrays[name] = (joined, pieces)

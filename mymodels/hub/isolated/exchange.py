"""Messages between a process and the one in the box: JSON in pipes, tensors in shared memory.

Both sides use this file; it imports the standard library and torch only. The reader trusts nothing: a message has
bounds, a tensor must lie within the memory, and is copied out of it. Memory cannot be made smaller, so that reading it
cannot fail.
"""

import json
import math
import mmap
import os
import select
import struct
import time
from collections.abc import Mapping
from typing import Any

import torch

LARGEST_MESSAGE = 16_000_000  # bytes of JSON
DEEPEST = 40  # levels of lists and mappings
_ALIGNMENT = 64
_SEALS = 0x0001 | 0x0002  # F_SEAL_SEAL, F_SEAL_SHRINK
DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"),
        *("complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"),
    )
    if hasattr(torch, name)
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class InvalidMessage(ValueError):
    """A message that the other side may not send."""


class Closed(EOFError):
    """The other side has ended."""


class Handle:
    """An object that stays on the other side, such as a cache of keys and values."""

    def __init__(self, number: int):
        self.number = number


def shared_memory(name: str) -> int:
    """A descriptor of memory that two processes share; it can grow, and never shrink."""
    import fcntl  # not on Windows, where nothing here is called

    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor


class Channel:
    """Sends and receives values: None, truth values, numbers, texts, lists, tuples, mappings, tensors, `Handle`s.

    Args:
        incoming, outgoing: pipes.
        incoming_memory, outgoing_memory: descriptors of `shared_memory`.
        largest: bytes of tensors that a message may bring; None for no limit.
    """

    def __init__(
        self, incoming: int, outgoing: int, incoming_memory: int, outgoing_memory: int, largest: int | None = None
    ):
        self.incoming, self.outgoing, self.largest = incoming, outgoing, largest
        self._memories = {incoming_memory: mmap.mmap(-1, 1), outgoing_memory: mmap.mmap(-1, 1)}
        self._read_from, self._write_to = incoming_memory, outgoing_memory
        self._left = largest

    def send(self, value: Any) -> None:
        """Send a value.

        Raises:
            TypeError: it holds something that cannot be sent, such as a function.
            Closed: the other side has ended.
        """
        tensors: list[tuple[int, torch.Tensor]] = []
        text = json.dumps(_encode(value, tensors, 0)).encode()
        if len(text) > LARGEST_MESSAGE:
            raise TypeError(f"it has {len(text):,} bytes besides its tensors, more than {LARGEST_MESSAGE:,}")
        if tensors:
            end = tensors[-1][0] + tensors[-1][1].numel()
            memory = self._memory(self._write_to, end, grow=True)
            for offset, tensor in tensors:
                if tensor.numel():
                    torch.frombuffer(memory, dtype=torch.uint8, count=tensor.numel(), offset=offset).copy_(tensor)
        data = memoryview(struct.pack("<Q", len(text)) + text)
        try:
            while data:
                data = data[os.write(self.outgoing, data) :]
        except BrokenPipeError:
            raise Closed from None

    def receive(self, seconds: float | None = None) -> Any:
        """The next value.

        Raises:
            Closed: the other side has ended.
            InvalidMessage: what came is no message.
            TimeoutError: nothing came within `seconds`.
        """
        until = None if seconds is None else time.monotonic() + seconds
        (size,) = struct.unpack("<Q", self._read(8, until))
        if size > LARGEST_MESSAGE:
            raise InvalidMessage(f"a message of {size:,} bytes")
        self._left = self.largest
        try:
            value = json.loads(self._read(size, until), parse_constant=_refuse)
            return self._decode(value, 0)
        except InvalidMessage:
            raise
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise InvalidMessage(f"a damaged message ({type(error).__name__}: {error})") from None

    def _read(self, size: int, until: float | None) -> bytes:
        parts = []
        while size:
            if until is not None:
                left = max(0.0, until - time.monotonic())
                if not select.select([self.incoming], [], [], left)[0]:
                    raise TimeoutError
            part = os.read(self.incoming, min(size, 2**20))
            if not part:
                raise Closed
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _memory(self, descriptor: int, size: int, *, grow: bool) -> mmap.mmap:
        """The memory of a descriptor, at least `size` bytes of it."""
        known = self._memories[descriptor]
        if size <= len(known) and len(known) > 1:
            return known
        present = os.fstat(descriptor).st_size
        if present < size:
            if not grow:
                raise InvalidMessage(f"a tensor that ends at byte {size:,} of {present:,}")
            present = max(size, 2**20)
            os.ftruncate(descriptor, present)
        self._memories[descriptor] = mmap.mmap(descriptor, present)
        return self._memories[descriptor]

    def _decode(self, value: Any, depth: int) -> Any:
        if depth > DEEPEST:
            raise InvalidMessage(f"a value nested deeper than {DEEPEST} levels")
        if not isinstance(value, dict):
            if isinstance(value, list):
                raise InvalidMessage("a list where a value should be")
            return value
        ((kind, content),) = value.items()
        if kind in ("list", "tuple"):
            items = [self._decode(item, depth + 1) for item in content]
            return items if kind == "list" else tuple(items)
        if kind == "mapping":
            found = {_key(key): self._decode(item, depth + 1) for key, item in content}
            if len(found) < len(content):
                raise InvalidMessage("a mapping in which a key stands twice")
            return found
        if kind == "float":
            return float(content)
        if kind == "dtype":
            return DTYPES[content]
        if kind == "handle":
            return Handle(int(content))
        if kind == "tensor":
            return self._tensor(*content)
        raise InvalidMessage(f"a value of the kind {kind!r}")

    def _tensor(self, offset: int, shape: list[int], name: str) -> torch.Tensor:
        dtype = DTYPES[name]
        numbers = [offset, *shape]
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers) or len(shape) > 64:
            raise InvalidMessage("a tensor with an impossible shape")
        count = math.prod(shape)
        size = count * dtype.itemsize
        if self._left is not None:
            self._left -= size  # of all tensors: they may lie in the same place
            if self._left < 0:
                raise InvalidMessage(f"tensors of more than {self.largest:,} bytes")
        if not count:
            return torch.empty(shape, dtype=dtype)
        memory = self._memory(self._read_from, offset + size, grow=False)
        if dtype is torch.bool:  # its bytes may be neither 0 nor 1
            return (torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=offset) != 0).reshape(shape)
        return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).clone().view(dtype).reshape(shape)


def _encode(value: Any, tensors: list[tuple[int, torch.Tensor]], depth: int) -> Any:
    """A value as JSON, in which every value but null, truth values, texts and numbers is an object with one key."""
    if depth > DEEPEST:
        raise TypeError(f"it is nested deeper than {DEEPEST} levels")
    if isinstance(value, torch.Tensor):
        if value.dtype not in _NAMES or value.layout != torch.strided or value.is_meta:
            raise TypeError(f"a tensor of {value.dtype}, {value.layout} on {value.device} cannot be sent")
        data = value.detach().cpu().contiguous()
        start = tensors[-1][0] + tensors[-1][1].numel() if tensors else 0
        start += -start % _ALIGNMENT
        tensors.append((start, data.reshape(-1).view(torch.uint8)))
        return {"tensor": [start, list(data.shape), _NAMES[data.dtype]]}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, torch.dtype):
        return {"dtype": _NAMES[value]}
    if isinstance(value, Handle):
        return {"handle": value.number}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {"mapping": [[_key(key), _encode(item, tensors, depth + 1)] for key, item in value.items()]}
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, tensors, depth + 1) for item in value]}
    raise TypeError(f"a {type(value).__name__} cannot be sent to a process in the box")


def _key(key: Any) -> str | int:
    if not isinstance(key, (str, int)):
        raise TypeError(f"a key is a {type(key).__name__}, neither a text nor a number")
    return key


def _refuse(constant: str) -> Any:
    raise InvalidMessage(f"the number {constant}")

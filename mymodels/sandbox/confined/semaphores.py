"""Semaphores of `multiprocessing` on pipes, for a box without a `/dev/shm` of its own.

Python's are files in `/dev/shm`, which all processes of the machine share. These are inherited by forks; nothing else can
have them.
"""

import _multiprocessing
import contextlib
import fcntl
import multiprocessing.heap
import os
import select
import struct
import termios
import threading
import time
from typing import Any

_RECURSIVE = 0
_LARGEST = 32_767  # tokens that a pipe holds without doubt


class PipeSemaphore:
    """What `_multiprocessing.SemLock` is: each token in the pipe is one that may be acquired."""

    SEM_VALUE_MAX = _LARGEST

    def __init__(self, kind: int, value: int, maxvalue: int, name: str | None, unlink: bool):
        if value > _LARGEST:
            raise OSError(f"a semaphore of more than {_LARGEST} cannot be made in the box")
        self.kind, self.maxvalue, self.name = kind, maxvalue, None
        self._held, self._owner = 0, 0
        self.handle, self._write = os.pipe()
        os.set_blocking(self.handle, False)
        os.write(self._write, bytes(value))

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.handle)
            os.close(self._write)

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        if self.kind == _RECURSIVE and self._is_mine():
            self._held += 1
            return True
        until = None if block and timeout is None else time.monotonic() + max(0.0, timeout or 0.0) * block
        while True:
            with contextlib.suppress(BlockingIOError):
                os.read(self.handle, 1)
                self._held, self._owner = self._held + 1, threading.get_ident()
                return True
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return False
            select.select([self.handle], [], [], left)

    def release(self) -> None:
        if self.kind == _RECURSIVE:
            if not self._is_mine():
                raise AssertionError("attempt to release recursive lock not owned by thread")
            self._held -= 1
            if self._held:
                return
        else:
            if self._get_value() >= self.maxvalue:
                raise ValueError("semaphore or lock released too many times")
            self._held -= 1
        os.write(self._write, b"\0")

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _count(self) -> int:
        return self._held

    def _is_mine(self) -> bool:
        return self._held > 0 and self._owner == threading.get_ident()

    def _get_value(self) -> int:
        return struct.unpack("i", fcntl.ioctl(self.handle, termios.FIONREAD, bytes(4)))[0]

    def _is_zero(self) -> bool:
        return self._get_value() == 0

    def _after_fork(self) -> None:
        self._held = 0


def use_no_shared_folder() -> None:
    """Let `multiprocessing` make its semaphores of pipes, and shared values of files in the scratch folder."""
    replaced: Any = _multiprocessing
    replaced.SemLock = PipeSemaphore
    arena: Any = multiprocessing.heap.Arena
    arena._dir_candidates = []

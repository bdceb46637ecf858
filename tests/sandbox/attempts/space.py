"""Filling the disk, and the pipe to whoever reads the output. Each runs in a box of its own."""

import ctypes
import mmap
import os
import time
from pathlib import Path

from . import Printed, Target, attempt
from .kernel import libc

MB = 2**20
SPACE = {"scratch_size": 16 * MB, "seconds": 30}
PAGE = mmap.PAGESIZE


def _write(path: str | Path, size: int) -> None:
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // MB):
            file.write(bytes(MB))


def _folder(target: Target) -> Path:
    os.mkdir(target.scratch_path())
    return Path(target.scratch_path())


@attempt(**SPACE)
def write_huge_file(target: Target):
    _write(target.scratch_path(), 64 * MB)
    time.sleep(1)
    return os.path.getsize(target.scratch_path())


@attempt(**SPACE)
def write_many_files(target: Target):
    """Each is small; together they are above the limit."""
    folder = _folder(target)
    for number in range(64):
        _write(folder / str(number), MB)
    time.sleep(1)
    return len(list(folder.iterdir())) == 64


@attempt(**SPACE)
def write_deleted_files(target: Target):
    """They have no name any more, and take their space until they are closed."""
    kept = []
    for _ in range(64):
        kept.append(os.open(target.scratch_path(), os.O_CREAT | os.O_WRONLY))
        os.unlink(target.scratch_path())
        os.write(kept[-1], bytes(MB))
    time.sleep(1)
    return sum(os.fstat(file).st_size for file in kept) == 64 * MB


@attempt(**SPACE)
def write_deleted_and_mapped_files(target: Target):
    """Neither a name nor a descriptor leads to them: a page in memory keeps them."""
    kept = []
    for _ in range(64):
        file = os.open(target.scratch_path(), os.O_CREAT | os.O_RDWR)
        os.unlink(target.scratch_path())
        os.write(file, bytes(MB))
        kept.append(_map_page(file))
        os.close(file)
    time.sleep(4)
    return len(kept)


def _map_page(file: int) -> int:
    """`mmap` of Python's keeps a descriptor of its own."""
    at = libc.mmap(None, PAGE, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
    if at == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return at


@attempt(**SPACE)
def write_unnamed_files(target: Target):
    kept = [os.open(target.scratch, 0o20200000 | os.O_WRONLY) for _ in range(64)]
    for file in kept:
        os.write(file, bytes(MB))
    time.sleep(1)
    return True


@attempt(**SPACE)
def allocate_huge_file(target: Target):
    with open(target.scratch_path(), "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 64 * MB)
        time.sleep(1)
        return os.fstat(file.fileno()).st_blocks


@attempt(**SPACE)
def write_by_mapping(target: Target):
    with open(target.scratch_path(), "w+b") as file:
        file.truncate(64 * MB)
        with mmap.mmap(file.fileno(), 64 * MB) as data:
            data[::PAGE] = b"x" * (64 * MB // PAGE)
            data.flush()
        time.sleep(1)
        return os.fstat(file.fileno()).st_blocks * 512 >= 64 * MB


@attempt(**SPACE)
def make_sparse_file(target: Target):
    """A file that says it holds a terabyte: whoever reads it, reads for hours."""
    with open(target.scratch_path(), "wb") as file:
        file.truncate(2**40)
    time.sleep(1)
    return os.path.getsize(target.scratch_path()) == 2**40


@attempt(scratch_size=16 * MB, seconds=20)
def make_many_empty_files(target: Target):
    """They take no space, and all the room for names there is."""
    folder = _folder(target)
    for number in range(20_000):
        os.close(os.open(folder / str(number), os.O_CREAT | os.O_WRONLY))
    time.sleep(4)  # the box looks at files every 3 seconds at the latest; what ends before that is in test_run.py
    return True


# ---- output


@attempt(seconds=20)
def print_without_end(target: Target):
    """40 MB, which the process that reads it would have to hold."""
    line = b"x" * MB
    for _ in range(40):
        os.write(1, line)
    os.write(1, b"\n")
    return Printed(40 * MB)


@attempt(seconds=20)
def complain_without_end(target: Target):
    line = b"x" * MB
    for _ in range(40):
        os.write(2, line)
    return Printed(40 * MB)

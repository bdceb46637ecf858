"""Weights in huge pages of memory, on Linux.

A product with one token reads each weight once, and from memory. With pages of 4 kB, the processor often waits for their
addresses: with pages of 2 MB, the same products take 0.86 of the time in float32, and 0.73 in int8 (torch 2.13, AMD EPYC).
The kernel moves the contents; addresses and values stay. Moving takes as long as some 20 products and has paid off after
some 100, so only weights that are read often are moved. MYMODELS_HUGE_PAGES=0 turns it off.

The models call it where mymodels is imported, see `models/products.py`.
"""

import ctypes
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch

MADV_COLLAPSE = 25  # Linux 6.1; older kernels refuse it, and nothing changes
HUGE_PAGE = 1 << 21
PATIENCE = 32  # products with a weight before it is moved
LARGEST_PROCESS = 4 << 30  # bytes that `move_process` moves, at about a second per GB

_counts: dict[tuple[int, int], int] = {}  # address and size of a weight: products so far
_last_move = -10.0


@functools.cache
def _madvise() -> Callable | None:
    if sys.platform != "linux" or os.environ.get("MYMODELS_HUGE_PAGES") == "0":
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


def _move(start: int, end: int) -> None:
    start, end = start // HUGE_PAGE * HUGE_PAGE, -(-end // HUGE_PAGE) * HUGE_PAGE  # neighbours are weights, too
    madvise = _madvise()
    if madvise is not None:
        madvise(start, end - start, MADV_COLLAPSE)  # an error means: not moved, which costs only time


def count_product(weight: torch.Tensor) -> None:
    """Count a product with few rows; move the weight into huge pages if it is used often.

    Weights get their turn one after the other, so that no step of a generation takes much longer than the others.
    """
    key = weight.data_ptr(), weight.numel()
    count = _counts.get(key)
    if count is None:
        if len(_counts) > 1 << 14:
            _counts.clear()
        count = -(len(_counts) % PATIENCE)
    _counts[key] = count + 1
    if count + 1 == PATIENCE:
        _move(key[0], key[0] + weight.numel() * weight.element_size())


def move_process() -> None:
    """Move the memory of this process, for weights whose addresses are unknown, unless that would take seconds."""
    global _last_move
    if _madvise() is None or time.monotonic() - _last_move < 10:
        return
    try:
        with open("/proc/self/smaps") as file:
            regions = list(_anonymous_regions(file))
    except OSError:
        regions = []
    if sum(resident for _, _, resident in regions) <= LARGEST_PROCESS:
        for start, end, resident in regions:
            if resident > 0.8 * (end - start):  # otherwise, moving it would allocate what is not in use
                _move(start, end)
    _last_move = time.monotonic()


def _anonymous_regions(lines: Iterable[str]) -> Iterator[tuple[int, int, int]]:
    """Start, end and resident bytes of writable memory without a file, from `/proc/…/smaps`."""
    region: tuple[int, int] | None = None
    for line in lines:
        fields = line.split()
        if not fields[0].endswith(":"):  # the first line of a region: its addresses, …, its file
            start, end = (int(address, 16) for address in fields[0].split("-"))
            private = fields[1] == "rw-p" and (len(fields) == 5 or fields[5] == "[heap]")
            region = (start, end) if private and end - start >= HUGE_PAGE else None
        elif fields[0] == "Rss:" and region is not None:
            yield *region, int(fields[1]) << 10

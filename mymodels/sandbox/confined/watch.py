"""What the box uses: its processes, their memory, the files of its scratch folder.

Limits of the kernel hold for one process or one file. The sums are watched from outside.
"""

import os
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Any

_PAGE = os.sysconf("SC_PAGE_SIZE")
_SHARE = 0.01  # of a processor, at most, that watching takes
_SHORTEST = 0.05  # seconds between two looks


class Watch:
    """Looks from time to time whether processes are within their limits."""

    def __init__(self, root: int, policy: dict[str, Any]):
        """
        Args:
            root: the process whose descendants are watched.
            policy: `scratch`, `scratch_size`, `memory`, `processes` and `seconds`; 0 for no limit.
        """
        self.root, self.policy = root, policy
        self.end = time.monotonic() + policy["seconds"] if policy["seconds"] else float("inf")
        self._next = {self._processes: 0.0, self._files: 0.0}
        self._outputs = [number for number in (1, 2) if stat.S_ISREG(os.fstat(number).st_mode)]

    def exceeded(self) -> str:
        """What has been exceeded, in a sentence; empty if nothing has."""
        if time.monotonic() > self.end:
            return f"it did not end within {self.policy['seconds']:g} s"
        for look, due in self._next.items():
            began = time.monotonic()
            if began >= due:
                if found := look():
                    return found
                cost = time.monotonic() - began
                self._next[look] = time.monotonic() + max(_SHORTEST, cost / _SHARE)
        return ""

    def seconds_left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def _processes(self) -> str:
        processes = dict(descendants(self.root))
        limit = self.policy["processes"]
        if limit and sum(processes.values()) > limit:
            return f"it started more than {limit} processes and threads"
        limit = self.policy["memory"]
        if limit:
            unlisted = _distinct(status for process in processes for status in _deleted_files(process, in_memory=True))
            if sum(map(_resident, processes)) + unlisted > limit and _memory(processes, unlisted) > limit:
                return f"it used more than {limit / 1e9:.2g} GB of memory"
        return ""

    def _files(self) -> str:
        limit = self.policy["scratch_size"]
        if not limit:
            return ""
        used = sum(os.fstat(number).st_blocks * 512 for number in self._outputs)
        seen: set[tuple[int, int]] = set()
        for status in _files_of(self.policy["scratch"]):
            if (key := (status.st_dev, status.st_ino)) not in seen:
                seen.add(key)
                used += status.st_blocks * 512 + 512  # an entry costs something, even an empty file
                if used > limit:
                    return _too_large(limit)
        processes = [process for process, _ in descendants(self.root)]
        used += _distinct(status for process in processes for status in _deleted_files(process, in_memory=False))
        return _too_large(limit) if used > limit else ""


def _too_large(limit: int) -> str:
    return f"it wrote more than {limit / 1e9:.2g} GB to its scratch folder"


def descendants(root: int) -> Iterator[tuple[int, int]]:
    """The processes that a process has started, and those they have; each with its number of threads."""
    waiting = _children(root)[0]
    while waiting:
        process = waiting.pop()
        children, threads = _children(process)
        yield process, threads
        waiting += children


def _children(process: int) -> tuple[list[int], int]:
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{process}/task")
    except OSError:
        return [], 0
    for thread in threads:
        try:
            with open(f"/proc/{process}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
        except OSError:
            pass
    return found, len(threads)


def _distinct(files: Iterable[os.stat_result]) -> int:
    """Bytes of files, each counted once."""
    return sum({(status.st_dev, status.st_ino): status.st_blocks * 512 for status in files}.values())


def _resident(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0


def _memory(processes: Iterable[int], unlisted: int) -> int:
    """Bytes of processes, where what several share counts once; without files that are mapped."""
    own = shared = 0
    for process in processes:
        try:
            with open(f"/proc/{process}/smaps_rollup", "rb") as file:
                next(file)
                rows = (line.split() for line in file)
                sizes = {row[0]: int(row[1]) * 1024 for row in rows}
        except (OSError, ValueError, IndexError, StopIteration):
            continue
        own += sizes.get(b"Pss_Anon:", 0) + sizes.get(b"SwapPss:", 0)
        shared += sizes.get(b"Pss_Shmem:", 0)
    return own + max(shared, unlisted)  # mapped files in memory are in both


def _files_of(folder: str) -> Iterator[os.stat_result]:
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    yield entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except OSError:
            continue


def _deleted_files(process: int, *, in_memory: bool) -> Iterator[os.stat_result]:
    """Files that a process holds open after they were deleted, which no folder lists: on disk, or in memory."""
    folder = f"/proc/{process}/fd"
    try:
        for name in os.listdir(folder):
            status = os.stat(f"{folder}/{name}")
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                memory = os.readlink(f"{folder}/{name}").startswith(("/memfd:", "/dev/shm/", "/dev/zero"))
                if memory == in_memory:
                    yield status
    except OSError:
        return

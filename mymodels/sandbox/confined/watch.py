"""What the box uses: its processes, their memory, the files of its scratch folder.

Limits of the kernel hold for one process or one file. The sums are watched from outside.
"""

import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Any

_PAGE = os.sysconf("SC_PAGE_SIZE")
_SHARE = 0.01  # of a processor, at most, that watching takes
_SHORTEST, _LONGEST = 0.05, {"_processes": 0.5, "_files": 3.0}  # seconds between two looks
_ENTRY = 4096  # bytes that a name and an empty file cost
_LISTED = os.path.exists(f"/proc/self/task/{os.getpid()}/children")  # a setting of the kernel
_PIPE = 2**16  # bytes that a pipe may hold
_MAPPED = 8  # files that may be mapped, and neither have a name nor be open: their size cannot be asked for


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
        self._device = os.stat(policy["scratch"]).st_dev
        self._free = _free(policy["scratch"])
        self._socket = 2 * _number("/proc/sys/net/core/wmem_max", 212_992)  # bytes that a socket may hold
        self._outputs = [number for number in (1, 2) if stat.S_ISREG(os.fstat(number).st_mode)]

    def exceeded(self) -> str:
        """What has been exceeded, in a sentence; empty if nothing has."""
        if time.monotonic() > self.end:
            return f"it did not end within {self.policy['seconds']:g} s"
        for look, due in self._next.items():
            if time.monotonic() >= due or (look == self._files and self._fills_the_disk()):
                began = time.thread_time()  # not the time of day: on a busy machine a look takes long and costs little
                if found := look():
                    return found
                pause = max(_SHORTEST, (time.thread_time() - began) / _SHARE)
                self._next[look] = time.monotonic() + min(pause, _LONGEST[look.__name__])
        return ""

    def _fills_the_disk(self) -> bool:
        """Whether, since the files were looked at, the disk has lost half of what they may take; others may do that too."""
        return (
            bool(self.policy["scratch_size"])
            and self._free - _free(self.policy["scratch"]) > self.policy["scratch_size"] / 2
        )

    def at_end(self) -> str:
        """What is exceeded by the files that are left, which may have been written after the last look."""
        return self._files()

    def seconds_left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def _processes(self) -> str:
        processes = dict(descendants(self.root))
        limit = self.policy["processes"]
        if limit and sum(processes.values()) > limit:
            return f"it started more than {limit} processes and threads"
        limit = self.policy["memory"]
        if limit:
            held, files = self._held(processes)
            if sum(map(_resident, processes)) + held + files > limit and _memory(processes, files) + held > limit:
                return f"it used more than {limit / 1e9:.2g} GB of memory"
        return ""

    def _files(self) -> str:
        limit = self.policy["scratch_size"]
        if not limit:
            return ""
        self._free = _free(self.policy["scratch"])
        used = sum(os.fstat(number).st_blocks * 512 for number in self._outputs)
        seen: set[tuple[int, int]] = set()
        for status in _files_of(self.policy["scratch"]):
            if status is None:
                return "it made a folder in its scratch folder that cannot be looked into"
            if (key := (status.st_dev, status.st_ino)) not in seen:
                seen.add(key)
                used += status.st_blocks * 512 + _ENTRY
                if used > limit:
                    return _too_large(limit)
        processes = [process for process, _ in descendants(self.root)]
        nameless = {(file.st_dev, file.st_ino): file for process in processes for file in _open_files(process)}
        nameless = {key: file for key, file in nameless.items() if key not in seen and key[0] == self._device}
        used += sum(file.st_blocks * 512 for file in nameless.values() if stat.S_ISREG(file.st_mode))
        if (
            len({key for process in processes for key in _mapped_deleted(process, self._device)} - {*nameless})
            > _MAPPED
        ):
            return "it keeps files in memory that it has deleted from its scratch folder"
        return _too_large(limit) if used > limit else ""

    def _held(self, processes: Iterable[int]) -> tuple[int, int]:
        """Bytes in the kernel for sockets and pipes, and bytes of files that are in memory only.

        What sockets and pipes hold cannot be asked for: each counts as full.
        """
        opened = {(file.st_dev, file.st_ino): file for process in processes for file in _open_files(process)}
        shared_device, shared = _shared_memory(processes) if self.policy["namespaces"] else (-1, 0)
        held = files = 0
        for (device, _), file in opened.items():
            if stat.S_ISSOCK(file.st_mode):
                held += self._socket
            elif stat.S_ISFIFO(file.st_mode):
                held += _PIPE
            elif stat.S_ISREG(file.st_mode) and not file.st_nlink and device not in (self._device, shared_device):
                files += file.st_blocks * 512
        return held, files + shared


def _free(folder: str) -> int:
    """Bytes that are free on the disk of a folder."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


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


def children(process: int) -> list[int]:
    """The processes that a process has started and that have not ended."""
    return _children(process)[0]


def _children(process: int) -> tuple[list[int], int]:
    """The processes that a process has started, and the number of its threads."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{process}/task")
    except OSError:
        return [], 0
    for thread in threads:
        try:
            with open(f"/proc/{process}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
        except FileNotFoundError:
            if not _LISTED:
                return _children_of_all().get(process, []), len(threads)
        except OSError:
            pass
    return found, len(threads)


def _children_of_all() -> dict[int, list[int]]:
    """The same of every process, for kernels that do not list children."""
    found: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):  # it has ended since
            continue
        found.setdefault(parent, []).append(int(name))
    return found


def _resident(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0


def _memory(processes: Iterable[int], files: int) -> int:
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
    return own + max(shared, files)  # files in memory that are mapped are in both


def _files_of(folder: str) -> Iterator[os.stat_result | None]:
    """What is in a folder, at any depth; None for a folder whose mode or the length of whose path forbids to look."""
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    yield entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.ENAMETOOLONG):
                yield None


def _open_files(process: int) -> Iterator[os.stat_result]:
    """What a process holds open, with or without a name."""
    try:
        names = os.listdir(f"/proc/{process}/fd")
    except OSError:
        return
    for name in names:
        try:
            yield os.stat(f"/proc/{process}/fd/{name}")
        except OSError:  # closed since
            continue


def _mapped_deleted(process: int, device: int) -> Iterator[tuple[int, int]]:
    """Deleted files of a device that a process has in its memory: device and number."""
    wanted = f"{os.major(device):02x}:{os.minor(device):02x}".encode()
    try:
        with open(f"/proc/{process}/maps", "rb") as file:
            for line in file:
                if line.endswith(b" (deleted)\n"):
                    _, _, _, of, number, _ = line.split(maxsplit=5)
                    if of == wanted:
                        yield device, int(number)
    except (OSError, ValueError):
        return


def _shared_memory(processes: Iterable[int]) -> tuple[int, int]:
    """The device of the box's own /dev/shm, and how many bytes are in it."""
    for process in processes:
        place = f"/proc/{process}/root/dev/shm"
        try:
            device, used = os.stat(place).st_dev, os.statvfs(place)
            if device != os.stat("/dev/shm").st_dev:  # of this machine, before the process has its own view
                return device, (used.f_blocks - used.f_bfree) * used.f_frsize
        except OSError:
            continue
    return -1, 0


def _number(path: str, default: int) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return default

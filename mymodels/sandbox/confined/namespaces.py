"""Namespaces: a view of the system in which other files, processes and networks do not exist.

Needs user namespaces, which some kernels, and most containers, do not give to users. What they add to Landlock and
seccomp: files outside cannot even be looked at, `/proc` shows no other process, `/dev/shm` is private, and every
process of the box ends with its first.
"""

import contextlib
import ctypes
import errno
import os
import stat
from pathlib import Path
from typing import Any

_USER, _MOUNT, _PROCESSES, _NETWORK, _IPC, _HOST_NAME = 1 << 28, 1 << 17, 1 << 29, 1 << 30, 1 << 27, 1 << 26
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _NO_EXEC = 1, 2, 4, 8
_REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1 << 5, 1 << 12, 1 << 14, 1 << 18
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_PIVOT_ROOT, _DETACH = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine, -1), 2
_HERE, _EMPTY_PATH, _EVERYTHING_BELOW = -100, 0x1000, 0x8000
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_HIDDEN = """acpi asound bus cmdline config.gz driver fs irq kallsyms kcore key-users keys kmsg kpagecount kpageflags
latency_stats modules partitions pressure sched_debug scsi swaps sysrq-trigger timer_list timer_stats vmallocinfo"""


def enter() -> None:
    """Leave the namespaces of users, processes, networks and IPC; the next fork is the first process of the new ones.

    Raises:
        OSError: the kernel refuses.
    """
    user, group = os.getuid(), os.getgid()
    _check(_libc().unshare(_USER | _PROCESSES | _NETWORK | _IPC | _HOST_NAME), "unshare")
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", file).write_text(text)


def build_root(readable: list[str], scratch: str, devices: list[str], *, shared_memory: int, processes: int) -> None:
    """Give this process, the first of its namespaces, a root that holds nothing but what is named.

    Args:
        readable: absolute paths of files and folders to show, read-only; missing ones are skipped.
        scratch: the folder to show as it is, to write in.
        devices: devices to show.
        shared_memory: bytes that `/dev/shm` may hold.
        processes: how many processes there may be, as far as the kernel has such a limit.

    Raises:
        OSError: the kernel refuses.
    """
    _check(_libc().unshare(_MOUNT), "unshare")
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    with contextlib.ExitStack() as stack:
        sources = {path: _copy(path, stack) for path in (*readable, scratch, *DEVICES, *devices)}
        _mount("tmpfs", scratch, "tmpfs", _NO_SETUID | _NO_DEVICES, "size=16m,mode=755")
        root = Path(scratch)
        for name in ("proc", "dev/shm"):
            (root / name).mkdir(parents=True)
        _mount("tmpfs", str(root / "dev/shm"), "tmpfs", _NO_SETUID | _NO_DEVICES | _NO_EXEC, f"size={shared_memory}")
        _mount_processes(root / "proc", processes)
        for name, number in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
            (root / "dev" / name).symlink_to(f"/proc/self/fd{number}")
        for path, source in sorted(sources.items(), key=lambda row: len(row[0])):  # a folder before what is in it
            if source is not None:
                _show(root, path, source, read_only=path != scratch and path not in devices)
        _mount("none", str(root), None, _REMOUNT | _BIND | _READ_ONLY | _NO_SETUID | _NO_DEVICES)
    os.chdir(root)
    _check(_libc().syscall(_PIVOT_ROOT, b".", b"."), "pivot_root")
    _check(_libc().umount2(b".", _DETACH), "umount2")
    os.chdir("/")
    with contextlib.suppress(OSError):
        _libc().sethostname(b"box", 3)


def _mount_processes(place: Path, processes: int) -> None:
    """`/proc` of this namespace, without the files that tell of the machine or act on it."""
    _mount("proc", str(place), "proc", _NO_SETUID | _NO_DEVICES | _NO_EXEC)
    with contextlib.suppress(OSError):  # a limit of each PID namespace from Linux 6.14
        (place / "sys/kernel/pid_max").write_text(str(max(processes, 400)))
    for name in _HIDDEN.split():
        if (place / name).is_dir():
            _mount("tmpfs", str(place / name), "tmpfs", _READ_ONLY, "size=0,mode=755")
        elif (place / name).exists():
            _mount("/dev/null", str(place / name), None, _BIND)
    _mount("none", str(place), None, _REMOUNT | _BIND | _READ_ONLY | _NO_SETUID | _NO_DEVICES | _NO_EXEC)


def _copy(path: str, stack: contextlib.ExitStack) -> int | None:
    """A descriptor of a mount of what is at a path, which is not attached anywhere yet."""
    how = 1 | os.O_CLOEXEC | _EVERYTHING_BELOW  # OPEN_TREE_CLONE
    descriptor = _libc().syscall(_OPEN_TREE, _HERE, os.fsencode(path), how)
    if descriptor < 0:
        if ctypes.get_errno() in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return None
        _check(descriptor, f"open_tree {path}")
    stack.callback(os.close, descriptor)
    return descriptor


def _show(root: Path, path: str, source: int, *, read_only: bool) -> None:
    """Attach a mount at its path under the new root, with the links on the way to it."""
    place, status = _place(root, path), os.fstat(source)
    if read_only and place.exists() and os.path.samestat(place.stat(), status):
        return  # in a folder that is shown already
    if stat.S_ISDIR(status.st_mode):
        place.mkdir(parents=True, exist_ok=True)
    elif not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    if not stat.S_ISCHR(status.st_mode):
        how = 2 | (1 if read_only else 0) | (4 if read_only else 0)  # no setuid; read-only, no devices
        attributes = (ctypes.c_uint64 * 4)(how, 0, 0, 0)
        size = ctypes.c_size_t(ctypes.sizeof(attributes))
        below = _EMPTY_PATH | _EVERYTHING_BELOW
        _check(_libc().syscall(_MOUNT_SETATTR, source, b"", below, attributes, size), f"mount_setattr {path}")
    _check(_libc().syscall(_MOVE_MOUNT, source, b"", _HERE, os.fsencode(place), 4), f"move_mount {path}")


def _place(root: Path, path: str) -> Path:
    """Where a path leads to under the new root, after its symbolic links have been made there as they are outside."""
    parts = [part for part in path.split("/") if part]
    at, followed = "", 0
    while parts:
        part = parts.pop(0)
        if part == "..":
            at = os.path.dirname(at)
            continue
        here = f"{at}/{part}"
        if os.path.islink(here) and followed < 40:
            followed += 1
            target = os.readlink(here)
            link = root / here[1:]
            if not link.is_symlink() and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(target)
            parts = [part for part in target.split("/") if part and part != "."] + parts
            at = "" if target.startswith("/") else at
            continue
        at = here
    return root / at[1:]


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    result = _libc().mount(
        source.encode(), os.fsencode(target), kind.encode() if kind else None, ctypes.c_ulong(flags), options.encode()
    )
    _check(result, f"mounting {kind or 'a folder'}")


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")

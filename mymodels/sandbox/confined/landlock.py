"""Landlock: which files a confined process may read and write. Linux 5.13, without privileges, also in containers.

What it covers depends on the kernel: files since Landlock 1 (Linux 5.13), truncating since 3 (6.2), TCP since 4 (6.7),
`ioctl` on devices since 5 (6.10), signals and abstract sockets since 6 (6.12). What it does not cover at all is looking
at a path (`stat`), and changing the mode, owner, times or attributes of a file.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ = 1 << 2 | 1 << 3  # files, folders
_WRITE_FILE, _TRUNCATE, _DEVICE_CONTROL = 1 << 1, 1 << 14, 1 << 15
_WRITE = _READ | _WRITE_FILE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13 | _TRUNCATE
_OF_FILES = 1 << 2 | _WRITE_FILE | _TRUNCATE | _DEVICE_CONTROL  # the rights that a rule for a single file may have


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64)]


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("access", ctypes.c_uint64), ("descriptor", ctypes.c_int32)]


def version() -> int:
    """The Landlock version of the kernel; 0 without Landlock."""
    return max(0, _libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def handled(abi: int) -> int:
    """The rights over files that Landlock of this version can restrict: all that are not granted are denied."""
    bits = (1 << 13) - 1
    return bits | (1 << 13 if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0) | (_DEVICE_CONTROL if abi >= 5 else 0)


def apply(
    readable: Iterable[str], listable: Iterable[str], writable: Iterable[str], devices: Iterable[str], abi: int
) -> None:
    """Restrict this thread and all that it starts, for ever. `PR_SET_NO_NEW_PRIVS` must be set.

    Args:
        readable: files, and folders with all that is in them; missing ones are skipped.
        listable: folders whose names may be listed.
        writable: folders to write in.
        devices: devices to read, write and control.
        abi: the Landlock version to use.

    Raises:
        OSError: the kernel refuses.
    """
    everything = handled(abi)
    ruleset = _Ruleset(everything, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    descriptor = _call(_CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(size), 0)
    rules = [(path, _READ) for path in readable]
    rules += [(path, 1 << 3) for path in listable]
    rules += [(path, _WRITE) for path in writable]
    rules += [(path, 1 << 2 | _WRITE_FILE | _TRUNCATE | _DEVICE_CONTROL) for path in devices]
    try:
        for path, access in rules:
            _allow(descriptor, path, access & everything)
        quiet = 1 if abi >= 7 else 0  # denials are no news for the system's log
        _call(_RESTRICT_SELF, descriptor, quiet)
    finally:
        os.close(descriptor)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            access &= _OF_FILES
        if access:
            rule = _PathRule(access, place)
            _call(_ADD_RULE, ruleset, 1, ctypes.byref(rule), 0)
    finally:
        os.close(place)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result = _libc().syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {errno.errorcode.get(code, code)} {os.strerror(code)}")
    return result

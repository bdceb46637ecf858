"""System calls by number, and what several attempts do with them."""

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Callable
from typing import Any

from . import Impossible

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]

_MACHINE = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
_NUMBERS = {  # on x86_64, on aarch64; from 424 on they are the same everywhere
    "accept": (43, 202),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "capset": (126, 91),
    "clone": (56, 220),
    "delete_module": (176, 106),
    "execveat": (322, 281),
    "fanotify_init": (300, 262),
    "fsetxattr": (190, 7),
    "init_module": (175, 105),
    "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27),
    "ioprio_set": (251, 30),
    "iopl": (172, None),
    "ioperm": (173, None),
    "kcmp": (312, 272),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "mknodat": (259, 33),
    "mount": (165, 40),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "reboot": (169, 142),
    "renameat2": (316, 276),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "semget": (64, 190),
    "msgget": (68, 186),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "shmat": (30, 196),
    "shmget": (29, 194),
    "socket": (41, 198),
    "statx": (332, 291),
    "syslog": (103, 116),
    "tgkill": (234, 131),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "pidfd_open": (434, 434),
    "clone3": (435, 435),
    "openat2": (437, 437),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "mount_setattr": (442, 442),
}


def number(name: str) -> int:
    found = None if _MACHINE is None else _NUMBERS[name][_MACHINE]
    if found is None:
        raise Impossible(f"{name} has no number on {platform.machine()}")
    return found


def syscall(name: str, *arguments: Any) -> int:
    """The result of a system call; raises `OSError`, or `Impossible` if the kernel was built without it."""
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    words = [ctypes.c_char_p(word) if isinstance(word, bytes) else word for word in words]
    result = libc.syscall(ctypes.c_long(number(name)), *words)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def if_built(call: Callable[[], Any], *codes: int) -> Any:
    """The result of a call; `Impossible` where the kernel lacks it: ENOSYS, or one of `codes`.

    A box may answer with the same codes. That is why the control run decides which attempts count.
    """
    try:
        return call()
    except OSError as error:
        if error.errno in (errno.ENOSYS, *codes):
            raise Impossible(f"the kernel answers {errno.errorcode[error.errno]}") from error
        raise


def canary(data: bytes | str) -> bool:
    """Whether this is the content of one of the files that the box must not read."""
    return (data.encode() if isinstance(data, str) else data).startswith(b"canary:")


def read(path: str | int, **how: Any) -> bool:
    """Whether a file could be read, and is one of those."""
    with open(path, "rb", **how) as file:
        return canary(file.read(64))


def in_child(work: Callable[[], Any]) -> Any:
    """The exit status of a child that does `work`: 77 for a true result, 0 for a false one, 1 for an OSError.

    Raises:
        Impossible: the child did.
    """
    child = os.fork()
    if not child:
        try:
            os._exit(77 if work() else 0)
        except OSError:
            os._exit(1)
        except Impossible:
            os._exit(3)
        except BaseException:
            os._exit(2)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 3:
        raise Impossible("the kernel lacks it, or this user may not")
    return status


def iovec(address: int, size: int) -> ctypes.Array:
    return ctypes.create_string_buffer(struct.pack("PN", address, size))


def machine_code(code: bytes) -> int:
    """What a piece of machine code returns, from a page below 4 GB."""
    if platform.machine() != "x86_64":
        raise Impossible("another processor")
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    at = libc.mmap(None, 4096, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40, -1, 0)
    if at in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    ctypes.memmove(at, code, len(code))
    return ctypes.CFUNCTYPE(ctypes.c_int)(at)()


def by_32_bits(call: int, *words: int) -> int:
    """A system call of the 32-bit kernel interface, by `int 0x80`, which has other numbers."""
    loads = b"".join(op + struct.pack("<I", word) for op, word in zip((b"\xbb", b"\xb9", b"\xba"), words))
    code = b"\x53" + loads + b"\xb8" + struct.pack("<I", call) + b"\xcd\x80" + b"\x5b\xc3"
    result = machine_code(code)
    if -4096 < result < 0:
        raise OSError(-result, os.strerror(-result))
    return result

"""The system calls that a confined process may make: a list of those allowed, compiled to a seccomp filter.

Whatever is not listed fails: with "operation not permitted" if it is known to be dangerous, else as if the kernel did
not have it, so that libraries take their other way. Needs Linux 3.17 and x86-64 or arm64.
"""

import ctypes
import errno
import struct
from collections.abc import Iterable

from .syscall_numbers import AUDIT_ARCH, NUMBERS

ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 open openat openat2 creat close close_range
dup dup2 dup3 lseek stat fstat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getcwd chdir
fchdir getdents getdents64 statfs fstatfs rename renameat renameat2 mkdir mkdirat rmdir unlink unlinkat link linkat
symlink symlinkat umask truncate ftruncate fsync fdatasync sync_file_range flock fadvise64 readahead
copy_file_range sendfile pipe pipe2 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait
epoll_pwait epoll_pwait2 eventfd eventfd2 timerfd_create timerfd_settime timerfd_gettime signalfd signalfd4
mmap mprotect munmap mremap brk msync mincore madvise mlock mlock2 munlock memfd_create membarrier get_mempolicy
set_mempolicy mbind pkey_alloc pkey_free pkey_mprotect
fork vfork exit exit_group wait4 waitid kill tgkill tkill getpid gettid getppid getpgid getpgrp setpgid getsid setsid
set_tid_address set_robust_list rseq futex futex_waitv sched_yield sched_getaffinity sched_getparam sched_getscheduler
sched_getattr sched_get_priority_max sched_get_priority_min sched_rr_get_interval getpriority getcpu
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack restart_syscall pause
alarm getitimer setitimer timer_create timer_settime timer_gettime timer_getoverrun timer_delete nanosleep
clock_nanosleep clock_gettime clock_getres gettimeofday time times getrusage getrlimit sysinfo uname getrandom getuid
geteuid getgid getegid getgroups getresuid getresgid capget arch_prctl
sendmsg recvmsg recvfrom shutdown getsockopt setsockopt getsockname getpeername
"""
FORBIDDEN = """
execve execveat socket connect bind listen accept accept4 sendmmsg recvmmsg ptrace process_vm_readv process_vm_writev
process_madvise kcmp pidfd_getfd pidfd_send_signal rt_sigqueueinfo rt_tgsigqueueinfo move_pages migrate_pages
io_uring_setup io_uring_enter io_uring_register bpf keyctl add_key request_key perf_event_open userfaultfd memfd_secret
mount umount2 pivot_root chroot unshare setns fsopen fsmount fsconfig fspick open_tree move_mount mount_setattr
setrlimit setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset
mknod mknodat inotify_init inotify_init1 inotify_add_watch fanotify_init fanotify_mark open_by_handle_at
name_to_handle_at shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd msgrcv msgctl mq_open mq_unlink
seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self syslog reboot kexec_load init_module
finit_module delete_module swapon swapoff acct quotactl sethostname setdomainname settimeofday clock_settime
clock_adjtime adjtimex iopl ioperm modify_ldt sched_setscheduler sched_setparam sched_setattr ioprio_set mlockall
vmsplice tee splice
"""
_XATTRS = [f"{how}{what}xattr" for what in ("set", "get", "list", "remove") for how in ("", "l", "f")]
_TIMES = ["utime", "utimes", "futimesat", "utimensat"]
_OWNERS = ["chown", "lchown", "fchown", "fchownat"]
_MODES = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2}  # name: which argument is the mode

_NAMESPACES = 0x7E020080  # CLONE_NEW…
_FCNTL_OF_OTHERS = (8, 10, 15, 1024, 1026)  # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A)  # is a terminal?, its size, FIO…
_IOCTLS_OF_FILES = (0x5412, 0x541C, 0x540E, 0x40086602, 0x40046602, 0x401C5820, 0x40049409, 0x4020940D, 0xC0189436)
_PRCTLS = (
    2,
    3,
    7,
    15,
    16,
    21,
    23,
    25,
    27,
    30,
    38,
    39,
    41,
    42,
    0x53564D41,
)  # questions, and names of threads and memory

_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _JUMP_EQUAL, _JUMP_SET, _JUMP_GREATER, _RETURN, _AND = 0x20, 0x15, 0x45, 0x25, 0x06, 0x54
Instruction = tuple[int, int, int, int]


def error(number: int) -> Instruction:
    return (_RETURN, 0, 0, _ERROR | number)


def _allow() -> Instruction:
    return (_RETURN, 0, 0, _ALLOW)


def _argument(index: int, high: bool = False) -> Instruction:
    return (_LOAD, 0, 0, 16 + 8 * index + 4 * high)


def _one_of(index: int, values: Iterable[int], found: Instruction, other: Instruction) -> list[Instruction]:
    """Return `found` if the argument's lower half is one of `values`, else `other`."""
    code = [_argument(index)]
    for value in values:
        code += [(_JUMP_EQUAL, 0, 1, value), found]
    return [*code, other]


def _any_bit(index: int, bits: int, found: Instruction, other: Instruction) -> list[Instruction]:
    return [_argument(index), (_JUMP_SET, 0, 1, bits), found, other]


def _zero(index: int, found: Instruction, other: Instruction) -> list[Instruction]:
    """Return `found` if the argument, a pointer or a number of 64 bits, is zero."""
    return [_argument(index), (_JUMP_EQUAL, 0, 3, 0), _argument(index, True), (_JUMP_EQUAL, 0, 1, 0), found, other]


def rules(
    *, own_files: bool, own_processes: bool, scoped_signals: bool, devices: bool, truncate: bool = True
) -> dict[str, list[Instruction]]:
    """What happens at each system call, by name.

    Args:
        own_files: only files of the box are in sight (a mount namespace), so modes and times may be changed.
        own_processes: only processes of the box are in sight (a PID namespace).
        scoped_signals: signals reach processes of the box only (a PID namespace, or Landlock 6).
        devices: devices such as GPUs may be used, which need `ioctl`.
        truncate: files may be truncated by path, because other files are out of reach (a mount namespace, or Landlock 3).
    """
    denied, unknown = error(errno.EPERM), error(errno.ENOSYS)
    table: dict[str, list[Instruction]] = {name: [_allow()] for name in ALLOWED.split()}
    table |= {name: [denied] for name in FORBIDDEN.split()}
    table |= {name: [error(errno.ENOTSUP)] for name in _XATTRS}
    table["fallocate"] = [
        error(errno.ENOTSUP)
    ]  # it takes a disk in no time, before anything can look; libc then writes
    table |= {name: [_allow() if own_files else denied] for name in _TIMES}
    table |= {name: [denied] for name in _OWNERS}
    if not truncate:
        table["truncate"] = [denied]
    permitted = _allow() if own_files else denied
    table |= {name: _any_bit(index, 0o6000, denied, permitted) for name, index in _MODES.items()}
    table["clone"] = _any_bit(0, _NAMESPACES, denied, _allow())
    table["clone3"] = [unknown]  # its flags are in memory, where a filter cannot read them; libraries then use clone
    table["pidfd_open"] = [unknown]
    table["socketpair"] = [
        _argument(0),
        (_JUMP_EQUAL, 1, 0, 1),  # AF_UNIX
        denied,
        _argument(1),
        (_AND, 0, 0, 0xFF),
        (_JUMP_EQUAL, 0, 1, 1),  # SOCK_STREAM: a datagram may name another address
        _allow(),
        (_JUMP_EQUAL, 0, 1, 5),  # SOCK_SEQPACKET
        _allow(),
        denied,
    ]
    table["sendto"] = _zero(4, _allow(), denied)
    table["fcntl"] = _one_of(1, _FCNTL_OF_OTHERS, denied, _allow())
    no_terminal = error(errno.ENOTTY)
    table["ioctl"] = (
        _one_of(1, _IOCTLS_OF_FILES, denied, _allow()) if devices else _one_of(1, _IOCTLS, _allow(), no_terminal)
    )
    dies_with_parent = (1,) if own_processes else ()  # elsewhere the box itself relies on it
    table["prctl"] = _one_of(0, (*_PRCTLS, *dies_with_parent), _allow(), denied)
    table["personality"] = _one_of(0, [0xFFFFFFFF], _allow(), denied)
    table["prlimit64"] = [  # reading the limits of this process: neither argument 0, a process, nor 2, new limits
        _argument(2),
        (_JUMP_EQUAL, 0, 5, 0),
        _argument(2, True),
        (_JUMP_EQUAL, 0, 3, 0),
        _argument(0),
        (_JUMP_EQUAL, 0, 1, 0),
        _allow(),
        denied,
    ]
    if own_processes:
        table |= {name: [_allow()] for name in ("sched_setaffinity", "setpriority")}
    else:
        own = {"sched_setaffinity": 0, "sched_getaffinity": 0, "sched_getparam": 0, "sched_getscheduler": 0}
        own |= {"sched_getattr": 0, "sched_rr_get_interval": 0, "getsid": 0, "getpgid": 0}
        own |= {"setpriority": 1, "getpriority": 1}  # of others they say that there are such
        table |= {name: _zero(index, _allow(), denied) for name, index in own.items()}
        # -1 is everybody that is in sight; the kernel reports success even if Landlock lets it reach nobody
        table["kill"] = _one_of(0, [0xFFFFFFFF], denied, _allow())
    if not scoped_signals:  # to the own process group only
        table |= {"kill": _zero(0, _allow(), denied), "tkill": [denied], "tgkill": [denied]}
    return table


def assemble(table: dict[str, list[Instruction]]) -> bytes:
    """The program of a table of rules."""
    code: list[Instruction] = [
        (_LOAD, 0, 0, 4),
        (_JUMP_EQUAL, 1, 0, AUDIT_ARCH or 0),
        (_RETURN, 0, 0, _KILL),  # a system call of another architecture, whose numbers mean other things
        (_LOAD, 0, 0, 0),
    ]
    for name, rule in sorted(table.items(), key=lambda row: len(row[1])):
        if name in NUMBERS:
            code += [(_JUMP_EQUAL, 0, len(rule), NUMBERS[name]), *rule]
    code.append(error(errno.ENOSYS))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def apply(program: bytes) -> None:
    """Filter the system calls of this thread, and of all that it starts, from now on and for ever.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    set_no_new_privileges, set_filter, by_filter = 38, 22, 2
    filter_ = _Program(len(program) // 8, program)
    if libc.prctl(set_no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_filter, by_filter, ctypes.byref(filter_), 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"the kernel takes no filter of system calls: {errno.errorcode.get(number, number)}")

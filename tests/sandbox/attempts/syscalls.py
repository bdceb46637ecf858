"""Parts of the kernel that a model does not need, and that are the doors of most escapes."""

import ctypes
import errno
import os
import signal
import struct
from pathlib import Path

from . import Impossible, Target, attempt
from .kernel import if_built, in_child, libc, syscall

NEW_USER, NEW_MOUNTS, NEW_NETWORK, NEW_PROCESSES, NEW_CGROUP = 0x10000000, 0x20000, 0x40000000, 0x20000000, 0x02000000
NEW_NAMES, NEW_IPC, NEW_TIME = 0x04000000, 0x08000000, 0x80
DENIED = (errno.EPERM, errno.EACCES)


def _root_only(call):
    """The result, or `Impossible` for someone who is not root."""
    return if_built(call, *(DENIED if os.getuid() else ()))


def _in_own_mounts(work) -> bool:
    """`work` in a mount namespace of a child, so that nothing of the machine changes."""

    def child() -> bool:
        syscall("unshare", NEW_MOUNTS)
        syscall("mount", b"none", b"/", None, 0x40000 | 0x4000, None)  # private, recursive
        return work()

    code = in_child(child)
    if code == 1 and os.getuid():
        raise Impossible("not root")
    return code == 77


@attempt
def set_up_io_uring(target: Target):
    return if_built(lambda: syscall("io_uring_setup", 4, ctypes.create_string_buffer(120)), errno.EPERM)


@attempt
def make_bpf_map(target: Target):
    what = ctypes.create_string_buffer(struct.pack("IIII", 2, 4, 4, 1), 128)  # BPF_MAP_TYPE_ARRAY
    return if_built(lambda: syscall("bpf", 0, what, 128), errno.EPERM)


@attempt
def load_bpf_program(target: Target):
    code = ctypes.create_string_buffer(struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0))
    licence = ctypes.create_string_buffer(b"GPL")
    what = struct.pack("=IIQQ", 1, 2, ctypes.addressof(code), ctypes.addressof(licence))  # a socket filter
    return if_built(lambda: syscall("bpf", 5, ctypes.create_string_buffer(what, 128), 128), errno.EPERM)


@attempt
def count_events(target: Target):
    """perf_event_open, software clock of this process."""
    what = ctypes.create_string_buffer(struct.pack("=IIQQQQQ", 1, 128, 0, 0, 0, 0, 0b1100001), 128)
    return if_built(lambda: syscall("perf_event_open", what, 0, -1, -1, 0), *DENIED)


@attempt
def watch_page_faults(target: Target):
    """Halts the kernel in the middle of a copy: the tool of many exploits. First for user memory only."""
    return if_built(lambda: syscall("userfaultfd", os.O_NONBLOCK | 1), errno.EPERM)


@attempt
def read_keyring(target: Target):
    return if_built(lambda: syscall("keyctl", 0, -4, 1))  # the id of the user's keyring, made if there is none


@attempt
def add_key(target: Target):
    return if_built(lambda: syscall("add_key", b"user", target.marker.encode(), b"x", 1, -1))  # of the thread


@attempt
def search_for_key(target: Target):
    try:
        return if_built(lambda: syscall("request_key", b"user", target.marker.encode(), None, 0))
    except OSError as error:
        return error.errno == errno.ENOKEY  # searched, and not refused


@attempt
def mount_filesystem(target: Target):
    os.mkdir(target.scratch_path())
    return _in_own_mounts(lambda: syscall("mount", b"none", target.scratch_path().encode(), b"tmpfs", 0, None) == 0)


@attempt
def bind_folder_into_scratch(target: Target):
    os.mkdir(target.scratch_path())
    home, place, bind = target.home.encode(), target.scratch_path().encode(), 4096
    return _in_own_mounts(lambda: syscall("mount", home, place, None, bind, None) == 0)


@attempt
def unmount_filesystem(target: Target):
    return _in_own_mounts(lambda: syscall("umount2", b"/proc", 2) == 0)


@attempt
def remount_as_writable(target: Target):
    bind_and_remount = 4096 | 32
    return _in_own_mounts(lambda: syscall("mount", b"none", b"/", None, bind_and_remount, None) == 0)


@attempt
def change_root_by_pivot(target: Target):
    os.mkdir(target.scratch_path())

    def work() -> bool:
        place = target.scratch_path().encode()
        syscall("mount", b"none", place, b"tmpfs", 0, None)
        return syscall("pivot_root", place, place) == 0

    return _in_own_mounts(work)


@attempt
def change_root(target: Target):
    os.mkdir(target.scratch_path())
    return _root_only(lambda: os.chroot(target.scratch_path()) is None)


@attempt
def open_new_filesystem(target: Target):
    """The newer calls beside mount."""
    return _root_only(lambda: syscall("fsopen", b"tmpfs", 0))


@attempt
def clone_mounts(target: Target):
    return _root_only(lambda: syscall("open_tree", -100, b"/", 1))


@attempt
def change_mount_attributes(target: Target):
    def work() -> bool:
        attributes = ctypes.create_string_buffer(struct.pack("QQQQ", 1, 0, 0, 0), 32)
        return syscall("mount_setattr", -100, b"/", 0, attributes, 32) == 0

    return _in_own_mounts(work)


def _unshared(flags: int) -> bool:
    code = in_child(lambda: syscall("unshare", flags) == 0)
    if code == 1 and (os.getuid() or flags & NEW_USER):
        raise Impossible("namespaces are off for this user")
    return code == 77


@attempt
def unshare_users(target: Target):
    """A user namespace makes anybody root within it, and opens the code that only root reaches."""
    return _unshared(NEW_USER)


@attempt
def unshare_users_and_mounts(target: Target):
    return _unshared(NEW_USER | NEW_MOUNTS)


@attempt
def unshare_network(target: Target):
    return _unshared(NEW_NETWORK)


@attempt
def unshare_other_namespaces(target: Target):
    return [flag for flag in (NEW_PROCESSES, NEW_CGROUP, NEW_NAMES, NEW_IPC, NEW_TIME) if _unshared(flag)]


@attempt
def clone_with_new_user(target: Target):
    child = if_built(lambda: syscall("clone", NEW_USER | signal.SIGCHLD, 0, 0, 0, 0), errno.EPERM, errno.ENOSPC)
    if not child:
        os._exit(77)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77


@attempt
def clone3_with_new_user(target: Target):
    """A filter cannot look into clone3's arguments, because they lie in memory."""
    how = ctypes.create_string_buffer(struct.pack("QQQQQQQQ", NEW_USER, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64)
    child = if_built(lambda: syscall("clone3", how, 64), errno.EPERM, errno.ENOSPC)
    if not child:
        os._exit(77)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77


@attempt
def enter_namespaces_of_outsider(target: Target):
    code = in_child(lambda: syscall("setns", os.open(f"/proc/{target.outsider}/ns/net", os.O_RDONLY), 0) == 0)
    if code == 1 and os.getuid():
        raise Impossible("not root")
    return code == 77


@attempt
def enter_namespaces_by_pidfd(target: Target):
    code = in_child(lambda: syscall("setns", os.pidfd_open(target.outsider), NEW_MOUNTS) == 0)
    if code == 1 and os.getuid():
        raise Impossible("not root")
    return code == 77


@attempt
def change_personality(target: Target):
    """Off goes the randomness of addresses, on goes the execution of data."""
    return in_child(lambda: syscall("personality", 0x0440000) >= 0) == 77


@attempt
def load_other_kernel(target: Target):
    return _root_only(lambda: syscall("kexec_load", 0, 0, None, 0) == 0)


@attempt
def reach_reboot(target: Target):
    """The command that only turns Ctrl-Alt-Del on or off, to what it is."""
    on = Path("/proc/sys/kernel/ctrl-alt-del").read_text().strip() != "0"
    command = 0x89ABCDEF if on else 0
    return _root_only(lambda: syscall("reboot", ctypes.c_int(-18751827), 672274793, ctypes.c_uint(command), 0) == 0)


@attempt
def load_module(target: Target):
    """Nonsense instead of a module: the kernel looks at it, and so would load another."""
    try:
        return _root_only(lambda: syscall("init_module", b"nonsense", 8, b""))
    except OSError as error:
        return error.errno in (errno.ENOEXEC, errno.EINVAL)


@attempt
def remove_module(target: Target):
    try:
        return _root_only(lambda: syscall("delete_module", target.marker.encode(), os.O_NONBLOCK))
    except OSError as error:
        return error.errno == errno.ENOENT


@attempt
def watch_whole_filesystem(target: Target):
    """fanotify: every access on the machine."""
    return _root_only(lambda: syscall("fanotify_init", 0, os.O_RDONLY))


@attempt
def reach_ports_of_devices(target: Target):
    return in_child(lambda: _root_only(lambda: syscall("iopl", 3) == 0)) == 77 or _no_ports()


def _no_ports() -> bool:
    if os.getuid() or os.uname().machine != "x86_64":
        raise Impossible("not root, or another processor")
    return False


@attempt
def adjust_clock(target: Target):
    """The length of a tick, to what it is."""
    timex = ctypes.create_string_buffer(256)
    syscall("adjtimex", timex)
    tick = struct.unpack_from("q", timex, 88)[0]
    timex = ctypes.create_string_buffer(256)
    struct.pack_into("I", timex, 0, 0x4000)
    struct.pack_into("q", timex, 88, tick)
    return _root_only(lambda: syscall("adjtimex", timex) >= 0)


@attempt
def name_machine(target: Target):
    name = os.uname().nodename.encode()
    return _root_only(lambda: syscall("sethostname", name, len(name)) == 0)


@attempt
def gain_capabilities(target: Target):
    header = ctypes.create_string_buffer(struct.pack("II", 0x20080522, 0))
    data = ctypes.create_string_buffer(struct.pack("IIIIII", 1, 1, 0, 0, 0, 0))  # CAP_CHOWN
    return in_child(lambda: _root_only(lambda: syscall("capset", header, data) == 0)) == 77 or _no_rights()


def _no_rights() -> bool:
    if os.getuid():
        raise Impossible("not root")
    return False


@attempt
def keep_capabilities_for_programs(target: Target):
    """PR_SET_SECUREBITS."""
    return in_child(lambda: libc.prctl(28, 1, 0, 0, 0) == 0) == 77 or _no_rights()


@attempt
def lock_memory_of_machine(target: Target):
    """mlock beyond the share of an ordinary user."""
    import mmap

    size = 64 * 2**20
    libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    block = mmap.mmap(-1, size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    if libc.mlock(address, size):
        raise Impossible("the limit of this user is lower") if os.getuid() else OSError(ctypes.get_errno(), "mlock")
    return True

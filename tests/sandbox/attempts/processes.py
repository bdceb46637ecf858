"""Other processes: reading, stopping, changing them; new rights; staying behind."""

import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import struct
import time
from pathlib import Path

from . import Impossible, Target, attempt
from .kernel import canary, if_built, in_child, iovec, libc, syscall

PTRACE_ATTACH, PTRACE_DETACH, PTRACE_SEIZE = 16, 17, 0x4206


# ---- reading others


@attempt
def attach_debugger(target: Target):
    syscall("ptrace", PTRACE_ATTACH, target.outsider, 0, 0)
    os.waitpid(target.outsider, 0x40000000)  # __WALL
    syscall("ptrace", PTRACE_DETACH, target.outsider, 0, 0)
    return True


@attempt
def seize_with_debugger(target: Target):
    return in_child(lambda: syscall("ptrace", PTRACE_SEIZE, target.outsider, 0, 0) == 0) == 77


@attempt
def debug_own_child(target: Target):
    """A tracer rewrites the child's system calls after a filter has looked at them."""
    child = os.fork()
    if not child:
        time.sleep(5)
        os._exit(0)
    try:
        return syscall("ptrace", PTRACE_SEIZE, child, 0, 0) == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@attempt
def read_memory_of_outsider(target: Target):
    found = ctypes.create_string_buffer(8)
    here, there = iovec(ctypes.addressof(found), 7), iovec(target.address, 7)
    syscall("process_vm_readv", target.outsider, here, 1, there, 1, 0)
    return canary(found.raw)


@attempt
def write_memory_of_outsider(target: Target):
    text = ctypes.create_string_buffer(b"canary:")
    here, there = iovec(ctypes.addressof(text), 7), iovec(target.address, 7)
    return syscall("process_vm_writev", target.outsider, here, 1, there, 1, 0)


@attempt
def read_memory_file_of_outsider(target: Target):
    with open(f"/proc/{target.outsider}/mem", "rb", buffering=0) as memory:
        memory.seek(target.address)
        return canary(memory.read(7))


@attempt
def read_memory_map_of_parent(target: Target):
    return Path(f"/proc/{target.parent}/maps").read_text()


@attempt
def read_environment_of_outsider(target: Target):
    """Tokens are there."""
    return b"CANARY_TOKEN=" in Path(f"/proc/{target.outsider}/environ").read_bytes()


@attempt
def read_command_line_of_parent(target: Target):
    return Path(f"/proc/{target.parent}/cmdline").read_bytes()


@attempt
def read_state_of_parent(target: Target):
    return Path(f"/proc/{target.parent}/status").read_text()


@attempt
def list_processes(target: Target):
    return str(target.outsider) in os.listdir("/proc")


@attempt
def read_tokens_in_own_environment(target: Target):
    return [name for name in ("CANARY_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY") if name in os.environ]


@attempt
def read_environment_of_own_start(target: Target):
    """As the process was started, whatever Python removed since."""
    return b"CANARY_TOKEN=" in Path("/proc/self/environ").read_bytes()


@attempt
def take_descriptor_of_outsider(target: Target):
    process = os.pidfd_open(target.outsider)
    return os.fstat(if_built(lambda: syscall("pidfd_getfd", process, 0, 0))).st_mode


@attempt
def see_process_by_pidfd(target: Target):
    return os.pidfd_open(target.outsider)


@attempt
def see_process_by_its_session(target: Target):
    return os.getsid(target.outsider)


@attempt
def see_process_by_its_group(target: Target):
    return os.getpgid(target.outsider)


@attempt
def compare_with_outsider(target: Target):
    return if_built(lambda: syscall("kcmp", os.getpid(), target.outsider, 1, 0, 0)) >= 0


@attempt
def move_pages_of_outsider(target: Target):
    """Says where the pages of another process lie."""
    status = ctypes.c_int()
    pages = (ctypes.c_void_p * 1)(target.address & ~4095)
    if_built(lambda: syscall("move_pages", target.outsider, 1, pages, None, ctypes.byref(status), 0))
    return True


# ---- signals and changes


@attempt
def signal_outsider(target: Target):
    os.kill(target.outsider, signal.SIGUSR1)
    return True


@attempt
def probe_outsider_by_signal(target: Target):
    os.kill(target.outsider, 0)
    return True


@attempt
def probe_parent_by_signal(target: Target):
    os.kill(target.parent, 0)
    return True


@attempt(alone=True)
def probe_everybody_by_signal(target: Target):
    """`kill(-1)`, with the signal that only asks whether there is anybody it would reach."""
    os.kill(-1, 0)
    return True


@attempt
def signal_group_of_outsider(target: Target):
    os.killpg(target.outsider, signal.SIGUSR1)
    return True


@attempt
def signal_thread_of_outsider(target: Target):
    syscall("tgkill", target.outsider, target.outsider, int(signal.SIGUSR1))
    return True


@attempt
def queue_signal_to_outsider(target: Target):
    information = ctypes.create_string_buffer(struct.pack("iii", signal.SIGUSR1, 0, -1), 128)
    syscall("rt_sigqueueinfo", target.outsider, int(signal.SIGUSR1), information)
    return True


@attempt
def signal_outsider_by_pidfd(target: Target):
    signal.pidfd_send_signal(os.pidfd_open(target.outsider), signal.SIGUSR1)
    return True


@attempt
def signal_outsider_by_descriptor(target: Target):
    """The kernel sends the signal when data arrives, and F_SETOWN names whom to."""
    one, other = socket.socketpair()
    fcntl.fcntl(one, fcntl.F_SETOWN, target.outsider)
    fcntl.fcntl(one, 10, int(signal.SIGUSR1))  # F_SETSIG
    fcntl.fcntl(one, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    before = Path(target.files, "signals").stat().st_size if os.path.exists(target.files) else 0
    other.send(b"x")
    time.sleep(0.2)
    return Path(target.files, "signals").stat().st_size > before


@attempt
def lower_priority_of_outsider(target: Target):
    os.setpriority(os.PRIO_PROCESS, target.outsider, 5)
    return True


@attempt
def read_priority_of_outsider(target: Target):
    return os.getpriority(os.PRIO_PROCESS, target.outsider) is not None


@attempt
def change_limits_of_outsider(target: Target):
    resource.prlimit(target.outsider, resource.RLIMIT_NOFILE, (512, 512))
    return True


@attempt
def read_limits_of_outsider(target: Target):
    return resource.prlimit(target.outsider, resource.RLIMIT_NOFILE)


@attempt
def pin_outsider_to_processor(target: Target):
    os.sched_setaffinity(target.outsider, os.sched_getaffinity(target.outsider))
    return True


@attempt
def reschedule_outsider(target: Target):
    os.sched_setscheduler(target.outsider, os.SCHED_BATCH, os.sched_param(0))
    return True


@attempt
def lower_disk_priority_of_outsider(target: Target):
    syscall("ioprio_set", 1, target.outsider, 3 << 13)
    return True


@attempt
def advise_memory_of_outsider(target: Target):
    """Moves another process's memory out to disk."""
    pages = iovec(target.address & ~4095, 4096)
    return if_built(lambda: syscall("process_madvise", os.pidfd_open(target.outsider), pages, 1, 20, 0))


# ---- new rights


@attempt
def become_another_user(target: Target):
    """As root: to a user whose processes the box does not count."""
    return in_child(lambda: if_built(lambda: os.setuid(54321) is None, errno.EPERM)) == 77 or _not_root()


@attempt
def become_another_group(target: Target):
    return in_child(lambda: os.setgid(54321) is None) == 77 or _not_root()


@attempt
def set_groups(target: Target):
    return in_child(lambda: os.setgroups([54321]) is None) == 77 or _not_root()


def _not_root() -> bool:
    if os.getuid():
        raise Impossible("not root")
    return False


@attempt
def have_capabilities(target: Target):
    """Any right of root's at all."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and int(line.split()[1], 16):
            return line
    return _not_root()


@attempt
def gain_rights_by_programs(target: Target):
    """Whether a setuid program would have its rights: no_new_privs is off."""
    return libc.prctl(39, 0, 0, 0, 0) == 0


@attempt
def raise_priority(target: Target):
    return in_child(lambda: os.nice(-1) is not None) == 77 or _not_root()


@attempt
def schedule_in_real_time(target: Target):
    """A real-time process that loops takes its processor from everyone."""
    code = in_child(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)) is None)
    return code == 77 or _not_root()


@attempt
def raise_file_size_limit(target: Target):
    return _raised(resource.RLIMIT_FSIZE)


@attempt
def raise_processor_time_limit(target: Target):
    return _raised(resource.RLIMIT_CPU)


@attempt
def raise_memory_limit(target: Target):
    return _raised(resource.RLIMIT_AS) and _raised(resource.RLIMIT_DATA)


def _raised(limit: int) -> bool:
    try:
        resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except ValueError as error:  # Python's way to say that it is not permitted
        raise PermissionError(str(error)) from error
    return True


# ---- the terminal


@attempt
def type_into_terminal(target: Target):
    """TIOCSTI puts characters into the input of the shell that started the program."""
    controller, terminal = os.openpty()

    def child() -> bool:
        os.setsid()
        fcntl.ioctl(terminal, 0x540E, 0)  # TIOCSCTTY
        fcntl.ioctl(terminal, 0x5412, b"x")
        return True

    try:
        code = in_child(child)
        if code == 1:
            raise Impossible("TIOCSTI is off")
        return code == 77
    finally:
        os.close(controller)


@attempt
def open_new_terminal(target: Target):
    return os.open("/dev/ptmx", os.O_RDWR)


@attempt
def open_fuse(target: Target):
    return if_built(
        lambda: os.open("/dev/fuse", os.O_RDWR), errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV
    )


@attempt
def open_virtual_machines(target: Target):
    return if_built(
        lambda: os.open("/dev/kvm", os.O_RDWR), errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV
    )


@attempt
def write_kernel_log(target: Target):
    return if_built(lambda: os.open("/dev/kmsg", os.O_WRONLY), errno.ENOENT, errno.EACCES, errno.EPERM)


@attempt
def open_page_faults_device(target: Target):
    return if_built(lambda: os.open("/dev/userfaultfd", os.O_RDWR), errno.ENOENT, errno.EACCES, errno.EPERM)

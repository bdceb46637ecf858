"""Starting programs."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from . import Impossible, Target, attempt
from .kernel import by_32_bits, in_child, libc, syscall

SHELL = "/bin/sh"
EXIT = "exit 77"


def _end(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77


@attempt
def exec_shell(target: Target):
    return in_child(lambda: os.execv(SHELL, ["sh", "-c", EXIT])) == 77


@attempt
def exec_in_place(target: Target):
    """Without fork: the process itself becomes the program, which says so by a file in the scratch folder."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.dup2(write_end, 1)
            os.execv(SHELL, ["sh", "-c", "echo started"])
        finally:
            os._exit(1)
    os.close(write_end)
    os.waitpid(child, 0)
    return os.read(read_end, 16) == b"started\n"


@attempt
def exec_python(target: Target):
    return in_child(lambda: os.execv(sys.executable, [sys.executable, "-Sc", "raise SystemExit(77)"])) == 77


@attempt
def exec_from_thread(target: Target):
    def child() -> None:
        thread = threading.Thread(target=os.execv, args=(SHELL, ["sh", "-c", EXIT]))
        thread.start()
        thread.join()

    try:
        return in_child(child) == 77
    finally:
        sys.stderr.flush()


@attempt
def spawn_shell(target: Target):
    return _end(os.posix_spawn(SHELL, ["sh", "-c", EXIT], {}))


@attempt
def run_subprocess(target: Target):
    return subprocess.run([SHELL, "-c", EXIT]).returncode == 77


@attempt
def run_subprocess_by_shell(target: Target):
    return subprocess.run(EXIT, shell=True).returncode == 77


@attempt
def run_by_system(target: Target):
    return os.waitstatus_to_exitcode(os.system(EXIT)) == 77


@attempt
def run_by_system_of_libc(target: Target):
    """Python's audit events do not see it."""
    return os.waitstatus_to_exitcode(libc.system(EXIT.encode())) == 77


@attempt
def run_by_popen(target: Target):
    return os.popen("echo started").read() == "started\n"


@attempt
def exec_by_descriptor(target: Target):
    descriptor = os.open(os.path.realpath(SHELL), os.O_RDONLY)
    return in_child(lambda: os.execve(descriptor, ["sh", "-c", EXIT], {})) == 77


@attempt
def exec_memory_file(target: Target):
    """A program that was never on a disk."""
    descriptor = os.memfd_create("program")
    with open(os.path.realpath(SHELL), "rb") as program:
        os.write(descriptor, program.read())
    arguments = (ctypes.c_char_p * 4)(b"sh", b"-c", EXIT.encode(), None)
    empty_path = 0x1000
    return in_child(lambda: syscall("execveat", descriptor, b"", arguments, None, empty_path)) == 77


@attempt
def exec_memory_file_by_path(target: Target):
    descriptor = os.memfd_create("program", 0)
    with open(os.path.realpath(SHELL), "rb") as program:
        os.write(descriptor, program.read())
    return in_child(lambda: os.execv(f"/proc/self/fd/{descriptor}", ["sh", "-c", EXIT])) == 77


@attempt
def exec_copy_in_scratch(target: Target):
    shutil.copy(os.path.realpath(SHELL), target.scratch_path())
    os.chmod(target.scratch_path(), 0o755)
    return in_child(lambda: os.execv(target.scratch_path(), ["sh", "-c", EXIT])) == 77


@attempt
def exec_script_in_scratch(target: Target):
    Path(target.scratch_path()).write_text(f"#!{SHELL}\n{EXIT}\n")
    os.chmod(target.scratch_path(), 0o755)
    return in_child(lambda: os.execv(target.scratch_path(), ["script"])) == 77


@attempt
def exec_program_in_model_folder(target: Target):
    return in_child(lambda: os.execv(Path(target.folder, "tool"), ["tool"])) == 77


def _loader() -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/ld-" in line:
            return line.split()[-1]
    raise Impossible("no dynamic loader is mapped")


@attempt
def exec_by_loader(target: Target):
    """The dynamic loader starts a file that itself may not be executed."""
    shutil.copy(os.path.realpath(SHELL), target.scratch_path())
    os.chmod(target.scratch_path(), 0o644)
    return in_child(lambda: os.execv(_loader(), ["ld.so", target.scratch_path(), "-c", EXIT])) == 77


@attempt
def exec_by_clone_with_shared_memory(target: Target):
    """What vfork does: the child has its parent's memory until it starts the program. posix_spawnp of the C library."""
    child, words = ctypes.c_int(), (ctypes.c_char_p * 4)(b"sh", b"-c", EXIT.encode(), None)
    code = libc.posix_spawnp(ctypes.byref(child), b"sh", None, None, words, None)
    if code:
        raise OSError(code, "posix_spawnp")
    return _end(child.value)


@attempt
def exec_setuid_program(target: Target):
    """A program that changes its user; with no_new_privs it starts without the rights."""
    program = next((path for path in ("/usr/bin/su", "/bin/su", "/usr/bin/mount") if os.access(path, os.X_OK)), None)
    if program is None:
        raise Impossible("there is none")
    return in_child(lambda: os.execv(program, [program, "--version"])) == 0


@attempt
def exec_privileged_helper_of_kernel(target: Target):
    """The kernel starts `modprobe` for a file with an unknown format: it must not be asked to."""
    Path(target.scratch_path()).write_bytes(b"\xff\xff\xff\xff")
    os.chmod(target.scratch_path(), 0o755)
    try:
        os.execv(target.scratch_path(), ["x"])
    except OSError as error:
        return error.errno == errno.ENOEXEC  # it was looked at, not refused


@attempt
def exec_by_32_bit_call(target: Target):
    """execve of the 32-bit interface, which has another number."""
    at = libc.mmap(None, 4096, 3, 0x62, -1, 0)  # private, without a file, below 4 GB
    ctypes.memmove(at, b"/bin/sh\0" + b"sh\0-c\0exit 77\0", 25)
    pointers = b"".join((at + offset).to_bytes(4, "little") for offset in (8, 11, 14)) + bytes(4)
    ctypes.memmove(at + 64, pointers, 16)
    child = os.fork()
    if not child:
        try:
            by_32_bits(11, at, at + 64, 0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        raise Impossible("the kernel has no 32-bit calls")
    return status == 77

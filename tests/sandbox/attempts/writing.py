"""Writing, changing and removing files outside of the scratch folder, by every route."""

import ctypes
import errno
import os
import resource
import stat
import sys
import sysconfig
from pathlib import Path

from . import Impossible, Left, Target, attempt
from .kernel import if_built, libc, syscall

AT_FDCWD = -100
O_TMPFILE = 0o20200000


@attempt
def create_file(target: Target):
    return Path(target.new).write_text("x")


@attempt
def append_to_file(target: Target):
    with open(target.mine, "a") as file:
        return file.write("more")


@attempt
def write_by_symlink(target: Target):
    os.symlink(target.mine, target.scratch_path())
    return Path(target.scratch_path()).write_text("x")


@attempt
def write_by_dangling_symlink(target: Target):
    os.symlink(target.new, target.scratch_path())
    return Path(target.scratch_path()).write_text("x")


@attempt
def write_by_hard_link(target: Target):
    os.link(target.mine, target.scratch_path())
    return Path(target.scratch_path()).write_text("x")


@attempt
def write_by_root_in_proc(target: Target):
    return Path(f"/proc/self/root{target.mine}").write_text("x")


@attempt
def write_by_inherited_folder(target: Target):
    return os.close(os.open("written", os.O_WRONLY | os.O_CREAT, dir_fd=target.descriptors["folder"])) is None


@attempt
def write_by_shared_mapping(target: Target):
    import mmap

    with open(target.mine, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        data[0:1] = b"X"
        return True


@attempt
def truncate_file(target: Target):
    os.truncate(target.mine, 0)
    return True


@attempt
def truncate_open_file(target: Target):
    os.ftruncate(os.open(target.mine, os.O_WRONLY), 0)
    return True


@attempt
def truncate_by_open(target: Target):
    return os.open(target.mine, os.O_RDONLY | os.O_TRUNC)


@attempt
def remove_file(target: Target):
    os.unlink(target.mine)
    return True


@attempt
def rename_file_out_of_scratch(target: Target):
    Path(target.scratch_path()).write_text("x")
    os.rename(target.scratch_path(), target.new)
    return True


@attempt
def rename_file_into_scratch(target: Target):
    os.rename(target.mine, target.scratch_path())
    return True


@attempt
def rename_within_outside(target: Target):
    os.rename(target.mine, target.new)
    return True


@attempt
def exchange_with_file_in_scratch(target: Target):
    Path(target.scratch_path()).write_text("x")
    exchange = 2
    syscall("renameat2", AT_FDCWD, target.scratch_path().encode(), AT_FDCWD, target.mine.encode(), exchange)
    return True


@attempt
def link_file_out_of_scratch(target: Target):
    Path(target.scratch_path()).write_text("x")
    os.link(target.scratch_path(), target.new)
    return True


@attempt
def link_unnamed_file_outside(target: Target):
    """A file without a name, made in the scratch folder and given a name outside."""
    descriptor = if_built(lambda: os.open(target.scratch, O_TMPFILE | os.O_WRONLY), errno.EOPNOTSUPP)
    follow = 0x400
    if libc.linkat(AT_FDCWD, f"/proc/self/fd/{descriptor}".encode(), AT_FDCWD, target.new.encode(), follow):
        raise OSError(ctypes.get_errno(), "linkat")
    return True


@attempt
def make_unnamed_file_outside(target: Target):
    return if_built(lambda: os.open(target.files, O_TMPFILE | os.O_RDWR), errno.EOPNOTSUPP)


@attempt
def make_folder(target: Target):
    os.mkdir(target.new)
    return True


@attempt
def make_symlink(target: Target):
    os.symlink("/", target.new)
    return True


@attempt
def make_fifo(target: Target):
    os.mkfifo(target.new)
    return True


@attempt
def make_socket_file(target: Target):
    import socket

    socket.socket(socket.AF_UNIX).bind(target.new)
    return True


@attempt
def make_device(target: Target):
    """/dev/zero under another name, in the scratch folder."""
    if_built(lambda: os.mknod(target.scratch_path(), stat.S_IFCHR | 0o666, os.makedev(1, 5)), errno.EPERM)
    return if_built(lambda: os.open(target.scratch_path(), os.O_RDONLY), errno.EACCES)


@attempt
def change_mode(target: Target):
    os.chmod(target.mine, 0o777)
    return os.stat(target.mine).st_mode & 0o777 == 0o777  # a box may say that it did, and do nothing


@attempt
def change_mode_in_model_folder(target: Target):
    os.chmod(Path(target.folder, "config.json"), 0o666)
    return os.stat(Path(target.folder, "config.json")).st_mode & 0o777 == 0o666


@attempt
def make_file_in_scratch_setuid(target: Target):
    """A program of root's that anyone may start later, from outside of the box."""
    if os.getuid():
        raise Impossible("the files of an ordinary user give nobody rights")
    Path(target.scratch_path()).write_text("x")
    os.chmod(target.scratch_path(), 0o4755)
    return os.stat(target.scratch_path()).st_mode & stat.S_ISUID


@attempt
def change_owner(target: Target):
    os.chown(target.mine, os.getuid(), os.getgid())
    return True


@attempt
def change_times(target: Target):
    os.utime(target.mine, (0, 0))
    return os.stat(target.mine).st_mtime == 0


@attempt
def change_times_by_descriptor(target: Target):
    os.utime(f"/proc/self/fd/{os.open(target.mine, os.O_PATH)}", (0, 0))
    return os.stat(target.mine).st_mtime == 0


@attempt
def change_attributes(target: Target):
    if_built(lambda: os.setxattr(target.mine, "user.note", b"x"), errno.EOPNOTSUPP)
    return True


@attempt
def change_attributes_of_model_folder(target: Target):
    """Of a file that may be read: the descriptor is enough."""
    descriptor = os.open(Path(target.folder, "config.json"), os.O_RDONLY)
    if_built(lambda: os.setxattr(descriptor, "user.note", b"x"), errno.EOPNOTSUPP)
    return True


@attempt
def change_flags_of_model_folder(target: Target):
    """FS_IOC_SETFLAGS with the flag for `no access times`, by an ordinary read descriptor."""
    import fcntl
    import struct

    descriptor = os.open(Path(target.folder, "config.json"), os.O_RDONLY)
    get, put = 0x80086601, 0x40086602
    flags = if_built(lambda: fcntl.ioctl(descriptor, get, bytes(8)), errno.ENOTTY)
    with_noatime = struct.pack("Q", struct.unpack("Q", flags)[0] | 0x80)
    if_built(lambda: fcntl.ioctl(descriptor, put, with_noatime), errno.EOPNOTSUPP, errno.ENOTTY)
    return True


@attempt
def change_code_of_model_folder(target: Target):
    with open(Path(target.folder, "modeling.py"), "a") as file:
        return file.write("# more")


@attempt
def add_file_to_model_folder(target: Target):
    return Path(target.folder, "added.py").write_text("x")


@attempt
def replace_model_folder(target: Target):
    """The folder itself is moved away, so that another may take its name."""
    moved = target.folder + "-moved"
    os.rename(target.folder, moved)
    os.rename(moved, target.folder)
    return True


def _install(place: str, name: str) -> Left:
    """An empty file with a name of its own; whoever started the attempt looks for it and removes it."""
    if not os.path.isdir(place):
        raise Impossible(f"there is no {os.path.basename(place)}")
    path = os.path.join(place, name)
    os.close(if_built(lambda: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), errno.EACCES, errno.EROFS))
    return Left(path)


@attempt
def add_pth_to_packages(target: Target):
    """Python runs `.pth` files at its next start."""
    return _install(sysconfig.get_path("purelib"), f"{target.marker}.pth")


@attempt
def add_module_to_packages(target: Target):
    return _install(sysconfig.get_path("platlib"), f"{target.marker}.py")


@attempt
def add_bytecode_to_standard_library(target: Target):
    return _install(str(Path(os.__file__).parent / "__pycache__"), f"{target.marker}.pyc")


@attempt
def add_program_beside_python(target: Target):
    return _install(os.path.dirname(sys.executable), target.marker)


@attempt
def write_in_etc(target: Target):
    """Where `ld.so.preload` would lie."""
    return _install("/etc", target.marker)


@attempt
def write_in_home(target: Target):
    """Where `.bashrc` and `.config/autostart` lie."""
    return Path(target.home, ".bashrc").write_text("x")


@attempt
def write_in_tmp(target: Target):
    return _install("/tmp", target.marker)


@attempt
def write_in_var_tmp(target: Target):
    return _install("/var/tmp", target.marker)


@attempt
def write_in_dev_shm(target: Target):
    return _install("/dev/shm", target.marker)


@attempt
def drop_core_file(target: Target):
    """A core file is written by the kernel, in the working folder or wherever the system says."""

    os.mkdir(target.scratch_path())
    child = os.fork()
    if not child:
        try:
            os.chdir(target.scratch_path())
            resource.setrlimit(resource.RLIMIT_CORE, (2**30, 2**30))
        except ValueError:
            pass
        try:
            os.abort()
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and not os.WCOREDUMP(status):
        raise Impossible("the system writes no core files")
    return os.WIFSIGNALED(status) and os.WCOREDUMP(status)


@attempt
def write_kernel_setting(target: Target):
    """`core_pattern` names a program that the kernel starts outside of every container. Written back as it is."""
    path = Path("/proc/sys/kernel/core_pattern")
    setting = path.read_text()
    return if_built(lambda: path.write_text(setting), errno.EACCES, errno.EROFS, errno.EPERM)


@attempt
def open_sysrq(target: Target):
    return if_built(lambda: os.open("/proc/sysrq-trigger", os.O_WRONLY), errno.EACCES, errno.ENOENT, errno.EROFS)


@attempt
def write_in_sys(target: Target):
    return if_built(lambda: os.open("/sys/kernel/uevent_helper", os.O_WRONLY), errno.EACCES, errno.ENOENT, errno.EROFS)


@attempt
def make_cgroup(target: Target):
    """A group of one's own, with limits of one's own."""
    for place in [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")]:
        try:
            os.mkdir(place / target.marker)
        except OSError:
            continue
        return Left(str(place / target.marker))
    raise Impossible("no cgroup may be made here")

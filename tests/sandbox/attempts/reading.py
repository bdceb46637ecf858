"""Reading files outside of the box, by every route, and learning that they exist."""

import ctypes
import errno
import mmap
import os
import struct
from pathlib import Path

from . import Target, attempt
from .kernel import canary, if_built, libc, read, syscall

AT_FDCWD = -100


# ---- their content


@attempt
def read_absolute_path(target: Target):
    return read(target.key)


@attempt
def read_relative_path(target: Target):
    os.chdir(target.scratch)
    return read(os.path.relpath(target.key, target.scratch))


@attempt
def read_by_symlink_in_scratch(target: Target):
    os.symlink(target.key, target.scratch_path())
    return read(target.scratch_path())


@attempt
def read_by_symlinked_folder_in_scratch(target: Target):
    os.symlink("/", target.scratch_path())
    return read(target.scratch_path() + target.key)


@attempt
def read_by_symlink_in_model_folder(target: Target):
    """The link comes with the folder, as from a repository."""
    return read(Path(target.folder, "weights.bin"))


@attempt
def read_by_hard_link(target: Target):
    os.link(target.key, target.scratch_path())
    return read(target.scratch_path())


@attempt
def read_by_own_root_in_proc(target: Target):
    return read(f"/proc/self/root{target.key}")


@attempt
def read_by_thread_root_in_proc(target: Target):
    return read(f"/proc/thread-self/root{target.key}")


@attempt
def read_by_own_cwd_in_proc(target: Target):
    os.chdir(target.scratch)
    return read(f"/proc/self/cwd/{os.path.relpath(target.key, target.scratch)}")


@attempt
def read_by_own_descriptor_in_proc(target: Target):
    folder = os.open(target.folder, os.O_RDONLY)
    return read(f"/proc/self/fd/{folder}/{os.path.relpath(target.key, target.folder)}")


@attempt
def read_by_parents_root_in_proc(target: Target):
    return read(f"/proc/{target.parent}/root{target.key}")


@attempt
def read_by_parents_cwd_in_proc(target: Target):
    return os.listdir(f"/proc/{target.parent}/cwd/")


@attempt
def read_by_parents_descriptor_in_proc(target: Target):
    return read(f"/proc/{target.parent}/fd/{target.descriptors['file']}")


@attempt
def read_by_folder_descriptor(target: Target):
    folder = os.open(target.folder, os.O_RDONLY)
    relative = os.path.relpath(target.key, target.folder)
    return read(relative, opener=lambda path, flags: os.open(path, flags, dir_fd=folder))


@attempt
def read_by_openat2(target: Target):
    how = ctypes.create_string_buffer(struct.pack("QQQ", os.O_RDONLY, 0, 0), 24)
    return read(if_built(lambda: syscall("openat2", AT_FDCWD, target.key.encode(), how, 24)))


@attempt
def read_by_path_descriptor(target: Target):
    """A descriptor opened with O_PATH passes some checks; opening it again through /proc needs them."""
    return read(f"/proc/self/fd/{os.open(target.key, os.O_PATH)}")


@attempt
def read_by_mapping(target: Target):
    with open(target.key, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as data:
        return canary(data[:7])


@attempt
def read_by_file_handle(target: Target):
    """As containers were left once: a handle is opened by number, without a walk along the path."""
    handle, mount = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136), ctypes.c_int()
    if_built(
        lambda: syscall("name_to_handle_at", AT_FDCWD, target.key.encode(), handle, ctypes.byref(mount), 0),
        errno.EOPNOTSUPP,
    )
    within = os.open(target.scratch, os.O_RDONLY)
    return read(if_built(lambda: syscall("open_by_handle_at", within, handle, os.O_RDONLY), errno.EPERM))


@attempt
def read_after_leaving_chroot(target: Target):
    """The old way out of a changed root: a folder descriptor from before, and `..`."""
    os.mkdir(target.scratch_path())
    outside = os.open(".", os.O_RDONLY)
    if_built(lambda: os.chroot(target.scratch_path()), errno.EPERM)
    os.fchdir(outside)
    for _ in range(40):
        os.chdir("..")
    return read(target.key.lstrip("/"))


@attempt
def read_after_two_chroots(target: Target):
    os.makedirs(target.scratch_path() + "/inner")
    os.chdir(target.scratch_path())
    if_built(lambda: os.chroot("inner"), errno.EPERM)
    for _ in range(40):
        os.chdir("..")
    return read(target.key.lstrip("/"))


@attempt
def read_inherited_file(target: Target):
    os.lseek(target.descriptors["file"], 0, os.SEEK_SET)
    return canary(os.read(target.descriptors["file"], 64))


@attempt
def read_from_inherited_folder(target: Target):
    return read("id_rsa", opener=lambda path, flags: os.open(path, flags, dir_fd=target.descriptors["folder"]))


@attempt
def find_open_descriptors(target: Target):
    """Any descriptor above the three standard ones that leads to a file outside."""
    for descriptor in range(3, max(target.descriptors.values()) + 256):
        try:
            place = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue
        if place.startswith((target.home, target.files)):
            return place
    return None


@attempt
def read_shared_memory_file(target: Target):
    return read(f"/dev/shm/{target.shared_memory}")


@attempt
def read_other_users_temporary_files(target: Target):
    return os.path.basename(target.files) in os.listdir(os.path.dirname(target.home))


@attempt
def read_raw_disk(target: Target):
    """A device node of one's own for the disk that holds the files."""
    os.mknod(target.scratch_path(), 0o600 | 0o060000, os.stat("/").st_dev)
    disk = if_built(lambda: os.open(target.scratch_path(), os.O_RDONLY), errno.ENXIO, errno.EPERM)
    return os.read(disk, 512)


@attempt
def read_machine_settings(target: Target):
    return Path("/proc/sys/kernel/random/boot_id").read_text() and os.listdir("/sys/class/net")


@attempt
def read_kernel_log(target: Target):
    return if_built(lambda: syscall("syslog", 10, 0, 0), errno.EPERM)  # its size


@attempt
def read_mounts(target: Target):
    """They name folders of the machine."""
    return " /sys " in Path("/proc/self/mountinfo").read_text()


# ---- that they exist


@attempt
def see_home_listed(target: Target):
    return "id_rsa" in os.listdir(target.home)


@attempt
def see_file_by_stat(target: Target):
    return os.stat(target.key).st_size


@attempt
def see_file_by_statx(target: Target):
    found = ctypes.create_string_buffer(256)
    syscall("statx", AT_FDCWD, target.key.encode(), 0, 0x7FF, found)
    return True


@attempt
def see_file_by_access(target: Target):
    return os.access(target.key, os.F_OK)


@attempt
def see_file_by_path_descriptor(target: Target):
    return os.fstat(os.open(target.key, os.O_PATH)).st_size


@attempt
def see_link_target(target: Target):
    return os.readlink(Path(target.home, "link"))


@attempt
def see_folder_by_chdir(target: Target):
    os.chdir(target.home)
    return os.getcwd() == target.home


@attempt
def see_file_by_statfs(target: Target):
    return os.statvfs(target.key).f_blocks


@attempt
def see_file_by_handle(target: Target):
    handle, mount = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136), ctypes.c_int()
    if_built(
        lambda: syscall("name_to_handle_at", AT_FDCWD, target.key.encode(), handle, ctypes.byref(mount), 0),
        errno.EOPNOTSUPP,
    )
    return True


@attempt
def see_file_by_its_attributes(target: Target):
    return if_built(lambda: os.getxattr(target.key, "user.origin"), errno.EOPNOTSUPP, errno.ENODATA)


@attempt
def see_changes_by_inotify(target: Target):
    watch = syscall("inotify_init1", os.O_NONBLOCK)
    return syscall("inotify_add_watch", watch, target.home.encode(), 0xFFF) > 0


def _answer(call, path: str) -> int:
    try:
        call(path)
    except OSError as error:
        return error.errno or -1
    return 0


@attempt
def see_file_by_error_codes(target: Target):
    """A box that answers "no permission" for what exists and "not found" for the rest tells them apart."""
    missing = target.key + "-missing"
    trials = {
        "open": lambda path: os.close(os.open(path, os.O_RDONLY)),
        "mkdir": os.mkdir,
        "execve": lambda path: os.execv(path, ["x"]),
        "readlink": os.readlink,
        "symlink": lambda path: os.symlink("x", path),
        "removexattr": lambda path: os.removexattr(path, "user.none"),
        "truncate": lambda path: os.truncate(path + "/", 0),
        "chroot": lambda path: os.chroot(path),
        "rmdir": os.rmdir,
        "utime": lambda path: os.utime(path + "/.", (0, 0)),
    }
    return [name for name, call in trials.items() if _answer(call, target.key) != _answer(call, missing)]


@attempt
def see_file_by_loader(target: Target):
    """The dynamic loader opens the file; its message differs for a file that is there."""
    libc.dlopen.restype, libc.dlerror.restype = ctypes.c_void_p, ctypes.c_char_p
    messages = []
    for path in (target.key, target.key + "-missing"):
        libc.dlopen(path.encode(), 2)
        messages.append((libc.dlerror() or b"").decode().replace(path, ""))
    return messages[0] != messages[1]

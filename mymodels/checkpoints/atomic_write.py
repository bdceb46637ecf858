"""Crash-safe writing: a file or folder is replaced completely or not at all."""

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

_NEW, _OLD, _LOCK = "new", "old", "lock"


@contextlib.contextmanager
def replace_folder(
    target: str | os.PathLike,
    *,
    keep: Callable[[str], bool] | None = None,
    finish: Callable[[Path], None] | None = None,
    overwrite: bool = True,
) -> Iterator[Path]:
    """Write a folder beside `target`, and replace `target` with it when the `with` block ends without an error.

    At every moment, `target` is either the complete old folder or the complete new one, also after an exception, a full
    disk, SIGKILL or a power cut: files and folders are flushed to the disk before the two are exchanged in one step
    (`renameat2` on Linux, `renamex_np` on macOS; file systems without it need two renames, and the next call for
    `target` repairs an interruption between them). The next writer removes what a killed one left. Several writers may
    run at once; the last to finish wins.

    Args:
        target: the folder; its parents are created.
        keep: whether the new folder keeps a file or folder of `target`, by name (as a hard link, so nothing is copied);
            None keeps nothing.
        finish: called with the new folder at the end, to add what depends on its content, such as a manifest.
        overwrite: if false, an existing `target` that is not empty is an error.

    Yields:
        the folder to write into, on the same file system as `target`.

    Raises:
        FileExistsError: `target` is a file, or not empty and `overwrite` is false.
        OSError: the disk is full, or the folder read-only; `target` is unchanged.
    """
    target = Path(os.path.realpath(os.path.expanduser(target)))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file: choose a folder to write to")
    with _explain_os_errors(f"{target} was not written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        repair(target)
        if not overwrite and target.exists() and any(target.iterdir()):
            raise FileExistsError(f"{target} exists and is not empty: choose another folder, or remove it first")
        if os.path.ismount(target):
            raise OSError(errno.EBUSY, f"{target} is a mount point and cannot be replaced: write to a folder inside it")
        if Path.cwd().is_relative_to(target):
            raise OSError(
                errno.EBUSY, f"{target} holds the current folder and cannot be replaced: start from elsewhere"
            )
        staging, lock = _stage(target)
    try:
        new = staging / _NEW
        with _explain_os_errors(f"{target} was not written, and what was there is unchanged"):
            new.mkdir()
            existed = target.exists()
            if existed:
                shutil.copymode(target, new)
            yield new
            if keep and existed:
                _link_kept_files(target, new, keep)
            if finish:
                finish(new)
            _flush(new)
            _swap(new, target, staging / _OLD)
            former = new if new.exists() else staging / _OLD
            if former.exists() and (not former.is_dir() or (not overwrite and any(former.iterdir()))):
                _swap(former, target, staging / "refused")
                raise FileExistsError(
                    f"{target} was created by another process meanwhile, and is unchanged: choose another folder"
                )
            if keep and former.exists():
                _move_files_added_meanwhile(former, target, keep)
            _sync(target.parent)
    finally:
        if not (staging / _OLD).exists() or target.exists():
            _remove(staging)
        lock.release()


@contextlib.contextmanager
def replace_file(target: str | os.PathLike, *, overwrite: bool = True) -> Iterator[Path]:
    """`replace_folder` for one file: yields the path to write it to.

    Raises:
        FileExistsError: `target` exists and `overwrite` is false.
        IsADirectoryError: `target` is a folder.
        OSError: the disk is full, or the folder read-only; `target` is unchanged.
    """
    target = Path(os.path.realpath(os.path.expanduser(target)))
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: choose a file to write to")
    with _explain_os_errors(f"{target} was not written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        repair(target)
        staging, lock = _stage(target)
    try:
        with _explain_os_errors(f"{target} was not written, and what was there is unchanged"):
            yield staging / _NEW
            if target.exists():
                shutil.copymode(target, staging / _NEW)
            _sync(staging / _NEW)
            if not overwrite:
                with contextlib.suppress(FileExistsError):
                    os.link(staging / _NEW, target)  # unlike a rename, this never overwrites
                if not os.path.samefile(staging / _NEW, target):
                    raise FileExistsError(f"{target} exists: choose another file, or remove it first")
            os.replace(staging / _NEW, target)
            _sync(target.parent)
    finally:
        _remove(staging)
        lock.release()


def repair(target: Path) -> None:
    """Remove what killed writers of `target` left, and restore the folder that one of them had moved away."""
    ours = re.compile(re.escape(f".{target.name}.saving-") + r"\w{8}")  # the prefix and what `mkdtemp` appends
    for staging in [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]:
        with contextlib.suppress(Timeout, OSError), FileLock(staging / _LOCK, timeout=0):
            if (staging / _OLD).exists() and not target.exists():
                (staging / _OLD).rename(target)
            _remove(staging)


def _stage(target: Path) -> tuple[Path, FileLock]:
    """A new folder beside `target`, locked until this process releases it or ends."""
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.saving-", dir=target.parent))
        lock = FileLock(staging / _LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError):
            continue  # removed by another writer's `repair` between the two steps
        except OSError:
            _remove(staging)
            raise
        if (staging / _LOCK).exists():
            return staging, lock
        lock.release()


def _remove(folder: Path) -> None:
    for parent, folders, _ in os.walk(folder):
        for name in folders:  # kept folders may be read-only
            if not os.path.islink(os.path.join(parent, name)):
                with contextlib.suppress(OSError):
                    os.chmod(os.path.join(parent, name), 0o700)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _explain_os_errors(what: str) -> Iterator[None]:
    """Within it, errors of the operating system say in one sentence what was not written; other errors pass."""
    try:
        yield
    except SafetensorError as error:  # safetensors, written in Rust, has the number in the text only
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), f"{what}: {os.strerror(int(number[1])).lower()}") from error
    except OSError as error:
        if error.errno is None or (error.filename is None and error.errno == errno.EBUSY):
            raise  # one of the sentences above
        reason = f"{os.strerror(error.errno).lower()} ({error.filename or 'writing'})"
        if error.errno == errno.EXDEV:
            reason = "it spans file systems, as folders of container images do, and cannot be replaced: choose another folder"
        raise OSError(error.errno, f"{what}: {reason}") from error


def _link_kept_files(target: Path, new: Path, keep: Callable[[str], bool]) -> None:
    """Link the kept files of `target` into `new`; again if another writer replaces `target` meanwhile."""
    for attempt in range(1000):
        taken: list[Path] = []
        try:
            identity = os.stat(target).st_ino
            for entry in list(target.iterdir()):
                if keep(entry.name) and not os.path.lexists(new / entry.name):
                    taken.append(new / entry.name)
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
                    else:
                        _link(str(entry), str(new / entry.name))
            if os.stat(target).st_ino == identity:
                return
        except (FileNotFoundError, shutil.Error) as error:
            gone = isinstance(error, FileNotFoundError) or all("No such file" in str(item[2]) for item in error.args[0])
            if not gone:
                raise OSError(errno.EIO, str(error.args[0][0][2]), str(error.args[0][0][0])) from error
        for path in taken:
            _remove(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        repair(target)  # a writer without an exchange may have been killed between its two renames
        if attempt > 100 and not target.exists():
            return  # removed by another process
        time.sleep(0.01)
    raise OSError(
        errno.EBUSY, f"{target} is being replaced by other processes again and again, so its other files cannot be kept"
    )


def _move_files_added_meanwhile(former: Path, target: Path, keep: Callable[[str], bool]) -> None:
    """Move the files that were added to the old folder after `_link_kept_files`."""
    for entry in former.iterdir():
        for attempt in range(1000):
            if not keep(entry.name) or os.path.lexists(target / entry.name):
                break
            try:
                entry.rename(target / entry.name)
                break
            except OSError:  # another writer is between its two renames, or has just added it
                if attempt == 999 or (target.exists() and not os.path.lexists(target / entry.name)):
                    raise
                time.sleep(0.01)


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copy2(source, destination, follow_symlinks=False)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush(folder: Path) -> None:
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                _sync(path)
        _sync(Path(parent))


def _swap(new: Path, target: Path, old: Path) -> None:
    """Put `new` at `target`; what was there is afterwards at the path of `new`, or at `old`."""
    while True:
        try:
            if target.exists():
                if _exchange(new, target):
                    return
                _remove(old)
                target.rename(old)
        except FileNotFoundError:
            if not new.exists():
                raise
            continue  # another writer is between its two renames
        try:
            new.rename(target)
            return
        except OSError as error:
            if error.errno not in (
                errno.EEXIST,
                errno.ENOTEMPTY,
            ):  # else another writer was first: replace what it wrote
                if old.exists():
                    old.rename(target)
                raise


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system does not support it."""
    if sys.platform not in ("linux", "darwin"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        at_cwd, exchange = -100, 2
        failed = libc.renameat2(at_cwd, first, at_cwd, second, exchange)
    elif sys.platform == "darwin":
        failed = libc.renamex_np(first, second, 2)
    else:
        return False
    if failed and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(b))
    return not failed

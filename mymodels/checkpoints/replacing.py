"""Crash-safe writing: a folder or file appears whole at its place, or what stood there before stays."""

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
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
    """Write a folder beside `target`, and put it in `target`'s place when the `with` block ends without an error.

    Whatever happens on the way (an exception, a full disk, SIGKILL, a power cut), `target` is at every moment what it
    was before, whole, or the new folder, whole: files and folders are flushed to the disk before both change places
    in one step (`renameat2` on Linux, `renamex_np` on macOS; a file system without it gets two renames, and the next
    call for `target` repairs an interruption between them). What a killed writer left behind is removed by the next
    one. Several writers may work at once; the last to finish wins.

    Args:
        target: the folder; its parents are created.
        keep: which of the files and folders that now stand in `target`, by name, the new folder takes over (hard links,
            so nothing is read); None takes over nothing.
        finish: called with the new folder when it is complete but for what this writes, such as a manifest.
        overwrite: if false, an existing `target` that is not empty is an error.

    Yields:
        the folder to write into, on the same file system as `target`.

    Raises:
        FileExistsError: `target` is a file, or not empty and `overwrite` is false.
        OSError: the disk is full, or the place read-only; `target` is as it was.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file: choose a folder to write to")
    with _said(f"{target} was not written"):
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
        with _said(f"{target} was not written, what stood there is unchanged"):
            new.mkdir()
            if target.exists():
                shutil.copymode(target, new)
            yield new
            if keep and target.exists():
                _take_over(target, new, keep)
            if finish:
                finish(new)
            _flush(new)
            _swap(new, target, staging / _OLD)
            _sync(target.parent)
    finally:
        if not (staging / _OLD).exists() or target.exists():
            shutil.rmtree(staging, ignore_errors=True)
        lock.release()


@contextlib.contextmanager
def replace_file(target: str | os.PathLike) -> Iterator[Path]:
    """As `replace_folder`, for one file: yields the path to write it to.

    Raises:
        IsADirectoryError: `target` is a folder.
        OSError: the disk is full, or the place read-only; `target` is as it was.
    """
    target = Path(os.path.realpath(target))
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: choose a file to write to")
    with _said(f"{target} was not written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        repair(target)
        staging, lock = _stage(target)
    try:
        with _said(f"{target} was not written, what stood there is unchanged"):
            yield staging / _NEW
            _sync(staging / _NEW)
            os.replace(staging / _NEW, target)
            _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        lock.release()


def repair(target: Path) -> None:
    """Clear away what killed writers of `target` left, and put back what one of them had set aside."""
    for staging in target.parent.glob(f".{_escaped(target.name)}.saving-*"):
        with contextlib.suppress(Timeout, OSError), FileLock(staging / _LOCK, timeout=0):
            if (staging / _OLD).exists() and not target.exists():
                (staging / _OLD).rename(target)
            shutil.rmtree(staging, ignore_errors=True)


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _stage(target: Path) -> tuple[Path, FileLock]:
    """A new folder beside `target`, locked for as long as this process lives."""
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.saving-", dir=target.parent))
        lock = FileLock(staging / _LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError):
            continue  # another writer's `repair` came between the two steps
        if (staging / _LOCK).exists():
            return staging, lock
        lock.release()


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Errors of the operating system in one sentence, wherever they come from; others pass."""
    try:
        yield
    except SafetensorError as error:  # safetensors writes in Rust and puts the number in the text
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), f"{what}: {os.strerror(int(number[1])).lower()}") from error
    except OSError as error:
        if error.errno is None or (error.filename is None and error.errno == errno.EBUSY):
            raise  # a sentence already
        raise OSError(
            error.errno, f"{what}: {os.strerror(error.errno).lower()} ({error.filename or 'writing'})"
        ) from error


def _take_over(old: Path, new: Path, keep: Callable[[str], bool]) -> None:
    def link(source: str, destination: str) -> None:
        try:
            os.link(source, destination, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(source, destination, follow_symlinks=False)

    for entry in old.iterdir():
        if not keep(entry.name) or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=link)
        else:
            link(str(entry), str(new / entry.name))


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
            if not os.path.islink(os.path.join(parent, name)):
                _sync(Path(parent, name))
        _sync(Path(parent))


def _swap(new: Path, target: Path, old: Path) -> None:
    """Put `new` in `target`'s place; afterwards what was there lies where `new` was, or at `old`."""
    while True:
        if target.exists():
            if _exchange(new, target):
                return
            target.rename(old)
        try:
            new.rename(target)
            return
        except OSError as error:
            if old.exists():
                old.rename(target)
                raise
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise  # else another writer was first: exchange with what it wrote


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system cannot."""
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

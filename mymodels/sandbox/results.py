"""Reading what a confined process has left in its scratch folder, of which nothing can be trusted.

Files are JSON or safetensors, never pickles. They are opened without following links, must be regular files, and have
bounds: of their size, of how deep JSON is nested. Read them after the process has ended.
"""

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..messages import one_line

LARGEST_TEXT = 64_000_000  # bytes
DEEPEST = 50  # levels of lists and objects
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
MOST_ITEMS = 4_000_000  # lists, objects and commas: two bytes of text each, and up to 100 in memory


class UntrustedResult(ValueError):
    """A file of a confined process is not what it may be."""


def open_regular(path: Path, largest: int | None = None) -> int:
    """A descriptor of a regular file in an existing folder; its last component may be no link.

    Raises:
        UntrustedResult: it is missing, a link, no regular file, or larger than `largest` bytes.
    """
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        )
    except OSError as error:
        raise UntrustedResult(f"{path.name} cannot be read: {error.strerror}") from None
    status = os.fstat(descriptor)
    wrong = "" if stat.S_ISREG(status.st_mode) else "it is no regular file"
    if largest is not None and status.st_size > largest:
        wrong = wrong or f"it has {status.st_size} bytes, more than {largest}"
    if wrong:
        os.close(descriptor)
        raise UntrustedResult(f"{path.name} is not read: {wrong}")
    return descriptor


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """The text of a file, with invalid UTF-8 replaced."""
    with open(open_regular(path, largest), "rb") as file:
        return file.read(largest + 1)[:largest].decode("utf-8", errors="replace")


def parse_json(text: str, items: int = MOST_ITEMS) -> Any:
    """JSON as the standard defines it: no NaN, no infinity, no name twice; nested no deeper than `DEEPEST`.

    Raises:
        UntrustedResult: it is not.

    Examples:
        >>> parse_json('{"a": [1]}')
        {'a': [1]}
    """
    if sum(map(text.count, ",[{")) > items:
        raise UntrustedResult(f"it is not read: it has more than {items} values")
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_each_name_once)
    except (ValueError, RecursionError) as error:
        raise UntrustedResult(f"it is not valid JSON: {one_line(error, 200)}") from None
    level, depth = [value], 0
    while level := [item for part in level for item in _items(part)]:
        depth += 1
        if depth > DEEPEST:
            raise UntrustedResult(f"it is nested deeper than {DEEPEST} levels")
    return value


def read_json(path: Path, largest: int = LARGEST_TEXT, items: int = MOST_ITEMS) -> Any:
    """The JSON of a file; see `parse_json`."""
    try:
        return parse_json(read_text(path, largest), items)
    except UntrustedResult as error:
        raise UntrustedResult(str(error).replace("it is ", f"{path.name} is ", 1)) from None


def read_tensors(path: Path, largest: int | None = None) -> dict[str, Any]:
    """The tensors of a safetensors file; their values can be anything.

    Raises:
        UntrustedResult: it is missing, damaged, or larger than `largest` bytes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    descriptor = open_regular(path, largest)
    opened = Path(f"/proc/self/fd/{descriptor}")  # the file that was looked at, whatever its name stands for now
    try:
        return load_file(opened if opened.exists() else path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UntrustedResult(f"{path.name} is no valid safetensors file: {one_line(error, 200)}") from None
    finally:
        os.close(descriptor)


def copy_file(source: Path, destination: Path) -> None:
    """Copy a regular file.

    Raises:
        UntrustedResult: it is missing, a link, or no regular file.
    """
    with open(open_regular(source), "rb") as found, open(destination, "wb") as copy:
        shutil.copyfileobj(found, copy, 2**20)


def copy_folder(source: Path, target: Path, largest: int) -> None:
    """Copy the files and folders in a folder that hostile code may still be changing.

    Args:
        source: the folder; it and what it lies in cannot be replaced by that code.
        target: an existing folder.
        largest: bytes that the files may have together.

    Raises:
        UntrustedResult: it holds links or something else, is too large or nested too deep.
    """
    try:
        descriptor = os.open(source, _FOLDER)
    except OSError as error:
        raise UntrustedResult(f"{source.name} cannot be read: {error.strerror}") from None
    try:
        _copy(descriptor, target, largest, [largest], DEEPEST)
    finally:
        os.close(descriptor)


def _copy(folder: int, target: Path, largest: int, left: list[int], depth: int) -> None:
    """Each name is opened once, in the folder that is open, so that no link is followed whatever is swapped."""
    if depth == 0:
        raise UntrustedResult(f"it is nested deeper than {DEEPEST} folders")
    for name in os.listdir(folder):
        shown = one_line(name, 100)
        try:
            found = os.open(name, _FILE, dir_fd=folder)
        except OSError as error:
            raise UntrustedResult(f"{shown} cannot be read: {error.strerror}") from None
        try:
            status = os.fstat(found)
            if stat.S_ISDIR(status.st_mode):
                (target / name).mkdir(exist_ok=True)
                _copy(found, target / name, largest, left, depth - 1)
                continue
            if not stat.S_ISREG(status.st_mode):
                raise UntrustedResult(f"{shown} is not read: it is no regular file")
            with open(found, "rb", closefd=False) as file, open(target / name, "wb") as copy:
                while part := file.read(2**20):
                    left[0] -= len(part)
                    if left[0] < 0:
                        raise UntrustedResult(f"it has more than {largest} bytes")
                    copy.write(part)
        finally:
            os.close(found)


def delete(folder: Path) -> None:
    """Delete a folder in which a confined process wrote, whatever modes, links and depth it left there.

    Neither the depth of folders nor the length of their paths sets a limit: it goes down by name and up by "..".
    """
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)
        here = os.open(folder, _FOLDER)
        way: list[str] = []
        waiting = [_clear(here)]
        while way or waiting[-1]:
            inner = _enter(here, waiting[-1].pop()) if waiting[-1] else None
            if inner is not None:
                name, descriptor = inner
                way.append(name)
                waiting.append(_clear(descriptor))
            elif not waiting[-1] and way:
                descriptor = os.open("..", _FOLDER, dir_fd=here)
                waiting.pop()
                with contextlib.suppress(OSError):
                    os.rmdir(way.pop(), dir_fd=descriptor)
            else:
                continue
            os.close(here)
            here = descriptor
        os.close(here)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder for a confined process, without links in its path; deleted afterwards by `delete`."""
    folder = Path(tempfile.mkdtemp(prefix=prefix)).resolve()
    try:
        yield folder
    finally:
        delete(folder)


def _enter(folder: int, name: str) -> tuple[str, int] | None:
    """A folder in a folder, opened; None if it cannot be."""
    try:
        os.chmod(name, 0o700, dir_fd=folder)
        return name, os.open(name, _FOLDER, dir_fd=folder)
    except OSError:
        return None


def _clear(folder: int) -> list[str]:
    """Remove the files of a folder; returns the names of the folders in it."""
    folders = []
    with os.scandir(folder) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.name, dir_fd=folder)
    return folders


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is not finite")
    return number

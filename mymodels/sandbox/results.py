"""Reading what a confined process has left in its scratch folder, of which nothing can be trusted.

Files are JSON or safetensors, never pickles. They are opened without following links, must be regular files, and have
bounds: of their size, of how deep JSON is nested. Read them after the process has ended.
"""

import contextlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

LARGEST_TEXT = 64_000_000  # bytes
DEEPEST = 50  # levels of lists and objects


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


def parse_json(text: str) -> Any:
    """JSON as the standard defines it: no NaN, no infinity, nested no deeper than `DEEPEST`.

    Raises:
        UntrustedResult: it is not.

    Examples:
        >>> parse_json('{"a": [1]}')
        {'a': [1]}
    """
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise UntrustedResult(f"it is not valid JSON: {error}") from None
    level, depth = [value], 0
    while level := [item for part in level for item in _items(part)]:
        depth += 1
        if depth > DEEPEST:
            raise UntrustedResult(f"it is nested deeper than {DEEPEST} levels")
    return value


def read_json(path: Path, largest: int = LARGEST_TEXT) -> Any:
    """The JSON of a file; see `parse_json`."""
    return parse_json(read_text(path, largest))


def read_tensors(path: Path, largest: int | None = None) -> dict[str, Any]:
    """The tensors of a safetensors file; their values can be anything.

    Raises:
        UntrustedResult: it is missing, damaged, or larger than `largest` bytes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    descriptor = open_regular(path, largest)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UntrustedResult(f"{path.name} is no valid safetensors file: {error}") from None
    finally:
        os.close(descriptor)


def delete(folder: Path) -> None:
    """Delete a folder in which a confined process wrote, whatever modes and links it left there."""
    for base, folders, _ in os.walk(folder, followlinks=False):
        for name in folders:
            path = os.path.join(base, name)
            if not os.path.islink(path):
                with contextlib.suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is not finite")
    return number

"""JSON of a checkpoint's folder, and the paths in it, both checked; imports neither torch nor transformers."""

import json
import os
import re
from pathlib import Path
from typing import Any

from ..messages import shorten
from .errors import CheckpointError

MAX_JSON_BYTES = 100_000_000  # the safetensors library's own limit for a header
ADVICE = "copy or download it again"


def parse_json(data: bytes, path: Path, what: str = "it") -> dict[str, Any]:
    """A JSON object, without duplicate keys, `NaN`, or text that is not Unicode.

    Raises:
        CheckpointError: it is not one, or larger than 100 MB.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{path}: {what} names {twice!r} twice; {ADVICE}")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {what} is {len(data):,} bytes of JSON, more than {MAX_JSON_BYTES:,}; {ADVICE}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate such as "\ud800" cannot be encoded
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON ({error}); {ADVICE}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} is a JSON {type(value).__name__}, not an object; {ADVICE}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`, as strictly as `parse_json`."""
    with path.open("rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1), path)


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def inside(folder: Path, name: Any, where: Path) -> Path:
    """The file `name` of `folder`, if it is inside it; in the Hub's cache, links to its `blobs` are allowed.

    Raises:
        CheckpointError: `name` is absolute, or leads out of the folder by `..` or a link.
    """
    if not isinstance(name, str) or not name or _CONTROL.search(name) or "\\" in name:
        raise CheckpointError(f"{where}: {shorten(repr(name), 100)} is not a file name; {ADVICE}")
    try:
        root, path = folder.resolve(), (folder / name).resolve()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, or a cyclic link
        raise CheckpointError(
            f"{where}: {shorten(repr(name), 100)} cannot be a file name ({type(error).__name__}); {ADVICE}"
        ) from error
    allowed = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    if os.path.isabs(name) or ".." in Path(name).parts or not any(path.is_relative_to(home) for home in allowed):
        raise CheckpointError(f"{where}: {name!r} leads out of the folder; do not use a checkpoint that does this")
    return folder / name

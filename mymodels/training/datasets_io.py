"""Read rows from files, folders and Hub data sets through the `datasets` library, with one-sentence errors."""

import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from ..extras import install_command
from ..messages import first_line
from .sample_text import load_sample_text, passages

SAMPLE = "sample_text"  # value of `data` for the text that ships with the package
_KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}  # split → its names in folders and Hub data sets


class DataError(ValueError):
    """Data that cannot be used for training; the message names file, row and column, and what to do."""


def require_module(module: str, extra: str) -> Any:
    """Import a module of an optional dependency.

    Raises:
        ValueError: the module is not installed; the message names the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"this needs the package {module.split('.')[0]}: run {install_command(extra)}") from error


def read_splits(data: Any, config: str | None, datasets: Any) -> tuple[dict[str, tuple[Any, str]], str, str | None]:
    """Split → (rows, name for messages), the name of the data, and its Hub id or None."""
    if isinstance(data, (datasets.Dataset, datasets.DatasetDict)):
        found = data if isinstance(data, datasets.DatasetDict) else {"train": data}
        return _canonical_splits(found, "the data set"), "a data set in memory", None
    if str(data) == SAMPLE and not Path(SAMPLE).exists():
        rows = {
            split: [{"text": text, "label": label} for text, label in passages(load_sample_text(part))]
            for split, part in (("train", "train"), ("validation", "held_out"))
        }
        return (
            {s: (datasets.Dataset.from_list(r), SAMPLE) for s, r in rows.items()},
            "the sample text of mymodels",
            None,
        )
    path = Path(data).expanduser()
    if path.is_file():
        return {"train": (read_files([path], datasets), str(data))}, path.name, None
    if path.is_dir():
        files = {split: _files(path, names) for split, names in _SPLITS.items()}
        if not files["train"]:
            raise DataError(
                f"{data} has no train.csv, train.jsonl, train.parquet or train.txt: rename the training file"
            )
        return (
            {s: (read_files(f, datasets), str(f[0] if len(f) == 1 else path / s)) for s, f in files.items() if f},
            path.resolve().name,
            None,
        )
    if path.suffix.lower() in _KINDS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(data)):
        raise DataError(f"there is no file or folder {data}: check the path")
    try:
        found = datasets.load_dataset(str(data), config)
    except Exception as error:  # of many kinds, by what went wrong
        raise DataError(
            f"there is no file or folder {data}, and no Hub data set could be fetched: {_reason(error)}"
        ) from error
    return _canonical_splits(found, str(data)), str(data), str(data)


def _canonical_splits(found: Any, name: str) -> dict[str, tuple[Any, str]]:
    """The splits of a `DatasetDict` under the names train, validation and test."""
    splits = {
        split: (found[there], f"{name}, split {there}")
        for split, names in _SPLITS.items()
        if (there := next((n for n in names if n in found), None)) is not None
    }
    if "train" not in splits:
        raise DataError(f"{name} has no split train, but {', '.join(found)}: choose data with one")
    return splits


def _files(folder: Path, names: Iterable[str]) -> list[Path]:
    pattern = re.compile(rf"({'|'.join(names)})([-_.].*)?")
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in _KINDS and pattern.fullmatch(f.stem.lower()))


def read_files(paths: list[Path], datasets: Any) -> Any:
    """Files of one kind as one `Dataset`."""
    kind = _KINDS.get(paths[0].suffix.lower())
    for path in paths:
        if not path.is_file():
            raise DataError(f"there is no file {path}: check the path")
        if kind is None or _KINDS.get(path.suffix.lower()) != kind:
            raise DataError(
                f"{path} is none of {', '.join(_KINDS)}, or of another kind than the other files: convert it"
            )
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty: choose another file")
        if kind != "parquet":
            _check_encoding(path)
    by_kind: dict[str, dict[str, Any]] = {"csv": {"keep_default_na": False}, "text": {"sample_by": "paragraph"}}
    options = by_kind.get(str(kind), {})
    if paths[0].suffix.lower() == ".tsv":
        options = options | {"sep": "\t"}
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows = getattr(datasets.Dataset, f"from_{kind}")([str(path) for path in paths], **options)
    except Exception as error:  # the readers' own, of many kinds
        reason = _reason(error)
        if "corresponds to no data" in reason:  # a table with only a header
            raise DataError(f"{', '.join(map(str, paths))} has no rows: choose another file") from None
        raise DataError(f"{', '.join(map(str, paths))} cannot be read as {kind}: {reason}") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()
    if not len(rows):
        raise DataError(f"{', '.join(map(str, paths))} has no rows: choose another file")
    return rows


def _check_encoding(path: Path) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} line {number} is not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x}): "
                    "save the file as UTF-8"
                ) from None


def _reason(error: BaseException) -> str:
    """The first line of an error's root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)

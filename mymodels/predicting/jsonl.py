"""Read texts from JSON or plain lines; invalid lines carry a sentence on the problem."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

LONGEST = 1 << 24  # bytes of a line, so that a file without line breaks is not read into memory completely


@dataclass
class Line:
    """One line of input.

    Attributes:
        number: counted from 1.
        size: in bytes.
        text, pair: the model's input; `pair` is the second text, or None.
        key: the first field of the answer: the line's `id`, or its number as `line`.
        problem: a sentence on why the line is invalid; None for a valid line.
    """

    number: int
    size: int
    text: str = ""
    pair: str | None = None
    key: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def read_lines(
    file: BinaryIO, *, column: str = "text", pair_column: str | None = None, plain: bool = False
) -> Iterator[Line]:
    """Read lines lazily.

    Args:
        column: the field of each JSON object with the text.
        pair_column: the field with the second text of a pair. Default: `text_pair`, in lines that have it.
        plain: each line is a text, not JSON.
    """
    number = 0
    while raw := file.readline(LONGEST):
        number += 1
        line = Line(number, len(raw), key={"line": number})
        if len(raw) == LONGEST and not raw.endswith(b"\n"):
            line.problem = f"it is longer than {LONGEST >> 20} MB"
            while rest := file.readline(LONGEST):
                line.size += len(rest)
                if rest.endswith(b"\n"):
                    break
        else:
            try:
                _read(line, raw, column, pair_column, plain)
            except ValueError as error:
                line.problem = str(error)
        yield line


def _read(line: Line, raw: bytes, column: str, pair_column: str | None, plain: bool) -> None:
    try:
        text = raw.decode("utf-8-sig" if line.number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start + 1} is 0x{raw[error.start]:02x})") from None
    if not text.strip():
        raise ValueError("it is empty")
    if plain:
        line.text = text
        return
    try:
        row = json.loads(text, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({str(error) or type(error).__name__})") from None
    if not isinstance(row, dict):
        raise ValueError(f"it is {_json_type(row)}, not a JSON object with the field {column!r}")
    line.text = _text(row, column)
    if pair_column is not None or "text_pair" in row:
        line.pair = _text(row, pair_column or "text_pair")
    if row.get("id") is not None:
        line.key = {"id": row["id"]}
    try:
        f"{line.text}{line.pair}{json.dumps(line.key, ensure_ascii=False, allow_nan=False)}".encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it has half of a character (\\u{ord(error.object[error.start]):04x})") from None
    except ValueError:
        raise ValueError("its field 'id' has a number too large for JSON, which is read as infinite") from None


def _text(row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise ValueError(f"it has no field {column!r}, but {', '.join(map(repr, list(row)[:6])) or 'none at all'}")
    if not isinstance(row[column], str):
        raise ValueError(f"its field {column!r} is {_json_type(row[column])}, not a text")
    if not row[column].strip():
        raise ValueError(f"its field {column!r} is empty")
    return row[column]


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")

"""Tables of `mymodels inspect`: what a checkpoint holds, and what differs between two."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..messages import printable
from ..tables import print_table, print_text


def show_inspection(data: Mapping[str, Any], console: Console, *, every_tensor: bool = False) -> None:
    """Print what `inspect_checkpoint` found; layers of one shape share a row unless `every_tensor`."""
    dtypes = ", ".join(
        f"{name} {_share(count, sum(data['dtypes'].values()))}" for name, count in data["dtypes"].items()
    )
    print_text(Text(f"{data['path']}: {data['format']}", style="bold"), console)
    size = _size(data["bytes"])
    print_text(f"{data['parameters']:,} parameters in {len(data['tensors'])} tensors, {size}, {dtypes}", console)
    for what, text in (
        ("quantised", data["quantisation"]),
        ("adapter", data["adapter"]),
        ("only a part", data["part_of"]),
    ):
        if text:
            print_text(printable(f"{what}: {text}"), console)
    if packed := data["quantised_modules"]:
        share = _share(sum(packed.values()), data["parameters"])
        first = ", ".join(list(packed)[:3]) + (", …" if len(packed) > 3 else "")
        text = f"{sum(packed.values()):,} of the parameters ({share}) are quantised, in {len(packed)} modules: {first}"
        print_text(printable(f"{text}; they are counted unpacked, without scales and zero points"), console)
    if data["left_out"]:
        print_text(printable(f"not opened, name a file to inspect it: {', '.join(data['left_out'])}"), console)
    if len(data["sections"]) > 1 or "(top)" not in data["sections"]:
        table = _table("models", ("section", "left"), ("tensors", "right"))
        for name, count in data["sections"].items():
            _add_row(table, name, str(count))
        print_table(table, console)
    if data["extras"]:
        table = _table("besides the weights", ("name", "left"), ("content", "left"))
        for name, text in data["extras"].items():
            _add_row(table, name, text)
        print_table(table, console)
    table = _table("modules", ("module", "left"), ("parameters", "right"), ("share", "right"))
    for name, count in data["modules"].items():
        _add_row(table, name, f"{count:,}", _share(count, data["parameters"]))
    print_table(table, console)
    table = _table("tensors", ("name", "left"), ("shape", "left"), ("dtype", "left"), ("file", "left"))
    for names, shape, dtype, files in _rows(data["tensors"], every_tensor):
        _add_row(table, names, "×".join(map(str, shape)) or "scalar", dtype, files)
    print_table(table, console)
    for alias, name in data["tied"].items():
        print_text(printable(f"tied: {alias} is {name}"), console)
    for names in data["duplicates"]:
        print_text(printable(f"stored {len(names)} times with the same bytes: {', '.join(names)}"), console)
    if "files" in data:
        table = _table("files", ("file", "left"), ("size", "right"), ("purpose", "left"))
        for name, file in data["files"].items():
            _add_row(table, name, _size(file["size"]), file["purpose"])
        print_table(table, console)
    if data.get("auto_map"):
        table = _table("auto_map", ("class", "left"), ("code", "left"), ("", "left"))
        for name, entry in data["auto_map"].items():
            state = f"in {entry['repo']}" if "repo" in entry else "ok" if entry["exists"] else "missing"
            _add_row(table, name, entry["target"], state)
        print_table(table, console)


def show_difference(rows: list[dict[str, Any]], a: str, b: str, console: Console) -> None:
    """Print what `compare_checkpoints` found, the tensors that differ in a table."""
    counts = Counter(row["status"] for row in rows)
    table = _table(None, ("tensor", "left"), ("", "left"), (a, "left"), (b, "left"), ("max |Δ|", "right"))
    for row in rows:
        if row["status"] not in ("equal", "prefix"):
            change = "" if row["max_difference"] is None else f"{row['max_difference']:.3g}"
            _add_row(table, row["name"], row["status"], row["a"] or "–", row["b"] or "–", change)
    if table.row_count:
        print_table(table, console)
    if prefix := next((row["prefix"] for row in rows if "prefix" in row), None):
        ((side, text),) = prefix.items()
        longer, shorter = (a, b) if side == "a" else (b, a)
        print_text(printable(f"the names in {longer} are those in {shorter} with the prefix {text!r}"), console)
    counts = Counter({"equal except for the prefix" if key == "prefix" else key: n for key, n in counts.items()})
    print_text(", ".join(f"{count} {status}" for status, count in counts.items()) or "no tensors", console)


def _rows(tensors: Mapping[str, Mapping[str, Any]], every: bool) -> list[tuple[str, list[int], str, str]]:
    groups: dict[tuple, list[tuple[list[int], str]]] = {}
    for name, tensor in tensors.items():
        pattern = name if every else re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1)
        layers = [] if pattern == name else [int(re.findall(r"(?<=\.)\d+(?=\.)", name)[0])]
        groups.setdefault((pattern, tuple(tensor["shape"]), tensor["dtype"]), []).append((layers, tensor["file"]))
    rows = []
    for (pattern, shape, dtype), members in groups.items():
        layers = [number for numbers, _ in members for number in numbers]
        files = list(dict.fromkeys(file for _, file in members))
        rows.append((pattern.replace("*", ranges(layers)) if layers else pattern, list(shape), dtype, _span(files)))
    return rows


def _span(files: list[str]) -> str:
    shards = sorted(int(found[1]) for file in files if (found := re.search(r"-0*(\d+)-of-\d+\.", file)))
    if len(shards) == len(files):
        return f"shard {ranges(shards)}"
    return files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"


def ranges(numbers: list[int]) -> str:
    """`{0–11}` for consecutive numbers, `{0,2,4}` for others."""
    if len(numbers) == 1:
        return str(numbers[0])
    consecutive = sorted(numbers) == list(range(min(numbers), max(numbers) + 1))
    return f"{{{min(numbers)}–{max(numbers)}}}" if consecutive else "{" + ",".join(map(str, sorted(numbers))) + "}"


def _table(title: str | None, *columns: tuple[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify)
    return table


def _add_row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(printable(cell), style="red" if cell == "missing" else "") for cell in cells))


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %" if total else ""


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"

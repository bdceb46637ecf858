"""What `verify` found, for people: what needs attention, the verdict, and the matrix of releases for the model card."""

import os
import textwrap
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..checkpoints.atomic_write import replace_file
from ..checkpoints.integrity import update_manifest
from ..tables import print_table
from .checks import Check
from .results_to_checks import DYNAMIC
from .verifying import Verification

_STYLES = {"ok": "green", "failed": "bold red", "warning": "yellow", "skipped": "yellow", "n/a": "dim"}
_SIGNS = {"ok": "✓", "failed": "✗", "warning": "!", "skipped": "○", "n/a": "–"}
_LABELS = {"ok": "passed", "failed": "failed", "warning": "warning", "skipped": "left out", "n/a": "n/a"}
_ATTENTION = ("failed", "warning", "left out", "not ready")  # in the order they are shown
_SUMMARY = ("failed", "warning", "not ready")  # what was left out is in the last line
_INDENT = 11  # characters, of the longest label and two blanks
_START, _END = "<!-- mymodels verify: begin -->", "<!-- mymodels verify: end -->"


class _Row(NamedTuple):
    """A check that is shown, and the releases that it came out so under; none for what is read."""

    label: str
    check: Check
    releases: list[str]


def show_verification(verification: Verification, console: Console | None = None, *, every_check: bool = False) -> None:
    """Print what failed, warned or was left out (what is wrong, where, how to fix it), and the verdict.

    What needs attention comes first in full, and is named again at the end, above the verdict.

    Args:
        verification: what `verify` returned.
        console: where to print; default: standard output.
        every_check: also list the checks that passed, and those that do not apply, with the reason.
    """
    console = console or Console()
    rows = _rows(verification)
    several = len(verification.runs) > 1
    attention = [row for row in rows if row.label in _ATTENTION]
    for row in _joined(sorted(attention, key=lambda row: _ATTENTION.index(row.label))):
        _show_row(row, console, releases=several)
    if every_check:
        _show_the_rest(verification, console)
    if several:
        _show_matrix(verification, console, every_check=every_check)
    for label in _SUMMARY:
        if places := [_place(row.check) for row in attention if row.label == label]:
            _show_text(label, ", ".join(dict.fromkeys(places)), console)
    passed = sum(check.status == "ok" for _, check in verification.rows)
    absent = sum(check.status == "n/a" for _, check in verification.rows)
    text = f"{passed} {'check' if passed == 1 else 'checks'}"
    text += f"; {absent} {'does' if absent == 1 else 'do'} not apply" if absent else ""
    _show_text("passed", text if every_check else f"{text}; --all lists them", console)
    style = "bold green" if verification.complete else "bold yellow" if verification.passed else "bold red"
    last = f"{verification.path}: {verdict(verification)}"
    for line in _wrap(last, console.width) if console.is_terminal else [last]:  # for scripts one line, however long
        console.print(Text(line, style=style), soft_wrap=True)


def _rows(verification: Verification) -> list[_Row]:
    """The checks, those with the same outcome under several releases once."""
    rows: dict[tuple, _Row] = {}
    for release, check in verification.rows:
        row = rows.setdefault((check, False), _Row(_LABELS[check.status], check, []))
        if release:
            row.releases.append(release)
    for check in verification.serving:
        if check.status not in ("ok", "n/a"):
            rows.pop((check, False))
            shown = check._replace(what=check.what.removeprefix("not ready: "))
            rows[check, True] = _Row("not tried" if check.status == "skipped" else "not ready", shown, [])
    return list(rows.values())


def _joined(rows: list[_Row]) -> list[_Row]:
    """What was left out for one reason as one row."""
    found: dict[tuple, _Row] = {}
    for row in rows:
        key = (row.label, row.check.what, *row.releases) if row.label == "left out" else (id(row),)
        first = found.setdefault(key, row)
        if first is not row:
            names = f"{_place(first.check)}, {_place(row.check)}"
            found[key] = first._replace(check=first.check._replace(name=names, where=""))
    return list(found.values())


def _show_row(row: _Row, console: Console, *, releases: bool) -> None:
    """Status, check and place in one line, and under it what is wrong and how to fix it."""
    check = row.check
    under = f"under transformers {', '.join(row.releases)}" if releases and row.releases else ""
    head = "  ".join(filter(None, (check.name, check.where, under)))
    first, *more = _wrap(head, console.width - _INDENT) or [""]
    line = Text(f"{row.label:<{_INDENT}}", style=_STYLES[check.status])
    line.append(first[: len(check.name)], style="bold").append(first[len(check.name) :])
    console.print(line, soft_wrap=True)
    for text in (*more, *_wrap(check.what, console.width - _INDENT)):
        console.print(Text(" " * _INDENT + text), soft_wrap=True)
    for number, text in enumerate(_wrap(check.remedy, console.width - _INDENT - 2)):
        console.print(Text(" " * _INDENT + ("→ " if number == 0 else "  ") + text, style="dim"), soft_wrap=True)


def _show_text(label: str, text: str, console: Console) -> None:
    for number, line in enumerate(_wrap(text, console.width - _INDENT)):
        console.print(Text(f"{label if number == 0 else '':<{_INDENT}}{line}"), soft_wrap=True)


def _wrap(text: str, width: int) -> list[str]:
    """Lines broken between words; a word longer than a line, such as a path, is not broken."""
    return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False)


def _place(check: Check) -> str:
    return f"{check.name} ({check.where})" if check.where else check.name


def _show_the_rest(verification: Verification, console: Console) -> None:
    """The checks that passed or do not apply, by how they were made; those that passed without a remark by name."""
    groups = [("read, nothing executed", verification.static)]
    groups += [(f"in a clean process, transformers {release}", checks) for release, checks in verification.runs.items()]
    groups.append(("ready for serving and tools", verification.serving))
    for title, checks in groups:
        kinds = ("ok", "n/a") if checks is not verification.serving else ("ok", "n/a", "skipped")
        shown = [check for check in checks if check.status in kinds]
        if shown:
            console.print(Text(title, style="bold"), soft_wrap=True)
        silent: dict[str, list[str]] = {}
        for check in shown:
            if check.status == "ok" and not check.what:
                silent.setdefault(check.name, []).append(check.where)
        if bare := [name for name, places in silent.items() if not any(places)]:
            _show_text("passed", ", ".join(bare), console)
        for name, places in silent.items():
            if name in bare:
                continue
            _show_row(
                _Row("passed", Check(name, "ok", "", ", ".join(filter(None, places))), []), console, releases=False
            )
        for check in shown:
            if check.status != "ok" or check.what:
                _show_row(_Row(_LABELS[check.status], check, []), console, releases=False)


def verdict(verification: Verification) -> str:
    """A summary: how many checks failed, which were skipped, and whether the folder's code was run."""
    failed, skipped = len(verification.failed), verification.skipped
    left_out = list(dict.fromkeys(f"{c.name} ({c.where})" if c.where else c.name for _, c in skipped))
    if failed:
        text = "1 check failed" if failed == 1 else f"{failed} checks failed"
    elif skipped:
        text = "what was looked at held"
    else:
        text = "every check held" if verification.runs else "every check held that runs nothing: its code was not run"
    return f"{text}; left out: {', '.join(left_out)}" if skipped else text


def matrix(verification: Verification) -> tuple[list[str], list[list[str]]]:
    """The releases, and for each check a row of its name and a symbol of its worst outcome under each release."""
    releases = list(verification.runs)
    rows = []
    for name in DYNAMIC:
        signs = [_worst([c.status for c in verification.runs[release] if c.name == name]) for release in releases]
        if any(signs):
            rows.append([name, *(_SIGNS.get(sign, "–") for sign in signs)])
    return releases, rows


def _worst(statuses: list[str]) -> str:
    return next((status for status in ("failed", "warning", "skipped", "ok", "n/a") if status in statuses), "")


def _show_matrix(verification: Verification, console: Console, *, every_check: bool) -> None:
    """A table of checks and releases, in as many parts as the width asks for; checks that hold everywhere on request."""
    releases, rows = matrix(verification)
    quiet = {_SIGNS["ok"], _SIGNS["n/a"]}
    rows = [row for row in rows if every_check or set(row[1:]) - quiet]
    if not rows:
        _show_text("releases", ", ".join(releases), console)
        return
    room = console.width - max(len(row[0]) for row in rows) - 5
    columns = max(1, room // (max(map(len, releases)) + 3))
    for start in range(0, len(releases), columns):
        table = Table("check", title="transformers releases", title_justify="left")
        for release in releases[start : start + columns]:
            table.add_column(release, no_wrap=True)
        for name, *signs in rows:
            cells = signs[start : start + columns]
            table.add_row(name, *(Text(cell, style="bold red" if cell == _SIGNS["failed"] else "") for cell in cells))
        print_table(table, console)


def write_matrix(verification: Verification, folder: str | os.PathLike) -> Path:
    """Write the matrix into the folder's model card, replacing an older one, and update the manifest.

    Args:
        verification: the result of `verify`.
        folder: the verified folder.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: the folder has no `README.md`.
    """
    folder = Path(folder)
    card = folder / "README.md"
    if not card.is_file():
        raise FileNotFoundError(f"{card} is missing: write a model card first")
    releases, rows = matrix(verification)
    lines = [
        _START,
        "",
        "## Verified under these transformers releases",
        "",
        f"{_SIGNS['ok']} holds, {_SIGNS['failed']} fails, {_SIGNS['warning']} see `mymodels verify`, "
        f"{_SIGNS['skipped']} was left out, {_SIGNS['n/a']} does not apply.",
        "",
        f"| check | {' | '.join(releases)} |",
        f"|---|{'---|' * len(releases)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        _END,
    ]
    text = card.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_START)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        before, after = text.rstrip() + "\n\n", "\n"
    text = before + "\n".join(lines) + after
    with replace_file(card) as file:
        file.write_text(text, encoding="utf-8")
    update_manifest(folder, card.name)
    return card

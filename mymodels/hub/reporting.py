"""Print the results of `verify` as tables, and write the matrix of releases into the model card."""

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..checkpoints.atomic_write import replace_file
from ..checkpoints.integrity import update_manifest
from .checks import Check
from .results_to_checks import DYNAMIC
from .verifying import Verification

_STYLES = {"ok": "green", "failed": "bold red", "warning": "yellow", "skipped": "yellow", "n/a": "dim"}
_SIGNS = {"ok": "✓", "failed": "✗", "warning": "!", "skipped": "○", "n/a": "–"}
_WIDE = 120  # characters; below, five columns would break names
_START, _END = "<!-- mymodels verify: begin -->", "<!-- mymodels verify: end -->"


def show_verification(verification: Verification, console: Console | None = None) -> None:
    """Print a table of the checks (problem, place, remedy), the matrix of releases, and a summary line."""
    console = console or Console()
    groups = [("static, no code executed", verification.static)]
    several = len(verification.runs) > 1
    for release, checks in verification.runs.items():
        listed = [c for c in checks if c.status == "failed"] if several else checks
        groups.append((f"in a clean process, transformers {release}", listed))
    groups.append(("readiness for serving and tools", verification.serving))
    for title, checks in groups:
        if checks:
            console.print(_table(title, checks, narrow=console.width < _WIDE))
    if several:
        console.print(_matrix(verification))
    style = "bold green" if verification.complete else "bold yellow" if verification.passed else "bold red"
    console.print(Text(f"{verification.path}: {verdict(verification)}", style=style))


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


def _table(title: str, checks: list[Check], *, narrow: bool) -> Table:
    """A row for each passed check, then a row for each check with a message, failures last.

    In a narrow terminal, place, message and remedy are lines of one column.
    """
    silent: dict[str, list[str]] = {}
    for check in checks:
        if check.status == "ok" and not check.what:
            silent.setdefault(check.name, []).append(check.where)
    columns = [
        "check",
        "",
        *(["where, what is wrong, how to fix it"] if narrow else ["where", "what", "how to fix it"]),
    ]
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns:
        column.overflow = "fold"

    def add(name: str, status: str, *texts: str) -> None:
        cells = [Text("\n".join(filter(None, texts)))] if narrow else [Text(text) for text in texts]
        table.add_row(Text(name), Text(status, style=_STYLES[status]), *cells)

    for name, places in silent.items():
        add(name, "ok", ", ".join(filter(None, places)), "", "")
    checks = [check for check in checks if check.status != "ok" or check.what]
    for check in sorted(checks, key=lambda check: check.status == "failed"):
        add(check.name, check.status, check.where, check.what, check.remedy)
    return table


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


def _matrix(verification: Verification) -> Table:
    releases, rows = matrix(verification)
    table = Table("check", *releases, title="transformers releases", title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell, style="bold red" if cell == _SIGNS["failed"] else "") for cell in row))
    return table


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

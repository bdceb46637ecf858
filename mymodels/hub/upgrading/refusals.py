"""Folders whose code is not touched and not run: code that cannot be read, or that no model needs."""

from collections.abc import Iterator

from ..static import CHECKS
from ..static.code_tree import reachable
from ..static.repo_snapshot import Finding, Folder

# of the static checks: what no model needs, or what leads out of the folder
_HOSTILE = ("network", "processes", "secrets access", "obfuscation", "dynamic code", "links", "paths")


def refusals(folder: Folder) -> list[Finding]:
    """Why the folder's code is neither edited nor run, each with file and line; empty for ordinary folders."""
    return [*_unreadable(folder), *_hostile(folder)]


def _unreadable(folder: Folder) -> Iterator[Finding]:
    live = reachable(folder)
    if "config.json" in folder.invalid:
        yield Finding("failed", f"config.json cannot be read: {folder.invalid['config.json']}", "config.json")
    for name, reason in folder.unparsed.items():
        if name in live:
            line, colon, text = reason.removeprefix("line ").partition(": ")
            where = f"{name}:{line}" if colon and line.isdigit() else name
            yield Finding("failed", f"it cannot be read as Python: {text if colon else reason}", where)


def _hostile(folder: Folder) -> Iterator[Finding]:
    for name in _HOSTILE:
        for finding in CHECKS[name](folder):
            if finding.status == "failed":
                yield finding

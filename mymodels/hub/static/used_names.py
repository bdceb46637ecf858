"""Findings for each line of code that uses a name that the policy forbids."""

import ast
from collections.abc import Iterator

from .policy import Verdict, verdict_on
from .reading import readers
from .repo_snapshot import Finding, Folder


def used_names(folder: Folder, check: str) -> Iterator[Finding]:
    """A finding for each line that uses a forbidden name of this check."""
    remedies = {
        "network": "do not load it unless you know what it fetches or sends",
        "processes": "do not load it",
        "dynamic code": "do not load it",
        "secrets access": "do not load it",
    }
    for reader in readers(folder):
        found: dict[int, tuple[str, str, Verdict, str]] = {}
        for node, names, inside in reader.uses:
            for name in names:
                verdict = verdict_on(name)
                if verdict is None or verdict.check != check:
                    continue
                line = getattr(node, "lineno", 0)
                found[line] = max(found.get(line, ("", "", verdict, "")), (name, inside, verdict, reader.file.at(node)))
        for _, (name, inside, verdict, where) in sorted(found.items()):
            status = verdict.status if reader.status(inside) == "failed" else "warning"
            shown = name.removeprefix("builtins.")
            what = f"{reader.file.name} {verdict.does}, by {shown}, {reader.moment(inside)}"
            yield Finding(status, what, where, remedies[check])


def is_super(node: ast.AST) -> bool:
    """Whether a node is `super()`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"

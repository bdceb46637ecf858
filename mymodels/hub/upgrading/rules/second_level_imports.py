"""Files that the entry file needs only through another one: older releases do not copy them into the module cache."""

import ast

import libcst as cst

from ...static.code_tree import entry_files, siblings
from ..rule import Context, Rule, statements


def _unseen(context: Context) -> list[tuple[str, str]]:
    """The files that an entry file needs through another one alone, each with a name that it defines."""
    if context.file.name not in entry_files(context.folder):
        return []
    code = context.folder.code
    seen = {context.file.name, *(name for name, _ in siblings(context.file))}
    waiting = [name for name, _ in siblings(context.file)]
    found = []
    while waiting:
        name = waiting.pop(0)
        for inner, _ in siblings(code[name]) if name in code else ():
            if inner in seen or inner not in code:
                continue
            seen.add(inner)
            waiting.append(inner)
            defined = [n.name for n in code[inner].tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
            if defined:
                found.append((inner.rpartition("/")[2].removesuffix(".py"), defined[0]))
    return found


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    unseen = _unseen(context)
    body = list(tree.body)
    places = [
        number
        for number, step in enumerate(body)
        if isinstance(step, cst.SimpleStatementLine)
        and any(isinstance(s, cst.ImportFrom) and s.relative for s in step.body)
    ]
    if not unseen or not places:
        return tree
    lines = []
    for module, name in unseen:
        context.note(body[places[-1]], f"imports {module}, which it needs through another file")
        lines += statements(
            f"from .{module} import {name}  # noqa: F401  releases through 5.6 copy what this file imports\n"
        )
    at = places[-1] + 1
    return tree.with_changes(body=[*body[:at], *lines, *body[at:]])


# an example needs several files: tests/upgrading/test_upgrade.py has it
RULE = Rule(
    name="second-level imports",
    reason="older releases copy only the files that the entry file itself imports",
    releases="4.56 to 5.6",
    apply=_apply,
    words=("from .",),
    order=90,
)

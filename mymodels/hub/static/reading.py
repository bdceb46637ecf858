"""One pass over each code file: every name used, what it refers to, and when it runs."""

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from .code_tree import reachable
from .library_modules import canonical
from .meanings import Meanings, meanings
from .repo_snapshot import CodeFile, Folder
from .walking import children

AT_IMPORT, MAIN = "", "__main__"
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Use(NamedTuple):
    """An expression, the full names it may refer to, and its function (`AT_IMPORT` or `MAIN` outside functions)."""

    node: ast.AST
    names: frozenset[str]
    inside: str


class Reader:
    """A code file, read once.

    Attributes:
        live: transformers loads this file.
        uses: every name, attribute, call and dict entry that refers to something outside the folder.
        calls: every call, with what is called.
        nodes: every node with the function it is in.
        eager: functions that run while the file is imported.
        used: functions that `forward` or `__init__` calls, directly or through others.
    """

    def __init__(self, folder: Folder, file: CodeFile, live: bool):
        self.file, self.live = file, live
        self.meanings: Meanings = meanings(folder, file)
        self.uses: list[Use] = []
        self.calls: list[Use] = []
        self.nodes: list[tuple[ast.AST, str]] = []
        self.parents: dict[int, ast.AST] = {}
        self.docs: set[int] = set()
        waiting: list[tuple[ast.AST, str]] = [(file.tree, AT_IMPORT)]
        while waiting:
            node, inside = waiting.pop()
            self.nodes.append((node, inside))
            self._read(node, inside)
            for child, place in _placed(node, inside):
                waiting.append((child, place))
                self.parents[id(child)] = node
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                self.docs.add(id(node.value))
        called = self._called()
        hooks = {"__init_subclass__", "__set_name__"} | {place for _, place in self.nodes if "." in place}
        self.eager = _closure(called, {AT_IMPORT, *hooks}) | hooks
        self.used = _closure(called, {"forward", "__init__"})

    def _read(self, node: ast.AST, inside: str) -> None:
        if isinstance(node, ast.Import):
            self.uses += [Use(node, frozenset({alias.name}), inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            taken = [canonical(f"{node.module}.{alias.name}") for alias in node.names]
            self.uses += [Use(node, frozenset({name}), inside) for name in taken]
        elif isinstance(node, (ast.Name, ast.Attribute, ast.Subscript, ast.Call)):
            names = self.meanings.names(node)
            if names:
                self.uses.append(Use(node, names, inside))
            if isinstance(node, ast.Call):
                self.calls.append(Use(node, self.meanings.names(node.func), inside))

    def _called(self) -> dict[str, set[str]]:
        """The functions of the file that each function calls, by name; decorators of the file count as calls."""
        defined: dict[str, set[str]] = {}
        for node, _ in self.nodes:
            if isinstance(node, ast.ClassDef):
                defined[node.name] = {"__init__"} if any(_is_def(member, "__init__") for member in node.body) else set()
            elif isinstance(node, _Function):
                defined.setdefault(node.name, {node.name})
        called: dict[str, set[str]] = {}
        for node, inside in self.nodes:
            functions = [node.func] if isinstance(node, ast.Call) else getattr(node, "decorator_list", [])
            for function in functions:
                if isinstance(node, ast.Call) and isinstance(function, ast.Lambda):
                    called.setdefault(inside, set()).add("lambda")
                name = _own_name(getattr(function, "func", function))
                called.setdefault(inside, set()).update(defined.get(name, ()))
        return called

    def parent(self, node: ast.AST) -> ast.AST | None:
        return self.parents.get(id(node))

    def runs_at_import(self, inside: str) -> bool:
        return inside == AT_IMPORT or inside in self.eager

    def status(self, inside: str) -> str:
        """`failed` for what runs when the model is used; a `warning` in a file or block that transformers never runs."""
        return "failed" if self.live and inside != MAIN else "warning"

    def moment(self, inside: str) -> str:
        if not self.live:
            return "in a file that transformers does not load"
        if inside == MAIN:
            return "only where the file is run as a program"
        if inside in self.eager:
            return f"in {inside}, which runs as soon as it is imported"
        return f"in {inside}" if inside else "as soon as it is imported"


def _closure(called: dict[str, set[str]], start: set[str]) -> set[str]:
    """All functions that those of `start` call, directly or indirectly."""
    found: set[str] = set()
    waiting = [name for place in start for name in called.get(place, ())]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += called.get(name, ())
    return found


def _own_name(function: ast.expr) -> str:
    """The name of a function or method of the file, from `f` or `self.f`."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self":
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _is_def(node: ast.AST, name: str) -> bool:
    return isinstance(node, _Function) and node.name == name


def _placed(node: ast.AST, inside: str) -> Iterator[tuple[ast.AST, str]]:
    """The children of a node, each with its function; decorators and defaults run outside of the function."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        name = "lambda" if isinstance(node, ast.Lambda) else node.name
        if inside.endswith("."):  # of a metaclass, whose methods run when classes are created
            name, inside = f"{inside}{name}", AT_IMPORT
        body = [node.body] if isinstance(node, ast.Lambda) else node.body
        inner = {id(child) for child in body}
        for child in children(node):
            yield child, (inside if isinstance(node, ast.Lambda) and inside else name) if id(child) in inner else inside
    elif isinstance(node, ast.ClassDef) and inside == AT_IMPORT and _is_metaclass(node):
        for child in children(node):
            yield child, f"{node.name}." if isinstance(child, _Function) else inside
    elif isinstance(node, ast.If) and inside == AT_IMPORT and _is_main(node.test):
        yield node.test, inside
        yield from ((child, MAIN) for child in node.body)
        yield from ((child, inside) for child in node.orelse)
    elif isinstance(node, ast.If) and inside == AT_IMPORT and _is_typing(node.test):
        yield from ((child, MAIN) for child in node.body)
        yield from ((child, inside) for child in [node.test, *node.orelse])
    else:
        yield from ((child, inside) for child in children(node))


def _is_metaclass(node: ast.ClassDef) -> bool:
    return any(re.search(r"(^|\.)(type|\w*Meta(class)?)$", ast.unparse(base)) for base in node.bases)


def _is_main(test: ast.expr) -> bool:
    return ast.unparse(test).replace('"', "'") in ("__name__ == '__main__'", "'__main__' == __name__")


def _is_typing(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def readers(folder: Folder) -> list[Reader]:
    """A `Reader` for each code file, in the order of their names."""
    if "readers" not in folder.memo:
        live = reachable(folder)
        folder.memo["readers"] = [Reader(folder, file, name in live) for name, file in sorted(folder.code.items())]
    return folder.memo["readers"]

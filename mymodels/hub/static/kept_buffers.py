"""Classes whose non-persistent buffers the code makes persistent, so that they are saved."""

import ast
import re
from collections.abc import Iterable, Iterator

from .check_config import target
from .code_tree import Code, Klass, calls, is_self
from .repo_snapshot import CodeFile, Folder
from .walking import walk

_CLEAR = "._non_persistent_buffers_set.clear"
Method = ast.FunctionDef | ast.AsyncFunctionDef
_ALL, _DIRECT = ("modules", "named_modules"), ("children", "named_children")


def kept_buffers(folder: Folder, code: Code) -> set[int]:
    """The `id` of each class node whose buffers are made persistent in all models of the folder that use it."""
    if not any(ast.unparse(call.func).endswith(_CLEAR) for klass in code.classes for call in calls(klass.node)):
        return set()
    reached = {id(klass.node): _reached(code, [klass]) for klass in code.classes}
    cleared = {id(klass.node): set(_cleared(code, klass)) for klass in code.classes}
    served = [target(folder, code, str(auto)) for auto in folder.auto_map if str(auto).startswith("AutoModel")]
    roots = [id(klass.node) for klass in served if klass is not None] or [id(klass.node) for klass in code.leaves()]
    kept: set[int] = set()
    for klass in code.classes:
        using = [root for root in roots if id(klass.node) in reached[root]]
        clears = [set().union(*(cleared.get(one, ()) for one in reached[root])) for root in using]
        if clears and all(id(klass.node) in one for one in clears):
            kept.add(id(klass.node))
    return kept


def _reached(code: Code, start: Iterable[Klass]) -> set[int]:
    """These classes, their bases, and all classes named in their code: the possible parts of their models."""
    found: set[int] = set()
    waiting: list[tuple[CodeFile, ast.AST]] = [(klass.file, klass.node) for klass in start]
    while waiting:
        file, node = waiting.pop()
        if id(node) in found:
            continue
        found.add(id(node))
        functions = {step.name: step for step in file.tree.body if isinstance(step, ast.FunctionDef)}
        for inner in walk(node):
            if isinstance(inner, (ast.Name, ast.Attribute)):
                other = code.find(file, file.dotted(inner))
                if other is not None:
                    waiting.append((other.file, other.node))
                elif isinstance(inner, ast.Name) and inner.id in functions:
                    waiting.append((file, functions[inner.id]))
    return found


def _cleared(code: Code, klass: Klass) -> Iterator[int]:
    """The classes whose buffers a method of this class makes persistent."""
    for method in klass.methods():
        for call in calls(method):
            if not ast.unparse(call.func).endswith(_CLEAR):
                continue
            owner = call.func.value.value  # type: ignore[attr-defined]  # X of X._non_persistent_buffers_set.clear()
            found = _owners(code, klass, method, owner)
            if isinstance(owner, ast.Name) and owner.id == "self":
                found -= {id(k.node) for k in code.lineage(klass) if _registers_after(k, method, call)}
            wanted = _tested(code, klass, method, call, ast.unparse(owner))
            for one in code.classes:
                lineage = {id(k.node) for k in code.lineage(one)}
                if id(one.node) in found and (wanted is None or lineage & wanted):
                    yield from lineage & found


def _owners(code: Code, klass: Klass, method: Method, owner: ast.expr) -> set[int]:
    """The classes of module that an expression in a method can have; if unknown, all possible parts of the class."""
    # a constructor runs before subclasses create their parts; other methods run later
    derived = [one for one in code.classes if any(base.node is klass.node for base in code.lineage(one))]
    own = [klass] if method.name == "__init__" else derived
    if isinstance(owner, ast.Name) and owner.id == "self":
        return _with_bases(code, own)
    if is_self(owner):
        made = _made(code, klass, owner)
        return _reached(code, own) if made is None else _with_bases(code, made)
    for loop in walk(method):
        if not isinstance(loop, ast.For) or ast.unparse(owner) not in map(ast.unparse, walk(loop.target)):
            continue
        source = loop.iter
        kind = source.func.attr if isinstance(source, ast.Call) and isinstance(source.func, ast.Attribute) else ""
        base = source.func.value if kind and isinstance(source, ast.Call) else source  # type: ignore[attr-defined]
        parts = own if ast.unparse(base) == "self" else _made(code, klass, base)
        if parts is None:
            return _reached(code, own)
        if kind in _DIRECT:
            return _with_bases(code, [named for one in parts for named in _named(code, one)])
        return _reached(code, parts) if kind in _ALL else _with_bases(code, parts)
    return _reached(code, own)


def _with_bases(code: Code, classes: Iterable[Klass]) -> set[int]:
    return {id(base.node) for klass in classes for base in code.lineage(klass)}


def _made(code: Code, klass: Klass, owner: ast.expr) -> list[Klass] | None:
    """The classes of the folder that `self.name` is built from, or None if that is not known."""
    if not isinstance(owner, ast.Attribute) or not is_self(owner):
        return None
    found: list[Klass] | None = None
    for member in code.lineage(klass):
        for step in walk(member.node):
            if isinstance(step, ast.Assign) and any(is_self(goal, owner.attr) for goal in step.targets):
                found = found or []
                for call in calls(step.value):
                    dotted = member.file.dotted(call.func)
                    made = code.find(member.file, dotted)
                    if made is not None:
                        found.append(made)
                    elif not re.match(r"torch\.|transformers\.|nn\.|range$|len$", dotted):
                        return None
    return found


def _named(code: Code, klass: Klass) -> Iterator[Klass]:
    for member in code.lineage(klass):
        for call in calls(member.node):
            named = code.find(member.file, member.file.dotted(call.func))
            if named is not None:
                yield named


def _registers_after(klass: Klass, method: Method, clear: ast.Call) -> bool:
    """Whether the method registers a buffer after this call, which then stays non-persistent."""
    return method in klass.methods() and any(
        is_self(call.func, "register_buffer") and (call.lineno, call.col_offset) > (clear.lineno, clear.col_offset)
        for call in calls(method)
    )


def _tested(code: Code, klass: Klass, method: ast.AST, clear: ast.Call, owner: str) -> set[int] | None:
    """The classes in an `isinstance` test around the call, or None without a test."""
    found: set[int] | None = None
    for step in walk(method):
        if not isinstance(step, ast.If) or not any(clear is inner for part in step.body for inner in walk(part)):
            continue
        for test in calls(step.test):
            if ast.unparse(test.func) == "isinstance" and len(test.args) == 2 and ast.unparse(test.args[0]) == owner:
                kinds = test.args[1].elts if isinstance(test.args[1], ast.Tuple) else [test.args[1]]
                if any(klass.file.dotted(kind).endswith("nn.Module") for kind in kinds):
                    continue
                named = [code.find(klass.file, klass.file.dotted(kind)) for kind in kinds]
                found = {id(one.node) for one in named if one is not None}
    return found

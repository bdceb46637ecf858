"""Resolve expressions to full names through imports, aliases, `getattr`, dicts and library modules.

Nothing of a folder is run. Constant strings are concatenated as Python would (`"o" + "s"`), and a module reached through
a library (`torch.os`) gets its own name (`os`).
"""

import ast
import base64
import builtins
import codecs
import re
from collections.abc import Iterator

from .library_modules import canonical
from .repo_snapshot import CodeFile, Folder
from .walking import children

_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
MAX_DEPTH, MAX_VALUES, MAX_TEXT = 12, 12, 2000
BUILT_IN = set(dir(builtins)) | {"execfile", "__builtins__"}


_GETTERS = {
    "builtins.getattr",
    "builtins.hasattr",
    "builtins.object.__getattribute__",
    "builtins.type.__getattribute__",
    "inspect.getattr_static",
}
_CHANGES = ("lower", "upper", "strip", "title", "swapcase", "replace", "removeprefix")
_IMPORTERS = {"builtins.__import__", "importlib.import_module", "importlib.__import__"}


class Meanings:
    """Resolves the expressions of one file.

    Attributes:
        bound: `id` of a name node → whether a function around it has a variable or parameter of this name.
    """

    def __init__(self, folder: Folder, file: CodeFile):
        self.folder, self.file = folder, file
        self.values: dict[str, list[ast.expr]] = {}  # variable, or ".attribute" → what is assigned to it
        self.own: set[str] = set()  # names that the file itself defines at its top level
        self.bound: set[int] = set()
        self.stars: list[str] = []  # modules imported with *
        self._known: dict[int, frozenset[str]] = {}
        self._of_name: dict[str, frozenset[str]] = {}
        self._texts: dict[int, str | bytes | int | None] = {}
        self._collect(file.tree)

    def _collect(self, tree: ast.Module) -> None:
        waiting: list[tuple[ast.AST, frozenset[str], bool]] = [(tree, frozenset(), True)]
        while waiting:
            node, local, top = waiting.pop()
            if isinstance(node, ast.Name) and node.id in local:
                self.bound.add(id(node))
            elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                self.stars.append(f"{'.' * node.level}{node.module or ''}")
            for target, value in _assignments(node):
                if isinstance(target, ast.Name):
                    self.values.setdefault(target.id, []).append(value)
                    self.own |= {target.id} if top else set()
                elif isinstance(target, ast.Attribute):
                    self.values.setdefault(f".{target.attr}", []).append(value)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and top:
                self.own.add(node.name)
            if isinstance(node, _Function):
                inner = local | _locals(node)
                outside = {id(child) for child in [*getattr(node, "decorator_list", []), *_defaults(node.args)]}
                for child in children(node):
                    waiting.append((child, local if id(child) in outside else inner, False))
            else:
                inside_class = isinstance(node, ast.ClassDef)
                waiting += [(child, local, top and not inside_class) for child in children(node)]

    def names(self, node: ast.AST | None, depth: int = 0) -> frozenset[str]:
        """All full names that an expression may refer to, such as `{"os.system"}`; empty if unknown."""
        attributes: list[str] = []
        top = node
        while isinstance(node, ast.Attribute) and id(node) not in self._known:
            attributes.append(node.attr)
            node = node.value
        if node is None or depth > MAX_DEPTH:
            return frozenset()
        if id(node) not in self._known:
            self._known[id(node)] = frozenset()  # while it is being resolved, as `x = x.y` is circular
            self._known[id(node)] = frozenset(map(canonical, self._names(node, depth)))
        found = self._known[id(node)]
        for attribute in reversed(attributes):
            if found:
                found = frozenset(canonical(f"{base}.{attribute}") for base in found)
            else:
                found = self._of_values(f".{attribute}", depth)
        if top is not None and attributes:
            self._known[id(top)] = found
        return found

    def _names(self, node: ast.AST, depth: int) -> Iterator[str]:
        if isinstance(node, ast.Name):
            yield from self._of_variable(node.id, id(node) in self.bound, depth)
        elif isinstance(node, ast.Call):
            yield from self._of_call(node, depth)
        elif isinstance(node, ast.Subscript):
            key = self.text(node.slice, depth + 1)
            if isinstance(node.value, (ast.List, ast.Tuple, ast.Dict)):
                yield from self.names(node.value, depth + 1)
            elif key is not None:
                for table in self.names(node.value, depth + 1):
                    yield from self._entry(table, key)
        else:
            for part in _alternatives(node)[:MAX_VALUES]:
                yield from self.names(part, depth + 1)

    def _of_variable(self, name: str, local: bool, depth: int) -> Iterator[str]:
        imported = name in self.file.names and not local
        if imported:
            for meaning in {self.file.names[name], *self.file.others.get(name, ())}:
                yield from self._of_sibling(meaning, depth) if meaning.startswith(".") else [meaning]
        yield from self._of_values(name, depth)
        if name == "__builtins__":
            yield "builtins"
        elif name in BUILT_IN and not local and not imported:
            if name not in self.own or name in self.values:
                yield f"builtins.{name}"
        elif not local and not imported and name not in self.own and name not in self.values:
            for module in self.stars[:8]:
                if module.startswith("."):
                    yield from self._of_sibling(f"{module}.{name}", depth)
                else:
                    yield f"{module}.{name}"

    def _of_values(self, name: str, depth: int) -> frozenset[str]:
        """The names of all values assigned in the file to a variable or attribute of this name."""
        if name not in self._of_name:
            self._of_name[name] = frozenset()
            values = [v for v in self.values.get(name, ())[:MAX_VALUES] if not isinstance(v, _CONTAINERS)]
            self._of_name[name] = frozenset().union(*(self.names(value, depth + 1) for value in values))
        return self._of_name[name]

    def _of_sibling(self, meaning: str, depth: int) -> Iterator[str]:
        """The names that `.layers.os` may have, if the folder has a `layers.py`."""
        yield meaning
        module, _, name = meaning.lstrip(".").partition(".")
        home = self.file.name.rpartition("/")[0]
        sibling = self.folder.code.get(f"{home}/{module}.py" if home else f"{module}.py")
        if sibling is not None and name and depth < MAX_DEPTH:
            yield from meanings(self.folder, sibling)._of_variable(name.partition(".")[0], False, depth + 3)

    def _of_call(self, node: ast.Call, depth: int) -> Iterator[str]:
        functions, first = self.names(node.func, depth + 1), node.args[0] if node.args else None
        if functions & _GETTERS and len(node.args) > 1:
            attribute = self.text(node.args[1], depth + 1)
            if attribute is not None:
                yield from (f"{base}.{attribute}" for base in self.names(first, depth + 1))
        elif functions & _IMPORTERS and first is not None:
            module = self.text(first, depth + 1)
            if module is not None:
                yield from {module, module.partition(".")[0]} if "builtins.__import__" in functions else {module}
        elif functions & {"multiprocessing.get_context", "multiprocessing.context.get_context"}:
            yield "multiprocessing.context"  # its functions are those of the package
        elif "string.Formatter" in functions:
            yield "string.Formatter"
        elif "builtins.vars" in functions and first is not None:
            yield from (f"{base}.__dict__" for base in self.names(first, depth + 1))
        elif functions & {"builtins.globals", "builtins.locals", "builtins.vars"}:
            yield "globals()"
        elif functions & {"functools.partial", "builtins.staticmethod", "builtins.classmethod"}:
            yield from self.names(first, depth + 1)
        elif isinstance(node.func, ast.Call) and node.args:
            inner = self.names(node.func.func, depth + 1)
            path = self.text(node.func.args[0], depth + 1) if node.func.args else None
            if "operator.attrgetter" in inner and path is not None:
                yield from (f"{base}.{path}" for base in self.names(first, depth + 1))
        elif isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop", "__getitem__") and node.args:
            key = self.text(first, depth + 1)
            for table in self.names(node.func.value, depth + 1) if key is not None else ():
                yield from self._entry(table, str(key))
        elif isinstance(node.func, ast.Attribute) and node.func.attr in ("__getattribute__", "__getattr__"):
            attribute = self.text(node.args[-1], depth + 1) if node.args else None
            bases = self.names(node.args[0] if len(node.args) > 1 else node.func.value, depth + 1)
            if attribute is not None:
                yield from (f"{base}.{attribute}" for base in bases)

    def _entry(self, table: str, key: str) -> Iterator[str]:
        if table == "sys.modules":
            yield key
        elif table.endswith(".__dict__"):
            yield f"{table.removesuffix('.__dict__')}.{key}"
        elif table in ("builtins", "builtins.__builtins__"):
            yield f"builtins.{key}"
        elif table == "globals()":
            yield "builtins" if key == "__builtins__" else self.file.names.get(key, f"builtins.{key}")

    def text(self, node: ast.AST | None, depth: int = 0) -> str | None:
        """The text of an expression made of constants only, or None."""
        value = self._constant(node, depth)
        return value if isinstance(value, str) else None

    def _constant(self, node: ast.AST | None, depth: int = 0) -> str | bytes | int | None:
        if node is None or depth > MAX_DEPTH:
            return None
        if id(node) not in self._texts:
            self._texts[id(node)] = None
            self._texts[id(node)] = self._made(node, depth)
        return self._texts[id(node)]

    def _made(self, node: ast.AST, depth: int) -> str | bytes | int | None:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, (str, bytes, int)) else None
        if isinstance(node, ast.Name):
            values = self.values.get(node.id, [])
            return self._constant(values[0], depth + 1) if len(values) == 1 else None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self._constant(node.left, depth + 1), self._constant(node.right, depth + 1)
            if isinstance(left, (str, bytes)) and type(left) is type(right) and len(left) < MAX_TEXT:
                return left + right  # type: ignore[operator]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
            pattern, parts_of = self.text(node.left, depth + 1), getattr(node.right, "elts", [node.right])
            given = [self._constant(part, depth + 1) for part in parts_of]
            plain = pattern is not None and len(pattern) < MAX_TEXT and not re.search(r"%\S*[\d*]", pattern)
            return _percent(pattern, given) if pattern is not None and plain and None not in given else None
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.FormattedValue) else p for p in node.values]
            return _joined("", [self.text(part, depth + 1) for part in parts])
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
            text, bounds = self._constant(node.value, depth + 1), node.slice
            cut = [_number(part) for part in (bounds.lower, bounds.upper, bounds.step)]
            if isinstance(text, (str, bytes)) and cut[2] != 0:
                return text[slice(*cut)]
        if isinstance(node, ast.Call):
            return self._of_text_call(node, depth)
        return None

    def _of_text_call(self, node: ast.Call, depth: int) -> str | bytes | None:
        functions = self.names(node.func, depth + 1)
        given = [self._constant(argument, depth + 1) for argument in node.args]
        first = given[0] if given else None
        try:
            if "builtins.chr" in functions and isinstance(first, int):
                return chr(first)
            if "builtins.bytes.fromhex" in functions and isinstance(first, str):
                return bytes.fromhex(first)
            if functions & {"builtins.bytes", "builtins.bytearray"} and isinstance(node.args[0], (ast.List, ast.Tuple)):
                return bytes(n for n in map(_number, node.args[0].elts) if n is not None)
            if functions & {"builtins.str"} and len(given) == 2 and isinstance(first, bytes):
                return first.decode()
            if functions & {"base64.b64decode", "base64.b32decode", "base64.b16decode", "base64.urlsafe_b64decode"}:
                decode = getattr(base64, next(iter(functions)).partition(".")[2], base64.b64decode)
                return decode(first) if isinstance(first, (str, bytes)) else None
            if "codecs.decode" in functions and first is not None and len(given) == 2:
                return codecs.decode(first, given[1]) if given[1] in ("rot13", "rot_13", "hex", "base64") else None  # type: ignore[call-overload, arg-type]
            if not isinstance(node.func, ast.Attribute):
                return None
            text = self._constant(node.func.value, depth + 1)
            if isinstance(text, bytes) and node.func.attr == "decode":
                return text.decode()
            if not isinstance(text, str):
                return None
            if node.func.attr == "join" and node.args:
                return self._join(text, node.args[0], depth)
            if node.func.attr == "format" and None not in given and re.fullmatch(r"([^{}]|\{\d?\})*", text):
                return text.format(*given)
            if node.func.attr in _CHANGES and None not in given and len(text) < MAX_TEXT:
                return getattr(text, node.func.attr)(*given)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
        return None

    def _join(self, separator: str, parts: ast.expr, depth: int) -> str | None:
        if isinstance(parts, (ast.List, ast.Tuple)):
            return _joined(separator, [self.text(part, depth + 1) for part in parts.elts[:MAX_TEXT]])
        if isinstance(parts, ast.Call) and len(parts.args) == 2 and "builtins.chr" in self.names(parts.args[0]):
            if "builtins.map" in self.names(parts.func) and isinstance(numbers := parts.args[1], (ast.List, ast.Tuple)):
                return separator.join(chr(n) for n in map(_number, numbers.elts) if n is not None)
            return None
        if isinstance(parts, (ast.GeneratorExp, ast.ListComp)) and len(parts.generators) == 1:
            inner, call = parts.generators[0].iter, parts.elt  # "".join(chr(c) for c in (111, 115))
            if isinstance(call, ast.Call) and "builtins.chr" in self.names(call.func, depth + 1):
                codes = [_number(n) for n in inner.elts] if isinstance(inner, (ast.List, ast.Tuple)) else []
                plain = bool(call.args) and isinstance(call.args[0], ast.Name)
                return separator.join(chr(n) for n in codes if n is not None) if codes and plain else None
        reversing = isinstance(parts, ast.Call) and "builtins.reversed" in self.names(parts.func, depth + 1)
        if reversing and isinstance(parts, ast.Call) and parts.args:
            text = self.text(parts.args[0], depth + 1)
            return separator.join(reversed(text)) if text is not None else None
        return None


def meanings(folder: Folder, file: CodeFile) -> Meanings:
    """The `Meanings` of a file of the folder, cached."""
    key = f"meanings of {file.name}"
    if key not in folder.memo:
        folder.memo[key] = Meanings(folder, file)
    return folder.memo[key]


_CONTAINERS = (ast.List, ast.Tuple, ast.Dict, ast.Set)


def _alternatives(node: ast.AST) -> list[ast.expr]:
    """The alternatives of an expression, such as the branches of a conditional."""
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return node.elts
    if isinstance(node, (ast.Dict, ast.BoolOp)):
        return node.values
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    return [node.value] if isinstance(node, (ast.NamedExpr, ast.Starred, ast.Await)) else []


def _joined(separator: str, parts: list[str | None]) -> str | None:
    texts = [part for part in parts if part is not None]
    return separator.join(texts)[:MAX_TEXT] if len(texts) == len(parts) else None


def _number(node: ast.AST | None) -> int | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _number(node.operand)
        return None if inner is None else -inner
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, int) else None


def _defaults(arguments: ast.arguments) -> list[ast.expr]:
    return [default for default in [*arguments.defaults, *arguments.kw_defaults] if default is not None]


def _assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Every (target, value) that a node assigns, including default values of parameters."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, (ast.Tuple, ast.List)) and isinstance(node.value, (ast.Tuple, ast.List)):
                yield from zip(target.elts, node.value.elts, strict=False)
            else:
                yield target, node.value
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
        yield node.target, node.value
    elif isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.iter, (ast.Tuple, ast.List)):
        yield from ((node.target, element) for element in node.iter.elts[:MAX_VALUES])
    elif isinstance(node, _Function):
        given = node.args
        positional = [*given.posonlyargs, *given.args]
        pairs = [*zip(reversed(positional), reversed(given.defaults), strict=False)]
        pairs += [(a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True) if d is not None]
        yield from ((ast.Name(argument.arg, ast.Store()), default) for argument, default in pairs)


def _locals(node: _Function) -> frozenset[str]:
    """The local names of a function, without imported names and globals."""
    given = node.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    found, outer = {argument.arg for argument in arguments}, set()
    waiting: list[ast.AST] = list(node.body) if not isinstance(node, ast.Lambda) else [node.body]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(inner.name)
            continue
        if isinstance(inner, ast.Lambda):
            continue
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            found.add(inner.id)
        elif isinstance(inner, (ast.Global, ast.Nonlocal)):
            outer |= set(inner.names)
        elif isinstance(inner, (ast.Import, ast.ImportFrom)):
            outer |= {(alias.asname or alias.name).partition(".")[0] for alias in inner.names}
        waiting += children(inner)
    return frozenset(found - outer)


def _percent(text: str, given: list) -> str | None:
    try:
        return text % tuple(given)
    except (TypeError, ValueError):
        return None

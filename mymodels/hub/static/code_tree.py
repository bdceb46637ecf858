"""The classes of a folder's code and their inheritance, from syntax trees."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .repo_snapshot import MAX_CONFIG_BYTES, CodeFile, Folder
from .walking import children, walk

MAX_CLASSES = 1000
_Function = ast.FunctionDef | ast.AsyncFunctionDef
# classes of transformers that are modules but not models
_TRANSFORMERS_MODULES = re.compile(
    r"(GradientCheckpointingLayer|RMSNorm|LayerNorm|Attention|MLP|Embedding|Layer|Block)$"
)


class Klass(NamedTuple):
    """A class and the file it is defined in."""

    file: CodeFile
    node: ast.ClassDef

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def where(self) -> str:
        return self.file.at(self.node)

    def method(self, name: str) -> _Function | None:
        """The method that this class itself defines."""
        return next((m for m in self.methods() if m.name == name), None)

    def methods(self) -> Iterator[_Function]:
        """The functions of the body, also those that an `if` or `try` in it defines, for some releases only."""
        waiting: list[ast.AST] = list(reversed(self.node.body))
        while waiting:
            node = waiting.pop()
            if isinstance(node, _Function):
                yield node
            elif isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
                waiting.extend(reversed(children(node)))

    def value(self, name: str) -> ast.expr | None:
        """What this class itself assigns to a class attribute."""
        for node in self.node.body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return node.value
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
                return node.value
        return None


class Code:
    """All classes of the files in `names` (default: every parsed file), with their ancestors."""

    def __init__(self, folder: Folder, names: set[str] | None = None):
        self.files = {name: file for name, file in folder.code.items() if names is None or name in names}
        self.classes = [
            Klass(file, node)
            for file in self.files.values()
            for node in walk(file.tree)
            if isinstance(node, ast.ClassDef)
        ]
        if len(self.classes) > MAX_CLASSES:
            raise ValueError(f"{len(self.classes)} classes are more than any model has")
        self._by_name = {(klass.file.name, klass.name): klass for klass in self.classes}
        self._lineage = {id(klass.node): self._ancestors(klass) for klass in self.classes}
        self.parents = {id(base.node) for klass in self.classes for base in self.lineage(klass)[1:]}

    def find(self, file: CodeFile, dotted: str) -> Klass | None:
        """The class that a name in `file` refers to, if the folder defines it."""
        for _ in range(20):  # a name may be re-exported by siblings
            if (klass := self._by_name.get((file.name, dotted))) is not None:
                return klass
            if not dotted.startswith("."):
                dotted = file.names.get(dotted, "")
            module, _, name = dotted.lstrip(".").rpartition(".")
            home = file.name.rpartition("/")[0]
            sibling = self.files.get(f"{home}/{module}.py" if home else f"{module}.py")
            if not dotted.startswith(".") or sibling is None:
                return None
            file, dotted = sibling, name
        return None

    def _ancestors(self, klass: Klass) -> tuple[list[Klass], set[str]]:
        family, roots, waiting, seen = [klass], set(), [klass], {id(klass.node)}
        while waiting:
            current = waiting.pop()
            for base in current.node.bases:
                base = base.value if isinstance(base, ast.Subscript) else base
                dotted = current.file.dotted(base)
                found = self.find(current.file, dotted)
                if found is None:
                    roots.add(dotted)
                elif id(found.node) not in seen:
                    seen.add(id(found.node))
                    family.append(found)
                    waiting.append(found)
        return family, roots

    def lineage(self, klass: Klass) -> list[Klass]:
        """The class and those of its ancestors that the folder defines."""
        return self._family(klass)[0]

    def roots(self, klass: Klass) -> set[str]:
        """Full names of the ancestors that come from elsewhere."""
        return self._family(klass)[1]

    def _family(self, klass: Klass) -> tuple[list[Klass], set[str]]:
        if id(klass.node) not in self._lineage:  # a class that stands for one of a library
            self._lineage[id(klass.node)] = self._ancestors(klass)
        return self._lineage[id(klass.node)]

    def is_model(self, klass: Klass) -> bool:
        """Whether it is a `PreTrainedModel`, directly or through a class of transformers."""
        return any(
            root.rpartition(".")[2] == "PreTrainedModel"
            or (
                root.startswith("transformers.")
                and re.search(r"(PreTrainedModel|PretrainedModel|Model|For[A-Z]\w+)$", root)
            )
            for root in self.roots(klass)
        )

    def is_module(self, klass: Klass) -> bool:
        """Whether it is a `torch.nn.Module`."""
        return self.is_model(klass) or any(
            re.match(r"torch\.nn\.|nn\.Module$|Module$", root)
            or (re.match(r"transformers\.(?!cache_utils)", root) and _TRANSFORMERS_MODULES.search(root))
            for root in self.roots(klass)
        )

    def is_config(self, klass: Klass) -> bool:
        """Whether it is a transformers config."""
        return any(re.search(r"(^|\.)\w*Config$", root) for root in self.roots(klass))

    def value(self, klass: Klass, name: str) -> tuple[Klass, ast.expr] | None:
        """A class attribute, and the class or ancestor that sets it."""
        for member in self.lineage(klass):
            if (value := member.value(name)) is not None:
                return member, value
        return None

    def method(self, klass: Klass, name: str) -> tuple[Klass, _Function] | None:
        """A method, and the class or ancestor that defines it."""
        for member in self.lineage(klass):
            if (method := member.method(name)) is not None:
                return member, method
        return None

    def leaves(self) -> list[Klass]:
        """The models that no other class here is derived from, and those that `auto_map` may name."""
        return [klass for klass in self.classes if self.is_model(klass) and id(klass.node) not in self.parents]


def calls(node: ast.AST) -> Iterator[ast.Call]:
    """Every call inside a node."""
    return (inner for inner in walk(node) if isinstance(inner, ast.Call))


def attributes(node: ast.AST) -> Iterator[ast.Attribute]:
    """Every attribute access inside a node."""
    return (inner for inner in walk(node) if isinstance(inner, ast.Attribute))


def is_self(node: ast.AST, name: str | None = None) -> bool:
    """Whether a node is `self.name`, or `self.` anything."""
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and (name is None or node.attr == name)
    )


def depth(node: ast.AST) -> int:
    """The number of names in an attribute expression: 3 for `self.head.weight`, 0 for other expressions."""
    count = 1
    while isinstance(node, ast.Attribute):
        count, node = count + 1, node.value
    return count if isinstance(node, ast.Name) else 0


def constant(node: ast.AST | None) -> Any:
    """The value of a literal, or None."""
    return node.value if isinstance(node, ast.Constant) else None


def guarded(tree: ast.AST, guards: Callable[[ast.AST], bool] | None = None) -> set[int]:
    """The `id` of every node under an `if` or a `try`, or under a node that `guards` accepts."""
    found: set[int] = set()
    waiting = [(tree, False)]
    while waiting:
        node, inside = waiting.pop()
        if inside:
            found.add(id(node))
        inside = inside or (guards(node) if guards else isinstance(node, (ast.If, ast.IfExp, ast.Try)))
        waiting += [(child, inside) for child in children(node)]
    return found


_RELEASE_TEST = re.compile(
    r"signature|getfullargspec|__version__|parse_version|find_spec|Version|"
    r"is_\w+_(available|version|or_later|or_equal|or_higher)\w*"
)
_OWN = {"self", "config", "module"}  # attributes of these do not depend on the release


def bridged(file: CodeFile) -> set[int]:
    """The `id` of every node that runs under some releases only: the code asks for a version, a name or a signature
    first, or catches what the other releases raise."""
    kept = getattr(file.tree, "_bridged", None)
    if kept is None:
        kept = file.tree._bridged = _find_bridged(file)  # type: ignore[attr-defined]
    return kept


def _find_bridged(file: CodeFile) -> set[int]:
    names: set[str] = set()
    for _ in range(3):  # names that hold the answer to such a test, or a function that gives it
        for node in walk(file.tree):
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                goals = node.targets if isinstance(node, ast.Assign) else [node.target]
                if _asks_release(node.value, names):
                    names |= {goal.id for goal in goals if isinstance(goal, ast.Name)}
                    names |= {goal.attr for goal in goals if isinstance(goal, ast.Attribute)}
            elif isinstance(node, _Function) and len(node.body) <= 3 and _asks_release(node.body[-1], names):
                names.add(node.name)
            elif isinstance(node, ast.Try) and _catches(node):  # try: import x; HAS_X = True
                for inner in node.body + [step for handler in node.handlers for step in handler.body]:
                    if isinstance(inner, ast.Assign) and isinstance(inner.value, ast.Constant):
                        names |= {goal.id for goal in inner.targets if isinstance(goal, ast.Name)}

    def guards(node: ast.AST) -> bool:
        if isinstance(node, (ast.If, ast.IfExp)):
            return _asks_release(node.test, names)
        return isinstance(node, ast.Try) and _catches(node)

    return guarded(file.tree, guards)


def _asks_release(node: ast.AST, names: set[str]) -> bool:
    words = {n.id for n in walk(node) if isinstance(n, ast.Name)}
    words |= {n.attr for n in walk(node) if isinstance(n, ast.Attribute)}
    if words & names or {"version", "parse"} <= words or any(map(_RELEASE_TEST.fullmatch, words)):
        return True
    asked = [n.args[0] for n in calls(node) if isinstance(n.func, ast.Name) and n.func.id == "hasattr" and n.args]
    return any(not (isinstance(one, ast.Name) and one.id in _OWN) for one in asked)


_CAUGHT = {"TypeError", "AttributeError", "ImportError", "ModuleNotFoundError", "Exception", "RuntimeError", "KeyError"}


def _catches(node: ast.Try) -> bool:
    """Whether what another release raises is caught: not a bare `finally`."""
    kinds = {n.id for h in node.handlers if h.type for n in walk(h.type) if isinstance(n, ast.Name)}
    return bool(kinds & _CAUGHT) or any(handler.type is None for handler in node.handlers)


def references(folder: Folder) -> list[tuple[str, str, str]]:
    """Every class reference of the configs' `auto_map`s: (file, Auto class, `module.Class`)."""
    found: list[tuple[str, str, str]] = []
    for name, value in folder.values.items():
        auto_map = value.get("auto_map")
        if not isinstance(auto_map, dict):
            continue
        for auto, reference in auto_map.items():
            for entry in reference if isinstance(reference, list) else [reference]:
                if entry is not None:
                    found.append((name, str(auto), entry if isinstance(entry, str) else repr(entry)))
    return found


def entry_files(folder: Folder) -> list[str]:
    """The files that transformers loads code from: those of `auto_map`, of custom pipelines and of generation."""
    targets = [reference.partition("--")[2] or reference for _, _, reference in references(folder)]
    pipelines = folder.config.get("custom_pipelines")
    if isinstance(pipelines, dict):
        targets += [p["impl"] for p in pipelines.values() if isinstance(p, dict) and isinstance(p.get("impl"), str)]
    names = dict.fromkeys(f"{target.rpartition('.')[0]}.py" for target in targets)
    if "custom_generate/generate.py" in folder.files:
        names["custom_generate/generate.py"] = None
    if any("/" in name and name.endswith("config.json") and _has_auto_map(file) for name, file in folder.files.items()):
        names |= dict.fromkeys(folder.code)  # a model in a subfolder, whose code is not traced further
    return [name for name in names if name in folder.files]


def _has_auto_map(file: Path) -> bool:
    with file.open("rb") as handle:
        return b"auto_map" in handle.read(MAX_CONFIG_BYTES)


def siblings(file: CodeFile) -> list[tuple[str, ast.ImportFrom]]:
    """The siblings that a file imports with `from .name import …`, and where."""
    home = file.name.rpartition("/")[0]
    return [
        (f"{home}/{node.module}.py" if home else f"{node.module}.py", node)
        for node in walk(file.tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and "." not in node.module
    ]


def reachable(folder: Folder) -> set[str]:
    """The files that run when something of the folder is loaded."""
    found: set[str] = set()
    waiting = entry_files(folder)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            if name in folder.code:
                waiting += [sibling for sibling, _ in siblings(folder.code[name]) if sibling in folder.files]
    return found

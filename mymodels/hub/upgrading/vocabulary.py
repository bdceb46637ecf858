"""What in a model has a row or a value for each token: embeddings, head, biases; read off its constructors."""

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..static.code_tree import Code, Klass, calls, constant, is_self
from .embeddings import input_embeddings, parts_of

_MAX_DEPTH = 4  # of a head inside modules of a model: `cls.predictions.decoder`
_TENSORS = re.compile(r"torch\.(zeros|ones|empty|randn|rand|full)$")
_CONFIG = re.compile(r"(?:self\.)?(?:config|cfg)\.(\w+)")


class Part(NamedTuple):
    """A module or tensor of a model.

    Attributes:
        path: its name from the model, such as `"transformer.lm_head"`.
        owner: the class whose constructor makes it.
        value: what the constructor sets it to.
        same_config: whether `config` in that constructor is the model's own, and not a config inside it.
    """

    path: str
    owner: Klass
    value: ast.expr
    same_config: bool


class Made(NamedTuple):
    """The call that makes a module: `nn.Linear(8, 4)`, also `skip_init(nn.Linear, 8, 4)`."""

    name: str
    args: list[ast.expr]
    keywords: dict[str, ast.expr]

    def argument(self, position: int, name: str) -> ast.expr | None:
        """An argument by its place or its name."""
        return self.args[position] if len(self.args) > position else self.keywords.get(name)


def made(owner: Klass, value: ast.expr | None) -> Made | None:
    """What makes a module, with the full name of its class; None for anything but one call."""
    value = value.body if isinstance(value, ast.IfExp) else value
    if not isinstance(value, ast.Call) or any(isinstance(argument, ast.Starred) for argument in value.args):
        return None
    keywords = {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg is not None}
    first = owner.file.dotted(value.args[0]) if value.args else ""
    if re.match(r"torch\.nn\.[A-Z]\w+$", first):  # a function that makes modules, given the class
        return Made(first, value.args[1:], keywords)
    return Made(owner.file.dotted(value.func), value.args, keywords)


def is_kind(found: Made | None, kind: str) -> bool:
    """Whether a module is of a class of `torch.nn`, such as `"Linear"`."""
    return found is not None and found.name.rpartition(".")[2] == kind


def parts_below(code: Code, klass: Klass, prefix: str = "", depth: int = 0, same_config: bool = True) -> Iterator[Part]:
    """The parts of a model and, inside modules of the folder's classes, theirs."""
    for name, value in parts_of(code, klass).items():
        yield Part(prefix + name, klass, value, same_config)
        found = made(klass, value)
        inner = code.find(klass.file, found.name) if found is not None else None
        if found is not None and inner is not None and depth < _MAX_DEPTH and code.is_module(inner):
            given = {ast.unparse(argument) for argument in (*found.args, *found.keywords.values())}
            same = same_config and not given.isdisjoint({"config", "self.config", "cfg", "self.cfg"})
            yield from parts_below(code, inner, f"{prefix}{name}.", depth + 1, same)


class Vocabulary:
    """The parts of one model class whose size is that of the vocabulary.

    Args:
        code: of the folder.
        klass: the model.
        headers: the checkpoint's tensors by name, with `shape`; empty if unknown.
    """

    def __init__(self, code: Code, klass: Klass, headers: Mapping[str, Any]):
        self.code, self.klass, self.headers = code, klass, headers
        self.parts = list(parts_below(code, klass))
        self.embeddings = input_embeddings(code, klass).removesuffix(".weight")
        part = next((part for part in self.parts if part.path == self.embeddings), None)
        found = made(part.owner, part.value) if part is not None else None
        size = found.argument(0, "num_embeddings") if is_kind(found, "Embedding") and found is not None else None
        self.size = _size(code, part.owner, size) if part is not None else ""

    def is_size(self, owner: Klass, value: ast.expr | None) -> bool:
        """Whether an expression in a constructor is the number of tokens."""
        size = _size(self.code, owner, value)
        if not size or not self.size:
            return False
        last = self.embeddings.rpartition(".")[2]
        return size == self.size or bool(
            re.search(rf"(^|\.){re.escape(last)}\.(num_embeddings|weight\.shape\[0\]|weight\.size\(0\))$", size)
        )

    def heads(self) -> list[Part]:
        """The linear layers that give a score for each token."""
        return [part for part in self.parts if self._is_head(part)]

    def _is_head(self, part: Part) -> bool:
        found = made(part.owner, part.value)
        if not is_kind(found, "Linear"):
            return False
        assert found is not None
        size = found.argument(1, "out_features")
        stored, rows = (self.rows(name) for name in (part.path, self.embeddings))
        if stored is not None and rows is not None and stored != rows:
            return False
        same = stored is not None and stored == rows and "vocab" in _size(self.code, part.owner, size)
        return same or self.is_size(part.owner, size)

    def rows(self, path: str) -> int | None:
        """The first size of a module's weight in the checkpoint; None if it is not in there."""
        info = self.headers.get(f"{path}.weight")
        return int(info.shape[0]) if info is not None and len(info.shape) else None

    def tensors(self) -> list[str]:
        """Parameters and buffers with one value a token that are no module's own: `final_logits_bias`."""
        found = []
        for prefix, klass in self._modules():
            for member in self.code.lineage(klass):
                init = member.method("__init__")
                for name, value in _own_tensors(init) if init is not None else ():
                    last = _last_size(member, value)
                    if last is not None and self.is_size(klass, last):
                        found.append(prefix + name)
        return list(dict.fromkeys(found))

    def _modules(self) -> Iterator[tuple[str, Klass]]:
        yield "", self.klass
        for part in self.parts:
            call = made(part.owner, part.value)
            inner = self.code.find(part.owner.file, call.name) if call is not None else None
            if inner is not None and self.code.is_module(inner):
                yield f"{part.path}.", inner

    def settings(self) -> list[str]:
        """The names under which the model's config holds the number of tokens; not those of a config inside it."""
        sizes = []
        for part in (part for part in self.parts if part.same_config):
            found = made(part.owner, part.value)
            if found is not None and part.path == self.embeddings:
                sizes.append(_size(self.code, part.owner, found.argument(0, "num_embeddings")))
            elif found is not None and self._is_head(part):
                sizes.append(_size(self.code, part.owner, found.argument(1, "out_features")))
        return [setting[1] for size in dict.fromkeys(sizes) if (setting := _CONFIG.fullmatch(size))]


def used_head(code: Code, klass: Klass, vocabulary: Vocabulary) -> Part | None:
    """The one head that `forward` calls, itself or through a module that is no model; None if there are several."""
    forward = code.method(klass, "forward")
    if forward is None:
        return None
    text = ast.unparse(forward[1])
    models = {
        part.path
        for part in vocabulary.parts
        if (call := made(part.owner, part.value))
        and (inner := code.find(part.owner.file, call.name))
        and code.is_model(inner)
    }
    found = []
    for head in vocabulary.heads():
        words = head.path.split(".")
        names = {".".join(words[: n + 1]) for n in range(len(words))} - models
        if any(
            re.search(rf"self\.{re.escape(name)}(?!\.?\w)|self\.{re.escape(name)}\.weight\b", text) for name in names
        ):
            found.append(head)
    return found[0] if len(found) == 1 else None


def output_embeddings(code: Code, klass: Klass) -> str:
    """The path of what `get_output_embeddings` returns, also through a part's own; "" if it returns nothing."""
    prefix: list[str] = []
    current: Klass | None = klass
    for _ in range(5):
        found = code.method(current, "get_output_embeddings") if current is not None else None
        if current is None or found is None:
            return ""
        returned = [n.value for n in ast.walk(found[1]) if isinstance(n, ast.Return) and n.value is not None]
        text = ast.unparse(returned[-1]) if returned else ""
        if own := re.fullmatch(r"self\.([\w.]+)", text):
            return ".".join([*prefix, own[1]])
        inner = re.fullmatch(r"self\.(\w+)\.get_output_embeddings\(\)", text)
        if inner is None:
            return ""
        prefix.append(inner[1])
        call = made(current, parts_of(code, current).get(inner[1]))
        current = code.find(current.file, call.name) if call is not None else None
    return ""


def gives_none(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a method does nothing but return None."""
    return all(
        isinstance(step, ast.Pass)
        or (isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant))  # a docstring
        or (isinstance(step, ast.Return) and (step.value is None or ast.unparse(step.value) == "None"))
        for step in method.body
    )


def _size(code: Code, owner: Klass, value: ast.expr | None) -> str:
    """An expression of a constructor as text, with names that the constructor sets once put in their place."""
    for _ in range(3):
        if value is not None and is_self(value):
            value = parts_of(code, owner).get(ast.unparse(value).removeprefix("self."), value)
        elif isinstance(value, ast.Name):
            value = _local(owner, value.id) or value
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "getattr":
            if len(value.args) < 2 or not isinstance(name := constant(value.args[1]), str):
                break
            return f"{ast.unparse(value.args[0]).removeprefix('self.')}.{name}"
    if value is None:
        return ""
    return ast.unparse(value).removeprefix("self.")


def _local(owner: Klass, name: str) -> ast.expr | None:
    init = owner.method("__init__")
    for node in ast.walk(init) if init is not None else ():
        if isinstance(node, ast.Assign) and any(
            isinstance(goal, ast.Name) and goal.id == name for goal in node.targets
        ):
            return node.value
    return None


def _own_tensors(init: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, ast.expr]]:
    """The parameters and buffers that a constructor makes, by name."""
    for node in ast.walk(init):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            func, goal = ast.unparse(node.value.func), node.targets[0]
            if is_self(goal) and func.rpartition(".")[2] == "Parameter" and node.value.args:
                yield ast.unparse(goal).removeprefix("self."), node.value.args[0]
    for call in calls(init):
        named = constant(call.args[0]) if call.args else None
        registers = ast.unparse(call.func) in ("self.register_buffer", "self.register_parameter")
        if registers and isinstance(named, str) and len(call.args) > 1:
            yield named, call.args[1]


def _last_size(owner: Klass, value: ast.expr) -> ast.expr | None:
    """The last size of a tensor that a constructor makes: `torch.zeros((1, n))`."""
    for call in calls(value):
        if _TENSORS.match(owner.file.dotted(call.func)) and call.args:
            sizes = call.args[:1] if call.func.attr == "full" else call.args  # type: ignore[attr-defined]
            last = sizes[-1]
            return last.elts[-1] if isinstance(last, (ast.Tuple, ast.List)) and last.elts else last
    return None

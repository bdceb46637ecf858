"""Where a model keeps its input embeddings and its parts, read off its constructor."""

import ast
import re
from collections.abc import Iterator
from typing import Any

from ..static.code_tree import Code, Klass, calls, constant, is_self

_USUAL = ("embed_tokens", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "embeddings", "shared", "embed")


def parts_of(code: Code, klass: Klass) -> dict[str, ast.expr]:
    """The attributes that the constructors of a class and its ancestors set, with what they are set to."""
    found: dict[str, ast.expr] = {}
    for member in code.lineage(klass):
        init = member.method("__init__")
        local: dict[str, ast.expr] = {}
        for node in ast.walk(init) if init is not None else ():
            for goal, set_to in _assigned(node):
                value = local.get(set_to.id, set_to) if isinstance(set_to, ast.Name) else set_to
                if isinstance(goal, ast.Name):
                    local.setdefault(goal.id, value)
                elif is_self(goal):
                    found.setdefault(goal.attr, value)  # type: ignore[attr-defined]
    return found


def _assigned(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What a statement sets, with what it is set to: also `self.a: A = …`, `self.a, self.b = …`, `self.add_module("a", …)`."""
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        yield node.target, node.value
    elif isinstance(node, ast.Assign):
        for goal in node.targets:
            if isinstance(goal, (ast.Tuple, ast.List)) and isinstance(node.value, (ast.Tuple, ast.List)):
                yield from zip(goal.elts, node.value.elts)
            else:
                yield goal, node.value
    elif isinstance(node, ast.Call) and len(node.args) == 2:
        adds = is_self(node.func, "add_module") or is_self(node.func, "register_module")
        if adds and isinstance(name := constant(node.args[0]), str):
            yield ast.Attribute(ast.Name("self"), name), node.args[1]


def class_of_part(code: Code, klass: Klass, value: ast.expr | None) -> Klass | None:
    """The class of the folder that a part is made from."""
    if value is None:
        return None
    names = [klass.file.dotted(call.func) for call in calls(value)]
    return next((found for name in names if (found := code.find(klass.file, name)) is not None), None)


def input_embeddings(code: Code, klass: Klass | None) -> str:
    """The full name of the weight of a model's input embeddings, from its `get_input_embeddings`, or ""."""
    prefix: list[str] = []
    for _ in range(5):  # a model with a head asks the base model in it
        if klass is None:
            return ""
        parts = parts_of(code, klass)
        found = code.method(klass, "get_input_embeddings")
        returned = [n.value for n in ast.walk(found[1]) if isinstance(n, ast.Return) and n.value] if found else []
        path = ast.unparse(returned[-1]) if returned else ""
        if own := re.fullmatch(r"self\.([\w.]+)", path):
            return ".".join([*prefix, own[1], "weight"])
        inner = re.fullmatch(r"self\.(\w+)\.get_input_embeddings\(\)", path)
        prefixes = code.value(klass, "base_model_prefix")
        named = inner[1] if inner else str(getattr(prefixes[1], "value", "")) if prefixes else ""
        if named not in parts:  # a prefix from a class of transformers: the first part that is a model
            models = (
                part for part, value in parts.items() if (k := class_of_part(code, klass, value)) and code.is_model(k)
            )
            named = next(models, "")
        if not named:
            usual = next((part for part in _USUAL if part in parts), "")
            return ".".join([*prefix, usual, "weight"]) if usual else ""
        prefix.append(named)
        klass = class_of_part(code, klass, parts[named])
    return ""


def exists(code: Code, klass: Klass | None, name: str) -> bool:
    """Whether a parameter's name leads to a part, as far as the folder's classes tell; wildcards and indexes pass."""
    words = name.split(".")
    for word in words[:-1]:
        if klass is None or not word.isidentifier():
            return True
        parts = parts_of(code, klass)
        if word not in parts:
            return False
        klass = class_of_part(code, klass, parts[word])
    return True


def tied_by_hand(code: Code, klass: Klass | None, name: str) -> str:
    """What a parameter such as `cls.decoder.bias` is set to by the code (`self.decoder.bias = self.bias`), or ""."""
    prefix: list[str] = []
    words = name.split(".")
    for depth in range(len(words)):
        if klass is None:
            return ""
        inner = ".".join(words[depth:])
        for member in code.lineage(klass):
            for node in ast.walk(member.node):
                if isinstance(node, ast.Assign) and any(ast.unparse(goal) == f"self.{inner}" for goal in node.targets):
                    to = re.fullmatch(r"self\.([\w.]+)", ast.unparse(node.value))
                    if to:
                        return ".".join([*prefix, to[1]])
        prefix.append(words[depth])
        klass = class_of_part(code, klass, parts_of(code, klass).get(words[depth]))
    return ""


def ties_by_config(code: Code, config: dict[str, Any]) -> bool:
    """Whether the old releases tied a head and the embeddings: by `tie_word_embeddings`, which was true by default."""
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    for klass in code.classes:
        init = klass.method("__init__") if code.is_config(klass) else None
        if init is None:
            continue
        names = [argument.arg for argument in [*init.args.args, *init.args.kwonlyargs]]
        defaults = [*init.args.defaults, *[d for d in init.args.kw_defaults if d is not None]]
        for name, default in zip(reversed(names), reversed(defaults)):
            if name == "tie_word_embeddings" and isinstance(default, ast.Constant):
                return bool(default.value)
        for call in calls(init):
            for keyword in call.keywords:
                if keyword.arg == "tie_word_embeddings" and isinstance(keyword.value, ast.Constant):
                    return bool(keyword.value.value)
    return True

"""Which classes of a folder generate, and whether they know transformers' `Cache`: what several rules ask."""

import ast
from collections.abc import Iterator

from ..static.code_tree import Code, Klass, bridged, calls
from ..static.repo_snapshot import CodeFile
from .rule import Context

_AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForVision2Seq", "AutoModelForImageTextToText")
_CACHES = {"Cache", "DynamicCache", "StaticCache", "EncoderDecoderCache", "SlidingWindowCache", "HybridCache"}
_METHODS = {
    "get_seq_length",
    "get_usable_length",
    "get_max_length",
    "get_max_cache_shape",
    "from_legacy_cache",
    "to_legacy_cache",
    "seen_tokens",
    "key_cache",
}
# what the rules put in place of methods of `Cache`
_HELPERS = {
    "length_of_cache",
    "limit_of_cache",
    "cache_keys",
    "cache_values",
    "cache_from_tuples",
    "cache_from_four",
    "cache_to_tuples",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def generating(context: Context) -> list[Klass]:
    """The models of this file, derived from `PreTrainedModel` by the folder's own code, that can generate."""
    auto_map = context.config.get("auto_map")
    served = {
        str(name).rpartition(".")[2]
        for auto, name in (auto_map.items() if isinstance(auto_map, dict) else ())
        if auto in _AUTO
    }
    found = []
    for klass in context.code.classes:
        if klass.file.name != context.file.name or not own_model(context.code, klass):
            continue
        method = context.code.method(klass, "prepare_inputs_for_generation")
        mixin = any(root.endswith("GenerationMixin") for root in context.code.roots(klass))
        if method is not None or mixin or klass.name in served:
            found.append(klass)
    return found


def own_model(code: Code, klass: Klass) -> bool:
    """Whether a class is a model by `PreTrainedModel` itself, not by a stock model that looks after these things."""
    roots = {root.rpartition(".")[2] for root in code.roots(klass)}
    return "PreTrainedModel" in roots and roots <= {"PreTrainedModel", "GenerationMixin", "ABC", "object", "Generic"}


def first_with(context: Context, classes: list[Klass], has: str) -> list[Klass]:
    """Of some classes, those that define a method themselves, or have no ancestor here that is among them."""
    nodes = {id(klass.node) for klass in classes}
    found = []
    for klass in classes:
        above = [id(base.node) for base in context.code.lineage(klass)[1:]]
        if klass.method(has) is not None or not nodes & set(above):
            found.append(klass)
    return found


def knows_cache(context: Context) -> bool:
    """Whether the code calls transformers' `Cache` anywhere; imports and annotations do not count."""
    own = {klass.name for klass in context.code.classes}
    for file in context.code.files.values():
        skipped = _annotations(file)
        for node in ast.walk(file.tree):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.Name) and node.id in (_CACHES | _HELPERS) - own and isinstance(node.ctx, ast.Load):
                return True
            if isinstance(node, ast.Attribute) and node.attr in _METHODS:
                return True
    return False


def _annotations(file: CodeFile) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(file.tree):
        notes: list[ast.expr | None] = []
        if isinstance(node, ast.arg):
            notes = [node.annotation]
        elif isinstance(node, Function):
            notes = [node.returns]
        elif isinstance(node, ast.AnnAssign):
            notes = [node.annotation]
        for note in notes:
            if note is not None:
                found |= {id(inner) for inner in ast.walk(note)}
    return found


def parameters(function: Function) -> set[str]:
    """The names that a function takes, without `*args` and `**kwargs`."""
    arguments = function.args
    return {a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}


def own_names(context: Context) -> set[str]:
    """Methods and attributes that classes of the folder give themselves: a cache of the folder's own may have them."""
    found: set[str] = set()
    for klass in context.code.classes:
        if context.code.is_module(klass):
            continue
        found |= {method.name for method in klass.methods()}
        found |= {
            node.attr
            for node in ast.walk(klass.node)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
    return found


def guarded_lines(context: Context) -> set[int]:
    """Lines that run under some releases only, by the code's own test."""
    nodes = bridged(context.file)
    return {node.lineno for node in ast.walk(context.file.tree) if id(node) in nodes and hasattr(node, "lineno")}


def called(function: Function) -> Iterator[str]:
    """The last name of everything that a function calls."""
    for call in calls(function):
        if isinstance(call.func, ast.Attribute):
            yield call.func.attr
        elif isinstance(call.func, ast.Name):
            yield call.func.id


def own_config(code: Code, klass: Klass) -> bool:
    """Whether a class is a config of the folder."""
    roots = {root.rpartition(".")[2] for root in code.roots(klass)}
    return any(root.endswith("Config") for root in roots) and not roots & {"GenerationConfig", "BitsAndBytesConfig"}

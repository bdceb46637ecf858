"""Decide from source code whether a module computes each token independently of the others.

Only then may padding be left out and tokens be packed into any rows.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import ast
import functools
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.activations import ACT2CLS

ACTIVATIONS = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()}
TOKENWISE = {nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity} | ACTIVATIONS
CONTAINERS = {nn.ModuleList, nn.ModuleDict, nn.ParameterDict, nn.ParameterList}
# libraries whose modules replace one `nn.Linear`, `nn.Embedding` or head: adapters, quantised matrices
ADAPTED = ("peft.", "torchao.", "torch.ao.", "bitsandbytes.", "optimum.", "hqq.")

# functions that a tokenwise `forward` may call; attention knows where sequences end
FUNCTIONS = {"apply_rotary", "norm_heads", "attention", "check_ids", "get_interface", "update", "zeros_like"}
FUNCTIONS |= {"own_layers", "in_one_call", "layer", "keep_last", "append", "tuple", "BaseModelOutput"}  # of a stack
FUNCTIONS |= {
    "gelu",
    "relu",
    "silu",
    "sigmoid",
    "tanh",
    "softplus",
    "dropout",
    "exp",
    "sqrt",
    "square",
    "abs",
    "clamp",
    "zip",
}
METHODS = {"view", "reshape", "to", "float", "flatten", "transpose"}
NODES = (ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AugAssign, ast.If, ast.IfExp, ast.Compare, ast.BoolOp)
NODES += (
    ast.GeneratorExp,
    ast.comprehension,
    ast.BinOp,
    ast.UnaryOp,
    ast.Tuple,
    ast.List,
    ast.For,
    ast.Dict,
    ast.Starred,
    ast.keyword,
    ast.Constant,
    ast.Name,
)
NODES += (ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)


# Digests (`digest`) of the stacks' methods as released. The source of any other method is analysed like a layer's.
STACKS = frozenset({"5b6b0b29903ccdab", "34e4b74cf3ee9181", "d81d31beb54f5407", "03359774a85a24c7"})


def stack_is_tokenwise(model: nn.Module, method: Callable) -> bool:
    """Whether neither `method`, which runs a model's layers, nor the methods it calls mix tokens outside the layers."""
    kind = _without_wrappers(type(model))
    functions = {"": inspect.unwrap(method)}
    functions |= {name: function for name in _self_calls(functions[""]) if (function := _own_method(kind, name))}
    return all(
        name not in vars(model) and (digest(function) in STACKS or calls_of_method(function, kind) is not None)
        for name, function in functions.items()
    )


@functools.cache
def digest(function: Callable) -> str:
    """The digest of a function's source, independent of indentation; empty if there is no source."""
    try:
        lines = inspect.getsource(function).splitlines()
    except (OSError, TypeError):
        return ""
    return hashlib.sha256("\n".join(filter(None, map(str.strip, lines))).encode()).hexdigest()[:16]


@functools.cache
def _self_calls(function: Callable) -> frozenset[str]:
    try:
        return frozenset(re.findall(r"\bself\.(\w+)\(", inspect.getsource(function)))
    except (OSError, TypeError):
        return frozenset()


def _own_method(kind: type, name: str) -> Any:
    """A method defined in a modeling file or a file of a subclass; None for modules, and methods of `base.py` or libraries."""
    function = getattr(kind, name, None)
    module = getattr(function, "__module__", None) or ""
    return None if module.endswith(".base") or module.startswith("transformers.") else function


def calls_are_unpatched(module: nn.Module, calls: frozenset[str]) -> bool:
    """Whether all `calls` (see `calls_of_class`) are own modules or methods of the class, not replaced on the instance."""
    own, kind = vars(module), type(module)
    return all(name in own["_modules"] or (name not in own and hasattr(kind, name)) for name in calls)


def calls_of_class(kind: type) -> frozenset[str] | None:
    """Names of the modules and methods of `self` that the `forward` of a class calls.

    None if `forward`, or one of these methods, may mix tokens. Only results of reading sources are cached, as methods
    of a class can be replaced at any time.
    """
    kind = _without_wrappers(kind)
    if _is_known(kind):
        return frozenset()
    forward: Any = getattr(kind, "forward")  # noqa: B009  unknown to mypy
    if forward is nn.Module.forward:  # a container, never called itself
        return frozenset()
    return calls_of_method(forward, kind)


@functools.cache
def _without_wrappers(kind: type) -> type:
    """The original class, if FSDP has derived its own class from it."""
    return next(base for base in kind.__mro__ if not base.__module__.startswith("torch.distributed."))


@functools.cache
def _is_known(kind: type) -> bool:
    known = is_tokenwise(kind) or kind in CONTAINERS
    return known or issubclass(kind, nn.Identity) or kind.__module__.startswith(ADAPTED)


def is_tokenwise(kind: type) -> bool:
    """Whether a class is a layer of torch, or of int8_layers.py, that computes each token by itself."""
    return kind in TOKENWISE or "is_tokenwise" in vars(kind)


def calls_of_method(method: Callable, kind: type) -> frozenset[str] | None:
    """Like `calls_of_class`, for a method of class `kind`: None if its source could mix tokens, or is not available.

    Indexing, sums and matrix products of two tensors could. So could calls, except calls of modules, of `FUNCTIONS`, and
    of methods that are analysed in turn.
    """
    found: set[str] = set()
    functions: list[Any] = [method]
    while functions:
        calls = _calls_in_source(functions.pop())
        if calls is None:
            return None
        called = (getattr(kind, name, None) for name in calls - found)
        functions += [function for function in called if function is not None]  # otherwise it is a module
        found |= calls
    return frozenset(found)


@functools.cache
def _calls_in_source(function: Any) -> frozenset[str] | None:
    """Names of the modules and methods of `self` that `function` calls; None if anything else in it could mix tokens."""
    if not inspect.isfunction(function):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    (definition,) = tree.body
    if not isinstance(definition, ast.FunctionDef) or not all(map(_is_allowed, definition.body)):
        return None
    calls = (node.func for node in ast.walk(definition) if isinstance(node, ast.Call))
    return frozenset(call.attr for call in calls if isinstance(call, ast.Attribute) and _is_self(call.value))


def _is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):  # a docstring, or a check
        return _is_allowed(node.value)
    if isinstance(node, ast.Subscript):  # only of a shape
        return isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
    if isinstance(node, ast.Attribute):
        return node.attr not in ("T", "mT", "H", "mH") and _is_allowed(node.value)
    if isinstance(node, ast.Call):
        parts = [*node.args, *node.keywords]
        return _is_allowed_call(node) and all(_is_allowed(part) for part in parts)
    if isinstance(node, ast.Assign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if not all(isinstance(target, ast.Name | ast.Tuple) for target in targets):  # visible from outside
            return False
    if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
        return False
    return isinstance(node, NODES) and all(_is_allowed(child) for child in ast.iter_child_nodes(node))


def _is_allowed_call(node: ast.Call) -> bool:
    function = node.func
    if isinstance(function, ast.Name):
        over_layers = function.id == "sum" and isinstance(node.args[0], ast.GeneratorExp)
        return over_layers or function.id in FUNCTIONS
    if not isinstance(function, ast.Attribute):
        return False
    if _is_self(function.value):  # a module, or a method that is analysed in turn
        return True
    if isinstance(function.value, ast.Attribute) and _is_self(function.value.value):
        return True  # a method of a parameter, which has no tokens, or of a module
    if function.attr == "transpose":  # exchanges heads and tokens for attention
        return [getattr(argument, "value", None) for argument in node.args] == [1, 2]
    return function.attr in FUNCTIONS or (function.attr in METHODS and _is_allowed(function.value))


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"

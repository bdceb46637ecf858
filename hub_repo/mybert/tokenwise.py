"""Whether a module computes each token by itself, so that tokens may be laid out in any rows. Read from its source.

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
# libraries whose modules stand for one `nn.Linear`, `nn.Embedding` or head: adapters, quantised matrices
ADAPTED = ("peft.", "torchao.", "torch.ao.", "bitsandbytes.", "optimum.", "hqq.")

# what a `forward` may call beside modules; attention is told where sequences end
FUNCTIONS = {"apply_rotary", "norm_heads", "attention", "check_ids", "get_interface", "update", "zeros_like"}
FUNCTIONS |= {"own_layers", "layer", "keep_last", "append", "tuple", "BaseModelOutput"}  # of a stack of layers
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


# Digests (`digest`) of the stacks' methods in the modeling files beside this one. An edited method is read like a layer's.
STACKS = frozenset({"4f37362ed551080d", "b684deaf0cfc7089", "1f2c97db977151b6", "b855d3632c71ab41"})


def stack_keeps_tokens_apart(model: nn.Module, method: Callable) -> bool:
    """Whether `method`, which runs a model's layers, and the methods it calls mix no tokens outside of the layers."""
    kind = _without_wrappers(type(model))
    functions = {"": inspect.unwrap(method)}
    functions |= {name: function for name in _self_calls(functions[""]) if (function := _own_method(kind, name))}
    return all(
        name not in vars(model) and (digest(function) in STACKS or calls_of_method(function, kind) is not None)
        for name, function in functions.items()
    )


@functools.cache
def digest(function: Callable) -> str:
    """Of a function's source, whatever its indentation; empty if it has none."""
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
    """A method that the modeling file has, or a file of a subclass; None for modules, and what `base.py` and the libraries give."""
    function = getattr(kind, name, None)
    module = getattr(function, "__module__", None) or ""
    return None if module.endswith(".base") or module.startswith("transformers.") else function


def treats_tokens_alone(module: nn.Module, calls: frozenset[str]) -> bool:
    """Whether all that it calls (`calls_of_class`) are its own modules and methods of its class, and none is patched."""
    own, kind = vars(module), type(module)
    return all(name in own["_modules"] or (name not in own and hasattr(kind, name)) for name in calls)


def calls_of_class(kind: type) -> frozenset[str] | None:
    """What the `forward` of a class calls of `self`, modules and methods, by name.

    None if `forward`, or one of these methods, is not known to give each token the same, whatever stands beside it.
    Only what is read from sources is cached: a class may be given another method at any time.
    """
    kind = _without_wrappers(kind)
    if _is_known(kind):
        return frozenset()
    forward: Any = getattr(kind, "forward")  # noqa: B009  unknown to mypy
    if forward is nn.Module.forward:  # a container, which is not called
        return frozenset()
    return calls_of_method(forward, kind)


@functools.cache
def _without_wrappers(kind: type) -> type:
    """The class itself, where FSDP has made one of its own from each that it shards."""
    return next(base for base in kind.__mro__ if not base.__module__.startswith("torch.distributed."))


@functools.cache
def _is_known(kind: type) -> bool:
    return kind in TOKENWISE | CONTAINERS or issubclass(kind, nn.Identity) or kind.__module__.startswith(ADAPTED)


def calls_of_method(method: Callable, kind: type) -> frozenset[str] | None:
    """The same for a method of class `kind`: None if anything in its source could mix tokens, or if it has none.

    Such are indices, sums, products of two tensors' matrices, and calls of anything but modules, methods that could not
    either, and `FUNCTIONS`.
    """
    found: set[str] = set()
    functions: list[Any] = [method]
    while functions:
        calls = _calls_in_source(functions.pop())
        if calls is None:
            return None
        called = (getattr(kind, name, None) for name in calls - found)
        functions += [function for function in called if function is not None]  # else it is a module
        found |= calls
    return frozenset(found)


@functools.cache
def _calls_in_source(function: Any) -> frozenset[str] | None:
    """What `function` calls of `self`, modules and methods, by name; None if anything else in its source could mix tokens."""
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
    if isinstance(node, ast.Subscript):  # of a shape only
        return isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
    if isinstance(node, ast.Attribute):
        return node.attr not in ("T", "mT", "H", "mH") and _is_allowed(node.value)
    if isinstance(node, ast.Call):
        parts = [*node.args, *node.keywords]
        return _may_call(node) and all(_is_allowed(part) for part in parts)
    if isinstance(node, ast.Assign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if not all(isinstance(target, ast.Name | ast.Tuple) for target in targets):  # would be seen from outside
            return False
    if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
        return False
    return isinstance(node, NODES) and all(_is_allowed(child) for child in ast.iter_child_nodes(node))


def _may_call(node: ast.Call) -> bool:
    function = node.func
    if isinstance(function, ast.Name):
        over_layers = function.id == "sum" and isinstance(node.args[0], ast.GeneratorExp)
        return over_layers or function.id in FUNCTIONS
    if not isinstance(function, ast.Attribute):
        return False
    if _is_self(function.value):  # a module, or a method, which is looked at by itself
        return True
    if isinstance(function.value, ast.Attribute) and _is_self(function.value.value):
        return True  # of a parameter, which has no tokens, or of a module
    if function.attr == "transpose":  # heads and tokens, for attention
        return [getattr(argument, "value", None) for argument in node.args] == [1, 2]
    return function.attr in FUNCTIONS or (function.attr in METHODS and _is_allowed(function.value))


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"

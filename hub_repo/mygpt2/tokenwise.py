"""Whether a module computes each token by itself, so that tokens may be laid out in any rows. Read from its source.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import ast
import functools
import inspect
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


def treats_tokens_alone(module: nn.Module) -> bool:
    """Whether this module's own `forward` is known to give each token the same, whatever stands beside it."""
    # FSDP makes a class of its own from each it shards
    kind = next(base for base in type(module).__mro__ if not base.__module__.startswith("torch.distributed."))
    if (
        kind in TOKENWISE
        or kind in CONTAINERS
        or isinstance(module, nn.Identity)
        or kind.__module__.startswith(ADAPTED)
    ):
        return True
    forward: Any = getattr(kind, "forward")  # noqa: B009  unknown to mypy
    if forward is nn.Module.forward:  # a container, which is not called
        return True
    return is_tokenwise(forward, kind)


@functools.cache
def is_tokenwise(forward: Callable, kind: type) -> bool:
    """Whether nothing in the source of `forward`, of class `kind`, could mix tokens: no indices, no sums, no products of
    two tensors' matrices, no calls but of modules and of `FUNCTIONS`. Without source: no.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return False
    (function,) = tree.body
    if not isinstance(function, ast.FunctionDef):
        return False
    return all(_is_allowed(statement, kind) for statement in function.body)


def _is_allowed(node: ast.AST, kind: type) -> bool:
    if isinstance(node, ast.Expr):  # a docstring, or a check
        return _is_allowed(node.value, kind)
    if isinstance(node, ast.Subscript):  # of a shape only
        return isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
    if isinstance(node, ast.Attribute):
        return node.attr not in ("T", "mT", "H", "mH") and _is_allowed(node.value, kind)
    if isinstance(node, ast.Call):
        parts = [*node.args, *node.keywords]
        return _may_call(node, kind) and all(_is_allowed(part, kind) for part in parts)
    if isinstance(node, ast.Assign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if not all(isinstance(target, ast.Name | ast.Tuple) for target in targets):  # would be seen from outside
            return False
    if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
        return False
    return isinstance(node, NODES) and all(_is_allowed(child, kind) for child in ast.iter_child_nodes(node))


def _may_call(node: ast.Call, kind: type) -> bool:
    function = node.func
    if isinstance(function, ast.Name):
        over_layers = function.id == "sum" and isinstance(node.args[0], ast.GeneratorExp)
        return over_layers or function.id in FUNCTIONS
    if not isinstance(function, ast.Attribute):
        return False
    if isinstance(function.value, ast.Name) and function.value.id == "self":  # a module, or a method
        method = next((vars(base)[function.attr] for base in kind.__mro__ if function.attr in vars(base)), None)
        return method is None or (inspect.isfunction(method) and is_tokenwise(method, kind))
    if isinstance(function.value, ast.Attribute) and getattr(function.value.value, "id", None) == "self":
        return True  # of a parameter, which has no tokens, or of a module
    if function.attr == "transpose":  # heads and tokens, for attention
        return [getattr(argument, "value", None) for argument in node.args] == [1, 2]
    return function.attr in FUNCTIONS or (function.attr in METHODS and _is_allowed(function.value, kind))

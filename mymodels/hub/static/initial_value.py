"""What a constructor gives a parameter, as one call of `nn.init` for `_init_weights`."""

import ast
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .code_tree import constant
from .constructor import CONFIG, Made, Scope

# method of a tensor → function of nn.init, and what its keywords become
IN_PLACE = {"normal_": "normal_", "uniform_": "uniform_", "zero_": "zeros_", "fill_": "constant_"}
KEYWORDS = {"uniform_": {"from": "a", "to": "b"}, "fill_": {"value": "val"}}
_INIT = {
    *("uniform_", "normal_", "constant_", "ones_", "zeros_", "eye_", "dirac_", "xavier_uniform_", "xavier_normal_"),
    *("kaiming_uniform_", "kaiming_normal_", "trunc_normal_", "orthogonal_"),
}
_PLAIN = {
    **dict.fromkeys(["zeros", "zeros_like"], "zeros_"),
    **dict.fromkeys(["ones", "ones_like"], "ones_"),
    **dict.fromkeys(["randn", "randn_like"], "normal_"),
    **dict.fromkeys(["rand", "rand_like"], "uniform_"),
    "eye": "eye_",
}
_SAME_VALUES = {
    *("to", "view", "reshape", "unsqueeze", "squeeze", "expand", "repeat", "clone", "contiguous", "detach", "float"),
    *("double", "half", "bfloat16", "requires_grad_", "flatten", "cpu", "cuda", "type"),
}
_NUMBERS: dict[str, Callable[[float], float | int]] = {
    "sqrt": math.sqrt,
    "log": math.log,
    "exp": math.exp,
    "log2": math.log2,
    "float": float,
    "int": int,
}


class _Init(NamedTuple):
    function: str
    args: list[ast.keyword]  # those without a name come first


def init_call(made: Sequence[Sequence[Made]], name: str, module: str = "module", model: str = "self") -> str | None:
    """The call that gives a parameter what its constructor does, as source; None if there is no such call.

    Args:
        made: for each place of the class, what the constructor sets the parameter to there, and writes into it.
        name: the parameter.
        module: how the module is called where the call is put.
        model: how the model is called there, whose config the constructors of its parts were given.
    """
    found = {_at(one, name, module, model) for one in made}
    return found.pop() if len(found) == 1 else None


def _at(made: Sequence[Made], name: str, module: str, model: str) -> str | None:
    """The call for one place."""
    writes = [one for one in made if one.written]
    if any(name not in ast.unparse(test) for one in writes for test, _ in one.tests) or len(writes) > 1:
        return None  # it may be written, or in several steps
    texts = set()
    for one in writes or made:
        init = _written(one) if writes else _made(one.value, one.scope)  # type: ignore[arg-type]
        if init is None:
            return None
        texts.add(_text(init, one.scope, f"{module}.{name}", module, model))
    return texts.pop() if len(texts) == 1 else None


def _text(init: _Init, scope: Scope, tensor: str, module: str, model: str) -> str | None:
    shown = [tensor]
    for argument in init.args:
        text = _Shown(scope, module, model).text(argument.value)
        if text is None:
            return None
        shown.append(f"{argument.arg}={text}" if argument.arg else text)
    return f"nn.init.{init.function}({', '.join(shown)})"


def _written(made: Made) -> _Init | None:
    """A call that writes a parameter: `nn.init.normal_(self.x, std=0.02)` or `self.x.data.normal_(0, 0.02)`."""
    call, scope = made.value, made.scope
    if not isinstance(call, ast.Call):
        return None
    module, _, function = scope.owner.file.dotted(call.func).rpartition(".")
    positional = [ast.keyword(None, argument) for argument in call.args]
    if module.startswith(("torch.nn.init", "timm.")):
        return _Init(function, [*positional[1:], *call.keywords]) if function in _INIT else None
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if method not in IN_PLACE:
        return None
    names = KEYWORDS.get(method, {})
    renamed = [ast.keyword(names.get(str(k.arg), k.arg), k.value) for k in call.keywords]
    return _Init(IN_PLACE[method], [*positional, *renamed])


def _made(value: ast.expr, scope: Scope) -> _Init | None:
    """What `nn.Parameter(…)` holds, or a tensor in it."""
    if isinstance(value, ast.Name):
        value = scope.resolve(value)
    if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub):
        return _scaled(_made(value.operand, scope), ast.Constant(-1.0), ast.Mult())
    if isinstance(value, ast.BinOp) and isinstance(value.op, (ast.Mult, ast.Div)):
        left = _made(value.left, scope)
        if left is not None or isinstance(value.op, ast.Div):
            return _scaled(left, value.right, value.op)
        return _scaled(_made(value.right, scope), value.left, value.op)
    if not isinstance(value, ast.Call):
        return None
    module, _, function = scope.owner.file.dotted(value.func).rpartition(".")
    arguments = {k.arg: k.value for k in value.keywords}
    if module.startswith("torch.nn") and function == "Parameter":
        held = value.args[0] if value.args else arguments.get("data")
        return _made(held, scope) if held is not None else None
    if module == "torch.nn.init" and function in _INIT:
        return _Init(function, [*(ast.keyword(None, one) for one in value.args[1:]), *value.keywords])
    if module == "torch":
        return _of_torch(function, value, arguments)
    if isinstance(value.func, ast.Attribute):
        if value.func.attr in _SAME_VALUES:
            return _made(value.func.value, scope)
        return _written(Made(scope, "", value, value)) if value.func.attr in IN_PLACE else None
    return None


def _of_torch(function: str, call: ast.Call, arguments: dict[Any, ast.expr]) -> _Init | None:
    if function in _PLAIN:
        return _Init(_PLAIN[function], [])
    if function in ("full", "full_like"):
        fill = call.args[1] if len(call.args) > 1 else arguments.get("fill_value")
        return _Init("constant_", [ast.keyword(None, fill)]) if fill is not None else None
    if function == "normal" and len(call.args) + ("size" in arguments) == 3:
        return _Init("normal_", [ast.keyword(None, one) for one in call.args[:2]])
    listed = function in ("Tensor", "FloatTensor")  # of numbers, these are sizes
    if (function in ("tensor", "as_tensor", "scalar_tensor") or listed) and call.args:
        numbers = _flat(call.args[0])
        if len({ast.dump(one) for one in numbers}) == 1 and not (listed and numbers[0] is call.args[0]):
            return _Init("constant_", [ast.keyword(None, numbers[0])])
    return None


def _flat(value: ast.expr) -> list[ast.expr]:
    """The numbers of a nested list."""
    if isinstance(value, (ast.List, ast.Tuple)):
        return [number for one in value.elts for number in _flat(one)]
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult) and isinstance(value.left, ast.List):
        return _flat(value.left)  # [0.1] * n
    return [value]


def _scaled(init: _Init | None, scale: ast.expr, op: ast.operator) -> _Init | None:
    if init is None or init.function == "zeros_":
        return init
    inverse = scale if isinstance(op, ast.Mult) else ast.BinOp(ast.Constant(1.0), op, scale)
    if init.function == "ones_":
        return _Init("constant_", [ast.keyword(None, inverse)])
    if init.function == "constant_" and init.args:
        return _Init("constant_", [ast.keyword(None, ast.BinOp(init.args[0].value, op, scale))])
    if init.function == "normal_" and not init.args and _sign(scale) >= 0:
        return _Init("normal_", [ast.keyword("std", inverse)])
    if init.function == "uniform_" and not init.args and _sign(scale) > 0:
        return _Init("uniform_", [ast.keyword("b", inverse)])
    return None


def _sign(scale: ast.expr) -> int:
    """1 or -1 for a number, 0 where it is not known."""
    number = _number(scale)
    return 0 if number is None else 1 if number > 0 else -1


def _number(node: ast.AST) -> float | int | None:
    """The value of an expression of numbers."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, (int, float)) and not isinstance(node.value, bool) else None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _number(node.operand)
        return None if value is None else -value
    try:
        if isinstance(node, ast.BinOp):
            left, right = _number(node.left), _number(node.right)
            if left is None or right is None:
                return None
            if isinstance(node.op, (ast.Add, ast.Sub)):
                return left + right if isinstance(node.op, ast.Add) else left - right
            if isinstance(node.op, (ast.Mult, ast.Div)):
                return left * right if isinstance(node.op, ast.Mult) else left / right
            return float(left) ** float(right) if isinstance(node.op, ast.Pow) else None
        if isinstance(node, ast.Call) and len(node.args) == 1:
            value = _number(node.args[0])
            function = _NUMBERS.get(
                ast.unparse(node.func).removeprefix("math.").removeprefix("np.").removeprefix("numpy.")
            )
            return function(value) if function is not None and value is not None else None
    except (ArithmeticError, ValueError, TypeError):
        return None
    return {"math.pi": math.pi, "np.pi": math.pi}.get(ast.unparse(node)) if isinstance(node, ast.Attribute) else None


class _Shown(ast.NodeTransformer):
    """An expression of a constructor, as it is written in `_init_weights`."""

    def __init__(self, scope: Scope, module: str, model: str):
        self.scope, self.module, self.model, self.known = scope, module, model, True

    def text(self, value: ast.expr) -> str | None:
        shown = self.visit(self.scope.resolve(value))
        return ast.unparse(shown) if self.known else None

    def generic_visit(self, node: ast.AST) -> ast.AST:
        kinds = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop, ast.expr_context)
        self.known = self.known and isinstance(node, kinds)
        return super().generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        number, called = _number(node), ast.unparse(node.func)
        if number is not None:
            return ast.Constant(number)
        if called in ("math.sqrt", "np.sqrt", "numpy.sqrt") and len(node.args) == 1:
            return ast.BinOp(self.visit(node.args[0]), ast.Pow(), ast.Constant(0.5))
        if called == "getattr" and len(node.args) == 3 and isinstance(constant(node.args[1]), str):
            return ast.Call(node.func, [self.visit(node.args[0]), node.args[1], self.visit(node.args[2])], [])
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        self.known = self.known and node.id == CONFIG
        return ast.Attribute(ast.Name(self.model, ast.Load()), "config", ast.Load())

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        number = _number(node)
        if number is not None:
            return ast.Constant(number)
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            self.known = self.known and node.attr in self.scope.plain
            return ast.Attribute(ast.Name(self.module, ast.Load()), node.attr, ast.Load())
        of = node.value
        while isinstance(of, ast.Attribute):
            of = of.value
        self.known = self.known and isinstance(of, ast.Name) and of.id in (CONFIG, "self")
        return ast.Attribute(self.visit(node.value), node.attr, ast.Load())


def value_of(made: Sequence[Sequence[Made]]) -> str:
    """What the constructor sets a parameter to, as it is written there, for a report."""
    values = [ast.unparse(one.value) for place in made for one in place if one.value is not None and not one.written]
    return min(values, key=len, default="")

"""What the constructor of a module sets on `self`, and what its arguments and names stand for."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from .code_tree import Code, Klass, calls, constant, is_self
from .torch_norms import torch_norm
from .walking import walk

CONFIG = "<config>"  # the name that stands for the config of the model that a module is in
MAX_NODES = 30  # of an expression that is put in for a name
_MAX_LENGTH = 300  # nodes of one that names are put into
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Tests = tuple[tuple[ast.expr, bool], ...]
_REGISTERS = ("register_parameter", "add_module", "register_module")
_ADDERS = ("append", "extend", "insert", "add_module", "register_module")
_KNOWN = {CONFIG, "math", "np", "numpy", "torch", "getattr", "hasattr", "int", "float", "len", "max", "min", "bool"}


@dataclass
class Scope:
    """What the names in a constructor stand for.

    Attributes:
        owner: the class that has the constructor, or another method that it runs.
        given: its arguments, in terms of the config of the model around it; those that are not known are left out.
        local: local names that are set once.
        attributes: what `self` was given so far.
        plain: the attributes of `self` that hold settings, not tensors and modules.
        is_model: whether `self.config` is the config of the model.
    """

    owner: Klass
    given: dict[str, ast.expr]
    local: dict[str, ast.expr]
    attributes: dict[str, ast.expr]
    plain: set[str]
    is_model: bool

    def resolve(self, value: ast.expr, *, attributes: bool = False) -> ast.expr:
        """An expression with what its names stand for, with `attributes` those of `self` too; `?` for a very long one."""
        if len(walk(value)) > _MAX_LENGTH:
            return ast.Name("?", ast.Load())
        return _Resolve(self, attributes).visit(_copy(value))


def _copy(node: Any) -> Any:
    """A tree of its own, without what `walk` keeps on the nodes."""
    if isinstance(node, list):
        return [_copy(one) for one in node]
    if not isinstance(node, ast.AST):
        return node
    return type(node)(**{name: _copy(value) for name, value in ast.iter_fields(node)})


class _Resolve(ast.NodeTransformer):
    def __init__(self, scope: Scope, attributes: bool, depth: int = 0):
        self.scope, self.attributes, self.depth = scope, attributes, depth

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.scope.given:
            return _copy(self.scope.given[node.id])
        value = self.scope.local.get(node.id)
        if value is None or self.depth >= 3 or len(walk(value)) > MAX_NODES:
            return node
        return _Resolve(self.scope, self.attributes, self.depth + 1).visit(_copy(value))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if self.scope.is_model and is_self(node, "config"):
            return ast.Name(CONFIG, ast.Load())
        if self.attributes and is_self(node) and node.attr in self.scope.attributes:
            return _copy(self.scope.attributes[node.attr])
        return self.generic_visit(node)


class Made(NamedTuple):
    """What a constructor sets on `self`, or writes into what it has set.

    Attributes:
        scope: what names in `value` stand for; its `owner` is the class that sets it.
        name: the attribute; "" where that is not known, "*" for a write into what may be any of them.
        value: what it is set to; of a write the call, or None for another kind of write.
        node: where.
        tests: the conditions that it depends on, with the outcome that it needs; at a place, those that are not known.
        conditional: whether there are such conditions, known or not.
        written: whether it is a write into a tensor, such as `nn.init.ones_(self.weight)`.
        listed: whether `value` is appended to the attribute.
    """

    scope: Scope
    name: str
    value: ast.expr | None
    node: ast.AST
    tests: _Tests = ()
    conditional: bool = False
    written: bool = False
    listed: bool = False


def defaults_of(function: _Function) -> dict[str, ast.expr]:
    own = function.args
    pairs = [
        *zip(reversed([*own.posonlyargs, *own.args]), reversed(own.defaults)),
        *zip(own.kwonlyargs, own.kw_defaults),
    ]
    return {argument.arg: value for argument, value in pairs if value is not None and _is_known(value)}


def _is_known(value: ast.expr) -> bool:
    """Whether an expression is in terms of the model's config and of constants alone, and short."""
    nodes = walk(value)
    return len(nodes) <= MAX_NODES and all(n.id in _KNOWN for n in nodes if isinstance(n, ast.Name))


def given_by(function: _Function, call: ast.Call, scope: Scope, skip: int = 0) -> dict[str, ast.expr]:
    """The arguments of a function, without `self`, that a call gives it."""
    names = [argument.arg for argument in [*function.args.posonlyargs, *function.args.args]][1:]
    passed: dict[str, ast.expr] = {}
    for name, value in zip(names, call.args[skip:]):
        if isinstance(value, ast.Starred):
            return {}
        passed[name] = value
    passed |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    opened = any(keyword.arg is None for keyword in call.keywords)
    given = {} if opened else defaults_of(function)
    for name, value in passed.items():
        given.pop(name, None)
        if len(walk(value)) <= MAX_NODES and _is_known(resolved := scope.resolve(value, attributes=True)):
            given[name] = resolved
    return given


def constructor_of(code: Code, klass: Klass) -> tuple[Klass, _Function] | None:
    """The constructor of a class, and the class that has it; that of a norm of torch too."""
    return code.method(klass, "__init__") or _of_torch(code, klass)


def _of_torch(code: Code, klass: Klass) -> tuple[Klass, _Function] | None:
    for root in sorted(code.roots(klass)):
        if (norm := torch_norm(klass.file, root)) is not None:
            return code.method(norm, "__init__")
    return None


def constructed(code: Code, klass: Klass, given: dict[str, ast.expr]) -> Iterator[Made]:
    """What the constructor of a class sets, those of its ancestors and the methods that they run included."""
    attributes: dict[str, ast.expr] = {}
    plain: set[str] = set()
    found = constructor_of(code, klass)
    waiting = [(*found, given)] if found is not None else []
    seen: set[int] = set()
    while waiting:
        owner, function, given = waiting.pop(0)
        if id(function) in seen:
            continue
        seen.add(id(function))
        scope = Scope(owner, given, _local(function), attributes, plain, code.is_model(klass))
        for step, tests in _steps(function.body):
            for made in _set_by(scope, step, tests):
                if made.name and made.value is not None and not made.written and not made.listed:
                    value = (
                        scope.resolve(made.value, attributes=True) if len(walk(made.value)) <= MAX_NODES else made.value
                    )
                    known = made.name not in attributes and not made.tests and _is_known(value)
                    attributes[made.name] = value if known else ast.Name("?", ast.Load())
                    plain |= set() if any(calls(made.value)) else {made.name}
                yield made
            for call in calls(step):
                waiting += _run_next(code, klass, scope, call)


def _run_next(
    code: Code, klass: Klass, scope: Scope, call: ast.Call
) -> Iterator[tuple[Klass, _Function, dict[str, ast.expr]]]:
    """The method of the same object that a call runs: `self.method(…)`, `super().__init__(…)`, `Base.__init__(self, …)`."""
    func = call.func
    if not isinstance(func, ast.Attribute):
        return
    if is_self(func):
        found = code.method(klass, func.attr)
        if found is not None:
            yield *found, given_by(found[1], call, scope)
    elif func.attr == "__init__":
        lineage = code.lineage(klass)
        by_super = isinstance(func.value, ast.Call)
        base = None if by_super else code.find(scope.owner.file, scope.owner.file.dotted(func.value))
        after = next((i for i, one in enumerate(lineage) if one.node is scope.owner.node), -1) + 1
        for one in lineage[after:] if by_super else [base] if base is not None else []:
            if (init := one.method("__init__")) is not None:
                yield one, init, given_by(init, call, scope, 0 if by_super else 1)
                return
        if by_super and (found := _of_torch(code, klass)) is not None:
            yield *found, given_by(found[1], call, scope)


def _local(function: _Function) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    twice = {argument.arg for argument in [*function.args.args, *function.args.kwonlyargs]}
    for node in walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            twice |= {node.id} & found.keys()
            found.setdefault(node.id, ast.Name("?", ast.Load()))
    for node in walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    return {name: value for name, value in found.items() if name not in twice}


def _steps(body: Iterable[ast.stmt], tests: _Tests = ()) -> Iterator[tuple[ast.stmt, _Tests]]:
    """The statements of a body that hold no others, with the conditions that they depend on."""
    for step in body:
        own = tests
        while isinstance(step, ast.If):
            yield from _steps(step.body, (*own, (step.test, True)))
            own = (*own, (step.test, False))
            if len(step.orelse) != 1 or len(own) > 50:
                break
            step = step.orelse[0]
        if isinstance(step, ast.If):
            yield from _steps(step.orelse, own)
        elif not isinstance(step, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = [getattr(step, name, []) for name in ("body", "orelse", "finalbody")]
            inner += [part.body for name in ("handlers", "cases") for part in getattr(step, name, [])]
            if not any(inner):
                yield step, own
            for steps in inner:
                yield from _steps(steps, own)


def _set_by(scope: Scope, step: ast.stmt, tests: _Tests) -> Iterator[Made]:
    """What one statement sets on `self`."""
    pairs: list[tuple[ast.expr, ast.expr]] = []
    if isinstance(step, (ast.AnnAssign, ast.AugAssign)) and step.value is not None:
        pairs.append((step.target, step.value))
    elif isinstance(step, ast.Assign):
        for goal in step.targets:
            goals = goal.elts if isinstance(goal, (ast.Tuple, ast.List)) else [goal]
            values = step.value.elts if isinstance(step.value, (ast.Tuple, ast.List)) and goals != [goal] else []
            pairs += zip(goals, values) if len(goals) == len(values) else [(one, step.value) for one in goals]
    for goal, value in pairs:
        written = _tensor_of_self(goal)
        if written and (not is_self(goal) or isinstance(step, ast.AugAssign)):
            yield Made(scope, written, None, step, tests, written=True)
        elif isinstance(goal, ast.Subscript) or isinstance(step, ast.AugAssign):
            yield Made(scope, "*", None, step, tests, written=_is_local(goal))
        for option, more in options(value):
            yield Made(scope, goal.attr if is_self(goal) else "", option, step, (*tests, *more))  # type: ignore[attr-defined]
    if isinstance(step, ast.Return) and step.value is not None:
        yield Made(scope, "", step.value, step, tests)
    if isinstance(step, ast.Expr) and isinstance(step.value, ast.Call):
        yield from _set_by_call(scope, step.value, step, tests)


def _set_by_call(scope: Scope, call: ast.Call, step: ast.stmt, tests: _Tests) -> Iterator[Made]:
    func, first = call.func, call.args[0] if call.args else None
    name = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
    if name == "setattr" and len(call.args) == 3 and isinstance(first, ast.Name) and first.id == "self":
        yield Made(scope, str(constant(call.args[1]) or ""), call.args[2], step, tests)
    elif is_self(func) and name in _REGISTERS and len(call.args) + len(call.keywords) > 1:
        by_name = {keyword.arg: keyword.value for keyword in call.keywords}
        label = constant(by_name.get("name", first))
        value = call.args[1] if len(call.args) > 1 else by_name.get("param", by_name.get("module"))
        for option, more in options(value) if value is not None else ():
            yield Made(scope, str(label or ""), option, step, (*tests, *more))
    elif name in _ADDERS and isinstance(func, ast.Attribute) and call.args:
        of = func.value.attr if is_self(func.value) else ""  # type: ignore[attr-defined]
        yield Made(scope, of, call.args[-1], step, tests, listed=True)
    elif name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
        on = func.value if isinstance(func, ast.Attribute) else None
        by_method = _tensor_of_self(on) if on is not None else ""
        argument = _tensor_of_self(first) if first is not None else ""
        if written := by_method or argument:
            tensor = ast.unparse(on if by_method and on is not None else call.args[0]).removesuffix(".data")
            yield Made(scope, written, call if tensor == f"self.{written}" else None, step, tests, written=True)
        elif _is_local(on) or _is_local(first):
            yield Made(scope, "*", None, step, tests, written=True)
    else:
        yield Made(scope, "", call, step, tests)


def _tensor_of_self(node: ast.expr | None) -> str:
    """`weight` of `self.weight`, `self.weight.data`, `self.weight[0]`; "" for anything else."""
    while isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr == "data"):
        node = node.value
    return node.attr if node is not None and is_self(node) else ""  # type: ignore[attr-defined]


def _is_local(node: ast.expr | None) -> bool:
    """Whether a tensor is reached by a local name: one that becomes a parameter, or that of a loop over parameters."""
    while isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr == "data"):
        node = node.value
    return isinstance(node, ast.Name)


def options(value: ast.expr) -> Iterator[tuple[ast.expr, _Tests]]:
    """What `a if test else b` can be, with the conditions."""
    if isinstance(value, ast.IfExp):
        yield from ((one, ((value.test, True), *more)) for one, more in options(value.body))
        yield from ((one, ((value.test, False), *more)) for one, more in options(value.orelse))
    else:
        yield value, ()

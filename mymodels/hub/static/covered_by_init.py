"""Whether an `_init_weights` fills a parameter: followed statement by statement, for the class that owns it."""

import ast
import re
from collections.abc import Iterable, Iterator

from .code_tree import Code, Klass, calls
from .walking import walk

_NORMS = ("LayerNorm", "RMSNorm")  # by these words in a class's name, transformers' own `_init_weights` finds norms
_STOCK = re.compile(r"torch\.nn\.(\w+\.)*(Linear|Conv\w+|Embedding|MultiheadAttention|GroupNorm|BatchNorm\dd)$")
_BARE = re.compile(r"(torch\.)?nn\.(modules\.module\.)?Module$|Module$")
_MAX_CALLS = 8


def initialises(code: Code, model: Klass, klass: Klass, name: str) -> bool:
    """Whether the `_init_weights` that transformers calls for a model fills the parameter `name` of a module in it.

    Args:
        model: the nearest model around the module, or the module itself.
        klass: the module's class.
    """
    found = code.method(model, "_init_weights")
    if found is None:
        return _by_transformers(code, klass, name)
    owner, method = found
    names = [argument.arg for argument in method.args.args]
    return len(names) < 2 or _Run(code, model, klass, name).covers(owner, method, names[1])


def _by_transformers(code: Code, klass: Klass, name: str) -> bool:
    if name not in ("weight", "bias"):
        return False
    return any(word in klass.name for word in _NORMS) or any(_STOCK.match(root) for root in code.roots(klass))


class _Run:
    """One `_init_weights`, as it runs for a module of one class."""

    def __init__(self, code: Code, model: Klass, klass: Klass, name: str):
        self.code, self.model, self.klass, self.name = code, model, klass, name
        self.seen: set[int] = set()

    def covers(self, owner: Klass, function: ast.FunctionDef | ast.AsyncFunctionDef, module: str) -> bool:
        """Whether a function fills the parameter.

        Args:
            owner: the class that has the function, or whose file has it.
            module: the argument that is the module.
        """
        if id(function) in self.seen or len(self.seen) > _MAX_CALLS:
            return False
        self.seen.add(id(function))
        return any(self._fills(owner, step, module) for step in self._reached(owner, function.body, module))

    def _reached(self, owner: Klass, body: Iterable[ast.stmt], module: str) -> Iterator[ast.stmt]:
        for step in body:
            while isinstance(step, ast.If):
                holds = self._holds(owner, step.test, module)
                if holds is not False:
                    yield from self._reached(owner, step.body, module)
                if holds is True:
                    if isinstance(step.body[-1], ast.Return):
                        return
                    break
                if len(step.orelse) != 1:
                    yield from self._reached(owner, step.orelse, module)
                    break
                step = step.orelse[0]
            if isinstance(step, (ast.With, ast.Try)):
                yield from self._reached(owner, step.body, module)
            elif isinstance(step, ast.Return):
                yield step
                return
            elif not isinstance(step, ast.If):
                yield step

    def _fills(self, owner: Klass, step: ast.stmt, module: str) -> bool:
        if isinstance(step, ast.For) and "parameters(" in ast.unparse(step.iter):
            tests = [node.test for node in walk(step) if isinstance(node, ast.If)]
            return all(self._may_be_named(test) for test in tests)
        family = {id(one.node) for one in self.code.lineage(self.model)}
        for node in walk(step):
            if isinstance(node, ast.Constant) and node.value == self.name:
                return True
            if isinstance(node, ast.Attribute) and node.attr == self.name and isinstance(node.value, ast.Name):
                own = node.value.id == "self" and id(self.klass.node) in family
                if own or node.value.id == module:
                    return True
        return any(self._fills_by(owner, call, module) for call in calls(step))

    def _may_be_named(self, test: ast.expr) -> bool:
        """Whether a test of a parameter's name in a loop may hold for the parameter."""
        if isinstance(test, ast.BoolOp):
            outcomes = [self._may_be_named(one) for one in test.values]
            return any(outcomes) if isinstance(test.op, ast.Or) else all(outcomes)
        for node in walk(test):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.In)):
                texts = [n.value for n in walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                equal = isinstance(node.ops[0], ast.Eq) or isinstance(
                    node.comparators[0], (ast.Tuple, ast.List, ast.Set)
                )
                if texts and not any(text == self.name if equal else text in self.name for text in texts):
                    return False
        return True

    def _fills_by(self, owner: Klass, call: ast.Call, module: str) -> bool:
        func = call.func
        place = next((i for i, a in enumerate(call.args) if isinstance(a, ast.Name) and a.id == module), None)
        if isinstance(func, ast.Attribute):
            of = ast.unparse(func.value)
            if of.startswith("super(") and func.attr == "_init_weights":
                return self._by_parent(owner)
            if of == module:
                found = self.code.method(self.klass, func.attr)
                if found is None:
                    stock = any(not _BARE.match(root) for root in self.code.roots(self.klass))
                    return stock and func.attr.endswith("reset_parameters") and self.name in ("weight", "bias")
                return self.covers(*found, "self")
            if place is None:
                return False
            found = self.code.method(self.model, func.attr) if of == "self" else None
            if found is None and (base := self.code.find(owner.file, owner.file.dotted(func.value))) is not None:
                found = self.code.method(base, func.attr)  # OtherModel._init_weights(self, module)
                place -= 1
            names = [argument.arg for argument in found[1].args.args] if found is not None else []
            return found is not None and place + 1 < len(names) and self.covers(*found, names[place + 1])
        if isinstance(func, ast.Name) and place is not None:
            for file in self.code.files.values():
                for step in file.tree.body:
                    if isinstance(step, ast.FunctionDef) and step.name == func.id and place < len(step.args.args):
                        return self.covers(Klass(file, owner.node), step, step.args.args[place].arg)
        return False

    def _by_parent(self, owner: Klass) -> bool:
        lineage = self.code.lineage(self.model)
        after = next((i for i, one in enumerate(lineage) if one.node is owner.node), -1) + 1
        for one in lineage[after:]:
            if (method := one.method("_init_weights")) is not None and len(method.args.args) > 1:
                return self.covers(one, method, method.args.args[1].arg)
        return _by_transformers(self.code, self.klass, self.name)

    def _holds(self, owner: Klass, test: ast.expr, module: str) -> bool | None:
        """Whether a test holds for a module of the class; None if that is not known."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            outcome = self._holds(owner, test.operand, module)
            return None if outcome is None else not outcome
        if isinstance(test, ast.BoolOp):
            outcomes = [self._holds(owner, one, module) for one in test.values]
            decides = isinstance(test.op, ast.Or)
            if decides in outcomes:
                return decides
            return None if None in outcomes else not decides
        if isinstance(test, ast.Call) and test.args and ast.unparse(test.args[0]) == module and len(test.args) > 1:
            asked = ast.unparse(test.func)
            if asked == "isinstance":
                return self._is_kind(owner, test.args[1])
            if asked == "hasattr" and isinstance(test.args[1], ast.Constant):
                return self._has(str(test.args[1].value))
        text = ast.unparse(test)
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            if text in (f"{module} is self", f"{module} == self"):
                return self.klass.node in [one.node for one in self.code.lineage(self.model)]
            if text.startswith((f"type({module}) is ", f"type({module}) == ")):
                return self._is_exactly(owner, test.comparators[0])
        names = (f"{module}.__class__.__name__", f"type({module}).__name__")
        return self._named(test) if any(name in text for name in names) else None

    def _is_kind(self, owner: Klass, kind: ast.expr) -> bool | None:
        if isinstance(kind, (ast.Tuple, ast.List)):
            outcomes = [self._is_kind(owner, one) for one in kind.elts]
            return True if True in outcomes else None if None in outcomes else False
        if isinstance(kind, ast.BinOp):
            return self._is_kind(owner, ast.Tuple([kind.left, kind.right]))
        dotted = owner.file.dotted(kind)
        found = self.code.find(owner.file, dotted)
        if found is not None:
            return any(one.node is found.node for one in self.code.lineage(self.klass))
        roots = self.code.roots(self.klass)
        last = dotted.rpartition(".")[2]
        if last == "Module" or last in {root.rpartition(".")[2] for root in roots}:
            return True
        if last.startswith("_"):
            return None  # a base of torch's, such as `_BatchNorm`
        if self.code.is_model(self.klass) and dotted.startswith("torch.nn."):
            return False  # a model is no layer of torch
        plain = all(_BARE.match(root) or root.startswith("torch.nn.") for root in roots)
        return False if plain and (dotted.startswith("torch.nn.") or (last[:1].isupper() and "." in dotted)) else None

    def _is_exactly(self, owner: Klass, kind: ast.expr) -> bool:
        found = self.code.find(owner.file, owner.file.dotted(kind))
        return found is not None and found.node is self.klass.node

    def _has(self, attribute: str) -> bool | None:
        if attribute == self.name:
            return True
        written = any(
            re.search(rf"\b{re.escape(attribute)}\b", ast.unparse(k.node)) for k in self.code.lineage(self.klass)
        )
        return None if written or not all(map(_BARE.match, self.code.roots(self.klass))) else False

    def _named(self, test: ast.expr) -> bool | None:
        """A test of the name of a module's class."""
        texts = [n.value for n in walk(test) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        if isinstance(test, ast.Compare) and texts:
            op, within = test.ops[0], isinstance(test.left, ast.Constant)
            if isinstance(op, ast.Eq):
                return self.klass.name in texts
            if isinstance(op, ast.In):
                return any(text in self.klass.name for text in texts) if within else self.klass.name in texts
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Attribute) and texts:
            ends = {"endswith": str.endswith, "startswith": str.startswith}.get(test.func.attr)
            return any(ends(self.klass.name, text) for text in texts) if ends else None
        return None

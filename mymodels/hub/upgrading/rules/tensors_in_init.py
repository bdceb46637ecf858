"""Tensors that a constructor makes and reads, or keeps as plain attributes: made on the CPU, where there is data."""

import ast
import re
from collections.abc import Iterator

import libcst as cst

from ...static.check_init import init_data
from ...static.code_tree import Klass, calls, is_self
from ..rule import Context, Rewriter, Rule, expression, rewrites, source_of

_NO_TENSORS = re.compile(
    r"(device|dtype|Size|Generator|finfo|iinfo|is_\w+|get_\w+|set_\w+|no_grad|compile|manual_seed|typename|numel|layout)$"
)
_LINSPACE = """
def linspace_here(*args, **kwargs):
    \"\"\"`torch.linspace` where the other tensors are: some releases make it on the CPU while they build without data.\"\"\"
    import torch

    return torch.linspace(*args, **kwargs).to(kwargs.get("device") or torch.empty(0).device)
"""
_ON_CPU = '''
def on_cpu(make):
    """A tensor with data: transformers 5 builds models without any (on "meta")."""
    import torch

    with torch.device("cpu"):
        return make()
'''


class _OnCpu(Rewriter):
    """Goes by the lines that the check "data in __init__" names."""

    def __init__(self, context: Context):
        super().__init__(context)
        places = [finding.where.rpartition(":") for finding in init_data(context.folder)]
        self.lines = {int(line) for name, _, line in places if name == context.file.name and line.isdigit()}
        self.lines |= _plain_tensors(context) | _read_later(context)
        self.methods = _methods_that_keep_tensors(context)
        self.mixed = _mixed_linspaces(context)

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        target = original_node.targets[0].target
        plain = isinstance(target, cst.Name) or (
            isinstance(target, cst.Attribute) and source_of(target.value) == "self"
        )
        if (
            plain
            and "on_cpu(" not in source_of(original_node.value)
            and self._is_named(original_node)
            and not _reads(original_node.value)
        ):
            return updated_node.with_changes(value=self._wrapped(original_node, updated_node.value))
        return updated_node

    def leave_Expr(self, original_node: cst.Expr, updated_node: cst.Expr) -> cst.Expr:
        if self.context.line(original_node) in self.methods and self.context.scope(original_node)[-1:] == ["__init__"]:
            return updated_node.with_changes(value=self._wrapped(original_node, updated_node.value))
        return updated_node

    def leave_CompFor(self, original_node: cst.CompFor, updated_node: cst.CompFor) -> cst.CompFor:
        whole = self.context.parent(original_node)
        if whole is not None and self._is_named(whole) and _reads(whole) and _makes(self.context, original_node.iter):
            return updated_node.with_changes(iter=self._wrapped(original_node, updated_node.iter))
        return updated_node

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        func = updated_node.func
        if (
            self.context.dotted(original_node.func) == "torch.linspace"
            and self.context.line(original_node) in self.mixed
        ):
            self.context.define("linspace_here", _LINSPACE)
            self.context.note(original_node, "linspace is made where the other tensors of the constructor are")
            return updated_node.with_changes(func=cst.Name("linspace_here"))
        if not isinstance(func, cst.Attribute) or func.attr.value not in ("item", "tolist", "numpy"):
            return updated_node
        if self._is_named(original_node) and _makes(self.context, original_node.func.value):  # type: ignore[attr-defined]
            return updated_node.with_changes(func=func.with_changes(value=self._wrapped(original_node, func.value)))
        return updated_node

    def _is_named(self, node: cst.CSTNode) -> bool:
        return self.context.line(node) in self.lines and self.context.scope(node)[-1:] == ["__init__"]

    def _wrapped(self, node: cst.CSTNode, value: cst.BaseExpression) -> cst.BaseExpression:
        self.context.define("on_cpu", _ON_CPU)
        self.context.note(node, "the tensor is made on the CPU, also where the loader builds without data")
        return cst.Call(cst.Name("on_cpu"), [cst.Arg(cst.Lambda(cst.Parameters(), value))])


def _plain_tensors(context: Context) -> set[int]:
    """The lines of this file where a constructor makes a tensor that it keeps as a plain attribute."""
    found: set[int] = set()
    for klass, init in _constructors(context):
        local = {
            goal.id: step
            for step in init.body
            if isinstance(step, ast.Assign)
            for goal in step.targets
            if isinstance(goal, ast.Name)
        }
        for step in ast.walk(init):
            if isinstance(step, (ast.ListComp, ast.GeneratorExp)) and _reads_values(step):
                names = [one.iter.id for one in step.generators if isinstance(one.iter, ast.Name)]
                found |= {
                    local[name].lineno for name in names if name in local and _is_tensor(klass, local[name].value)
                }
            if not isinstance(step, ast.Assign) or not any(is_self(goal) for goal in step.targets):
                continue
            if _is_tensor(klass, step.value):
                found.add(step.lineno)
            elif isinstance(step.value, ast.Name) and step.value.id in local:
                made = local[step.value.id]
                uses = [n for n in ast.walk(init) if isinstance(n, ast.Name) and n.id == step.value.id]
                if _is_tensor(klass, made.value) and len(uses) == 2:
                    found.add(made.lineno)
    return found


def _reads_values(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr in ("item", "tolist", "numpy") for n in ast.walk(node))


def _methods_that_keep_tensors(context: Context) -> set[int]:
    """The lines where a constructor calls a method of its own that keeps tensors as plain attributes."""
    found: set[int] = set()
    for klass, init in _constructors(context):
        if "register_buffer" in ast.unparse(klass.node):
            continue  # a buffer without data cannot be mixed with tensors that have some
        for step in init.body:
            call = step.value if isinstance(step, ast.Expr) else None
            if not isinstance(call, ast.Call) or not is_self(call.func):
                continue
            method = context.code.method(klass, call.func.attr)  # type: ignore[attr-defined]
            text = ast.unparse(method[1]) if method is not None else ""
            if re.search(r"\bself\.\w+ = ", text) and re.search(
                r"\btorch\.(arange|tensor|zeros|ones|Tensor|outer|full)\(", text
            ):
                found.add(step.lineno)
    return found


def _is_tensor(klass: Klass, node: ast.AST) -> bool:
    """Whether an expression is a tensor that functions of torch make."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        dotted = klass.file.dotted(node.func)
        if dotted.startswith("torch.") and dotted.count(".") == 1:
            return not _NO_TENSORS.match(node.func.attr)
        return node.func.attr not in ("item", "tolist", "numpy", "size", "dim") and _is_tensor(klass, node.func.value)
    if isinstance(node, ast.BinOp):
        return _is_tensor(klass, node.left) or _is_tensor(klass, node.right)
    if isinstance(node, (ast.UnaryOp, ast.Subscript)):
        return _is_tensor(klass, node.operand if isinstance(node, ast.UnaryOp) else node.value)
    return False


def _read_later(context: Context) -> set[int]:
    """Lines where a constructor makes a tensor under a local name that it reads further down (`scale.item()`)."""
    found: set[int] = set()
    for klass in context.code.classes:
        init = klass.method("__init__")
        if init is None or klass.file.name != context.file.name or not context.code.is_module(klass):
            continue
        read = {
            call.func.value.id
            for call in calls(init)
            if isinstance(call.func, ast.Attribute)
            and call.func.attr in ("item", "tolist")
            and isinstance(call.func.value, ast.Name)
        }
        for step in ast.walk(init):
            if not isinstance(step, ast.Assign) or "device=" in ast.unparse(step.value):
                continue
            names = {goal.id for goal in step.targets if isinstance(goal, ast.Name)}
            if names & read and any(klass.file.dotted(call.func).startswith("torch.") for call in calls(step.value)):
                found.add(step.lineno)
    return found


def _mixed_linspaces(context: Context) -> set[int]:
    """The lines with a linspace in constructors that make other tensors too and read none of them."""
    found: set[int] = set()
    for klass, init in _constructors(context):
        names = {klass.file.dotted(call.func) for call in calls(init)}
        others = {name for name in names if name.startswith("torch.") and name.count(".") == 1} - {"torch.linspace"}
        if others and not _reads_values(init):
            found |= {call.lineno for call in calls(init) if klass.file.dotted(call.func) == "torch.linspace"}
    return found


def _constructors(context: Context) -> Iterator[tuple[Klass, ast.FunctionDef]]:
    for klass in context.code.classes:
        init = klass.method("__init__")
        if klass.file.name == context.file.name and isinstance(init, ast.FunctionDef) and context.code.is_module(klass):
            yield klass, init


def _reads(node: cst.CSTNode) -> bool:
    tree = ast.parse(source_of(node).strip(), mode="exec") if not isinstance(node, cst.BaseExpression) else None
    tree = tree or ast.parse(f"({source_of(node)})")
    return any(isinstance(n, ast.Attribute) and n.attr in ("item", "tolist", "numpy") for n in ast.walk(tree))


def _makes(context: Context, node: cst.BaseExpression) -> bool:
    """Whether an expression calls a function of torch somewhere."""
    found = [n for n in ast.walk(ast.parse(f"({source_of(node)})")) if isinstance(n, ast.Call)]
    return any(context.dotted(expression(ast.unparse(call.func))).startswith("torch.") for call in found)


RULE = Rule(
    name="tensors in __init__",
    reason="transformers 5 builds models without data (on meta): .item() raises, and plain tensors stay without data",
    releases="5.0 and newer",
    before="""
        import torch
        from torch import nn
        from transformers import PreTrainedModel


        class ToyModel(PreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                rates = [x.item() for x in torch.linspace(0, config.drop_path, config.n_layer)]
                self.layers = nn.ModuleList([nn.Dropout(rate) for rate in rates])
                self.slopes = torch.arange(1, config.n_head + 1) / config.n_head
                self.post_init()
    """,
    after=f"""
        import torch
        from torch import nn
        from transformers import PreTrainedModel

        # --- transformers releases: what differs between them, and what newer ones no longer have ---
        # [on_cpu]
{"".join(f"        {line}" if line.strip() else line for line in _ON_CPU.strip(chr(10)).splitlines(keepends=True))}
        # --- end of transformers releases ---


        class ToyModel(PreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                rates = [x.item() for x in on_cpu(lambda: torch.linspace(0, config.drop_path, config.n_layer))]
                self.layers = nn.ModuleList([nn.Dropout(rate) for rate in rates])
                self.slopes = on_cpu(lambda: torch.arange(1, config.n_head + 1) / config.n_head)
                self.post_init()
    """,
    apply=rewrites(_OnCpu, ("torch",)),
    words=("torch",),
)

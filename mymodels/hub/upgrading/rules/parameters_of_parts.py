"""A block that reads a parameter of one of its parts: accelerate brings it in only while that part itself is called."""

import ast

import libcst as cst

from ...static.code_tree import Code, Klass, attributes, calls, depth, is_self
from ..embeddings import class_of_part, parts_of
from ..parts import named_classes, with_parts
from ..rule import Context, Rewriter, Rule, rewrites, source_of

_HELPER = '''
def parameter_of(module, name):
    """A parameter of another module: accelerate brings one that is on the disk in only while its module is called."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return getattr(module, name)
    hook.pre_forward(module)
    value = getattr(module, name)
    hook.post_forward(module, None)
    return value
'''
# what a parameter without data tells too
_KNOWN = {"dtype", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_floating_point", "device", "grad"}
_BOTH, _ONE = ("weight", "bias"), ("weight",)
_TORCH = {
    **dict.fromkeys(["Linear", "Bilinear", "Conv1d", "Conv2d", "Conv3d", "LayerNorm", "GroupNorm"], _BOTH),
    **dict.fromkeys(["Embedding", "RMSNorm"], _ONE),
}


def _block_classes(code: Code) -> set[int]:
    """The modules that lists of blocks are made of, with all that they are made of: what a device map splits off."""
    listed: list[Klass] = []
    for klass in code.classes:
        for call in calls(klass.node):
            adds = isinstance(call.func, ast.Attribute) and call.func.attr == "append"
            if adds or klass.file.dotted(call.func).rpartition(".")[2] == "ModuleList":
                listed += named_classes(code, klass, call)
    return {id(klass.node) for klass in with_parts(code, listed)}


def _is_parameter(code: Code, klass: Klass, names: list[str]) -> bool:
    """Whether `self.part.….name` is a parameter of a part of a module."""
    made = parts_of(code, klass).get(names[0])
    own = class_of_part(code, klass, made)
    if own is not None:
        return names[1] in _own_parameters(code, own) if len(names) == 2 else _is_parameter(code, own, names[1:])
    dotted = klass.file.dotted(made.func) if isinstance(made, ast.Call) else ""
    module, _, kind = dotted.rpartition(".")
    return len(names) == 2 and module == "torch.nn" and names[1] in _TORCH.get(kind, ())


def _own_parameters(code: Code, klass: Klass) -> set[str]:
    found: set[str] = set()
    for member in code.lineage(klass):
        init = member.method("__init__")
        for step in ast.walk(init) if init is not None else ():
            if isinstance(step, ast.Assign) and isinstance(step.value, ast.Call):
                if member.file.dotted(step.value.func).endswith(("nn.Parameter", "nn.parameter.Parameter")):
                    found |= {goal.attr for goal in step.targets if isinstance(goal, ast.Attribute) and is_self(goal)}
            elif isinstance(step, ast.Call) and is_self(step.func, "register_parameter") and step.args:
                found |= {step.args[0].value} if isinstance(step.args[0], ast.Constant) else set()  # type: ignore[arg-type]
    return found


def _running(code: Code, klass: Klass) -> set[str]:
    """The methods that `forward` runs."""
    found, waiting = set(), ["forward"]
    while waiting:
        name = waiting.pop()
        method = code.method(klass, name)
        if method is not None and name not in found:
            found.add(name)
            waiting += [one.attr for one in attributes(method[1]) if is_self(one)]
    return found


def _reads(context: Context) -> dict[str, set[str]]:
    """The classes of this file whose `forward` reads parameters of their parts: name → what it reads, as it is written."""
    code, blocks = context.code, _block_classes(context.code)
    found: dict[str, set[str]] = {}
    for klass in code.classes:
        if klass.file.name != context.file.name or id(klass.node) not in blocks:
            continue
        for name in _running(code, klass):
            method = klass.method(name)
            for node in attributes(method) if method is not None else ():
                names = ast.unparse(node).split(".") if depth(node) > 2 else []
                if names[:1] == ["self"] and _is_parameter(code, klass, names[1:]):
                    found.setdefault(klass.name, set()).add(".".join(names))
    return found


class _Read(Rewriter):
    def __init__(self, context: Context, reads: dict[str, set[str]]):
        super().__init__(context)
        self.reads = reads
        self.running = {name: _running(context.code, klass) for name in reads if (klass := context.klass(name))}

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        scope, written = self.context.scope(original_node), source_of(original_node)
        if len(scope) < 2 or written not in self.reads.get(scope[0], ()) or scope[1] not in self.running[scope[0]]:
            return updated_node
        names = written.split(".")
        around = self.context.parent(original_node)
        if isinstance(around, cst.Attribute) and around.attr.value in _KNOWN:
            return updated_node
        if self._is_set(original_node):
            return updated_node
        self.context.define("parameter_of", _HELPER)
        part = ".".join(names[:-1])
        self.context.note(original_node, f"{names[-1]} of {part} is brought in also where it is kept on the disk")
        name = cst.SimpleString(f'"{names[-1]}"')
        return cst.Call(cst.Name("parameter_of"), [cst.Arg(updated_node.value, comma=_COMMA), cst.Arg(name)])

    def _is_set(self, node: cst.CSTNode) -> bool:
        """Whether a node is what a statement sets or deletes, also as one of several."""
        around = self.context.parent(node)
        while isinstance(around, (cst.Element, cst.StarredElement, cst.Tuple, cst.List)):
            node, around = around, self.context.parent(around)
        sets = isinstance(around, (cst.AssignTarget, cst.AugAssign, cst.AnnAssign, cst.For, cst.CompFor))
        return isinstance(around, (cst.Del, cst.AsName)) or (sets and getattr(around, "target", None) is node)


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    reads = _reads(context)
    return rewrites(lambda of: _Read(of, reads), ("self.",))(tree, context) if reads else tree


_COMMA = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))

_BEFORE = """
    import torch
    from torch import nn
{block}

    class ToyFilter(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.ones(4))

        def forward(self, length):
            return self.bias[:length]


    class ToyBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter = ToyFilter()

        def forward(self, x):
            x = x.to(self.filter.bias.dtype)
            return x + {read}


    class ToyModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([ToyBlock() for _ in range(2)])
"""
_BLOCK = """
    # --- transformers releases: what differs between them, and what newer ones no longer have ---
    # [parameter_of]
{source}
    # --- end of transformers releases ---
"""
_SOURCE = "\n".join(f"    {line}" if line else "" for line in _HELPER.strip("\n").split("\n"))

RULE = Rule(
    name="parameters of parts",
    reason="a block reads a parameter of one of its parts, which has no data there where the weights are on the disk",
    releases="every release",
    before=_BEFORE.format(block="", read="self.filter.bias"),
    after=_BEFORE.format(block=_BLOCK.format(source=_SOURCE), read='parameter_of(self.filter, "bias")'),
    apply=_apply,
    order=60,
)

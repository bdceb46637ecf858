"""A module that stands twice in a Sequential: its parameters have two names, of which a file holds one."""

import ast

import libcst as cst
import libcst.matchers as m

from ...static.code_tree import Klass, calls
from ..rule import Context, Rewriter, Rule, rewrites

_AGAIN = '''
from torch import nn as _nn


class UsedAgain(_nn.Module):
    """A module that is used a second time: its parameters stay where it was used first."""

    def __init__(self, module):
        super().__init__()
        self.__dict__["module"] = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)
'''


def _has_parameters(context: Context, klass: Klass, init: ast.AST | None, name: str) -> bool:
    """Whether a local module is made from a class of the folder with parameters of its own."""
    for step in ast.walk(init) if init is not None else ():
        if isinstance(step, ast.Assign) and any(isinstance(g, ast.Name) and g.id == name for g in step.targets):
            made = [context.code.find(klass.file, klass.file.dotted(call.func)) for call in calls(step.value)]
            return any(one is not None and "Parameter(" in ast.unparse(one.node) for one in made)
    return False


class _Again(Rewriter):
    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        scope = self.context.scope(original_node)
        klass = self.context.klass(scope[0]) if len(scope) == 2 and scope[1] == "__init__" else None
        if klass is None or not self.context.dotted(original_node.func).endswith("nn.Sequential"):
            return updated_node
        seen: set[str] = set()
        arguments = list(updated_node.args)
        for number, argument in enumerate(arguments):
            if not m.matches(argument, m.Arg(value=m.Name(), star="")):
                continue
            name = argument.value.value  # type: ignore[attr-defined]
            if name in seen and _has_parameters(self.context, klass, klass.method("__init__"), name):
                self.context.define("UsedAgain", _AGAIN)
                self.context.note(
                    original_node, f"{name} is used a second time without second names for its parameters"
                )
                again = cst.Call(cst.Name("UsedAgain"), [cst.Arg(argument.value)])
                arguments[number] = argument.with_changes(value=again)
            seen.add(name)
        return updated_node.with_changes(args=arguments)


_BEFORE = """
    import torch
    from torch import nn
{block}

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(1))


    class ToyFilter(nn.Module):
        def __init__(self):
            super().__init__()
            act = Scale()
            self.steps = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), {again})
"""
_BLOCK = """
    # --- transformers releases: what differs between them, and what newer ones no longer have ---
    # [UsedAgain]
{source}
    # --- end of transformers releases ---
"""
_SOURCE = "\n".join(f"    {line}" if line else "" for line in _AGAIN.strip("\n").split("\n"))

RULE = Rule(
    name="modules used twice",
    reason="the second name of a parameter counts as missing, so that 5.0 draws it anew, and save_pretrained refuses it",
    releases="5.0 and newer",
    before=_BEFORE.format(block="", again="act"),
    after=_BEFORE.format(block=_BLOCK.format(source=_SOURCE), again="UsedAgain(act)"),
    apply=rewrites(_Again, ("nn.Sequential(",)),
    words=("nn.Sequential(",),
)

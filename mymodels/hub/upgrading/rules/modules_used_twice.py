"""A module that stands twice in a Sequential: saving wants to know that the second name is the first's."""

import ast

import libcst as cst

from ...static.code_tree import Klass, calls, is_self
from ..rule import Context, Rewriter, Rule, rewrites, statements


def _twice(context: Context, klass: Klass) -> dict[str, str]:
    """The second and later names of modules that are used several times, with the first."""
    init = klass.method("__init__")
    found: dict[str, str] = {}
    for step in init.body if init is not None else ():
        if not isinstance(step, ast.Assign) or not isinstance(step.value, ast.Call):
            continue
        if not klass.file.dotted(step.value.func).endswith("nn.Sequential"):
            continue
        for goal in step.targets:
            first: dict[str, int] = {}
            for number, part in enumerate(step.value.args if is_self(goal) else ()):
                if not isinstance(part, ast.Name):
                    continue
                if part.id in first and _has_parameters(context, klass, init, part.id):
                    attribute = goal.attr  # type: ignore[attr-defined]
                    found[f"{attribute}.{number}"] = f"{attribute}.{first[part.id]}"
                first.setdefault(part.id, number)
    return found


def _has_parameters(context: Context, klass: Klass, init: ast.AST | None, name: str) -> bool:
    """Whether a local module is made from a class of the folder with parameters of its own."""
    for step in ast.walk(init) if init is not None else ():
        if isinstance(step, ast.Assign) and any(isinstance(g, ast.Name) and g.id == name for g in step.targets):
            made = [context.code.find(klass.file, klass.file.dotted(call.func)) for call in calls(step.value)]
            return any(one is not None and "Parameter(" in ast.unparse(one.node) for one in made)
    return False


class _Declare(Rewriter):
    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        name = original_node.name.value
        klass = self.context.klass(name)
        if klass is None or self.context.scope(original_node) or not self.context.code.is_module(klass):
            return updated_node
        pairs = _twice(self.context, klass) if klass.value("_tied_weights_keys") is None else {}
        if not pairs or not isinstance(updated_node.body, cst.IndentedBlock):
            return updated_node
        self.context.note(original_node, f"{name} names its modules that are used twice: {', '.join(pairs)}")
        shown = ", ".join(f'"{second}": "{first}"' for second, first in pairs.items())
        body = list(updated_node.body.body)
        at = next((i for i, step in enumerate(body) if isinstance(step, cst.FunctionDef)), len(body))
        body[at:at] = statements(f"_tied_weights_keys = {{{shown}}}\n")
        return updated_node.with_changes(body=updated_node.body.with_changes(body=body))


_BEFORE = """
    import torch
    from torch import nn


    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(1))


    class ToyFilter(nn.Module):
{line}        def __init__(self):
            super().__init__()
            act = Scale()
            self.steps = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
"""

RULE = Rule(
    name="modules used twice",
    reason="save_pretrained refuses parameters with two names that nothing declares",
    releases="5.0 and newer",
    before=_BEFORE.format(line=""),
    after=_BEFORE.format(line='        _tied_weights_keys = {"steps.3": "steps.1"}\n'),
    apply=rewrites(_Declare, ("nn.Sequential(",)),
    words=("nn.Sequential(",),
)

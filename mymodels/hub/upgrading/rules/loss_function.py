"""`self.loss_function` set by a model: a property of that name in newer releases hides it."""

import ast
import re

import libcst as cst
import libcst.matchers as m

from ...static.code_tree import is_self
from ..rule import Context, Rewriter, Rule, rewrites

_NEW = "own_loss_function"
_ATTRIBUTE = m.Attribute(value=m.Name("self"), attr=m.Name("loss_function"))


def _setting(context: Context) -> set[str]:
    """The classes of the folder that set a loss without parameters as `self.loss_function`, or inherit one that does."""
    found = set()
    for klass in context.code.classes:
        for member in context.code.lineage(klass) if context.code.is_model(klass) else ():
            init = member.method("__init__")
            for step in ast.walk(init) if init is not None else ():
                if isinstance(step, ast.Assign) and any(is_self(goal, "loss_function") for goal in step.targets):
                    made = member.file.dotted(step.value.func) if isinstance(step.value, ast.Call) else ""
                    if re.match(r"torch\.nn\.(\w+\.)*\w*Loss$", made):
                        found.add(klass.name)
    return found


class _Rename(Rewriter):
    def __init__(self, context: Context):
        super().__init__(context)
        self.classes = _setting(context)

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.Attribute:
        if m.matches(original_node, _ATTRIBUTE) and self.context.scope(original_node)[:1] in [
            [n] for n in self.classes
        ]:
            self.context.note(original_node, f"self.loss_function is called self.{_NEW}")
            return updated_node.with_changes(attr=cst.Name(_NEW))
        return updated_node


_BEFORE = """
    from torch import nn
    from transformers import PreTrainedModel


    class ToyModel(PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.{name} = nn.HuberLoss()
            self.post_init()

        def forward(self, hidden, labels):
            return self.{name}(hidden, labels)
"""

RULE = Rule(
    name="loss_function",
    reason="models have a property loss_function, which hides a loss that the code keeps under that name",
    releases="4.48 and newer",
    before=_BEFORE.format(name="loss_function"),
    after=_BEFORE.format(name=_NEW),
    apply=rewrites(_Rename, ("self.loss_function",)),
    words=("self.loss_function",),
)

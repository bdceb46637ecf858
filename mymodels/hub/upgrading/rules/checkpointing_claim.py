"""`supports_gradient_checkpointing = True` without a part that can: enabling it raises under every release."""

import ast
import re

import libcst as cst

from ..rule import Context, Rewriter, Rule, literal, rewrites, statements

_FLAG = "supports_gradient_checkpointing"
_MARKS = ("gradient_checkpointing", "_set_gradient_checkpointing", "GradientCheckpointingLayer", "checkpoint")


def _can(context: Context) -> bool:
    """Whether anything in the folder's code has to do with checkpointing, or a part may come from transformers."""
    for file in context.code.files.values():
        for node in ast.walk(file.tree):
            names = [getattr(node, "attr", ""), getattr(node, "id", ""), getattr(node, "name", "")]
            if isinstance(node, (ast.Attribute, ast.Name, ast.FunctionDef, ast.alias)) and set(_MARKS) & set(names):
                return True
            if isinstance(node, ast.Constant) and node.value in _MARKS:
                return True
            if isinstance(node, (ast.Attribute, ast.Name)) and _stock(file.dotted(node)):
                return True
    return False


def _stock(full: str) -> bool:
    """Whether a name is that of a model or layer of transformers, which may have the flag itself; a base class has none."""
    name = full.rpartition(".")[2]
    if not full.startswith("transformers.") or re.search(
        r"(PreTrainedModel|Config|Output\w*|^_?[a-z]\w*|^[A-Z_]+)$", name
    ):
        return False
    made = re.search(r"(Model|For[A-Z]\w+|Layer|Encoder|Decoder|Stack|Block)$", name)
    return name.startswith("AutoModel") or ".models." in full or made is not None


class _Deny(Rewriter):
    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        scope = self.context.scope(original_node)
        named = [target.target.value for target in original_node.targets if isinstance(target.target, cst.Name)]
        if named != [_FLAG] or len(scope) != 1 or not self.context.is_model(scope[0]):
            return updated_node
        if literal(original_node.value) is not True:
            return updated_node
        self.context.note(
            original_node, f"{scope[0]} no longer declares gradient checkpointing, which no part of it can do"
        )
        return updated_node.with_changes(value=cst.Name("False"))

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        """A class that has the flag from a base of transformers, such as `BertPreTrainedModel`."""
        name, code = original_node.name.value, self.context.code
        klass, body = self.context.klass(name), updated_node.body
        if klass is None or self.context.scope(original_node) or not isinstance(body, cst.IndentedBlock):
            return updated_node
        roots = {root.rpartition(".")[2] for root in code.roots(klass)}
        stock = any(root.endswith("PreTrainedModel") and root != "PreTrainedModel" for root in roots)
        if not stock or not code.is_model(klass) or code.value(klass, _FLAG) is not None:
            return updated_node
        if any(code.is_model(base) for base in code.lineage(klass)[1:]):
            return updated_node  # its base gets the line
        self.context.note(original_node, f"{name} does not declare gradient checkpointing, which no part of it can do")
        at = 1 if original_node.get_docstring() is not None else 0
        line = statements(f"{_FLAG} = False\n")
        return updated_node.with_changes(body=body.with_changes(body=[*body.body[:at], *line, *body.body[at:]]))


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    return tree if _can(context) else rewrites(_Deny, (_FLAG, "PreTrainedModel"))(tree, context)


_BEFORE = """
    from torch import nn
    from transformers import PreTrainedModel


    class ToyModel(PreTrainedModel):
        supports_gradient_checkpointing = {value}

        def __init__(self, config):
            super().__init__(config)
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
            self.post_init()
"""

RULE = Rule(
    name="checkpointing claim",
    reason="no part has a gradient_checkpointing flag, so enabling what the class declares raises",
    releases="every release",
    before=_BEFORE.format(value="True"),
    after=_BEFORE.format(value="False"),
    apply=_apply,
    words=(_FLAG, "PreTrainedModel"),
)

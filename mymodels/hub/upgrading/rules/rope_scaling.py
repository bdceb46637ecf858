"""`rope_scaling` of the folder's own config, kept as it was written."""

import ast

import libcst as cst

from ...static.code_tree import Klass, is_self
from ..generating import own_config
from ..rule import Context, Rewriter, Rule, rewrites, statements


def uses_stock_rope(context: Context) -> bool:
    """Whether rotary positions are made by transformers, which wants `rope_parameters`."""
    for file in context.code.files.values():
        if "rope_parameters" in file.text or "ROPE_INIT_FUNCTIONS" in file.text:
            return True
        if any(full.startswith("transformers.") and full.endswith("RotaryEmbedding") for full in file.names.values()):
            return True
    return False


def _sets_it(klass: Klass) -> bool:
    """Whether a config assigns `self.rope_scaling`."""
    return any(
        isinstance(node, ast.Attribute) and is_self(node, "rope_scaling") and isinstance(node.ctx, ast.Store)
        for node in ast.walk(klass.node)
    )


class _Plain(Rewriter):
    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        klass = self.context.klass(original_node.name.value)
        if klass is None or not own_config(self.context.code, klass) or not _sets_it(klass):
            return updated_node
        if self.context.code.value(klass, "rope_scaling") is not None or not isinstance(
            updated_node.body, cst.IndentedBlock
        ):
            return updated_node
        body = [*updated_node.body.body]
        at = next((i for i, step in enumerate(body) if isinstance(step, cst.FunctionDef)), len(body))
        line = statements(
            "rope_scaling = None  # a plain attribute: transformers 5 rewrites the property it has made of it\n"
        )
        self.context.note(original_node, f"{klass.name}.rope_scaling is a plain attribute, which nothing rewrites")
        body[at:at] = line
        following = body[at + 1] if at + 1 < len(body) else None
        if isinstance(following, cst.FunctionDef) and not following.leading_lines:
            body[at + 1] = following.with_changes(leading_lines=[cst.EmptyLine(indent=False)])
        return updated_node.with_changes(body=updated_node.body.with_changes(body=body))


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    return tree if uses_stock_rope(context) else rewrites(_Plain, ("rope_scaling",))(tree, context)


RULE = Rule(
    name="rope_scaling",
    reason="transformers 5 makes rope_parameters of it: None becomes a dictionary, entries are added, kinds it does not know fail",
    releases="5.0 and newer",
    before="""
        from transformers import PretrainedConfig


        class ToyConfig(PretrainedConfig):
            model_type = "toy"

            def __init__(self, rope_scaling=None, **kwargs):
                self.rope_scaling = rope_scaling
                super().__init__(**kwargs)
    """,
    after="""
        from transformers import PretrainedConfig


        class ToyConfig(PretrainedConfig):
            model_type = "toy"
            rope_scaling = None  # a plain attribute: transformers 5 rewrites the property it has made of it

            def __init__(self, rope_scaling=None, **kwargs):
                self.rope_scaling = rope_scaling
                super().__init__(**kwargs)
    """,
    apply=_apply,
    words=("rope_scaling",),
)

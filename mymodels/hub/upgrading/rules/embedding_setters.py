"""`get_input_embeddings` or `get_output_embeddings` without its setter: the vocabulary cannot be extended."""

import ast
import re

import libcst as cst

from ...static.code_tree import Klass
from ..generating import own_model
from ..rule import Context, Rewriter, Rule, rewrites, statements

_KINDS = ("input_embeddings", "output_embeddings")


def _setter(context: Context, klass: Klass, kind: str) -> str:
    """The setter of what a getter of this class returns; "" if there is one, or if the getter does more."""
    getter = klass.method(f"get_{kind}")
    if getter is None or context.code.method(klass, f"set_{kind}") is not None:
        return ""
    returned = [node.value for node in ast.walk(getter) if isinstance(node, ast.Return) and node.value is not None]
    text = ast.unparse(returned[0]) if len(returned) == 1 else ""
    head = f"def set_{kind}(self, value):\n"
    if re.fullmatch(r"self(\.\w+)+", text):
        return f"{head}    {text} = value\n"
    if inner := re.fullmatch(rf"(self(\.\w+)+)\.get_{kind}\(\)", text):
        return f"{head}    {inner[1]}.set_{kind}(value)\n"
    return ""


class _Setters(Rewriter):
    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        klass, body = self.context.klass(original_node.name.value), updated_node.body
        if klass is None or self.context.scope(original_node) or not isinstance(body, cst.IndentedBlock):
            return updated_node
        if not own_model(self.context.code, klass):
            return updated_node
        steps = [*body.body]
        for kind in _KINDS:
            if not (text := _setter(self.context, klass, kind)):
                continue
            getter = klass.method(f"get_{kind}")
            assert getter is not None
            self.context.note(getter.lineno, f"{klass.name} can set the embeddings that its get_{kind} returns")
            at = next(
                i for i, s in enumerate(steps) if isinstance(s, cst.FunctionDef) and s.name.value == f"get_{kind}"
            )
            made = statements(text)[0].with_changes(leading_lines=[cst.EmptyLine(indent=False)])
            steps.insert(at + 1, made)
        return updated_node.with_changes(body=body.with_changes(body=steps))


_BEFORE = """
    from torch import nn
    from transformers import PreTrainedModel


    class ToyModel(PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.tokens = nn.Embedding(8, 4)
            self.post_init()

        def get_input_embeddings(self):
            return self.tokens
"""

RULE = Rule(
    name="embedding setters",
    reason="resize_token_embeddings sets what it has resized, and raises where the class has no setter",
    releases="every release; 5 and newer know some usual names",
    before=_BEFORE,
    after=_BEFORE.rstrip() + "\n\n        def set_input_embeddings(self, value):\n            self.tokens = value\n",
    apply=rewrites(_Setters, ("get_input_embeddings", "get_output_embeddings")),
    words=("get_input_embeddings", "get_output_embeddings"),
)

"""Parameters that a constructor ties by hand (`self.decoder.bias = self.bias`), tied again after loading."""

import ast

import libcst as cst

from ...static.code_tree import is_self
from ..rule import Rewriter, Rule, rewrites, statements


class _Again(Rewriter):
    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        klass, code = self.context.klass(original_node.name.value), self.context.code
        if klass is None or self.context.scope(original_node) or not code.is_module(klass):
            return updated_node
        init = klass.method("__init__")
        if code.is_model(klass) or init is None or code.method(klass, "_tie_weights") is not None:
            return updated_node
        ties = [
            ast.unparse(step)
            for step in init.body
            if isinstance(step, ast.Assign)
            and is_self(step.value)
            and isinstance(step.targets[0], ast.Attribute)
            and step.targets[0].attr in ("weight", "bias")
            and is_self(step.targets[0].value)
        ]
        if not ties or not isinstance(updated_node.body, cst.IndentedBlock):
            return updated_node
        self.context.note(original_node, f"{klass.name} ties again after loading: {', '.join(ties)}")
        lines = "".join(f"    {tie}\n" for tie in ties)
        method = statements(f"def _tie_weights(self):\n{lines}")[0]
        body = [*updated_node.body.body, method.with_changes(leading_lines=[cst.EmptyLine(indent=False)])]
        return updated_node.with_changes(body=updated_node.body.with_changes(body=body))


_BEFORE = """
    import torch
    from torch import nn


    class ToyHead(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
            self.decoder.bias = self.bias
"""

RULE = Rule(
    name="ties by hand",
    reason="loading replaces parameters, so that two names of one parameter come apart",
    releases="4.56 and 4.57; newer ones go by _tied_weights_keys",
    before=_BEFORE,
    after=_BEFORE.rstrip() + "\n\n        def _tie_weights(self):\n            self.decoder.bias = self.bias\n",
    apply=rewrites(_Again, (".bias = self.", ".weight = self.")),
    words=(".bias = self.", ".weight = self."),
)

"""Ties that the code makes without declaring them: transformers 5 ties what `_tied_weights_keys` names, and nothing else."""

import ast
import re

import libcst as cst

from ..embeddings import input_embeddings, ties_by_config
from ..rule import Rewriter, Rule, rewrites, statements


class _Declare(Rewriter):
    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        name = original_node.name.value
        klass = self.context.klass(name)
        if klass is None or self.context.scope(original_node) or not self.context.code.is_model(klass):
            return updated_node
        if self.context.code.value(klass, "_tied_weights_keys") is not None or not ties_by_config(
            self.context.code, self.context.config
        ):
            return updated_node
        if self.context.code.method(klass, "tie_weights") is not None:
            return updated_node  # it ties by itself, on its own conditions
        found = self.context.code.method(klass, "get_output_embeddings")
        returned = [n.value for n in ast.walk(found[1]) if isinstance(n, ast.Return) and n.value] if found else []
        head = re.fullmatch(r"self\.([\w.]+)", ast.unparse(returned[-1])) if returned else None
        embeddings = input_embeddings(self.context.code, klass)
        if head is None or not embeddings or klass.method("get_output_embeddings") is None:
            return updated_node
        if f"{head[1]}.weight" == embeddings or not isinstance(updated_node.body, cst.IndentedBlock):
            return updated_node
        self.context.note(original_node, f"{name} declares that {head[1]}.weight is tied to {embeddings}")
        line = statements(f'_tied_weights_keys = {{"{head[1]}.weight": "{embeddings}"}}\n')
        body = list(updated_node.body.body)
        at = next((i for i, step in enumerate(body) if isinstance(step, (cst.FunctionDef, cst.ClassDef))), len(body))
        return updated_node.with_changes(body=updated_node.body.with_changes(body=[*body[:at], *line, *body[at:]]))


_BEFORE = """
    from torch import nn
    from transformers import PreTrainedModel


    class ToyForCausalLM(PreTrainedModel):
        config_class = ToyConfig
{line}
        def __init__(self, config):
            super().__init__(config)
            self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def get_input_embeddings(self):
            return self.wte

        def get_output_embeddings(self):
            return self.lm_head
"""

RULE = Rule(
    name="undeclared ties",
    reason="transformers 5 ties the weights that _tied_weights_keys names; 4 tied head and embeddings by the config alone",
    releases="5.0 and newer",
    before=_BEFORE.format(line=""),
    after=_BEFORE.format(line='        _tied_weights_keys = {"lm_head.weight": "wte.weight"}\n'),
    config={"tie_word_embeddings": True},
    apply=rewrites(_Declare, ("get_output_embeddings",)),
    words=("get_output_embeddings",),
    order=55,
)

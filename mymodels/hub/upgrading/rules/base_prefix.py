"""`base_model_prefix` that is the name of no part: the model with a head keeps its base model elsewhere."""

import ast
import re

import libcst as cst

from ...static.code_tree import Code, Klass, constant
from ..embeddings import parts_of
from ..generating import own_model
from ..rule import Rewriter, Rule, literal, rewrites
from ..vocabulary import made

_NAME = "base_model_prefix"
_PART_BY_PREFIX = re.compile(r"(setattr\(self, |self\.(add|register)_module\()(self|cls)\.base_model_prefix\b")
_HEAD = re.compile(r"For[A-Z]|Head")  # in names of classes


def _kept_in(code: Code, klass: Klass) -> str:
    """The one part of a model with a head that is a model of the folder without one, or ""."""
    found = []
    for name, value in parts_of(code, klass).items():
        call = made(klass, value)
        inner = code.find(klass.file, call.name) if call is not None else None
        if inner is not None and own_model(code, inner):
            found.append("" if _HEAD.search(inner.name) else name)
    return found[0] if len(found) == 1 else ""


def _true_prefix(code: Code, defining: Klass, wrong: str) -> str:
    """Where the models with a head that inherit a prefix keep their base model; "" unless they agree."""
    kept = set()
    for klass in code.classes:
        found = code.value(klass, _NAME) if own_model(code, klass) else None
        if found is None or found[0].node is not defining.node:
            continue
        if wrong in parts_of(code, klass) or code.method(klass, wrong) is not None:
            return ""  # some class has such a part
        if _PART_BY_PREFIX.search(ast.unparse(klass.node)):
            return ""  # the part is made under the prefix, whatever it is
        if _HEAD.search(klass.name) and "PreTrained" not in klass.name:
            kept.add(_kept_in(code, klass))
    return kept.pop() if len(kept) == 1 else ""


class _Prefix(Rewriter):
    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        target = original_node.targets[0].target
        scope = self.context.scope(original_node)
        if not isinstance(target, cst.Name) or target.value != _NAME or len(scope) != 1:
            return updated_node
        klass, wrong = self.context.klass(scope[0]), literal(original_node.value)
        if klass is None or not isinstance(wrong, str) or not wrong or constant(klass.value(_NAME)) != wrong:
            return updated_node
        prefix = _true_prefix(self.context.code, klass, wrong)
        if not prefix:
            return updated_node
        self.context.note(original_node, f"{_NAME} is {prefix!r}, where the base model is, not {wrong!r}")
        return updated_node.with_changes(value=cst.SimpleString(f'"{prefix}"'))


_EXAMPLE = """
    from torch import nn
    from transformers import PreTrainedModel


    class ToyPreTrainedModel(PreTrainedModel):
        base_model_prefix = "{prefix}"


    class ToyModel(ToyPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
            self.post_init()


    class ToyForCausalLM(ToyPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.transformer = ToyModel(config)
            self.post_init()
"""

RULE = Rule(
    name="base model prefix",
    reason="the base model is looked for under base_model_prefix: weights of the one are not found by the other",
    releases="every release",
    before=_EXAMPLE.format(prefix="model"),
    after=_EXAMPLE.format(prefix="transformer"),
    apply=rewrites(_Prefix, (_NAME,)),
    words=(_NAME,),
)

"""`_tied_weights_keys` as a list: transformers 5 asks which parameter each one is tied to."""

import re

import libcst as cst
import libcst.matchers as m

from ...static.headers import tensor_headers
from ..embeddings import exists, input_embeddings, tied_by_hand
from ..rule import Rewriter, Rule, expression, literal, rewrites, source_of


class _Ties(Rewriter):
    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        if len(original_node.targets) == 1 and _is_ties(original_node.targets[0].target):
            return updated_node.with_changes(value=self._as_dict(original_node, updated_node.value))
        if len(original_node.targets) == 1 and source_of(original_node.targets[0].target) == "self._tied_weights_keys":
            return updated_node.with_changes(value=self._with_prefix(original_node, updated_node.value))
        return updated_node

    def leave_AnnAssign(self, original_node: cst.AnnAssign, updated_node: cst.AnnAssign) -> cst.AnnAssign:
        if _is_ties(original_node.target) and updated_node.value is not None:
            return updated_node.with_changes(value=self._as_dict(original_node, updated_node.value))
        return updated_node

    def _as_dict(self, node: cst.Assign | cst.AnnAssign, value: cst.BaseExpression) -> cst.BaseExpression:
        names = literal(value)
        if not isinstance(value, (cst.List, cst.Tuple, cst.Set)) or not isinstance(names, (list, tuple, set)):
            return value
        scope = self.context.scope(node)
        if len(scope) != 1 or not names:
            return value
        klass, code = self.context.klass(scope[0]), self.context.code
        source = input_embeddings(code, klass)
        if not source:
            self.context.refuse(node, f"which embeddings {', '.join(map(str, names))} are tied to was not found")
            return value
        pairs = {}
        for name in [_plain(str(name)) for name in names]:
            to = source if name.endswith("weight") else tied_by_hand(code, klass, name)
            if to and name != to and exists(code, klass, name):
                stored = tensor_headers(self.context.folder)
                name, to = (to, name) if name in stored and to not in stored else (name, to)  # the file has that end
                pairs[name] = to
        self.context.note(node, f"{scope[0]}._tied_weights_keys is a dict: each name with the parameter it is tied to")
        return expression("{" + ", ".join(f'"{name}": "{to}"' for name, to in pairs.items()) + "}")

    def _with_prefix(self, node: cst.Assign, value: cst.BaseExpression) -> cst.BaseExpression:
        """`[f"model.{k}" for k in model._tied_weights_keys]`, which is set on an instance, as a dict of both ends."""
        if not isinstance(value, cst.ListComp) or not m.matches(
            value.for_in.iter, m.Attribute(attr=m.Name("_tied_weights_keys"))
        ):
            return value
        key = source_of(value.for_in.target)
        made = source_of(value.elt)
        if not key.isidentifier() or value.for_in.ifs or "{" + key + "}" not in made:
            return value
        to = made.replace("{" + key + "}", "{to}")
        self.context.note(node, "the ties of a part are passed on as a dict")
        return expression(f"{{{made}: {to} for {key}, to in {source_of(value.for_in.iter)}.items()}}")


def _is_ties(target: cst.BaseExpression) -> bool:
    return isinstance(target, cst.Name) and target.value == "_tied_weights_keys"


def _plain(pattern: str) -> str:
    """The name that a pattern such as `r"lm_head\\.weight"` stands for."""
    return re.sub(r"\\(.)", r"\1", pattern).strip("^$")


RULE = Rule(
    name="tied weights",
    reason="transformers 5 refuses a list in _tied_weights_keys: it wants each name with the parameter it is tied to",
    releases="5.0 and newer",
    before="""
        from torch import nn
        from transformers import PreTrainedModel


        class ToyModel(PreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
                self.post_init()

            def get_input_embeddings(self):
                return self.wte


        class ToyForCausalLM(PreTrainedModel):
            base_model_prefix = "transformer"
            _tied_weights_keys = [r"lm_head\\.weight"]  # shared with wte

            def __init__(self, config):
                super().__init__(config)
                self.transformer = ToyModel(config)
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
                self.post_init()
    """,
    after="""
        from torch import nn
        from transformers import PreTrainedModel


        class ToyModel(PreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
                self.post_init()

            def get_input_embeddings(self):
                return self.wte


        class ToyForCausalLM(PreTrainedModel):
            base_model_prefix = "transformer"
            _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # shared with wte

            def __init__(self, config):
                super().__init__(config)
                self.transformer = ToyModel(config)
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
                self.post_init()
    """,
    apply=rewrites(_Ties, ("_tied_weights_keys",)),
    words=("_tied_weights_keys",),
)

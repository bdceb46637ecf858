"""`_tied_weights_keys` as a list: transformers 5 asks which parameter each one is tied to."""

import ast
import re

import libcst as cst

from ...static.code_tree import Klass, calls, is_self
from ..rule import Context, Rewriter, Rule, expression, literal, rewrites

_INPUT = ("embed_tokens", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "embeddings", "shared", "embed")


class _Ties(Rewriter):
    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        if len(original_node.targets) == 1 and _is_ties(original_node.targets[0].target):
            return updated_node.with_changes(value=self._as_dict(original_node, updated_node.value))
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
        source = input_embeddings(self.context, scope[0])
        if not source:
            self.context.refuse(node, f"which embeddings {', '.join(map(str, names))} are tied to was not found")
            return value
        pairs = {_plain(str(name)): source for name in names if _plain(str(name)) != source}
        self.context.note(node, f"{scope[0]}._tied_weights_keys is a dict: each name with the parameter it is tied to")
        return expression("{" + ", ".join(f'"{name}": "{to}"' for name, to in pairs.items()) + "}")


def _is_ties(target: cst.BaseExpression) -> bool:
    return isinstance(target, cst.Name) and target.value == "_tied_weights_keys"


def _plain(pattern: str) -> str:
    """The name that a pattern such as `r"lm_head\\.weight"` stands for."""
    return re.sub(r"\\(.)", r"\1", pattern).strip("^$")


def input_embeddings(context: Context, name: str) -> str:
    """The full name of the weight of a model's input embeddings, from its `get_input_embeddings`, or ""."""
    klass = context.klass(name)
    prefix: list[str] = []
    for _ in range(4):  # a model with a head asks the base model in it
        if klass is None:
            return ""
        found = context.code.method(klass, "get_input_embeddings")
        returned = [n.value for n in ast.walk(found[1]) if isinstance(n, ast.Return) and n.value] if found else []
        path = ast.unparse(returned[-1]) if returned else ""
        if inner := re.fullmatch(r"self\.([\w.]+)\.get_input_embeddings\(\)", path):
            part, wanted = inner[1], None
        elif own := re.fullmatch(r"self\.([\w.]+)", path):
            part, wanted = own[1], own[1]
        else:
            part, wanted = "", None
        made = _parts(context, klass)
        if wanted is None and not part:  # none of its own: transformers goes by base_model_prefix
            base = context.code.value(klass, "base_model_prefix")
            part = str(getattr(base[1], "value", "")) if base else ""
            if part not in made:
                own_part = next((p for p in _INPUT if p in made), "")
                return ".".join([*prefix, own_part, "weight"]) if own_part else ""
        first, *rest = part.split(".")
        following = made.get(first)
        if wanted is not None and (not rest or following is None or "nn.Embedding" in str(following)):
            return ".".join([*prefix, part, "weight"])
        if wanted is not None:
            return ".".join([*prefix, *wanted.split("."), "weight"])
        prefix.append(first)
        call = following
        names = [klass.file.dotted(c.func) for c in calls(call) if not is_self(c.func)] if call is not None else []
        klass = next((k for n in names if (k := context.code.find(klass.file, n)) is not None), None)
    return ""


def _parts(context: Context, klass: Klass) -> dict[str, ast.AST]:
    """The attributes that the constructors of a class and its ancestors set, with what they are set to."""
    found: dict[str, ast.AST] = {}
    for member in context.code.lineage(klass):
        init = member.method("__init__")
        for node in ast.walk(init) if init is not None else ():
            if isinstance(node, ast.Assign):
                for goal in node.targets:
                    if isinstance(goal, ast.Attribute) and is_self(goal):
                        found.setdefault(goal.attr, node.value)
    return found


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
    apply=rewrites(_Ties),
)

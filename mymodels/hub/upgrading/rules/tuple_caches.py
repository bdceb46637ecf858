"""Models that keep keys and values in tuples: `generate` must not hand them a `DynamicCache`."""

import ast

import libcst as cst

from ..generating import first_with, generating, knows_cache, parameters
from ..rule import Context, Rule, statements

_PASTS = {"past_key_values", "past", "past_key_value", "layer_past", "cache_params", "state", "mems"}
_METHOD = """
@classmethod
def _supports_default_dynamic_cache(cls):
    return False  # the past is no Cache
"""


def _lacking(context: Context) -> set[str]:
    """The generating classes of this file that take a past, and know nothing of `Cache`."""
    if knows_cache(context):
        return set()
    found = set()
    for klass in first_with(context, generating(context), "prepare_inputs_for_generation"):
        prepare = context.code.method(klass, "prepare_inputs_for_generation")
        forward = context.code.method(klass, "forward")
        if prepare is None or context.code.method(klass, "_supports_default_dynamic_cache") is not None:
            continue
        taken = parameters(prepare[1]) | (parameters(forward[1]) if forward is not None else set())
        used = {node.id for node in ast.walk(prepare[1]) if isinstance(node, ast.Name)}
        if _PASTS & taken & used:
            found.add(klass.name)
    return found


class _Refuse(cst.CSTTransformer):
    def __init__(self, context: Context, lacking: set[str]):
        super().__init__()
        self.context, self.lacking = context, lacking

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        if original_node.name.value not in self.lacking or not isinstance(updated_node.body, cst.IndentedBlock):
            return updated_node
        body = [*updated_node.body.body]
        at = next(
            (i for i, s in enumerate(body) if isinstance(s, cst.FunctionDef) and s.name.value != "__init__"), len(body)
        )
        method = statements(_METHOD.strip() + "\n")[0]
        lines = [cst.EmptyLine(indent=False)] if at else []
        body.insert(at, method.with_changes(leading_lines=lines))
        if at + 1 < len(body) and not body[at + 1].leading_lines:  # type: ignore[attr-defined]
            body[at + 1] = body[at + 1].with_changes(leading_lines=[cst.EmptyLine(indent=False)])
        name = original_node.name.value
        self.context.note(
            original_node, f"{name} tells generate to leave the past to the model, whose tuples it passes on"
        )
        return updated_node.with_changes(body=updated_node.body.with_changes(body=body))


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    lacking = _lacking(context)
    return tree.visit(_Refuse(context, lacking)) if lacking else tree


RULE = Rule(
    name="tuple caches",
    reason="generate hands every model a DynamicCache, which code that keeps keys and values in tuples cannot read",
    releases="4.56 and newer",
    before="""
        from transformers import PreTrainedModel


        class ToyForCausalLM(PreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.post_init()

            def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
                if past_key_values:
                    input_ids = input_ids[:, -1:]
                return {"input_ids": input_ids, "past_key_values": past_key_values}
    """,
    after="""
        from transformers import PreTrainedModel


        class ToyForCausalLM(PreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.post_init()

            @classmethod
            def _supports_default_dynamic_cache(cls):
                return False  # the past is no Cache

            def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
                if past_key_values:
                    input_ids = input_ids[:, -1:]
                return {"input_ids": input_ids, "past_key_values": past_key_values}
    """,
    apply=_apply,
    order=30,
    words=("prepare_inputs_for_generation",),
)

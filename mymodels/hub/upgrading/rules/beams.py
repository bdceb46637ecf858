"""A model's own `_reorder_cache` that reads tuples, given a `Cache` or None: beam search fails."""

import libcst as cst

from ..generating import knows_cache
from ..rule import Rewriter, Rule, rewrites, source_of, statements


class _Reorder(Rewriter):
    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        scope = self.context.scope(original_node)
        if original_node.name.value != "_reorder_cache" or len(scope) != 1 or not self.context.is_model(scope[0]):
            return updated_node
        names = [one.name.value for one in original_node.params.params if one.name.value not in ("self", "cls")]
        body = updated_node.body
        if len(names) != 2 or not isinstance(body, cst.IndentedBlock):
            return updated_node
        past, beams = names
        text, added = source_of(original_node.body), ""
        if f"{past} is None" not in text and f"{past} is not None" not in text:
            self.context.note(original_node, f"{scope[0]}._reorder_cache has nothing to reorder without a cache")
            added = f"if {past} is None:\n    return None\n"
        if ".reorder_cache" not in text and knows_cache(self.context):
            self.context.note(original_node, f"{scope[0]}._reorder_cache lets a Cache reorder itself")
            added += f'if hasattr({past}, "reorder_cache"):\n    {past}.reorder_cache({beams})\n    return {past}\n'
        if not added:
            return updated_node
        first = statements(added)
        docstring = 1 if original_node.get_docstring() is not None else 0
        steps = [*body.body[:docstring], *first, *body.body[docstring:]]
        return updated_node.with_changes(body=body.with_changes(body=steps))


_BEFORE = """
    from transformers import DynamicCache, PreTrainedModel


    class ToyForCausalLM(PreTrainedModel):
        def forward(self, input_ids, past_key_values=None):
            past_key_values = past_key_values or DynamicCache()
            return past_key_values.get_seq_length()

        @staticmethod
        def _reorder_cache(past, beam_idx):
{lines}            return tuple(tuple(state.index_select(0, beam_idx) for state in layer) for layer in past)
"""
_LINES = """
            if past is None:
                return None
            if hasattr(past, "reorder_cache"):
                past.reorder_cache(beam_idx)
                return past
"""

RULE = Rule(
    name="beams",
    reason="generate hands _reorder_cache a Cache, or None without a cache, which code for tuples of keys and values cannot read",
    releases="4.56 and newer",
    before=_BEFORE.format(lines=""),
    after=_BEFORE.format(lines=_LINES.lstrip("\n")),
    apply=rewrites(_Reorder, ("_reorder_cache",)),
    words=("_reorder_cache",),
    order=35,
)

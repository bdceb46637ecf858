"""A model's own `_reorder_cache` that reads tuples, given a `Cache` or None: beam search fails."""

import ast

import libcst as cst

from ..generating import generating, knows_cache, own_model
from ..rule import Context, Rewriter, Rule, rewrites, source_of, statements

_UPDATE = "_update_model_kwargs_for_generation"
_WITHOUT = """
@staticmethod
def _reorder_cache(past, beam_idx):
    if past is None:
        return None
    raise NotImplementedError("the state of this model cannot be reordered: pass use_cache=False for beams")
"""


def _keeping(context: Context) -> set[str]:
    """The classes that hand on a state by an update of their own, which no release takes for a `Cache`."""
    return {
        klass.name
        for klass in generating(context)
        if (own := klass.method(_UPDATE)) is not None and "cache_params" in ast.unparse(own)
    }


class _Reorder(Rewriter):
    def __init__(self, context: Context):
        super().__init__(context)
        self.keeping = _keeping(context)

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        scope = self.context.scope(original_node)
        if original_node.name.value != "_reorder_cache" or len(scope) != 1 or not self.context.is_model(scope[0]):
            return updated_node
        names = [one.name.value for one in original_node.params.params if one.name.value not in ("self", "cls")]
        body = updated_node.body
        star = original_node.params.star_arg
        if not names and isinstance(star, cst.Param):  # `*args`, passed on to a part
            names = [f"{star.name.value}[0]", f"{star.name.value}[1]"]
        if len(names) != 2 or not isinstance(body, cst.IndentedBlock):
            return updated_node
        past, beams = names
        text, added = source_of(original_node.body), ""
        if f"{past} is None" not in text and f"{past} is not None" not in text:
            self.context.note(original_node, f"{scope[0]}._reorder_cache has nothing to reorder without a cache")
            added = f"if {past} is None:\n    return None\n"
        if ".reorder_cache" not in text and (knows_cache(self.context) or past.endswith("[0]")):
            self.context.note(original_node, f"{scope[0]}._reorder_cache lets a Cache reorder itself")
            added += f'if hasattr({past}, "reorder_cache"):\n    {past}.reorder_cache({beams})\n    return {past}\n'
        if not added:
            return updated_node
        first = statements(added)
        docstring = 1 if original_node.get_docstring() is not None else 0
        steps = [*body.body[:docstring], *first, *body.body[docstring:]]
        return updated_node.with_changes(body=body.with_changes(body=steps))

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        """A class that hands on a state of its own, and has no `_reorder_cache`: beams go without that state."""
        klass, code = self.context.klass(original_node.name.value), self.context.code
        if klass is None or klass.name not in self.keeping or not isinstance(updated_node.body, cst.IndentedBlock):
            return updated_node
        if code.method(klass, "_reorder_cache") is not None or not own_model(code, klass):
            return updated_node
        self.context.note(original_node, f"{klass.name} takes beams without its state, which nothing can reorder")
        made = statements(_WITHOUT)[0].with_changes(leading_lines=[cst.EmptyLine(indent=False)])
        body = [*updated_node.body.body, made]
        return updated_node.with_changes(body=updated_node.body.with_changes(body=body))


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
    apply=rewrites(_Reorder, ("_reorder_cache", _UPDATE)),
    words=("_reorder_cache", _UPDATE),
    order=35,
)

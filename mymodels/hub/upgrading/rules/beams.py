"""`_reorder_cache`: one that reads tuples is given a `Cache` or None, or tuples are handed on and there is none."""

import ast
import re

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


_TUPLES = """
@staticmethod
def _reorder_cache(past, beam_idx):
    if past is None:
        return None
    if hasattr(past, "reorder_cache"):
        past.reorder_cache(beam_idx)
        return past
    return tuple(tuple(state.index_select(0, beam_idx.to(state.device)) for state in layer) for layer in past)
"""
_MAKES_TUPLES = re.compile(r"\b(to_legacy_cache|cache_to_tuples)\(")


def _handing_on_tuples(context: Context) -> set[str]:
    """The classes whose code makes tuples of the cache that it made itself, and that nothing reorders."""
    code = context.code
    if not any(_MAKES_TUPLES.search(file.text) for file in code.files.values()):
        return set()
    return {
        klass.name
        for klass in generating(context)
        if code.method(klass, "_reorder_cache") is None
        and ((own := code.method(klass, "generate")) is None or "super().generate(" in ast.unparse(own[1]))
    }


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
        self.tuples = _handing_on_tuples(context) - self.keeping

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
        """A class without `_reorder_cache`: a state of its own is not used with beams, tuples are reordered."""
        klass, code = self.context.klass(original_node.name.value), self.context.code
        if klass is None or klass.name not in self.keeping | self.tuples:
            return updated_node
        if code.method(klass, "_reorder_cache") is not None or not own_model(code, klass):
            return updated_node
        if not isinstance(updated_node.body, cst.IndentedBlock):
            return updated_node
        if klass.name in self.tuples:
            self.context.note(original_node, f"{klass.name} reorders the tuples that it makes of a cache")
        else:
            self.context.note(original_node, f"{klass.name} takes beams without its state, which nothing can reorder")
        made = statements(_TUPLES if klass.name in self.tuples else _WITHOUT)[0].with_changes(
            leading_lines=[cst.EmptyLine(indent=False)]
        )
        body = [*updated_node.body.body, made]
        return updated_node.with_changes(body=updated_node.body.with_changes(body=body))


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    words = ["_reorder_cache", _UPDATE, *(f"class {name}(" for name in _handing_on_tuples(context))]
    return rewrites(_Reorder, tuple(words))(tree, context)


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
    reason="generate hands _reorder_cache a Cache, or None without a cache, which code for tuples of keys and values cannot "
    "read; 5.0 makes no Cache, so that a model that hands on tuples needs one",
    releases="4.56 and newer",
    before=_BEFORE.format(lines=""),
    after=_BEFORE.format(lines=_LINES.lstrip("\n")),
    apply=_apply,
    words=("_reorder_cache", _UPDATE, "prepare_inputs_for_generation", "GenerationMixin"),
    order=35,
)

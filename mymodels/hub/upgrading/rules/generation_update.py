"""`_update_model_kwargs_for_generation` of the folder's own, and what it called."""

import libcst as cst

from ..generating import own_model
from ..rule import Rewriter, Rule, name_of, rewrites

_PAST = '''
def past_of(outputs):
    """The keys and values, or the state, that a model's outputs hold."""
    for name in ("past_key_values", "cache_params", "state", "mems", "past_buckets_states"):
        if outputs.get(name, None) is not None:
            return outputs[name]
    return None
'''
_NAMED_PAST = '''
def named_past_of(outputs):
    """The name and the value of the keys and values, or the state, that a model's outputs hold."""
    for name in ("past_key_values", "cache_params", "state", "mems", "past_buckets_states"):
        if outputs.get(name, None) is not None:
            return "cache_params" if name == "cache_params" else "past_key_values", outputs[name]
    return "past_key_values", None
'''
_NAME = "_update_model_kwargs_for_generation"


class _Update(Rewriter):
    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        if name_of(updated_node.func) != "self._extract_past_from_model_output" or not updated_node.args:
            return updated_node
        parent = self.context.parent(original_node)
        pair = isinstance(parent, cst.Assign) and isinstance(parent.targets[0].target, cst.Tuple)
        name, source = ("named_past_of", _NAMED_PAST) if pair else ("past_of", _PAST)
        self.context.define(name, source)
        self.context.note(original_node, "_extract_past_from_model_output, which is gone, is read from the outputs")
        outputs = updated_node.args[0].with_changes(comma=cst.MaybeSentinel.DEFAULT, keyword=None)
        return cst.Call(cst.Name(name), [outputs])

    def leave_Comparison(self, original_node: cst.Comparison, updated_node: cst.Comparison) -> cst.BaseExpression:
        """`"attention_mask" in model_kwargs`: the key is there with None if every token counts."""
        first = updated_node.comparisons[0]
        if len(updated_node.comparisons) != 1 or not isinstance(first.operator, cst.In):
            return updated_node
        if name_of(first.comparator) != "model_kwargs" or not isinstance(updated_node.left, cst.SimpleString):
            return updated_node
        if self.context.scope(original_node)[-1:] != [_NAME]:
            return updated_node
        key = updated_node.left.value
        self.context.note(original_node, f"{key} of model_kwargs may be None")
        return cst.parse_expression(f"model_kwargs.get({key}) is not None").with_changes(
            lpar=updated_node.lpar, rpar=updated_node.rpar
        )

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        scope = self.context.scope(original_node)
        klass = self.context.klass(scope[0]) if len(scope) == 1 else None
        given = updated_node.params
        if original_node.name.value != _NAME or klass is None or given.star_kwarg is not None:
            return updated_node
        mixin = any(root.endswith("GenerationMixin") for root in self.context.code.roots(klass))
        if not mixin and not own_model(self.context.code, klass):
            return updated_node
        if any(parameter.name.value == "num_new_tokens" for parameter in given.params):
            return updated_node
        self.context.note(original_node, f"{klass.name}.{_NAME} takes whatever further arguments generate passes")
        return updated_node.with_changes(params=given.with_changes(star_kwarg=cst.Param(cst.Name("kwargs"))))


RULE = Rule(
    name="generation update",
    reason="generate passes num_new_tokens and a mask of None, and _extract_past_from_model_output is gone",
    releases="4.56 and newer",
    before="""
        from transformers import GenerationMixin, PreTrainedModel


        class ToyForCausalLM(PreTrainedModel, GenerationMixin):
            def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False):
                model_kwargs["past_key_values"] = self._extract_past_from_model_output(outputs, standardize_cache_format=False)
                if "attention_mask" in model_kwargs:
                    model_kwargs["attention_mask"] = one_more(model_kwargs["attention_mask"])
                return model_kwargs
    """,
    after="""
        from transformers import GenerationMixin, PreTrainedModel

        # --- transformers releases: what differs between them, and what newer ones no longer have ---
        # [past_of]
        def past_of(outputs):
            \"\"\"The keys and values, or the state, that a model's outputs hold.\"\"\"
            for name in ("past_key_values", "cache_params", "state", "mems", "past_buckets_states"):
                if outputs.get(name, None) is not None:
                    return outputs[name]
            return None
        # --- end of transformers releases ---


        class ToyForCausalLM(PreTrainedModel, GenerationMixin):
            def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, **kwargs):
                model_kwargs["past_key_values"] = past_of(outputs)
                if model_kwargs.get("attention_mask") is not None:
                    model_kwargs["attention_mask"] = one_more(model_kwargs["attention_mask"])
                return model_kwargs
    """,
    apply=rewrites(_Update, (_NAME, "_extract_past_from_model_output")),
    words=(_NAME, "_extract_past_from_model_output"),
)

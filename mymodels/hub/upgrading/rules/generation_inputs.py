"""`prepare_inputs_for_generation` of the folder's own, which newer releases call in another way."""

import ast

import libcst as cst

from ...static.code_tree import Klass
from ..generating import Function, own_model, parameters
from ..rule import Context, Rewriter, Rule, rewrites, statements

_HELPER = '''
def as_generate_called_it(prepare):
    """Calls prepare_inputs_for_generation as transformers 4 does: the mask is always given, and no newer arguments."""
    import functools
    import inspect

    import torch

    taken = inspect.signature(prepare).parameters

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        ids = input_ids if input_ids is not None else kwargs.get("decoder_input_ids")
        new = kwargs.get("next_sequence_length")
        if new is not None and kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = kwargs["cache_position"][-new:]  # 5.3 passes those of the whole text
        for name in ("next_sequence_length", "is_first_iteration"):
            if name not in taken:
                kwargs.pop(name, None)
        decoder_only = not getattr(self.config, "is_encoder_decoder", False)
        plain = ids is not None and kwargs.get("inputs_embeds") is None
        if decoder_only and plain and kwargs.get("attention_mask", 0) is None:
            kwargs["attention_mask"] = torch.ones_like(ids)
        if "cache_position" not in taken:
            kwargs.pop("cache_position", None)
        elif ids is not None and kwargs.get("cache_position") is None and not args:
            cache = kwargs.get("past_key_values")
            held = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
            kwargs["cache_position"] = torch.arange(held, ids.shape[1], device=ids.device)
        return prepare(self, input_ids, *args, **kwargs)

    return prepare_inputs_for_generation
'''


def _needs_call(method: Function, forward: Function | None) -> str:
    """Why a method cannot be called as newer releases call it; "" if it can."""
    taken = parameters(method)
    if taken & {"next_sequence_length", "is_first_iteration"}:
        return ""
    if method.args.kwarg is None:
        return "it takes no further arguments"
    extra = method.args.kwarg.arg
    takes_all = forward is not None and forward.args.kwarg is not None
    for node in ast.walk(method):
        if isinstance(node, ast.Call):
            if not takes_all and any(
                k.arg is None and isinstance(k.value, ast.Name) and k.value.id == extra for k in node.keywords
            ):
                return "it passes on whatever it is given"
            if not takes_all and any(isinstance(a, ast.Name) and a.id == extra for a in node.args):
                return "it passes on whatever it is given"
        elif isinstance(node, ast.Dict) and any(
            key is None and isinstance(value, ast.Name) and value.id == extra
            for key, value in zip(node.keys, node.values)
        ):
            return "it passes on whatever it is given"
        elif isinstance(node, ast.Subscript) and ast.unparse(node) == f"{extra}['attention_mask']":
            return "it needs an attention mask"
    if "cache_position" in taken and "cache_position" in _used(method):
        return "it slices by cache_position"
    reads = any(isinstance(n, ast.Attribute) and ast.unparse(n.value) == "attention_mask" for n in ast.walk(method))
    if "attention_mask" in taken and reads and "attention_mask is not None" not in ast.unparse(method):
        return "it needs an attention mask"
    return ""


def _used(method: Function) -> set[str]:
    """Names with which something is computed, not only passed on."""
    found = set()
    for node in ast.walk(method):
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            found |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    return found


def _makes_positions(context: Context, klass: Klass, method: Function) -> bool:
    """Whether positions are made only if none are given, and those that are given are not cut to the new tokens."""
    forward = context.code.method(klass, "forward")
    if forward is None or "position_ids" not in parameters(forward[1]):
        return False
    if context.code.method(klass, "_prepare_position_ids_for_generation") is not None:
        return False
    text = ast.unparse(method)
    if "position_ids" not in text or parameters(method) & {"next_sequence_length", "is_first_iteration"}:
        return False
    branches = [n for n in ast.walk(method) if isinstance(n, ast.If) and "position_ids is None" in ast.unparse(n.test)]
    inside = {id(inner) for branch in branches for inner in ast.walk(branch)}
    cut_outside = any(
        isinstance(n, ast.Subscript) and ast.unparse(n.value) == "position_ids" and id(n) not in inside
        for n in ast.walk(method)
    )
    return not branches or not cut_outside or "cumsum" not in text


class _Inputs(Rewriter):
    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        klass = self.context.klass(original_node.name.value)
        method = klass.method("prepare_inputs_for_generation") if klass is not None else None
        if klass is None or method is None or not own_model(self.context.code, klass):
            return updated_node
        if not isinstance(updated_node.body, cst.IndentedBlock):
            return updated_node
        body = [*updated_node.body.body]
        at = next(
            i
            for i, step in enumerate(body)
            if isinstance(step, cst.FunctionDef) and step.name.value == "prepare_inputs_for_generation"
        )
        forward = self.context.code.method(klass, "forward")
        why = _needs_call(method, forward[1] if forward is not None else None)
        found = body[at]
        assert isinstance(found, cst.FunctionDef)
        if why and not found.decorators:
            self.context.define("as_generate_called_it", _HELPER)
            where = method.lineno
            self.context.note(where, f"{klass.name}.prepare_inputs_for_generation is called as before: {why}")
            body[at] = found = found.with_changes(decorators=[cst.Decorator(cst.Name("as_generate_called_it"))])
        if _makes_positions(self.context, klass, method):
            self.context.note(
                method.lineno, f"{klass.name} makes its own position ids while it generates, none are handed to it"
            )
            text = (
                "def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):\n"
                "    return None  # prepare_inputs_for_generation makes them\n"
            )
            made = statements(text)[0].with_changes(leading_lines=found.leading_lines or [cst.EmptyLine(indent=False)])
            if not found.leading_lines:
                body[at] = found.with_changes(leading_lines=[cst.EmptyLine(indent=False)])
            if at == 0:
                made = made.with_changes(leading_lines=[])
            body.insert(at, made)
        return updated_node.with_changes(body=updated_node.body.with_changes(body=body))


RULE = Rule(
    name="generation inputs",
    reason="generate makes position ids for the whole text, leaves out a mask of ones, and passes new arguments",
    releases="5.0 and newer",
    before="""
        from transformers import GenerationMixin, PreTrainedModel


        class ToyForCausalLM(PreTrainedModel, GenerationMixin):
            def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None):
                return input_ids

            def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
                position_ids = kwargs.get("position_ids", None)
                if attention_mask is not None and position_ids is None:
                    position_ids = (attention_mask.long().cumsum(-1) - 1)[:, -1:]
                return {"input_ids": input_ids[:, -1:], "position_ids": position_ids}
    """,
    after="""
        from transformers import GenerationMixin, PreTrainedModel


        class ToyForCausalLM(PreTrainedModel, GenerationMixin):
            def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None):
                return input_ids

            def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
                return None  # prepare_inputs_for_generation makes them

            def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
                position_ids = kwargs.get("position_ids", None)
                if attention_mask is not None and position_ids is None:
                    position_ids = (attention_mask.long().cumsum(-1) - 1)[:, -1:]
                return {"input_ids": input_ids[:, -1:], "position_ids": position_ids}
    """,
    apply=rewrites(_Inputs, ("prepare_inputs_for_generation",)),
    words=("prepare_inputs_for_generation",),
)

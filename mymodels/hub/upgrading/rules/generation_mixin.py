"""`GenerationMixin` as a base of models that generate."""

import libcst as cst

from ..rule import Context, Rewriter, Rule, rewrites, statements

_METHODS = ("prepare_inputs_for_generation", "generate")


class _Bases(Rewriter):
    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        name, code = original_node.name.value, self.context.code
        klass = self.context.klass(name)
        if klass is None or not code.is_model(klass) or self.context.scope(original_node):
            return updated_node
        if not any(klass.method(method) for method in _METHODS):
            return updated_node
        if any("GenerationMixin" in root or "For" in root for root in code.roots(klass)):
            return updated_node
        self.context.note(original_node, f"{name} derives from GenerationMixin")
        bases = [*updated_node.bases[:-1], updated_node.bases[-1].with_changes(comma=_COMMA), cst.Arg(_MIXIN)]
        return updated_node.with_changes(bases=bases)


_MIXIN, _COMMA = cst.Name("GenerationMixin"), cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    changed = rewrites(_Bases, ("PreTrainedModel", *_METHODS))(tree, context)
    if changed is tree or "GenerationMixin" in context.file.names:
        return changed
    body = list(changed.body)
    imports = [
        number
        for number, step in enumerate(body)
        if isinstance(step, cst.SimpleStatementLine) and isinstance(step.body[0], (cst.Import, cst.ImportFrom))
    ]
    at = imports[-1] + 1 if imports else 0
    line = statements("from transformers.generation import GenerationMixin\n")
    return changed.with_changes(body=[*body[:at], *line, *body[at:]])


_BEFORE = """
    from transformers import PreTrainedModel
{line}

    class ToyForCausalLM(PreTrainedModel{base}):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            return {{"input_ids": input_ids}}
"""

RULE = Rule(
    name="GenerationMixin",
    reason="PreTrainedModel no longer brings generate along: a model that generates derives from GenerationMixin itself",
    releases="4.50 and newer",
    before=_BEFORE.format(line="", base=""),
    after=_BEFORE.format(line="    from transformers.generation import GenerationMixin\n", base=", GenerationMixin"),
    apply=_apply,
    words=_METHODS,
)

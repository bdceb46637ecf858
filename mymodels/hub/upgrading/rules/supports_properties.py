"""`_supports_…` properties that ask a part of the model: transformers asks them before the part is there."""

import libcst as cst
import libcst.matchers as m

from ..embeddings import class_of_part, parts_of
from ..rule import Rewriter, Rule, rewrites, source_of, statements

_ASKS_PART = m.Return(
    value=m.Attribute(
        value=m.Attribute(value=m.Name("self"), attr=m.Name()),
        attr=m.Name(value=m.MatchIfTrue(lambda n: n.startswith("_supports_"))),
    )
)


class _Properties(Rewriter):
    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        name, scope = original_node.name.value, self.context.scope(original_node)
        if not name.startswith("_supports_") or len(scope) != 1 or not self.context.is_model(scope[0]):
            return updated_node
        body = updated_node.body
        if not isinstance(body, cst.IndentedBlock) or not isinstance(body.body[-1], cst.SimpleStatementLine):
            return updated_node
        last = body.body[-1].body[0]
        if not m.matches(last, _ASKS_PART):
            return updated_node
        value = last.value  # type: ignore[attr-defined]
        part, asked = value.value.attr.value, source_of(value.attr)  # type: ignore[attr-defined]
        self.context.note(original_node, f"{scope[0]}.{name} answers also before self.{part} is made")
        before = self._before(scope[0], part, asked)
        line = statements(f'return getattr(getattr(self, "{part}", None), "{asked}", {before})\n')
        return updated_node.with_changes(body=body.with_changes(body=[*body.body[:-1], *line]))

    def _before(self, name: str, part: str, asked: str) -> str:
        """What to answer before the part is made: what its class says, or, for one of transformers', yes.

        Older releases asked the class, where the property itself counts as yes.
        """
        klass, code = self.context.klass(name), self.context.code
        made = class_of_part(code, klass, parts_of(code, klass).get(part)) if klass is not None else None
        if made is None or self.context.klass(made.name) is None:
            return "True"
        return f'getattr({made.name}, "{asked}", False)'


_BEFORE = """
    from transformers import PreTrainedModel


    class ToyModel(PreTrainedModel):
        @property
        def _supports_sdpa(self):
            return {value}
"""

RULE = Rule(
    name="_supports properties",
    reason="transformers asks _supports_sdpa and the like in the constructor, before the part that answers is made",
    releases="4.56 and newer",
    before=_BEFORE.format(value="self.language_model._supports_sdpa"),
    after=_BEFORE.format(value='getattr(getattr(self, "language_model", None), "_supports_sdpa", True)'),
    apply=rewrites(_Properties, ("def _supports_",)),
    words=("def _supports_",),
)

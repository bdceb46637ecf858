"""`pad` and `_pad` of the folder's own tokenizers, which are given a `padding_side`."""

import libcst as cst

from ..rule import Rewriter, Rule, name_of, rewrites

_METHODS = ("pad", "_pad")
_PARAMETER = cst.Param(
    cst.Name("padding_side"),
    default=cst.Name("None"),
    equal=cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace("")),
)


class _Side(Rewriter):
    def __init__(self, context):  # type: ignore[no-untyped-def]  # as Rewriter
        super().__init__(context)
        self.inside = 0

    def concerned(self, node: cst.FunctionDef) -> bool:
        """Whether it is a method of a tokenizer that pads and takes no padding_side."""
        if node.name.value not in _METHODS or node.params.star_kwarg is not None:
            return False
        scope = self.context.scope(node)
        klass = self.context.klass(scope[0]) if len(scope) == 1 else None
        if klass is None or not any("Tokenizer" in root for root in self.context.code.roots(klass)):
            return False
        params = [*node.params.posonly_params, *node.params.params, *node.params.kwonly_params]
        return all(parameter.name.value != "padding_side" for parameter in params)

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self.inside += self.concerned(node)

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        if not self.concerned(original_node):
            return updated_node
        self.inside -= 1
        name = self.context.scope(original_node)[0]
        self.context.note(
            original_node, f"{name}.{original_node.name.value} takes a padding_side, else the tokenizer's own"
        )
        given = updated_node.params
        if given.params and isinstance(given.params[-1].comma, cst.Comma):
            last = given.params[-1]  # keeps how the author has laid out the parameters
            made = _PARAMETER.with_changes(comma=last.comma)
            between = given.params[-2].comma if len(given.params) > 1 else last.comma
            params = [*given.params[:-1], last.with_changes(comma=between), made]
        else:
            params = [*given.params, _PARAMETER]
        return updated_node.with_changes(params=given.with_changes(params=params))

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        if not self.inside or name_of(original_node) != "self.padding_side":
            return updated_node
        if isinstance(self.context.parent(original_node), cst.AssignTarget):
            return updated_node
        return cst.parse_expression("(padding_side or self.padding_side)")


RULE = Rule(
    name="padding_side",
    reason="tokenizers hand padding_side to _pad, which raises where it takes none",
    releases="4.56 and newer",
    before="""
        from transformers import PreTrainedTokenizer


        class ToyTokenizer(PreTrainedTokenizer):
            def _pad(self, encoded_inputs, max_length=None, padding_strategy=None, return_attention_mask=None):
                assert self.padding_side == "left"
                return encoded_inputs
    """,
    after="""
        from transformers import PreTrainedTokenizer


        class ToyTokenizer(PreTrainedTokenizer):
            def _pad(self, encoded_inputs, max_length=None, padding_strategy=None, return_attention_mask=None, padding_side=None):
                assert (padding_side or self.padding_side) == "left"
                return encoded_inputs
    """,
    apply=rewrites(_Side, ("def pad(", "def _pad(")),
    words=("def pad(", "def _pad("),
)

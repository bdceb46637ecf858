"""Tied weights under transformers 5.3, which alone leaves them uninitialised in custom code, and reports nothing."""

import ast

import libcst as cst

from ..generating import own_model
from ..rule import Context, Rewriter, Rule, rewrites, source_of

_HELPER = '''
def tied_in_5_3(model_class):
    """For transformers 5.3 alone: it does not count the tied weights of custom code as missing, and never fills them."""
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) == (5, 3):
        tie = model_class.tie_weights

        def tie_weights(self, missing_keys=None, *args, **kwargs):
            if missing_keys is not None:
                missing_keys.update(n for n in self.all_tied_weights_keys if self.get_parameter(n).is_meta)
            return tie(self, missing_keys, *args, **kwargs)

        model_class.tie_weights = tie_weights
    return model_class
'''


class _Decorate(Rewriter):
    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        klass, code = self.context.klass(original_node.name.value), self.context.code
        if klass is None or self.context.scope(original_node) or not own_model(code, klass):
            return updated_node
        ties = klass.value("_tied_weights_keys")
        if not isinstance(ties, ast.Dict) or not ties.keys or code.method(klass, "tie_weights") is not None:
            return updated_node
        if any(source_of(one.decorator) == "tied_in_5_3" for one in original_node.decorators):
            return updated_node
        self.context.define("tied_in_5_3", _HELPER)
        self.context.note(original_node, f"the tied weights of {klass.name} are filled under transformers 5.3 too")
        decorator = cst.Decorator(cst.Name("tied_in_5_3"))
        return updated_node.with_changes(decorators=[decorator, *updated_node.decorators])


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    first, last = context.releases
    bridged = any("(5, 3)" in file.text for file in context.code.files.values())  # by the folder itself
    if not first <= (5, 3) <= last or bridged:
        return tree
    return rewrites(_Decorate, ("_tied_weights_keys",))(tree, context)


_BEFORE = """
    from torch import nn
    from transformers import PreTrainedModel
{block}

{decorator}    class ToyForCausalLM(PreTrainedModel):
        _tied_weights_keys = {{"lm_head.weight": "wte.weight"}}

        def __init__(self, config):
            super().__init__(config)
            self.wte = nn.Embedding(8, 4)
            self.lm_head = nn.Linear(4, 8, bias=False)
            self.post_init()
"""
_BLOCK = """
    # --- transformers releases: what differs between them, and what newer ones no longer have ---
    # [tied_in_5_3]
{source}
    # --- end of transformers releases ---
"""
_SOURCE = "\n".join(f"    {line}" if line else "" for line in _HELPER.strip("\n").split("\n"))

RULE = Rule(
    name="ties in 5.3",
    reason="transformers 5.3 leaves the tied weights of custom code uninitialised",
    releases="5.3",
    before=_BEFORE.format(block="", decorator=""),
    after=_BEFORE.format(block=_BLOCK.format(source=_SOURCE), decorator="    @tied_in_5_3\n"),
    apply=_apply,
    words=("_tied_weights_keys",),
    order=70,
)

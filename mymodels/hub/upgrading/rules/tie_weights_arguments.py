"""A model's own `tie_weights` takes what transformers 5 passes to it."""

import libcst as cst
import libcst.matchers as m

from ..rule import Rewriter, Rule, rewrites, statements

_PARENT = m.Call(func=m.Attribute(value=m.Call(func=m.Name("super")), attr=m.Name("tie_weights")))


_DISCARD = '''
def discard_tied(model, missing_keys):
    """Counts a parameter as not missing if it is another, loaded one under a second name."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    for group in names.values() if missing_keys else ():
        if group - missing_keys:
            missing_keys.difference_update(group)
'''


class _Arguments(Rewriter):
    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        scope = self.context.scope(original_node)
        if original_node.name.value != "tie_weights" or len(scope) != 1 or not self.context.is_model(scope[0]):
            return updated_node
        parameters = updated_node.params
        if parameters.star_kwarg is not None or any(p.name.value == "missing_keys" for p in parameters.params):
            return updated_node
        self.context.note(original_node, f"{scope[0]}.tie_weights takes the arguments that transformers 5 passes")
        taking = parameters.with_changes(star_kwarg=cst.Param(cst.Name("kwargs")))
        if not m.findall(original_node, _PARENT) and isinstance(updated_node.body, cst.IndentedBlock):
            self.context.define("discard_tied", _DISCARD)
            last = statements('discard_tied(self, kwargs.get("missing_keys"))\n')
            body = updated_node.body.with_changes(body=[*updated_node.body.body, *last])
            return updated_node.with_changes(params=taking, body=body)
        changed = updated_node.with_changes(params=taking).visit(_PassOn())
        assert isinstance(changed, cst.FunctionDef)
        return changed


class _PassOn(cst.CSTTransformer):
    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if m.matches(original_node, _PARENT) and not any(argument.star == "**" for argument in original_node.args):
            return updated_node.with_changes(args=[*updated_node.args, cst.Arg(cst.Name("kwargs"), star="**")])
        return updated_node


_BEFORE = """
    from transformers import PreTrainedModel


    class ToyForCausalLM(PreTrainedModel):
        def tie_weights({arguments}):
            super().tie_weights({passed})
            self.lm_head.weight = self.model.wte.weight
"""

RULE = Rule(
    name="tie_weights",
    reason="transformers 5 passes missing_keys and recompute_mapping to tie_weights while it loads",
    releases="5.0 and newer",
    before=_BEFORE.format(arguments="self", passed=""),
    after=_BEFORE.format(arguments="self, **kwargs", passed="**kwargs"),
    apply=rewrites(_Arguments, ("def tie_weights",)),
    words=("def tie_weights",),
)

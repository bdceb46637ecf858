"""`self.post_init()` at the end of a model's `__init__`."""

import ast

import libcst as cst

from ...static.check_model import served
from ...static.code_tree import calls, is_self
from ..rule import Context, Rule, statements


def _lacking(context: Context) -> dict[str, int]:
    """The classes of this file whose `__init__` never calls post_init, nor does an ancestor's, with its line."""
    found: dict[str, int] = {}
    for klass in served(context.folder, context.code):
        inits = [m for k in context.code.lineage(klass) if (m := k.method("__init__")) is not None]
        own = klass.method("__init__")
        if own is None or klass.file.name != context.file.name:
            continue
        if not any(is_self(call.func, "post_init") for init in inits for call in calls(init)):
            found[klass.name] = own.lineno
    return found


class _AddCall(cst.CSTTransformer):
    def __init__(self, context: Context, lacking: dict[str, int]):
        super().__init__()
        self.context, self.lacking = context, lacking

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        scope = self.context.scope(original_node)
        if original_node.name.value != "__init__" or len(scope) != 1 or scope[0] not in self.lacking:
            return updated_node
        body = updated_node.body
        if not isinstance(body, cst.IndentedBlock):
            return updated_node
        old = [step for step in body.body if not _calls_init_weights(step)]
        if len(old) < len(body.body):
            what = f"{scope[0]}.__init__ ends with self.post_init(), which calls init_weights as far as it is needed"
        else:
            what = f"{scope[0]}.__init__ ends with self.post_init()"
        self.context.note(original_node, what)
        return updated_node.with_changes(body=body.with_changes(body=[*old, *statements("self.post_init()\n")]))


def _calls_init_weights(step: cst.CSTNode) -> bool:
    """`self.init_weights()` alone: what `post_init` took the place of."""
    return isinstance(step, cst.SimpleStatementLine) and ast.unparse(
        ast.parse(cst.Module(body=[step]).code.strip())
    ).strip() in ("self.init_weights()", "self.apply(self._init_weights)")


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    lacking = _lacking(context)
    return tree.visit(_AddCall(context, lacking)) if lacking else tree


RULE = Rule(
    name="post_init",
    reason="transformers 5 prepares ties and plans in post_init(), without which it raises while it loads",
    releases="5.0 and newer",
    before="""
        from torch import nn
        from transformers import PreTrainedModel


        class ToyModel(PreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
                self.init_weights()
    """,
    after="""
        from torch import nn
        from transformers import PreTrainedModel


        class ToyModel(PreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
                self.post_init()
    """,
    apply=_apply,
    words=("__init__",),
)

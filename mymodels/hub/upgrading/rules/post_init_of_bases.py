"""`post_init()` of a base class, run before a subclass has made the part that it ties: building the model raises."""

import ast

import libcst as cst

from ...static.code_tree import Klass, calls, is_self
from ..rule import Context, Rewriter, Rule, source_of, statements


def _posts(klass: Klass) -> bool:
    init = klass.method("__init__")
    return init is not None and any(is_self(call.func, "post_init") for call in calls(init))


def _ties_own_part(klass: Klass) -> bool:
    """Whether a class ties a part that its own constructor makes."""
    ties, init = klass.value("_tied_weights_keys"), klass.method("__init__")
    if not isinstance(ties, ast.Dict) or init is None:
        return False
    made = {
        n.attr for n in ast.walk(init) if isinstance(n, ast.Attribute) and is_self(n) and isinstance(n.ctx, ast.Store)
    }
    return any(isinstance(key, ast.Constant) and str(key.value).partition(".")[0] in made for key in ties.keys)


def _early(context: Context) -> set[str]:
    """The bases of this file whose post_init comes too early for a subclass, and that may leave it to all of them."""
    found = set()
    for base in context.code.classes:
        if base.file.name != context.file.name or not context.code.is_model(base) or not _posts(base):
            continue
        below = [
            klass
            for klass in context.code.classes
            if klass.method("__init__") is not None
            and any(one.node is base.node for one in context.code.lineage(klass)[1:])
        ]
        if any(map(_ties_own_part, below)) and all(map(_posts, below)):
            found.add(base.name)
    return found


class _Later(Rewriter):
    def __init__(self, context: Context, early: set[str]):
        super().__init__(context)
        self.early = early

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement:
        scope = self.context.scope(original_node)
        if scope[1:] != ["__init__"] or scope[0] not in self.early or len(original_node.body) != 1:
            return updated_node
        parent = self.context.parent(self.context.parent(original_node) or original_node)
        if source_of(original_node.body[0]).strip() != "self.post_init()" or not isinstance(parent, cst.FunctionDef):
            return updated_node
        self.context.note(original_node, f"{scope[0]} leaves post_init to a subclass that makes more parts")
        text = f"if type(self).__init__ is {scope[0]}.__init__:  # a subclass calls it itself\n    self.post_init()\n"
        return statements(text)[0].with_changes(leading_lines=updated_node.leading_lines)


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    early = _early(context)
    if not early:
        return tree
    changed = tree.visit(_Later(context, early))
    return changed if context.edits else tree


_BEFORE = """
    from torch import nn
    from transformers import PreTrainedModel


    class ToyModel(PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.shared = nn.Embedding(8, 4)
{call}

    class ToyForGeneration(ToyModel):
        _tied_weights_keys = {{"lm_head.weight": "shared.weight"}}

        def __init__(self, config):
            super().__init__(config)
            self.lm_head = nn.Linear(4, 8, bias=False)
            self.post_init()
"""

RULE = Rule(
    name="post_init of bases",
    reason="transformers 5 ties in post_init, which a base class calls before the subclass has made what it ties",
    releases="5.0 and newer",
    before=_BEFORE.format(call="            self.post_init()\n"),
    after=_BEFORE.format(
        call="            if type(self).__init__ is ToyModel.__init__:  # a subclass calls it itself\n"
        "                self.post_init()\n"
    ),
    apply=_apply,
    words=("post_init",),
    order=65,
)

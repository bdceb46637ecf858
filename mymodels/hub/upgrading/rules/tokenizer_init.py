"""Attributes of the folder's own tokenizers that the constructor of the base class already needs."""

import ast

import libcst as cst

from ...static.code_tree import Klass, is_self
from ..rule import Context, Rewriter, Rule, rewrites

_READ = ("vocab_size", "get_vocab", "__len__", "_convert_token_to_id", "_convert_id_to_token", "convert_tokens_to_ids")


def _needed(context: Context, klass: Klass) -> set[str]:
    """The attributes that the base class reads, through the methods that it calls, while it is constructed."""
    found: set[str] = set()
    waiting, seen = list(_READ), set()
    while waiting:
        name = waiting.pop()
        method = context.code.method(klass, name)
        if name in seen or method is None:
            continue
        seen.add(name)
        for node in ast.walk(method[1]):
            if isinstance(node, ast.Attribute) and is_self(node) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
                waiting.append(node.attr)
    return found


def _stored(step: ast.stmt) -> set[str]:
    return {
        n.attr for n in ast.walk(step) if isinstance(n, ast.Attribute) and is_self(n) and isinstance(n.ctx, ast.Store)
    }


def _loaded(step: ast.stmt) -> set[str]:
    return {
        n.attr for n in ast.walk(step) if isinstance(n, ast.Attribute) and is_self(n) and isinstance(n.ctx, ast.Load)
    }


def _own_methods_safe(context: Context, klass: Klass, names: set[str], known: set[str]) -> bool:
    """Whether these are attributes set already, or methods of the folder that read no others."""
    for name in names - known:
        method = context.code.method(klass, name)
        if method is None or not _loaded(method[1]) <= known | {name}:
            return False
    return True


class _Order(Rewriter):
    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        scope = self.context.scope(original_node)
        klass = self.context.klass(scope[0]) if len(scope) == 1 and original_node.name.value == "__init__" else None
        init = klass.method("__init__") if klass is not None else None
        body = updated_node.body
        if klass is None or init is None or not isinstance(body, cst.IndentedBlock):
            return updated_node
        roots = self.context.code.roots(klass)
        if not any(root.endswith("PreTrainedTokenizer") for root in roots) or len(init.body) != len(body.body):
            return updated_node
        call = next((i for i, step in enumerate(init.body) if _calls_base(step)), None)
        if call is None:
            return updated_node
        known = set().union(*(_stored(step) for step in init.body[:call])) if call else set()
        needed = _needed(self.context, klass) - known
        last = max((i for i, s in enumerate(init.body) if i > call and _stored(s) & needed), default=None)
        if last is None:
            return updated_node
        moved, stay = [], []
        for i in range(call + 1, last + 1):
            step = init.body[i]
            if _own_methods_safe(self.context, klass, _loaded(step) - _stored(step), known):
                known |= _stored(step)
                moved.append(i)
            else:
                stay.append(i)
        if any(_stored(init.body[i]) & needed for i in stay):
            self.context.refuse(
                original_node,
                f"{klass.name} sets what its base class needs after super().__init__, from what that sets",
            )
            return updated_node
        names = sorted(set().union(*(_stored(init.body[i]) for i in moved)))
        self.context.note(original_node, f"{klass.name} sets {', '.join(names)} before super().__init__ needs them")
        steps = [*body.body]
        order = [*range(call), *moved, call, *stay, *range(last + 1, len(steps))]
        return updated_node.with_changes(body=body.with_changes(body=[steps[i] for i in order]))


def _calls_base(step: ast.stmt) -> bool:
    return (
        isinstance(step, ast.Expr)
        and isinstance(step.value, ast.Call)
        and isinstance(step.value.func, ast.Attribute)
        and step.value.func.attr == "__init__"
    )


RULE = Rule(
    name="tokenizer order",
    reason="the base class asks for the vocabulary in its constructor, before the tokenizer has set it",
    releases="4.34 and newer",
    before="""
        from transformers import PreTrainedTokenizer


        class ToyTokenizer(PreTrainedTokenizer):
            def __init__(self, vocab_file, unk_token="<unk>", **kwargs):
                super().__init__(unk_token=unk_token, **kwargs)
                self.vocab_file = vocab_file
                self.ids = self.load()

            def load(self):
                return {line.strip(): i for i, line in enumerate(open(self.vocab_file))}

            @property
            def vocab_size(self):
                return len(self.ids)

            def get_vocab(self):
                return dict(self.ids)
    """,
    after="""
        from transformers import PreTrainedTokenizer


        class ToyTokenizer(PreTrainedTokenizer):
            def __init__(self, vocab_file, unk_token="<unk>", **kwargs):
                self.vocab_file = vocab_file
                self.ids = self.load()
                super().__init__(unk_token=unk_token, **kwargs)

            def load(self):
                return {line.strip(): i for i, line in enumerate(open(self.vocab_file))}

            @property
            def vocab_size(self):
                return len(self.ids)

            def get_vocab(self):
                return dict(self.ids)
    """,
    apply=rewrites(_Order, ("PreTrainedTokenizer",)),
    words=("PreTrainedTokenizer",),
)

"""`get_output_embeddings` that is missing or returns None although the model has a head."""

import re
from typing import Any

import libcst as cst

from ...static.check_model import live_code
from ...static.code_tree import Code, Klass
from ...static.headers import tensor_headers
from ...static.repo_snapshot import Folder
from ..embeddings import tied_by_hand, ties_by_config
from ..generating import own_model
from ..rule import Context, Report, Rewriter, Rule, rewrites, statements
from ..vocabulary import Vocabulary, gives_none, used_head

_GET, _SET = "get_output_embeddings", "set_output_embeddings"
_DEFAULT = "lm_head"  # what transformers 4.56 and newer find by themselves


def _unnamed_head(folder: Folder, code: Code, klass: Klass) -> str:
    """The path of a model's head if the code does not tell transformers about it, or ""."""
    getter = code.method(klass, _GET)
    if not own_model(code, klass) or (getter is not None and not gives_none(getter[1])):
        return ""
    head = used_head(code, klass, Vocabulary(code, klass, tensor_headers(folder)))
    return head.path if head is not None else ""


def _is_untied(folder: Folder, code: Code, klass: Klass, head: str) -> bool:
    """Whether the config says ties, the code makes none, and the checkpoint holds a head of its own."""
    return (
        ties_by_config(code, folder.config)
        and f"{head}.weight" in tensor_headers(folder)
        and not tied_by_hand(code, klass, f"{head}.weight")
    )


def _configure(values: dict[str, Any], folder: Folder, report: Report) -> dict[str, Any]:
    code = live_code(folder)
    heads = {klass.name: (klass, head) for klass in code.classes if (head := _unnamed_head(folder, code, klass))}
    getters = [code.method(klass, _GET) for klass in code.classes if own_model(code, klass)]
    if any(getter is not None and not gives_none(getter[1]) for getter in getters):
        return values  # a class with a named head goes by the same setting
    for name, (klass, head) in heads.items():
        if _is_untied(folder, code, klass, head) and _saved_before_default(folder, head):
            report(f"tie_word_embeddings is false: the checkpoint holds {head}.weight, which {name} never tied")
            return {**values, "tie_word_embeddings": False}
    return values


def _saved_before_default(folder: Folder, head: str) -> bool:
    """Whether the code is older than the releases that find this head by themselves, and tie it."""
    version = re.match(r"4\.(\d+)", str(folder.config.get("transformers_version", "")))
    return head != _DEFAULT or (version is not None and int(version[1]) < 56)


class _Named(Rewriter):
    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        klass, body = self.context.klass(original_node.name.value), updated_node.body
        if klass is None or self.context.scope(original_node) or not isinstance(body, cst.IndentedBlock):
            return updated_node
        head = self._head(klass)
        code = self.context.code
        if not head or any(self._head(base) == head for base in code.lineage(klass)[1:]):
            return updated_node
        why = "returns" if code.method(klass, _GET) is None else "returns its head,"
        self.context.note(original_node, f"{klass.name}.{_GET} {why} self.{head}")
        texts = {_GET: f"def {_GET}(self):\n    return self.{head}\n"}
        setter = code.method(klass, _SET)
        if setter is None or gives_none(setter[1]):
            texts[_SET] = f"def {_SET}(self, new_embeddings):\n    self.{head} = new_embeddings\n"
        return updated_node.with_changes(body=body.with_changes(body=_with_methods([*body.body], texts)))

    def _head(self, klass: Klass) -> str:
        context = self.context
        head = _unnamed_head(context.folder, context.code, klass)
        by_itself = head == _DEFAULT and context.code.method(klass, _GET) is None
        ties = ties_by_config(context.code, context.config) and not tied_by_hand(context.code, klass, f"{head}.weight")
        return "" if by_itself or ties else head


def _with_methods(steps: list[Any], texts: dict[str, str]) -> list[Any]:
    """A class's body with these methods: in place of those of the same name, or below the other methods for embeddings."""
    for name, text in texts.items():
        names = [step.name.value if isinstance(step, cst.FunctionDef) else "" for step in steps]
        made = statements(text)[0]
        if name in names:
            old = steps[names.index(name)]
            steps[names.index(name)] = made.with_changes(leading_lines=old.leading_lines)
            continue
        above = [i for i, n in enumerate(names) if n == "__init__" or n.endswith("_embeddings")]
        at = above[-1] + 1 if above else len(steps)
        steps.insert(at, made.with_changes(leading_lines=[cst.EmptyLine(indent=False)]))
    return steps


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    return rewrites(_Named, ("def forward",))(tree, context)


_BEFORE = """
    from torch import nn
    from transformers import PreTrainedModel


    class ToyForCausalLM(PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.wte = nn.Embedding(config.padded_vocab_size, config.hidden_size)
            self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size)
            self.post_init()

        def get_input_embeddings(self):
            return self.wte
{methods}
        def forward(self, input_ids):
            return self.output_layer(self.wte(input_ids))
"""
_METHODS = """
        def get_output_embeddings(self):
            return self.output_layer

        def set_output_embeddings(self, new_embeddings):
            self.output_layer = new_embeddings
"""

RULE = Rule(
    name="output embeddings",
    reason="resize_token_embeddings leaves a head as it is that get_output_embeddings does not return",
    releases="every release; they find a head by themselves that is called lm_head",
    before=_BEFORE.format(methods=""),
    after=_BEFORE.format(methods=_METHODS),
    config={"tie_word_embeddings": False},
    apply=_apply,
    configure=_configure,
    words=("Linear",),
)

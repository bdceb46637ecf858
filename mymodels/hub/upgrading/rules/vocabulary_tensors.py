"""Biases with one value a token, and settings of the config, that `resize_token_embeddings` leaves at the old size."""

import ast
import re

import libcst as cst

from ...static.code_tree import Code, Klass, constant
from ...static.headers import tensor_headers
from ..embeddings import ties_by_config
from ..generating import own_model
from ..rule import Context, Rewriter, Rule, rewrites, statements
from ..vocabulary import Vocabulary, is_kind, made, output_embeddings

_RESIZE = "resize_token_embeddings"
_HELPER = '''
def fit_to_embeddings(model, embeddings, tensors=(), settings=()):
    """Gives tensors with one value a token, and settings that hold the number of tokens, the size of the embeddings."""
    import torch

    count = embeddings.weight.shape[0]
    for name in tensors:
        path, _, last = name.rpartition(".")
        tensor = getattr(model.get_submodule(path), last)
        tensor.data = torch.nn.functional.pad(tensor.data, (0, count - tensor.shape[-1]))
    for name in settings:
        setattr(model.config, name, count)
    return embeddings
'''
_BY_TRANSFORMERS = ("super().tie_weights", "_tie_or_clone_weights", "_adjust_bias", ".pad(")


def _left(context: Context, klass: Klass) -> tuple[list[str], list[str]]:
    """The tensors and the settings that keep their size when the vocabulary is extended."""
    code = context.code
    if not own_model(code, klass) or code.method(klass, _RESIZE) is not None:
        return [], []
    head = output_embeddings(code, klass)
    vocabulary = Vocabulary(code, klass, tensor_headers(context.folder))
    if not vocabulary.size:
        return [], []
    tensors = [name for name in vocabulary.tensors() if not _is_bias_of_head(code, name)]
    if not head and not tensors:
        return [], []
    part = next((part for part in vocabulary.heads() if part.path == head), None)
    found = made(part.owner, part.value) if part is not None else None
    if is_kind(found, "Linear") and found is not None and _keeps_bias(context, klass):
        bias = found.argument(2, "bias")
        if bias is None or constant(bias) is True:
            tensors.insert(0, f"{head}.bias")
    return tensors, [name for name in vocabulary.settings() if name not in _set_by_transformers(context)]


def _keeps_bias(context: Context, klass: Klass) -> bool:
    """Whether a head that is tied by the class's own `tie_weights` keeps its bias as it is."""
    own = context.code.method(klass, "tie_weights")
    text = ast.unparse(own[1]) if own is not None else ""
    return bool(text) and ties_by_config(context.code, context.config) and not any(w in text for w in _BY_TRANSFORMERS)


def _is_bias_of_head(code: Code, name: str) -> bool:
    """Whether a tensor is also the bias of a linear layer (`self.decoder.bias = self.bias`), which is resized with it."""
    last = re.escape(name.rpartition(".")[2])
    return any(re.search(rf"\.bias = self\.{last}\b", ast.unparse(klass.node)) for klass in code.classes)


def _set_by_transformers(context: Context) -> set[str]:
    """The names of the setting that transformers sets itself: `vocab_size`, and what `attribute_map` calls it."""
    names = {"vocab_size"}
    for klass in context.code.classes:
        found = klass.value("attribute_map") if context.code.is_config(klass) else None
        for key, value in zip(found.keys, found.values) if isinstance(found, ast.Dict) else ():
            pair = {str(constant(key)), str(constant(value))}
            names |= pair if "vocab_size" in pair else set()
    return names


class _Resize(Rewriter):
    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        klass, body = self.context.klass(original_node.name.value), updated_node.body
        if klass is None or self.context.scope(original_node) or not isinstance(body, cst.IndentedBlock):
            return updated_node
        tensors, settings = _left(self.context, klass)
        if not (tensors or settings):
            return updated_node
        if any(any(_left(self.context, base)) for base in self.context.code.lineage(klass)[1:]):
            return updated_node
        self.context.note(original_node, f"{klass.name}.{_RESIZE} resizes {', '.join(tensors + settings)} too")
        self.context.define("fit_to_embeddings", _HELPER)
        given = "".join(
            f", {kind}={_tuple(names)}" for kind, names in (("tensors", tensors), ("settings", settings)) if names
        )
        text = (
            f"def {_RESIZE}(self, *args, **kwargs):\n"
            f"    embeddings = super().{_RESIZE}(*args, **kwargs)\n"
            f"    return fit_to_embeddings(self, embeddings{given})\n"
        )
        steps = [*body.body]
        names = [step.name.value if isinstance(step, cst.FunctionDef) else "" for step in steps]
        above = [i for i, name in enumerate(names) if name == "__init__" or name.endswith("_embeddings")]
        at = above[-1] + 1 if above else len(steps)
        steps.insert(at, statements(text)[0].with_changes(leading_lines=[cst.EmptyLine(indent=False)]))
        return updated_node.with_changes(body=body.with_changes(body=steps))


def _tuple(names: list[str]) -> str:
    return "(" + ", ".join(f'"{name}"' for name in names) + ("," if len(names) == 1 else "") + ")"


_BEFORE = """
    import torch
    from torch import nn
    from transformers import PreTrainedModel
{block}

    class ToyForMaskedLM(PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.embed = nn.Embedding(config.padded_vocab_size, config.hidden_size)
            self.decoder = nn.Linear(config.hidden_size, config.padded_vocab_size)
            self.register_buffer("final_logits_bias", torch.zeros((1, self.embed.num_embeddings)))
            self.post_init()

        def tie_weights(self, **kwargs):
            self.decoder.weight = self.embed.weight

        def get_input_embeddings(self):
            return self.embed

        def get_output_embeddings(self):
            return self.decoder
{method}"""
_METHOD = """
        def resize_token_embeddings(self, *args, **kwargs):
            embeddings = super().resize_token_embeddings(*args, **kwargs)
            return fit_to_embeddings(self, embeddings, tensors=("decoder.bias", "final_logits_bias"), settings=("padded_vocab_size",))
"""
_BLOCK = """
    # --- transformers releases: what differs between them, and what newer ones no longer have ---
    # [fit_to_embeddings]
{source}
    # --- end of transformers releases ---
"""
_SOURCE = "\n".join(f"    {line}" if line else "" for line in _HELPER.strip("\n").split("\n"))

RULE = Rule(
    name="resized vocabulary",
    reason="after resize_token_embeddings a bias or a setting of the config has the old number of tokens, which raises",
    releases="every release",
    before=_BEFORE.format(block="", method=""),
    after=_BEFORE.format(block=_BLOCK.format(source=_SOURCE), method=_METHOD),
    config={"tie_word_embeddings": True},
    apply=rewrites(_Resize, ("def __init__",)),
    words=("get_output_embeddings", "Parameter", "register_buffer"),
    order=56,
)

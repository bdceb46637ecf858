"""`num_hidden_layers` and `vocab_size`, which transformers asks a config for while it generates."""

import ast
from collections.abc import Iterator

import libcst as cst

from ...static.code_tree import Klass, is_self
from ...static.headers import tensor_headers
from ..generating import knows_cache, own_config, parameters
from ..rule import Context, Rewriter, Rule, literal, rewrites, statements
from ..vocabulary import Vocabulary

# the name that transformers asks for → what configs call it
_NAMES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "decoder_layers", "depth"),
    "vocab_size": ("padded_vocab_size", "vocab_size_lm_head", "n_vocab", "num_tokens"),
}


def _lacking(context: Context, klass: Klass) -> dict[str, str]:
    """The names that a config lacks, each with the config's own name for it."""
    known: set[str] = set()
    for member in context.code.lineage(klass):
        known |= {method.name for method in member.methods()}
        init = member.method("__init__")
        if init is not None:
            known |= parameters(init)
        known |= {n.attr for n in ast.walk(member.node) if isinstance(n, ast.Attribute) and is_self(n)}
    mapped = context.code.value(klass, "attribute_map")
    text = ast.unparse(mapped[1]) if mapped else ""
    found = {}
    for asked, names in _NAMES.items():
        if asked in known or f"'{asked}'" in text or isinstance(context.config.get(asked), int):
            continue
        own = next((name for name in names if name in known), "")
        if not own and asked == "vocab_size":
            own = next((name for name in _sizes_of_embeddings(context, klass) if name in known), "")
        if own:
            found[asked] = own
    return found


def _sizes_of_embeddings(context: Context, config: Klass) -> Iterator[str]:
    """What a config calls the number of tokens, by the embeddings of the models that have this config."""
    for klass in context.code.classes:
        found = context.code.value(klass, "config_class") if context.code.is_model(klass) else None
        named = context.code.find(found[0].file, found[0].file.dotted(found[1])) if found is not None else None
        if named is not None and named.name == config.name:
            vocabulary = Vocabulary(context.code, klass, tensor_headers(context.folder))
            yield from vocabulary.settings()[:1]


class _Map(Rewriter):
    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        klass = self.context.klass(original_node.name.value)
        if (
            klass is None
            or not own_config(self.context.code, klass)
            or not isinstance(updated_node.body, cst.IndentedBlock)
        ):
            return updated_node
        added = _lacking(self.context, klass)
        mapped = klass.value("attribute_map")
        if not added or (mapped is not None and not isinstance(mapped, ast.Dict)):
            return updated_node
        for asked, own in added.items():
            self.context.note(original_node, f"{asked} is another name of {klass.name}.{own}")
        body = [*updated_node.body.body]
        for i, step in enumerate(body):
            if mapped is not None and isinstance(step, cst.SimpleStatementLine):
                small = step.body[0]
                if isinstance(small, cst.Assign) and literal(small.value) == ast.literal_eval(mapped):
                    more = {**ast.literal_eval(mapped), **added}
                    body[i] = step.with_changes(body=[small.with_changes(value=cst.parse_expression(_written(more)))])
                    return updated_node.with_changes(body=updated_node.body.with_changes(body=body))
        at = next((i for i, step in enumerate(body) if isinstance(step, cst.FunctionDef)), len(body))
        body[at:at] = statements(f"attribute_map = {_written(added)}\n")
        following = body[at + 1] if at + 1 < len(body) else None
        if isinstance(following, cst.FunctionDef) and not following.leading_lines:
            body[at + 1] = following.with_changes(leading_lines=[cst.EmptyLine(indent=False)])
        return updated_node.with_changes(body=updated_node.body.with_changes(body=body))


def _written(mapping: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{key}": "{value}"' for key, value in mapping.items()) + "}"


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    generates = any("GenerationMixin" in file.names for file in context.code.files.values())
    return rewrites(_Map, ("Config",))(tree, context) if generates or knows_cache(context) else tree


RULE = Rule(
    name="names in the config",
    reason="generate reads num_hidden_layers for the cache and vocab_size for beams, which a config with other names lacks",
    releases="4.56 and newer",
    before="""
        from transformers import DynamicCache, PretrainedConfig


        class ToyConfig(PretrainedConfig):
            model_type = "toy"

            def __init__(self, num_layers=2, **kwargs):
                self.num_layers = num_layers
                super().__init__(**kwargs)


        def empty():
            return DynamicCache()
    """,
    after="""
        from transformers import DynamicCache, PretrainedConfig


        class ToyConfig(PretrainedConfig):
            model_type = "toy"
            attribute_map = {"num_hidden_layers": "num_layers"}

            def __init__(self, num_layers=2, **kwargs):
                self.num_layers = num_layers
                super().__init__(**kwargs)


        def empty():
            return DynamicCache()
    """,
    apply=_apply,
    words=("Config",),
)

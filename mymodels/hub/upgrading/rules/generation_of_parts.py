"""Token ids of generation that a config's part has by default: newer releases no longer take them from its class."""

import ast
import re

import libcst as cst

from ..generating import own_config
from ..rule import Context, Rewriter, Rule, rewrites, statements

_PARTS = ("text_config", "decoder", "generator")  # where transformers 4 looked
_HELPER = '''
def take_token_ids(config, part):
    """Sets the token ids that generation starts and ends with to those of a part, where the config has none."""
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is None and getattr(part, name, None) is not None:
            setattr(config, name, getattr(part, name))
'''


class _Take(Rewriter):
    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        scope, body = self.context.scope(original_node), updated_node.body
        klass = self.context.klass(scope[0]) if len(scope) == 1 and original_node.name.value == "__init__" else None
        init = klass.method("__init__") if klass is not None else None
        if klass is None or init is None or not own_config(self.context.code, klass):
            return updated_node
        text = ast.unparse(init)
        part = next((name for name in _PARTS if re.search(rf"self\.{name} = ", text)), "")
        if not part or "take_token_ids(" in text or not isinstance(body, cst.IndentedBlock) or _own_ids(self.context):
            return updated_node
        self.context.define("take_token_ids", _HELPER)
        self.context.note(
            original_node, f"{klass.name} has the bos and eos tokens of its {part}, as generate took them"
        )
        line = statements(f"take_token_ids(self, self.{part})\n")
        return updated_node.with_changes(body=body.with_changes(body=[*body.body, *line]))


def _own_ids(context: Context) -> bool:
    """Whether the folder says itself with what generation ends, or its code reads that from the config."""
    if "generation_config.json" in context.folder.files or context.config.get("eos_token_id") is not None:
        return True
    return any(
        isinstance(node, ast.Attribute)
        and node.attr in ("bos_token_id", "eos_token_id")
        and isinstance(node.ctx, ast.Load)
        and re.search(r"(^|\.)config$", ast.unparse(node.value))
        for file in context.code.files.values()
        for node in ast.walk(file.tree)
    )


_BEFORE = """
    from transformers import CONFIG_MAPPING, PretrainedConfig
{block}

    class ToyConfig(PretrainedConfig):
        model_type = "toy"

        def __init__(self, text_config=None, **kwargs):
            self.text_config = CONFIG_MAPPING["llama"](**(text_config or {{}}))
            super().__init__(**kwargs)
{line}"""
_BLOCK = """
    # --- transformers releases: what differs between them, and what newer ones no longer have ---
    # [take_token_ids]
{source}
    # --- end of transformers releases ---
"""
_SOURCE = "\n".join(f"    {line}" if line else "" for line in _HELPER.strip("\n").split("\n"))

RULE = Rule(
    name="token ids of parts",
    reason="generate no longer ends at the eos token that a nested config has by default, so it runs on",
    releases="5.0 and newer",
    before=_BEFORE.format(block="", line=""),
    after=_BEFORE.format(
        block=_BLOCK.format(source=_SOURCE), line="            take_token_ids(self, self.text_config)\n"
    ),
    apply=rewrites(_Take, _PARTS),
    words=_PARTS,
    order=51,
)

"""`rope_theta` and `rope_scaling` of a config that is derived from one of transformers, read by the folder's own code."""

import ast
import re

import libcst as cst

from ...static.code_tree import Klass
from ..generating import own_config, parameters
from ..rule import Context, Rewriter, Rule, rewrites, statements
from .rope_scaling import uses_stock_rope

_THETA = {  # the default of transformers 4
    **dict.fromkeys(
        ["LlamaConfig", "MistralConfig", "Qwen2Config", "PhiConfig", "GemmaConfig", "StableLmConfig"], "10000.0"
    ),
    "MixtralConfig": "1000000.0",
}
_CONFIG = re.compile(r"(^|\.)config$")
_HELPER = '''
def keep_rope(config, given, rope_theta):
    """Sets what rotary positions are made of as a config of transformers 4 has it: newer ones have rope_parameters."""
    config.rope_theta = given.get("rope_theta", rope_theta)
    config.rope_scaling = given.get("rope_scaling")
'''


def _reads_rope(context: Context) -> int:
    """A line of the folder's code that reads `config.rope_theta` or `config.rope_scaling`, or 0."""
    for file in context.code.files.values():
        for node in ast.walk(file.tree):
            if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
                continue
            if node.attr in ("rope_theta", "rope_scaling") and _CONFIG.search(ast.unparse(node.value)):
                return node.lineno
    return 0


def _stock_base(context: Context, klass: Klass) -> str:
    """The config of transformers that a class is derived from; "" for `PretrainedConfig` itself."""
    roots = {root.rpartition(".")[2] for root in context.code.roots(klass)}
    return next((root for root in sorted(roots) if re.fullmatch(r"(?!Pre[tT]rained)\w+Config", root)), "")


class _Keep(Rewriter):
    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        klass, body = self.context.klass(original_node.name.value), updated_node.body
        if klass is None or not own_config(self.context.code, klass) or not isinstance(body, cst.IndentedBlock):
            return updated_node
        base, init = _stock_base(self.context, klass), klass.method("__init__")
        if not base or "keep_rope(" in ast.unparse(klass.node) or self.context.code.value(klass, "rope_scaling"):
            return updated_node
        theta = _THETA.get(base)
        if theta is None and isinstance(self.context.config.get("rope_theta"), (int, float)):
            theta = repr(float(self.context.config["rope_theta"]))
        given = init.args.kwarg.arg if init is not None and init.args.kwarg is not None else ""
        named = parameters(init) if init is not None else set()
        if theta is None or named & {"rope_theta", "rope_scaling"} or (init is not None and not given):
            self.context.refuse(original_node, f"which rope_theta and rope_scaling {klass.name} has was not understood")
            return updated_node
        self.context.define("keep_rope", _HELPER)
        self.context.note(original_node, f"{klass.name} has rope_theta and rope_scaling as plain attributes")
        plain = statements("rope_scaling = None  # a plain attribute: transformers 5 has a property of that name\n")
        steps = [*body.body]
        at = next((i for i, step in enumerate(steps) if isinstance(step, cst.FunctionDef)), len(steps))
        if init is None:
            text = (
                f"def __init__(self, **kwargs):\n    super().__init__(**kwargs)\n    keep_rope(self, kwargs, {theta})\n"
            )
            made = statements(text)
            steps[at:at] = [*plain, made[0].with_changes(leading_lines=[cst.EmptyLine(indent=False)])]
            return updated_node.with_changes(body=body.with_changes(body=steps))
        for i, step in enumerate(steps):
            if isinstance(step, cst.FunctionDef) and step.name.value == "__init__":
                assert isinstance(step.body, cst.IndentedBlock)
                line = statements(f"keep_rope(self, {given}, {theta})\n")
                own = step.body.with_changes(body=[*step.body.body, *line])
                lines = step.leading_lines or [cst.EmptyLine(indent=False)]
                steps[i] = step.with_changes(body=own, leading_lines=lines)
        steps[at:at] = plain
        return updated_node.with_changes(body=body.with_changes(body=steps))


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    if not _reads_rope(context) or uses_stock_rope(context):
        return tree
    return rewrites(_Keep, ("Config",))(tree, context)


_BEFORE = """
    from torch import nn
    from transformers import LlamaConfig
{block}

    class ToyConfig(LlamaConfig):
        model_type = "toy"
{plain}
        def __init__(self, heads=None, **kwargs):
            self.heads = heads
            super().__init__(**kwargs)
{line}

    class ToyRotary(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.base = config.rope_theta
"""
_BLOCK = """
    # --- transformers releases: what differs between them, and what newer ones no longer have ---
    # [keep_rope]
{source}
    # --- end of transformers releases ---
"""
_SOURCE = "\n".join(f"    {line}" if line else "" for line in _HELPER.strip("\n").split("\n"))
_PLAIN = "        rope_scaling = None  # a plain attribute: transformers 5 has a property of that name\n"

RULE = Rule(
    name="rope of stock configs",
    reason="configs of transformers 5 have rope_parameters in place of rope_theta, and None of rope_scaling becomes a dictionary",
    releases="5.0 and newer",
    before=_BEFORE.format(block="", plain="", line=""),
    after=_BEFORE.format(
        block=_BLOCK.format(source=_SOURCE), plain=_PLAIN, line="            keep_rope(self, kwargs, 10000.0)\n"
    ),
    apply=_apply,
    words=("Config",),
)

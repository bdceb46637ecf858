"""Attention written out as matrix products, put through transformers' interface; with `--attention-interface` only."""

import ast
import re
from typing import NamedTuple

import libcst as cst
import libcst.matchers as m

from ..rule import Context, Rewriter, Rule, rewrites, source_of, statements

_HELPERS = '''
def _eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention as matrix products; weights too."""
    import torch
    from torch import nn

    if getattr(module, "num_key_value_groups", 1) > 1:
        key = key.repeat_interleave(module.num_key_value_groups, 1)
        value = value.repeat_interleave(module.num_key_value_groups, 1)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask[..., : key.shape[-2]]
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def attend_by_interface(module, query, key, value, attention_mask, scaling, dropout=0.0):
    """The function that the config chooses; (batch, heads, length, size) in and out."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation or "eager"
    function = _eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    module.is_causal = False  # the mask says what is seen
    rate = dropout if module.training else 0.0
    mixed, weights = function(module, query, key, value, attention_mask, scaling=scaling, dropout=rate)
    return mixed.transpose(1, 2), weights
'''


class _Found(NamedTuple):
    """A stretch of statements that is attention; `rest` is the last one with the product replaced by its name."""

    first: int
    last: int
    rest: cst.CSTNode | None
    query: str
    key: str
    value: str
    scaling: str
    weights: str
    mixed: str
    mask: str
    dropout: str


def _assigned(step: cst.CSTNode) -> tuple[str, cst.BaseExpression] | None:
    """Name and value of a plain assignment."""
    if isinstance(step, cst.SimpleStatementLine) and len(step.body) == 1 and isinstance(step.body[0], cst.Assign):
        assign = step.body[0]
        if len(assign.targets) == 1 and isinstance(assign.targets[0].target, cst.Name):
            return assign.targets[0].target.value, assign.value
    return None


_SCORES = m.Call(
    func=m.Attribute(attr=m.Name("matmul")),
    args=[m.Arg(m.Name()), m.Arg(m.Call(func=m.Attribute(attr=m.Name("transpose"))))],
)
_MATMUL = m.Call(func=m.Attribute(attr=m.Name("matmul")), args=[m.Arg(), m.Arg()])
_PRODUCTS = re.compile(r"\b(matmul|bmm|einsum|baddbmm)\(| @ ")


def _find(body: list[cst.CSTNode]) -> _Found | None:
    """The stretch from the scores to the product with the values, if nothing else happens between them."""
    for first, step in enumerate(body):
        found = _assigned(step)
        if found is None or not isinstance(found[1], cst.BinaryOperation) or not m.matches(found[1].left, _SCORES):
            continue
        weights, scores = found
        assert isinstance(scores.left, cst.Call)  # type: ignore[attr-defined]
        divided = isinstance(scores.operator, cst.Divide)  # type: ignore[attr-defined]
        if not divided and not isinstance(scores.operator, cst.Multiply):  # type: ignore[attr-defined]
            continue
        by = source_of(scores.right)  # type: ignore[attr-defined]
        query = source_of(scores.left.args[0].value)  # type: ignore[attr-defined]
        key = source_of(scores.left.args[1].value.func.value)  # type: ignore[attr-defined]
        mask, dropout, softmax = "", "0.0", False
        for last in range(first + 1, len(body)):
            after = _assigned(body[last])
            if after is None:
                added = _mask(body[last], weights)
                if added is None or softmax:
                    break
                mask = added or mask
                continue
            name, value = after
            text = source_of(value)
            if name == weights and ".softmax(" in text and not softmax:
                softmax = True
            elif name == weights and ".dropout(" in text and softmax and isinstance(value, cst.Call):
                rate = next((source_of(a.value) for a in value.args if a.keyword and a.keyword.value == "p"), None)
                if rate is None:
                    break
                dropout = rate
            elif softmax and (product := _product(value, weights)) is not None:
                scaling = f"1 / {by}" if divided else by
                made = source_of(product.args[1].value)
                rest = None if product is value else body[last].deep_replace(product, cst.Name("attended"))
                mixed = name if rest is None else "attended"
                return _Found(first, last, rest, query, key, made, scaling, weights, mixed, mask or "None", dropout)  # type: ignore[arg-type]
            else:
                break
    return None


def _product(value: cst.BaseExpression, weights: str) -> cst.Call | None:
    """The one product of the weights with the values in an expression, such as `torch.matmul(w, v).transpose(1, 2)`."""
    found = [call for call in m.findall(value, _MATMUL) if source_of(call.args[0].value) == weights]  # type: ignore[attr-defined]
    uses = m.findall(value, m.Name(weights))
    return found[0] if len(found) == 1 and len(uses) == 1 else None  # type: ignore[return-value]


def _mask(step: cst.CSTNode, weights: str) -> str | None:
    """What an `if` adds to the scores: the mask; "" for one that only checks and raises; None for anything else."""
    if not isinstance(step, cst.If) or step.orelse is not None or not isinstance(step.body, cst.IndentedBlock):
        return None
    mask = ""
    for inner in step.body.body:
        found = _assigned(inner)
        if isinstance(inner, cst.If) and m.matches(
            inner.body, m.IndentedBlock(body=[m.SimpleStatementLine(body=[m.Raise()])])
        ):
            continue
        if isinstance(inner, cst.SimpleStatementLine) and m.matches(inner.body[0], m.Raise()):
            continue
        if found is None or found[0] != weights or not isinstance(found[1], cst.BinaryOperation):
            return None
        if not isinstance(found[1].operator, cst.Add) or source_of(found[1].left) != weights:
            return None
        mask = source_of(found[1].right)
    return mask


class _Interface(Rewriter):
    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        scope = self.context.scope(original_node)
        klass = self.context.klass(scope[0]) if len(scope) == 1 else None
        if (
            klass is None
            or not self.context.code.is_module(klass)
            or not isinstance(updated_node.body, cst.IndentedBlock)
        ):
            return updated_node
        text = source_of(original_node.body)
        if "attend_by_interface(" in text or not _attends(text):
            return updated_node
        body: list[cst.CSTNode] = [*updated_node.body.body]
        found = _find(body) if original_node.name.value == "forward" else None
        if found is None or "self.config = " not in ast.unparse(klass.node):
            why = (
                "has another form than softmax(query @ key.T * scale + mask) @ value"
                if found is None
                else "has no config"
            )
            self.context.refuse(
                original_node,
                f"the attention of {scope[0]} {why}, so it cannot be called through transformers' interface: "
                "leave out --attention-interface (attention_interface)",
            )
            return updated_node
        self.context.note(original_node, f"{scope[0]} calls attention through transformers' interface")
        self.context.define("attend_by_interface", _HELPERS)
        call = f"attend_by_interface(self, {found.query}, {found.key}, {found.value}, {found.mask}, {found.scaling}, {found.dropout})"
        line = statements(f"{found.mixed}, {found.weights} = {call}\n")
        before = [step for step in body[: found.first] if not _repeats(step, (found.key, found.value))]
        rest = [] if found.rest is None else [found.rest]
        return updated_node.with_changes(
            body=updated_node.body.with_changes(body=[*before, *line, *rest, *body[found.last + 1 :]])
        )

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        """The model's base class says that attention goes through the interface."""
        klass, code, body = self.context.klass(original_node.name.value), self.context.code, updated_node.body
        if klass is None or not code.is_model(klass) or not isinstance(body, cst.IndentedBlock):
            return updated_node
        if any(code.is_model(base) for base in code.lineage(klass)[1:]) or not _converted(self.context):
            return updated_node
        steps = [*body.body]
        at = next((i for i, step in enumerate(steps) if isinstance(step, cst.FunctionDef)), len(steps))
        for flag in ("_supports_sdpa", "_supports_attention_backend"):
            if code.value(klass, flag) is None:
                self.context.note(original_node, f"{klass.name} declares {flag}")
                steps[at:at] = statements(f"{flag} = True\n")
        return updated_node.with_changes(body=body.with_changes(body=steps))


def _attends(text: str) -> bool:
    """Whether a function computes attention: a softmax between two products, or torch's own function for it."""
    return "scaled_dot_product_attention(" in text or ("softmax(" in text and len(_PRODUCTS.findall(text)) > 1)


def _converted(context: Context) -> bool:
    return any("attend_by_interface(self" in file.text for file in context.code.files.values())


def _repeats(step: cst.CSTNode, names: tuple[str, ...]) -> bool:
    """`key = repeat_kv(key, self.num_key_value_groups)`: the interface repeats by itself."""
    found = _assigned(step)
    return (
        found is not None
        and found[0] in names
        and source_of(found[1]).startswith(f"repeat_kv({found[0]}, self.num_key_v")
    )


_BEFORE = """
    import math

    import torch
    from torch import nn
{block}

    class ToyAttention(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

        def forward(self, query, key, value, attention_mask=None):
{steps}
            return attn_output.transpose(1, 2), attn_weights
"""
_OLD = """
            attn_weights = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(self.head_dim)
            if attention_mask is not None:
                attn_weights = attn_weights + attention_mask
            attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
            attn_weights = nn.functional.dropout(attn_weights, p=self.dropout, training=self.training)
            attn_output = torch.matmul(attn_weights, value)
"""
_NEW = """
            attn_output, attn_weights = attend_by_interface(self, query, key, value, attention_mask, 1 / math.sqrt(self.head_dim), self.dropout)
"""
_BLOCK = """
    # --- transformers releases: what differs between them, and what newer ones no longer have ---
    # [attend_by_interface]
{source}
    # --- end of transformers releases ---
"""
_SOURCE = "\n".join(f"    {line}" if line else "" for line in _HELPERS.strip("\n").split("\n"))

RULE = Rule(
    name="attention interface",
    reason="serving engines replace attention where it goes through transformers' interface",
    releases="every release; nothing breaks without it",
    before=_BEFORE.format(block="", steps=_OLD.strip("\n")),
    after=_BEFORE.format(block=_BLOCK.format(source=_SOURCE), steps=_NEW.strip("\n")),
    apply=rewrites(_Interface, ("softmax", "scaled_dot_product_attention", "PreTrainedModel")),
    words=("softmax", "scaled_dot_product_attention", "PreTrainedModel"),
    order=80,
    option="attention_interface",
)

"""Methods that models no longer inherit: masks of heads and of attention."""

import libcst as cst

from ..rule import Rewriter, Rule, rewrites

_DEFINITIONS = {
    "get_head_mask": '''
def get_head_mask(model, head_mask, num_hidden_layers, is_attention_chunked=False):
    """The mask of each layer's heads, or None for each layer."""
    if head_mask is None:
        return [None] * num_hidden_layers
    if head_mask.dim() == 1:
        head_mask = head_mask[None, None, :, None, None].expand(num_hidden_layers, -1, -1, -1, -1)
    elif head_mask.dim() == 2:
        head_mask = head_mask[:, None, :, None, None]
    head_mask = head_mask.to(model.dtype)
    return head_mask.unsqueeze(-1) if is_attention_chunked else head_mask
''',
    "invert_attention_mask": '''
def invert_attention_mask(model, encoder_attention_mask):
    """A mask that is added to scores: 0 where it is 1, the lowest number where it is 0."""
    import torch

    mask = encoder_attention_mask[:, None] if encoder_attention_mask.dim() == 3 else encoder_attention_mask[:, None, None]
    return (1.0 - mask.to(model.dtype)) * torch.finfo(model.dtype).min
''',
    "get_extended_attention_mask": '''
def get_extended_attention_mask(model, attention_mask, input_shape, device=None, dtype=None):
    """A mask that is added to scores; causal too in a decoder, where it covers the past of the cache."""
    import torch

    dtype = model.dtype if dtype is None else dtype
    if attention_mask.dim() == 3:
        mask = attention_mask[:, None]
    else:
        mask = attention_mask[:, None, None]
        if getattr(model.config, "is_decoder", None):
            length, past = input_shape[1], attention_mask.shape[1] - input_shape[1]
            causal = torch.ones(length, past + length, dtype=mask.dtype, device=mask.device).tril(past)
            mask = causal[None, None] * mask
    return (1.0 - mask.to(dtype)) * torch.finfo(dtype).min
''',
}


class _Functions(Rewriter):
    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        func = original_node.func
        if not isinstance(func, cst.Attribute) or func.attr.value not in _DEFINITIONS:
            return updated_node
        name = func.attr.value
        scope = self.context.scope(original_node)
        klass = self.context.klass(scope[0]) if scope else None
        if not isinstance(func.value, cst.Name) or func.value.value != "self" or klass is None:
            return updated_node
        if not self.context.code.is_model(klass) or self.context.code.method(klass, name) is not None:
            return updated_node
        self.context.note(original_node, f"{name}, which models no longer have, is defined in the file")
        self.context.define(name, _DEFINITIONS[name])
        comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
        first = cst.Arg(func.value, comma=comma if updated_node.args else cst.MaybeSentinel.DEFAULT)
        return updated_node.with_changes(func=cst.Name(name), args=[first, *updated_node.args])


_BEFORE = """
    from transformers import PreTrainedModel
{block}

    class ToyModel(PreTrainedModel):
        def forward(self, hidden, head_mask=None):
            head_mask = {call}, self.config.n_layer)
            return hidden
"""
_BLOCK = """
    # --- transformers releases: what differs between them, and what newer ones no longer have ---
    # [get_head_mask]
{source}
    # --- end of transformers releases ---
"""
_SOURCE = "\n".join(f"    {line}" if line else "" for line in _DEFINITIONS["get_head_mask"].strip("\n").split("\n"))

RULE = Rule(
    name="model methods",
    reason="models no longer have methods that prepare masks of heads and of attention",
    releases="5.0 and newer (get_head_mask), 5.23 and newer (the others)",
    before=_BEFORE.format(block="", call="self.get_head_mask(head_mask"),
    after=_BEFORE.format(block=_BLOCK.format(source=_SOURCE), call="get_head_mask(self, head_mask"),
    apply=rewrites(_Functions, tuple(_DEFINITIONS)),
    words=tuple(_DEFINITIONS),
)

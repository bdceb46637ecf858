"""One token per row on the CPU, as in generation: the block of MyGPT2 as one function.

With one token, a fifth of the time passes between the products: in the calls of 13 modules, and in the mode that
selects kernels. `in_one_function` decorates the block's `forward` and computes the same, but steps aside where a module, a
class or the source of a `forward` was changed.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import ALL_ATTENTION_FUNCTIONS, apply_rotary, attend, eager_attention_forward, norm_heads
from .base import has_global_hooks, torch_is_patched
from .compat import TRANSFORMERS_ATTENTION
from .cpu_kernels import linear_by_onednn, recordable
from .int8_layers import Int8Linear, joint_product_of_few
from .products import LARGE, ONE_DNN, product_of_few
from .tokenwise import ACTIVATIONS, digest

# what decode_step.py computes without calling it; where one of these was replaced, it steps aside
BLOCK_CALL = GradientCheckpointingLayer.__call__
ORIGINALS: list[tuple[Any, str, Any]] = [(kind, "update", kind.update) for kind in (DynamicCache, DynamicLayer)]
ORIGINALS += [(ALL_ATTENTION_FUNCTIONS, "get_interface", ALL_ATTENTION_FUNCTIONS.get_interface)]
ORIGINALS += [(sys.modules[attend.__module__], "attend", attend), (GradientCheckpointingLayer, "__call__", BLOCK_CALL)]
ROWS = 64  # as in `few_rows`
# digests of the `forward` methods that `_block` computes, as released, and where each is
FORWARDS = {
    "87a54c959b0d5e77": "block",
    "bad53d9e61f7ff3c": "attention",
    "803374830d5b403d": "dense",
    "b9216e94f2d5d7d0": "gated",
}
# what these look up in their own file, where it may be replaced
HELPERS: dict[str, Any] = {
    "apply_rotary": apply_rotary,
    "norm_heads": norm_heads,
    "eager_attention_forward": eager_attention_forward,
}
HELPERS |= {"ALL_ATTENTION_FUNCTIONS": ALL_ATTENTION_FUNCTIONS}
PROJECTIONS = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
CALL = nn.Module.__call__
_KERNELS = inspect.getfile(linear_by_onednn)
LINEAR = {nn.Linear: nn.Linear.forward, Int8Linear: Int8Linear.forward}
OTHERS = {nn.LayerNorm, nn.RMSNorm, nn.Dropout} | ACTIVATIONS
ARGUMENTS = {"attention_mask", "past_key_values", "rotary", "cache_position", "position_ids", "output_attentions"}


def in_one_function(forward: Callable) -> Callable:
    """Decorate the `forward` of a block: for one token per row, without gradients, it is computed by `_block`."""
    if "vllm" in sys.modules:  # it has its own layers, and its tracer cannot follow a wrapped `forward` with **kwargs
        return forward

    @functools.wraps(forward)
    def fast(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if is_one_token(hidden_states, kwargs) and is_known(self):
            return _block(self, hidden_states, **kwargs), None
        return forward(self, hidden_states, **kwargs)

    return fast


def is_one_token(states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether these are float32 states `[batch, 1, width]` of few rows on the CPU, without gradients or special wishes."""
    if states.shape[1] != 1 or torch.is_grad_enabled() or type(states) is not torch.Tensor:
        return False
    if states.dtype is not torch.float32 or not states.is_cpu or not 0 < len(states) <= ROWS:
        return False
    if not recordable() or torch.is_autocast_enabled("cpu") or has_global_hooks():
        return False
    if torch_is_patched():
        return False
    if kwargs.get("output_attentions") or not kwargs.keys() <= ARGUMENTS:
        return False
    return ONE_DNN and bool(torch.backends.mkldnn.enabled)


def is_stock(cache: Any) -> bool:
    """Whether this cache, and attention, are transformers' own."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or "update" in vars(cache):
        return False
    if any(getattr(owner, name) is not function for owner, name, function in ORIGINALS):
        return False
    if TRANSFORMERS_ATTENTION.get_interface("sdpa", None) is not sdpa_attention_forward:
        return False
    return torch._C._len_torch_function_stack() == 0  # a mode of somebody else sees each call


def holds_keys(cache: DynamicCache, place: int, rows: int, head_dim: int) -> bool:
    """Whether the cache has float32 keys and values of this layer on the CPU."""
    past = cache.layers[place] if place < len(cache.layers) else None
    if type(past) is not DynamicLayer or "update" in vars(past) or not getattr(past, "is_initialized", True):
        return False
    keys, values = getattr(past, "keys", None), getattr(past, "values", None)
    if type(keys) is not torch.Tensor or not keys.is_cpu or keys.dtype is not torch.float32 or keys.ndim != 4:
        return False
    return keys.shape[0] == rows and keys.shape[2] > 0 and keys.shape[3] == head_dim and type(values) is type(keys)


def has_released_attention(block: Any) -> bool:
    """Whether a block has attention that computes as released, and an MLP."""
    parts = block._modules
    return "mlp" in parts and _is_attention(type(parts.get("self_attn")))


def _is_attention(kind: Any) -> bool:
    return FORWARDS.get(digest(getattr(kind, "forward", None))) == "attention"


def is_known(block: Any) -> bool:
    """Whether a block in evaluation, and all in it, are as released, with float32 or int8 weights on the CPU."""
    main = (block, block.self_attn, block.mlp)
    if not _are_released("gate_proj" in block.mlp._modules, *(type(module).forward for module in main)):
        return False
    if any(type(module).__call__ is not CALL for module in main[1:]):
        return False
    used = sys.modules.get(type(block.self_attn).forward.__module__)
    if any(getattr(used, name, None) is not helper for name, helper in HELPERS.items()):
        return False
    parts = (part for module in main for part in module._modules.items())
    return all(_is_plain(name, part, main) for name, part in parts) and _is_plain("", block, main)


@functools.cache
def _are_released(is_gated: bool, *forwards: Callable) -> bool:
    places = ("block", "attention", "gated" if is_gated else "dense")
    if not all(is_unwrapped(forward, _KERNELS) for forward in forwards[1:]):  # what wraps the block's runs before this
        return False
    return all(FORWARDS.get(digest(each)) == place for each, place in zip(forwards, places))


def is_unwrapped(function: Any, *files: str) -> bool:
    """Whether all decorators of a function are from these files: a digest does not show any that are added later."""
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        return True
    return inspect.isfunction(function) and inspect.getfile(function) in files and is_unwrapped(wrapped, *files)


@functools.cache
def is_only_forward(call: Any, forward: Any) -> bool:
    """Whether to call a block is to run its `forward`, and this has no decorators but ours and transformers'."""
    files = inspect.getfile(in_one_function), inspect.getfile(GradientCheckpointingLayer)
    return call in (CALL, BLOCK_CALL) and is_unwrapped(forward, *files)


def _is_plain(name: str, module: Any, main: tuple[Any, ...]) -> bool:
    """Whether a module in evaluation has no hooks and is one of `main`, or known and in its place, with CPU weights."""
    if module is None:
        return False
    own = module.__dict__
    if own["training"] or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return False
    if own["_backward_hooks"] or own["_backward_pre_hooks"] or own.get("_compiled_call_impl") is not None:
        return False
    if module in main:
        return True
    kind = type(module)
    if kind.__call__ is not CALL:
        return False
    is_linear = kind in LINEAR and kind.forward is LINEAR[kind]
    if not is_linear and (kind not in OTHERS or name in PROJECTIONS):
        return False
    if name == "dropout" and kind is not nn.Dropout:  # not called, as it does nothing
        return False
    parameters = own["_parameters"]
    weight = parameters.get("weight")
    if is_linear and (weight is None or "bias" not in parameters):  # computed elsewhere
        return False
    if weight is None:
        return True
    if type(weight) is not nn.Parameter or not weight.is_cpu:
        return False
    bias = parameters.get("bias")
    if bias is not None and bias.dtype is not torch.float32:
        return False
    return module.packs() if kind is Int8Linear else weight.dtype is torch.float32


def _block(
    block: Any,
    hidden_states: torch.Tensor,
    *,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    attention_mask: torch.Tensor | None,
    past_key_values: Any,
    cache_position: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """`MyGPT2Block.forward` for states `[batch, 1, width]`."""
    blocks, attention, mlp = block._modules, block.self_attn, block.mlp._modules
    parts = attention._modules  # for speed: `nn.Module` looks up each attribute in three dicts
    heads = (len(hidden_states), -1, 1, attention.head_dim)
    states = hidden_states[:, 0]

    normed = blocks["input_layernorm"].forward(states)
    projected = _joint((parts["q_proj"], parts["k_proj"], parts["v_proj"]), normed)
    query, key, value = (states.view(heads) for states in projected)  # [B, H or K, 1, D]
    if attention.qk_norm:
        query, key = norm_heads(parts["q_norm"], query), norm_heads(parts["k_norm"], key)
    if rotary is not None:
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx, {"cache_position": cache_position})
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    about = {"dropout": 0.0, "scaling": attention.scaling, "sliding_window": attention.sliding_window, **kwargs}
    mixed, _ = attend(attention, query, key, value, attention_mask, **about)  # [B, 1, H, D]
    states = states + _linear(parts["o_proj"], mixed.reshape(len(states), -1))

    normed = blocks["post_attention_layernorm"].forward(states)
    if "gate_proj" in mlp:
        gate, up = _joint((mlp["gate_proj"], mlp["up_proj"]), normed)
        wide = mlp["act_fn"].forward(gate) * up
    else:
        wide = mlp["act_fn"].forward(_linear(mlp["up_proj"], normed))
    return (states + _linear(mlp["down_proj"], wide))[:, None]


def _linear(layer: Any, states: torch.Tensor) -> torch.Tensor:
    if type(layer) is Int8Linear:
        return layer.product_of_few(states)
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if weight.numel() >= LARGE:
        return product_of_few(states, weight, bias)
    return nn.functional.linear(states, weight, bias)


def _joint(layers: Sequence[Any], states: torch.Tensor) -> Sequence[torch.Tensor]:
    if all(type(layer) is Int8Linear for layer in layers):
        return joint_product_of_few(layers, states)
    return [_linear(layer, states) for layer in layers]

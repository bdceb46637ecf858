"""Faster forms of what torch and transformers compute: activations, matrix products on the CPU.

Same numbers, up to rounding; each falls away by itself where it does not apply. This file is copied as it is into Hub
repos and runs there without mymodels.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2CLS, ACT2FN

from .layers import hooks_everywhere, is_hooked, readable

# GPT-2's and the original BERT's GELU by one kernel; transformers writes the same formula out in eight steps
FUSED = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}


def make_activation(name: str) -> nn.Module:
    """transformers' activation function `name`, by its fastest form."""
    return ACT2FN[FUSED.get(name, name)]


def one_dnn(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


def _no_view(output: torch.Tensor) -> torch.Tensor:
    """oneDNN's product is a view of its rows; from a `Function`, that could not be changed in place afterwards."""
    return torch.ops.aten._unsafe_view(output, output.shape)


def recordable() -> bool:
    """Whether the functions here may stand in for torch's: no graph is captured, and no forward-mode derivatives taken."""
    return readable() and getattr(torch.autograd.forward_ad, "_current_level", -1) < 0


class _OneDnnLinear(torch.autograd.Function):
    """`nn.functional.linear` by oneDNN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _no_view(one_dnn(states, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        states, weight = ctx.saved_tensors
        return _linear_gradients(states, weight, gradient, ctx.needs_input_grad)


def _linear_gradients(
    states: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, wanted: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Of `states`, `weight` and bias, those that are wanted."""
    rows, columns = gradient.flatten(0, -2), states.flatten(0, -2).t()
    if torch.is_grad_enabled():  # to be differentiated once more
        return gradient @ weight, rows.t() @ columns.t(), rows.sum(0) if wanted[2] else None
    for_states = one_dnn(gradient, weight.t()) if wanted[0] else None
    for_weight = torch.empty_like(weight) if wanted[1] else None
    if for_weight is not None:  # in pieces: each is copied to be turned
        for piece, into in zip(rows.split(4096, dim=1), for_weight.split(4096)):
            into.copy_(one_dnn(piece.t(), columns))
    return for_states, for_weight, rows.sum(0) if wanted[2] else None


def _serves(states: Any, weight: Any, bias: Any = None) -> bool:
    tensors = (states, weight) if bias is None else (states, weight, bias)
    plain = all(type(t) in (torch.Tensor, nn.Parameter) and t.dtype is torch.float32 for t in tensors)
    return recordable() and plain and states.ndim > 1 and states.numel() > 0 and weight.numel() > 0


class FastProducts(TorchFunctionMode):
    """Within it, every `nn.Linear` in float32 on the CPU multiplies by oneDNN, whosever module it is.

    torch itself asks MKL, which leaves half of the vector units of a processor idle that is not Intel's (torch 2.13).
    `torch.backends.mkldnn.flags(enabled=False)` turns it off; under compilation, tracing and autocast it is off.
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is nn.functional.linear and not kwargs and _serves(*args):
            return _OneDnnLinear.apply(*args, *[None] * (3 - len(args)))  # the bias may be left out
        return function(*args, **(kwargs or {}))


def fast_products(states: torch.Tensor) -> AbstractContextManager:
    """The context for layers that work on `states`: `FastProducts` where it may be, else one that does nothing."""
    fast = states.device.type == "cpu" and states.dtype is torch.float32 and recordable() and ONE_DNN
    fast = fast and not few_rows(states)
    fast = fast and torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
    return FastProducts() if fast else nullcontext()


class FewRowProducts(TorchFunctionMode):
    """`FastProducts` for a step of generation, where no graph is recorded: fewer checks, and small weights go to torch."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is nn.functional.linear and not kwargs and len(args) == 3 and _large(args[1]):
            states, weight, bias = args
            if type(states) is torch.Tensor and states.dtype is torch.float32 and states.ndim > 1:
                if bias is None or states.numel() != weight.shape[1]:
                    return one_dnn(states, weight, bias)
                return one_dnn(states, weight).add_(bias)  # one row: its own kernel with a bias is slower
        return function(*args, **kwargs) if kwargs else function(*args)


def _large(weight: Any) -> bool:
    """Whether oneDNN gains more than its own start takes; and not quantised, distributed, pruned, …"""
    return type(weight) is nn.Parameter and weight.numel() >= 1 << 17 and weight.dtype is torch.float32


FEW_ROW_PRODUCTS, NOTHING = FewRowProducts(), nullcontext()
ONE_DNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def few_rows(states: torch.Tensor) -> bool:
    """Whether this is like a step of generation, where a mode around each call of torch costs more than it gains."""
    return not torch.is_grad_enabled() and states.shape[:-1].numel() <= 64


def is_plain(layer: nn.Module, states: torch.Tensor) -> bool:
    """Whether `layer(states)` is a product on the CPU and nothing else: a bare `nn.Linear` that nothing hooks into."""
    if type(layer) is not nn.Linear or not recordable():
        return False
    own = vars(layer)
    weight = own["_parameters"].get("weight")
    return (
        type(weight) is nn.Parameter  # not quantised, distributed, pruned, …
        and states.dtype is weight.dtype
        and states.is_cpu
        and weight.is_cpu
        and states.ndim >= 2
        and states.numel() > 0
        and not is_hooked(layer)
        and not hooks_everywhere()
        and not torch.is_autocast_enabled("cpu")
    )


def few_row_products(layer: nn.Module, states: torch.Tensor) -> AbstractContextManager:
    """The context for a few `nn.Linear`s, of `layer`'s size, on `states`: around these alone a mode pays with few rows.

    Serving engines look for plain calls such as `self.q_proj(hidden_states)` in the source, hence a context.
    """
    if type(states) is not torch.Tensor or not ONE_DNN or not states.is_cpu or states.numel() == 0:
        return NOTHING
    if not _large(getattr(layer, "weight", None)) or not recordable() or not few_rows(states):
        return NOTHING
    fast = torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
    return FEW_ROW_PRODUCTS if fast else NOTHING


ACTIVATIONS = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()}
ROW_BY_ROW = {nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout} | ACTIVATIONS


def in_cache(states: torch.Tensor, widening: Any, *modules: nn.Module) -> tuple[torch.Tensor, ...]:
    """`states`, or parts of their rows `[tokens, width]` of which `modules` make tensors that stay in the caches.

    Only in inference on the CPU, if nothing in the modules was replaced by what might look at several rows at once, and
    if no hook would see parts. Tensors of more than 32 MB are also taken from the operating system anew each time (by
    glibc), which costs a fifth of a layer's time.
    """
    if type(states) is not torch.Tensor or torch.is_grad_enabled() or not states.is_cpu or not readable():
        return (states,)
    if type(widening) is not nn.Linear:  # a serving engine's, a quantised one, …
        return (states,)
    size = max(64, (1 << 21) // widening.out_features)  # 8 MB in float32
    if states.ndim != 3 or states.shape[:-1].numel() < 2 * size:
        return (states,)
    if hooks_everywhere():
        return (states,)
    for whole in modules:
        for module in whole.modules():
            known = module is whole or type(module) in ROW_BY_ROW
            if not known or is_hooked(module):
                return (states,)
    return states.flatten(0, 1).split(size)


class _ProductOf(torch.autograd.Function):
    """`nn.functional.linear(function(*inputs), weight, bias)`, which keeps the inputs and not what `function` gives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: torch.Tensor, bias: torch.Tensor | None, function: Callable, *inputs: torch.Tensor) -> Any:
        return _no_view(one_dnn(function(*inputs), weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        weight, bias, ctx.function, *inputs = inputs
        ctx.save_for_backward(weight, bias, *inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        weight, _, *inputs = ctx.saved_tensors
        for_weight, for_bias, _, *for_inputs = ctx.needs_input_grad
        with torch.enable_grad():
            inputs = [tensor.view_as(tensor) for tensor in inputs]  # to end there, whatever they were made of
            states = ctx.function(*inputs)
        kept = states if torch.is_grad_enabled() else states.detach()
        wanted = (any(for_inputs), for_weight, for_bias)
        for_states, *for_parameters = _linear_gradients(kept, weight, gradient, wanted)
        return *for_parameters, None, *differentiated(states, inputs, for_inputs, for_states)


def differentiated(
    outputs: torch.Tensor, inputs: list[torch.Tensor | None], wanted: tuple[bool, ...], gradient: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Of the `inputs` that are wanted; None for the others."""
    found = iter(())
    if any(wanted):
        chosen = [tensor for tensor, want in zip(inputs, wanted) if want]
        found = iter(torch.autograd.grad(outputs, chosen, gradient, create_graph=torch.is_grad_enabled()))
    return [next(found) if want else None for want in wanted]


def is_pure(function: Any) -> bool:
    """Whether this is one of transformers' activations and only that: no parameters, no hooks, not in place."""
    if type(function) not in ACTIVATIONS:
        return False
    own = vars(function)
    changed = own.get("inplace") or is_hooked(function) or hooks_everywhere()
    return not changed and not own["_parameters"] and not own["_modules"]


def keeps_less(mlp: Any, states: Any) -> bool:
    """Whether `product_of` serves for its `act_fn` and `down_proj` in training; False for whatever traces a model.

    It takes `mlp` as a whole, since vLLM wants to find `self.act_fn` once in `forward`.
    """
    if type(states) is not torch.Tensor or not torch.is_grad_enabled() or states.dtype is not torch.float32:
        return False
    return ONE_DNN and bool(torch.backends.mkldnn.enabled) and is_plain(mlp.down_proj, states) and is_pure(mlp.act_fn)


def product_of(function: Callable, layer: Any, *inputs: torch.Tensor) -> torch.Tensor:
    """`layer(function(*inputs))` in training, where what `function` gives is not kept but computed once more.

    `function`, of `inputs` alone, is the same each time and leaves them as they are.
    """
    return _ProductOf.apply(layer.weight, layer.bias, function, *inputs)

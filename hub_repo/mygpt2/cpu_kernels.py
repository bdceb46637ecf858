"""Faster CPU implementations: float32 products, activations, and an MLP that stores less for training.

Results are the same up to rounding. Each falls back to torch where it does not apply or a formula was edited.
This file is copied as it is into Hub repos and runs there without mymodels.
"""

import ast
import functools
import inspect
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2FN

from .base import has_global_hooks, is_hooked, torch_is_patched
from .compat import readable
from .products import LARGE, ONE_DNN, batched, fastest, one_dnn, product_of_few, turned
from .tokenwise import ACTIVATIONS, calls_are_unpatched, calls_of_method, is_tokenwise

# GPT-2's and the original BERT's GELU in one kernel; transformers computes the same formula in eight operations
FUSED = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}


def make_activation(name: str) -> nn.Module:
    """transformers' activation function `name`, in its fastest implementation."""
    return ACT2FN[FUSED.get(name, name)]


def _no_view(output: torch.Tensor) -> torch.Tensor:
    """`output` as no view: oneDNN returns one, and a view from a `Function` cannot be modified in place afterwards."""
    return torch.ops.aten._unsafe_view(output, output.shape)


def recordable() -> bool:
    """Whether the `Function`s here can be used: not in graph capture, transforms or forward-mode differentiation."""
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
    """Gradients of states, weight and bias; None for those that `wanted` excludes."""
    rows, columns = gradient.flatten(0, -2), states.flatten(0, -2).t()
    if torch.is_grad_enabled():  # for second derivatives
        return gradient @ weight, rows.t() @ columns.t(), rows.sum(0) if wanted[2] else None
    for_states = one_dnn(gradient, weight.t()) if wanted[0] else None
    for_weight = torch.empty_like(weight) if wanted[1] else None
    if for_weight is not None:  # in pieces, because each transposed piece is copied
        for piece, into in zip(rows.split(4096, dim=1), for_weight.split(4096)):
            into.copy_(one_dnn(piece.t(), columns))
    return for_states, for_weight, rows.sum(0) if wanted[2] else None


def _is_supported(states: Any, weight: Any, bias: Any = None) -> bool:
    tensors = (states, weight) if bias is None else (states, weight, bias)
    plain = all(type(t) in (torch.Tensor, nn.Parameter) and t.dtype is torch.float32 for t in tensors)
    return recordable() and plain and states.ndim > 1 and states.numel() > 0 and weight.numel() > 0


def _is_large(weight: Any) -> bool:
    """Whether a weight is plain float32 (not quantised, distributed, pruned, …), and so large that torch is slower."""
    return type(weight) is nn.Parameter and weight.numel() >= LARGE and weight.dtype is torch.float32


class OneDnnLinear(TorchFunctionMode):
    """A mode in which oneDNN computes `nn.functional.linear` in float32 on the CPU, whatever module calls it.

    torch uses MKL, which leaves half of the vector units of non-Intel processors idle (torch 2.13).
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is not nn.functional.linear or kwargs:
            return function(*args, **kwargs) if kwargs else function(*args)
        states, weight, bias = args if len(args) == 3 else (*args, None)
        if not few_rows(states):
            return _OneDnnLinear.apply(states, weight, bias) if _is_supported(states, weight, bias) else function(*args)
        # generation step: no autograd, so fewer checks; torch computes small weights
        if not _is_large(weight) or type(states) is not torch.Tensor or states.dtype is not torch.float32:
            return function(*args)
        width = weight.shape[1]
        if states.ndim < 2 or states.numel() == 0 or not states.is_cpu or states.shape[-1] != width:
            return function(*args)
        return product_of_few(states, weight, bias)


class _State(threading.local):
    active = False  # whether the mode is active in this thread


_MODE, _STATE = OneDnnLinear(), _State()


def linear_by_onednn(forward: Callable) -> Callable:
    """Decorate a module's `forward`: run it in `OneDnnLinear`. Of nested decorated modules, the outermost enters the mode.

    While the mode is active, each torch call takes some microseconds longer, which matters with few rows. Then only
    modules that directly contain a large `nn.Linear` enter it.
    `torch.backends.mkldnn.flags(enabled=False)` turns it off; it is off under compilation, tracing and autocast.
    """
    # vLLM has its own linear layers, and its tracer cannot follow a wrapped `forward` with **kwargs
    if "vllm" in sys.modules:
        return forward

    @functools.wraps(forward)
    def fast(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else None
        if not isinstance(states, torch.Tensor):
            states = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if states is None or not _is_faster(self, states):
            return forward(self, *args, **kwargs)
        _STATE.active = True
        try:
            with _MODE:
                return forward(self, *args, **kwargs)
        finally:
            _STATE.active = False

    return fast


def _is_faster(module: nn.Module, states: torch.Tensor) -> bool:
    """Whether the mode applies, is not active yet, and makes a `forward` whose first tensor is `states` faster."""
    if not ONE_DNN or not recordable() or _STATE.active or not torch.backends.mkldnn.enabled:
        return False
    if not states.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    if not few_rows(states):
        return not torch_is_patched()
    if type(states) is not torch.Tensor:
        return False
    rows = states.shape[:-1].numel()
    # from this size on, oneDNN saves more time than the mode costs (torch 2.13, AMD EPYC)
    least = max(LARGE, min(1 << 21, (1 << 25) // max(1, rows)))
    for layer in (module, *module._modules.values()):
        weight: Any = layer._parameters.get("weight") if isinstance(layer, nn.Linear) else None
        if not _is_large(weight):
            continue
        product = fastest(rows, weight.shape[1], torch.get_num_threads())
        if product in (batched, turned) or (product is one_dnn and weight.numel() >= least):
            return not torch_is_patched()
    return False


def few_rows(states: torch.Tensor) -> bool:
    """Whether `states` `[…, width]`, or ids `[…]`, have at most 64 tokens and no gradients, as in a generation step."""
    rows = states.shape[:-1] if states.is_floating_point() else states.shape
    return not torch.is_grad_enabled() and rows.numel() <= 64


def is_plain(layer: nn.Module, states: torch.Tensor) -> bool:
    """Whether `layer(states)` is just a product on the CPU: an unmodified `nn.Linear` without hooks."""
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
        and not has_global_hooks()
        and not torch_is_patched()
        and not torch.is_autocast_enabled("cpu")
    )


def in_row_chunks(method: Callable) -> Callable:
    """Decorate a method on states `[batch, length, width]` of a module with an MLP's `intermediate` and `output`.

    In CPU inference, the method is called on chunks of tokens, so small that the MLP's tensors fit into the caches. This
    also avoids tensors above 32 MB, which glibc requests from the operating system each time (a fifth of a layer's
    time). Applies only if each token is computed independently and no hook would see the chunks.
    """

    @functools.wraps(method)
    def in_parts(self: nn.Module, states: torch.Tensor) -> torch.Tensor:
        if type(states) is not torch.Tensor or torch.is_grad_enabled() or not states.is_cpu or not readable():
            return method(self, states)
        widening = getattr(self.intermediate, "dense", None)
        if widening is None or not is_tokenwise(type(widening)):  # replaced, for example by a serving engine
            return method(self, states)
        size = max(64, (1 << 21) // widening.out_features)  # 8 MB in float32
        if states.ndim != 3 or states.shape[:-1].numel() < 2 * size or not _may_split(self, method):
            return method(self, states)
        parts = states.flatten(0, 1).split(size)
        return torch.cat([method(self, part) for part in parts]).view_as(states)

    return in_parts


def _may_split(layer: Any, method: Callable) -> bool:
    calls = calls_of_method(method, type(layer))
    if has_global_hooks() or calls is None or not calls_are_unpatched(layer, calls):
        return False
    for part in (layer.intermediate, layer.output):
        for module in part.modules():
            kind = type(module)
            calls = frozenset() if is_tokenwise(kind) else None
            if module is part:
                calls = calls_of_method(kind.forward, kind)
            if calls is None or is_hooked(module) or not calls_are_unpatched(module, calls):
                return False
    return True


class _RecomputedLinear(torch.autograd.Function):
    """`nn.functional.linear(function(*inputs), weight, bias)`; stores the inputs instead of the result of `function`."""

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
            inputs = [tensor.view_as(tensor) for tensor in inputs]  # so that the gradient stops at these inputs
            states = ctx.function(*inputs)
        kept = states if torch.is_grad_enabled() else states.detach()
        wanted = (any(for_inputs), for_weight, for_bias)
        for_states, *for_parameters = _linear_gradients(kept, weight, gradient, wanted)
        return *for_parameters, None, *gradients_of(states, inputs, for_inputs, for_states)


def gradients_of(
    outputs: torch.Tensor, inputs: list[torch.Tensor | None], wanted: tuple[bool, ...], gradient: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Gradients of the `inputs` that are `wanted`; None for the others."""
    found = iter(())
    if any(wanted):
        chosen = [tensor for tensor, want in zip(inputs, wanted) if want]
        found = iter(torch.autograd.grad(outputs, chosen, gradient, create_graph=torch.is_grad_enabled()))
    return [next(found) if want else None for want in wanted]


def is_pure(function: Any) -> bool:
    """Whether this is one of transformers' activations, without parameters or hooks, and not in place."""
    if type(function) not in ACTIVATIONS:
        return False
    own = vars(function)
    changed = own.get("inplace") or is_hooked(function) or has_global_hooks()
    return not changed and not own["_parameters"] and not own["_modules"]


def saves_memory(mlp: Any, states: Any) -> bool:
    """Whether an MLP in training can use `recomputed_linear` for `act_fn` and `down_proj`; False while tracing."""
    if type(states) is not torch.Tensor or not torch.is_grad_enabled() or states.dtype is not torch.float32:
        return False
    return ONE_DNN and bool(torch.backends.mkldnn.enabled) and is_plain(mlp.down_proj, states) and is_pure(mlp.act_fn)


def recomputed_linear(function: Callable, layer: Any, *inputs: torch.Tensor) -> torch.Tensor:
    """`layer(function(*inputs))` in training; the result of `function` is not stored but computed again for the gradient.

    `function` must be deterministic, depend on `inputs` only and not modify them.
    """
    return _RecomputedLinear.apply(layer.weight, layer.bias, function, *inputs)


def dense_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.up_proj(x)))


def gated_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _train_dense(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return recomputed_linear(mlp.act_fn, mlp.down_proj, mlp.up_proj(x))


def _train_gated(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return recomputed_linear(lambda gate, up: mlp.act_fn(gate) * up, mlp.down_proj, mlp.gate_proj(x), mlp.up_proj(x))


_IN_TRAINING = {dense_mlp: _train_dense, gated_mlp: _train_gated}


def trained_as(formula: Callable) -> Callable:
    """Decorate an MLP's `forward` that computes `formula`: in float32 training on the CPU it then stores less.

    A `forward` with any other code, such as an edited one, is returned unchanged.
    """
    train = _IN_TRAINING[formula]

    def decorate(forward: Callable) -> Callable:
        if not _same_code(forward, formula):
            return forward

        @functools.wraps(forward)
        def chosen(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return train(self, x) if saves_memory(self, x) else forward(self, x)

        return chosen

    return decorate


def _same_code(function: Callable, formula: Callable) -> bool:
    """Whether two functions have the same arguments and statements in their source; False without source."""
    try:
        one, other = (ast.parse(textwrap.dedent(inspect.getsource(each))).body[0] for each in (function, formula))
    except (OSError, TypeError, SyntaxError):
        return False
    if not isinstance(one, ast.FunctionDef) or not isinstance(other, ast.FunctionDef):
        return False
    if hasattr(function, "__wrapped__") or one.args.defaults:
        return False
    names = [[node.arg for node in ast.walk(each.args) if isinstance(node, ast.arg)] for each in (one, other)]
    return names[0] == names[1] and list(map(ast.dump, _statements(one))) == list(map(ast.dump, _statements(other)))


def _statements(function: ast.FunctionDef) -> list[ast.stmt]:
    """The statements of a function's body, without its docstring."""
    return function.body[1:] if ast.get_docstring(function) is not None else function.body

"""The tensors of a model's output by name, and the comparison of two outputs."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch

MAX_VALUES = 200_000
EQUAL = 5e-5  # tolerance in float32 between two orders of summation
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
QUANTISED = 5e-2  # on another processor, many states are rounded to another step
MUST_BE_FINITE = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output", "0")
LEFT_OUT = ("loss", "past_key_values", "cache_params")


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor and number of an output with its path, such as `hidden_states.0`.

    Descends into mappings, dataclasses, tuples, lists, and instances of the folder's own plain classes.
    """
    if (tensor := _as_tensor(value)) is not None:
        yield name or "0", tensor
        return
    if isinstance(value, Mapping):
        items = list(value.items())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value))
    elif isinstance(value, (tuple, list)):
        items = list(enumerate(value))
    elif all(klass.__module__.startswith(("transformers_modules", "builtins")) for klass in type(value).__mro__):
        items = list(getattr(value, "__dict__", {}).items())
    else:
        return  # a cache, or nothing
    for key, inner in items:
        if str(key) not in LEFT_OUT:
            yield from flatten(inner, f"{name}.{key}" if name else str(key))


def _as_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, numpy.ndarray | numpy.generic) and value.dtype.kind in "biufc":
        value = torch.from_numpy(numpy.array(value))
    elif isinstance(value, bool | int | float):
        value = torch.tensor(value)
    if not isinstance(value, torch.Tensor):
        return None
    if value.is_nested:
        value = torch.nested.to_padded_tensor(value, 0.0)
    elif value.layout is not torch.strided:
        value = value.to_dense()
    return torch.view_as_real(value) if value.is_complex() else value


@torch.inference_mode()
def run_model(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor the model returns, by its path in the output, without the loss and the cache.

    Raises:
        ValueError: there is no floating-point tensor among them.
    """
    tensors = {name: tensor.detach().clone() for name, tensor in flatten(model(**inputs))}
    if not any(tensor.is_floating_point() for tensor in tensors.values()):
        raise ValueError(f"forward of {type(model).__name__} returns no floating-point tensor")
    return tensors


def row_of(tensor: torch.Tensor, mask: torch.Tensor | None, row: int) -> torch.Tensor:
    """One row of an output, without padding where the output has tokens (attention weights: on both sides)."""
    if mask is not None and tensor.shape[:2] == mask.shape:
        return tensor[row][mask[row].bool()]
    if mask is not None and tensor.dim() == 4 and tensor.shape[-2:] == mask.shape[1:] * 2:
        kept = mask[row].bool()
        return tensor[row][:, kept][:, :, kept]
    return tensor[row]


def unpadded_outputs(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs, flat, without those at padding; of more than `MAX_VALUES` values every n-th."""
    mask, shown = inputs.get("attention_mask"), {}
    for name, tensor in run_model(model, inputs).items():
        rows = [row_of(tensor, mask, row).reshape(-1) for row in range(tensor.shape[0])] if tensor.dim() else [tensor]
        values = torch.cat([row.reshape(-1) for row in rows]) if rows else tensor.reshape(-1)
        shown[name] = values[:: -(-values.numel() // MAX_VALUES) or 1].contiguous()
    return shown


def floating(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The floating-point outputs. Integers, such as an argmax, may differ where two numbers are nearly equal."""
    return {name: tensor for name, tensor in outputs.items() if tensor.is_floating_point()}


def not_finite(outputs: Mapping[str, torch.Tensor]) -> str:
    """A sentence on the first output with NaN or infinite values, or "". Other scores than logits may hold -inf."""
    for name, tensor in floating(outputs).items():
        wrong = ~tensor.isfinite() if name in MUST_BE_FINITE else tensor.isnan()
        if wrong.any():
            return f"{name} has {int(wrong.sum())} values that are NaN or infinite"
    return ""


def difference(
    seen: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float | None = None
) -> str:
    """A sentence on the first output in which `seen` differs from `expected`, or "".

    Args:
        tolerance: times the largest expected value or 1; default by dtype. Integers must be equal.
    """
    for name, want in expected.items():
        if name not in seen:
            return f"the output {name!r} is missing"
        got = seen[name]
        if got.shape != want.shape:
            return f"{name} has {tuple(got.shape)} values, {tuple(want.shape)} were expected"
        limit = 0.0
        if want.is_floating_point():
            finite = want[want.isfinite()].abs()
            size = max(1.0, finite.max().item()) if finite.numel() else 1.0
            limit = (TOLERANCES.get(want.dtype, 1e-5) if tolerance is None else tolerance) * size
        apart = torch.where(got == want, 0.0, (got.double() - want.double()).abs())  # equal infinities too
        largest = apart.max().item() if want.numel() else 0.0
        if not largest <= limit:  # NaN too
            return f"{name} differs by up to {largest:.3g}, more than {limit:.3g}"
    return ""

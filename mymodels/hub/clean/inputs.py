"""Inputs that fit a model, what it makes of them, and how two results are compared."""

from collections.abc import Mapping
from typing import Any

import torch

from .loading import accepts, text_config

LENGTH, NEW_TOKENS, MAX_VALUES = 11, 8, 200_000
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
PREFERRED = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


class Unsuitable(Exception):
    """The model takes something else than text, or the config does not say enough to make inputs."""


def vocabulary(config: Any) -> list[int]:
    """Token ids that are not special, or all if that leaves too few."""
    config = text_config(config)
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int) or size < 2:
        raise Unsuitable("the config has no vocab_size, so no token ids can be made up for it")
    special: set[Any] = set()
    for name in dir(config):
        if name.endswith("_token_id"):
            value = getattr(config, name, None)
            special.update(value if isinstance(value, (list, tuple)) else [value])
    usable = [token for token in range(min(size, 50_000)) if token not in special]
    return usable if len(usable) > 1 else list(range(size))


def tokens(model: Any, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """The same pseudo-random token ids on every machine."""
    ids, state, values = vocabulary(model.config), seed + 1, []
    for _ in range(rows * length):
        state = state * 6364136223846793005 + 1442695040888963407 & (2**64 - 1)
        values.append(ids[(state >> 33) % len(ids)])
    return torch.tensor(values).reshape(rows, length)


def room(model: Any) -> int:
    """How many tokens of input leave room for padding and for the tokens to be generated."""
    limit = getattr(text_config(model.config), "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else 1_000_000
    return max(2, min(LENGTH, limit - NEW_TOKENS - 3))


def pad_id(model: Any) -> int:
    value = getattr(text_config(model.config), "pad_token_id", None)
    return value if isinstance(value, int) and value >= 0 else 0


def generates(model: Any) -> bool:
    return bool(getattr(model, "can_generate", bool)())


def one_row_only(model: Any) -> bool:
    """Whether the model finds the end of a row by its padding, and its config names none."""
    return "Classif" in type(model).__name__ and getattr(text_config(model.config), "pad_token_id", None) is None


def make_inputs(model: Any) -> dict[str, torch.Tensor]:
    """A batch of two rows, the second padded: on the left for decoders, else on the right."""
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        size = getattr(model.config, "image_size", None)
        if not isinstance(size, int):
            raise Unsuitable("the config has no image_size, so no image can be made up for it")
        shape = (2, getattr(model.config, "num_channels", 3), size, size)
        count = torch.Size(shape).numel()
        return {main: torch.linspace(-1, 1, count).reshape(shape)}
    others = [name for name in ("pixel_values", "input_features", "input_values") if accepts(model, name)]
    if main != "input_ids" or others:
        raise Unsuitable(f"the model takes {others[0] if others else main}, which cannot be made up")
    length = room(model)
    inputs = {"input_ids": tokens(model, 1 if one_row_only(model) else 2, length)}
    if accepts(model, "attention_mask") and not one_row_only(model):
        inputs = pad(model, inputs["input_ids"], side_of(model), [0, min(4, length - 1)])
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens(model, 2, max(1, length // 2), seed=7)
    return inputs


def side_of(model: Any) -> str:
    decoder = generates(model) and not getattr(model.config, "is_encoder_decoder", False)
    return "left" if decoder else "right"


def pad(model: Any, ids: torch.Tensor, side: str, padding: list[int]) -> dict[str, torch.Tensor]:
    """The rows of `ids` with their first (or last) `padding` tokens replaced by padding."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, count in enumerate(padding):
        cut = slice(0, count) if side == "left" else slice(ids.shape[1] - count, None)
        ids[row, cut], mask[row, cut] = pad_id(model), 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def run_model(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The floating-point tensors the model returns, the losses and caches left out."""
    output = model(**inputs)
    if isinstance(output, Mapping):
        items = dict(output)
    else:
        items = {str(i): value for i, value in enumerate(output if isinstance(output, (tuple, list)) else [output])}
    tensors = {
        name: value.detach().clone()
        for name, value in items.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "loss"
    }
    if not tensors:
        raise ValueError(f"forward of {type(model).__name__} returns no floating-point tensor")
    known = {name: tensors[name] for name in PREFERRED if name in tensors}
    return known or dict([next(iter(tensors.items()))])


def row_of(tensor: torch.Tensor, mask: torch.Tensor | None, row: int) -> torch.Tensor:
    """One row of an output, at the tokens that are no padding if it has tokens."""
    if mask is not None and tensor.shape[:2] == mask.shape:
        return tensor[row][mask[row].bool()]
    return tensor[row]


def shown_outputs(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs where they mean something: not at padding; of very large ones every n-th value."""
    mask, shown = inputs.get("attention_mask"), {}
    for name, tensor in run_model(model, inputs).items():
        values = torch.cat([row_of(tensor, mask, row).reshape(-1) for row in range(tensor.shape[0])])
        shown[name] = values[:: -(-values.numel() // MAX_VALUES)].contiguous()
    return shown


@torch.inference_mode()
def generate(model: Any, inputs: Mapping[str, torch.Tensor], **how: Any) -> Any:
    """Greedy tokens, always `NEW_TOKENS` of them."""
    given = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    how = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, **how}
    return model.generate(**given, pad_token_id=pad_id(model), **how)


def difference(
    seen: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float | None = None
) -> str:
    """What is wrong with `seen`, in words, or nothing.

    Args:
        tolerance: times the largest expected value or 1; default by dtype.
    """
    for name, want in expected.items():
        if name not in seen:
            return f"there is no output {name!r}, which there was before"
        got = seen[name]
        if got.shape != want.shape:
            return f"{name} has {tuple(got.shape)} values, {tuple(want.shape)} were expected"
        size = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        limit = (TOLERANCES.get(want.dtype, 1e-5) if tolerance is None else tolerance) * size
        apart = torch.where(got == want, 0.0, (got.double() - want.double()).abs())  # equal infinities too
        largest = apart.max().item() if want.numel() else 0.0
        if not largest <= limit:  # NaN too
            return f"{name} differs by up to {largest:.3g}, more than {limit:.3g}"
    return ""

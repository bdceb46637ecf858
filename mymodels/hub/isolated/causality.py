"""Whether outputs at a position depend on what comes later: tokens, or no more than the length of the row.

Of later tokens they must not, or a cache changes them. On the length they do where positions are scaled by it.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .comparing import EQUAL, difference, run_model
from .inputs import make_rows, prompt_length, with_required


def future_leak(model: Any, like: Mapping[str, torch.Tensor] | None = None) -> str:
    """A sentence on the first earlier position that changes with the last token; "" if there is none.

    Also "" for encoder-decoder models, which are not examined.

    Args:
        like: inputs of the model, which show whether it takes token ids or numbers; default: token ids.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return ""
    ids = make_rows(model, like or {}, 1, prompt_length(model), seed=5)
    changed, others = ids.clone(), make_rows(model, like or {}, 1, 50, seed=9)
    changed[0, -1] = next(other for other in others[0] if not torch.equal(other, ids[0, -1]))
    before, after = (run_model(model, with_required(model, {"input_ids": one})) for one in (ids, changed))
    for name, tensor in before.items():
        if tensor.shape[:2] == ids.shape[:2] and tensor.shape[1] > 1:
            for place in range(tensor.shape[1] - 1):
                if difference({name: after[name][:, place]}, {name: tensor[:, place]}, EQUAL):
                    return (
                        f"a token attends to later ones: the last of {ids.shape[1]} tokens changes {name} at position "
                        f"{place}, so the mask is not causal"
                    )
    return ""


_SCALED = re.compile(r"dynamic|ntk|longrope")


def scaled_by_length(config: Any) -> str:
    """The setting of a config that scales positions by the length of the row, such as `"use_dynamic_ntk"`, or ""."""
    waiting = list(config.to_dict().items())
    while waiting:
        name, value = waiting.pop(0)
        if isinstance(value, Mapping):
            waiting += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif value is True and _SCALED.search(name):
            return name
        elif isinstance(value, str) and _SCALED.search(value) and re.search(r"rope|rotary", name):
            return f"{name} = {value}"
    return ""


def steady_length(model: Any, like: Mapping[str, torch.Tensor], longest: int) -> int:
    """The most tokens, up to `longest`, with which outputs at the first ones do not depend on the length of the row.

    Less than `longest` only for a causal model whose config scales positions by that length: beyond the trained
    length, all positions are turned otherwise, so that keys in a cache are not those of the whole row.
    """
    if not scaled_by_length(model.config) or getattr(model.config, "is_encoder_decoder", False):
        return longest
    ids = make_rows(model, like, 1, longest, seed=5)
    first = max(2, longest // 4)

    def outputs(length: int) -> dict[str, torch.Tensor]:
        made = run_model(model, with_required(model, {"input_ids": ids[:, :length]}))
        return {name: t[:, :first] for name, t in made.items() if t.is_floating_point() and t.shape[:2] == (1, length)}

    want, low, high = outputs(first), first, longest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if difference(outputs(middle), want, EQUAL) else (middle, high)
    return low

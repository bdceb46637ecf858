"""Does a token see the ones after it? The reason why generation with a cache is not generation without it."""

from typing import Any

from .comparing import EQUAL, difference, run_model
from .inputs import make_token_ids, prompt_length


def future_leak(model: Any) -> str:
    """What a change of the last token changes before it, in words; nothing if nothing does, or if it cannot be told."""
    if getattr(model.config, "is_encoder_decoder", False):
        return ""
    ids = make_token_ids(model, 1, prompt_length(model), seed=5)
    changed = ids.clone()
    changed[0, -1] = next(int(token) for token in make_token_ids(model, 1, 50, seed=9)[0] if token != ids[0, -1])
    before, after = run_model(model, {"input_ids": ids}), run_model(model, {"input_ids": changed})
    for name, tensor in before.items():
        if tensor.shape[:2] == ids.shape and tensor.shape[1] > 1:
            for place in range(tensor.shape[1] - 1):
                if difference({name: after[name][:, place]}, {name: tensor[:, place]}, EQUAL):
                    return (
                        f"a token sees the ones after it: the last of {ids.shape[1]} tokens changes {name} at position "
                        f"{place}, so the mask is not causal"
                    )
    return ""

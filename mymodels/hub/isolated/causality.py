"""Whether the mask is causal: outputs at a position must not depend on later tokens, or a cache changes them."""

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

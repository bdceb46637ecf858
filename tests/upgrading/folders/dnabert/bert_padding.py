import torch


def unpad_rows(hidden_states, attention_mask):
    """The states of real tokens, [tokens, width], and their places in the flattened batch."""
    places = torch.nonzero(attention_mask.flatten(), as_tuple=False).flatten()
    return hidden_states.flatten(0, 1)[places], places


def index_put_rows(rows, places, shape):
    """The opposite of `unpad_rows`: zeros where there was padding."""
    out = torch.zeros(shape[0] * shape[1], rows.shape[-1], device=rows.device, dtype=rows.dtype)
    return out.index_put((places,), rows).unflatten(0, shape)

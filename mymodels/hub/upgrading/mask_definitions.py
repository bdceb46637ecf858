"""Private helpers of masks that transformers no longer has, written anew."""

MASKS: dict[str, str] = {
    "_expand_mask": '''
def _expand_mask(mask, dtype=None, tgt_len=None, tgt_length=None):
    """A mask [batch, keys] for each query: numbers to add to scores for a dtype, True where hidden for a length alone."""
    import torch

    if not isinstance(dtype, torch.dtype):  # as BLOOM's: `_expand_mask(mask, tgt_length)`
        length = dtype if dtype is not None else tgt_length
        hidden = ~(mask[:, None, None, :].to(torch.bool))
        return hidden.expand(mask.shape[0], 1, mask.shape[1] if length is None else length, mask.shape[1])
    hidden = mask[:, None, None, :].to(dtype) != 1
    hidden = hidden.expand(mask.shape[0], 1, mask.shape[1] if tgt_len is None else tgt_len, mask.shape[1])
    return torch.zeros(hidden.shape, dtype=dtype, device=mask.device).masked_fill(hidden, torch.finfo(dtype).min)
''',
    "_make_causal_mask": '''
def _make_causal_mask(input_ids_shape, dtype=None, device=None, past_key_values_length=0):
    """Hides what comes later: numbers to add to scores for a dtype, True where hidden without one."""
    import torch

    if not isinstance(dtype, torch.dtype):  # as BLOOM's: `_make_causal_mask(shape, device, past_key_values_length)`
        if dtype is not None:
            device, past_key_values_length = dtype, device if device is not None else past_key_values_length
        dtype = None
    batch, length = input_ids_shape
    hidden = torch.ones(length, past_key_values_length + length, dtype=torch.bool, device=device)
    hidden = hidden.triu(past_key_values_length + 1)[None, None].expand(batch, 1, -1, -1)
    if dtype is None:
        return hidden
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, torch.finfo(dtype).min)
''',
}

"""What transformers no longer has: where it is now, or a definition that takes its place, and does not depend on it."""

# (module, name) → where every supported release has it
MOVED: dict[tuple[str, str], tuple[str, str]] = {
    ("transformers.modeling_utils", "prune_linear_layer"): ("transformers.pytorch_utils", "prune_linear_layer"),
    ("transformers.deepspeed", "is_deepspeed_zero3_enabled"): (
        "transformers.integrations.deepspeed",
        "is_deepspeed_zero3_enabled",
    ),
}

_TRUE = """
def {name}(*arguments):
    return True  # every torch that the supported releases of transformers run on
"""

# name → source of a definition that is complete by itself
DEFINITIONS: dict[str, str] = {
    **{
        name: _TRUE.format(name=name)
        for name in ("is_torch_fx_available", "is_torch_bf16_available", "is_safetensors_available")
    },
    **{
        name: f"{name} = True" for name in ("is_torch_greater_or_equal_than_1_9", "is_torch_greater_or_equal_than_1_10")
    },
    "DUMMY_INPUTS": "DUMMY_INPUTS = [[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]]",
    "DUMMY_MASK": "DUMMY_MASK = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]",
    "find_pruneable_heads_and_indices": '''
def find_pruneable_heads_and_indices(heads, n_heads, head_size, already_pruned_heads):
    """The heads that are still there, and the positions of the features of all heads but these."""
    import torch

    heads = set(heads) - already_pruned_heads
    keep = torch.ones(n_heads, head_size, dtype=torch.bool)
    for head in heads:
        keep[head - sum(pruned < head for pruned in already_pruned_heads)] = False
    return heads, keep.flatten().nonzero().flatten()
''',
}

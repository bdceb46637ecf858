"""DeepSpeed's ZeRO folders by its documented layout, written without it, and read by its own rules a second time."""

from pathlib import Path
from typing import Any

import torch

SHAPES = [{"embed.weight": (7, 5), "mid.weight": (5, 5)}, {"mid.bias": (5,), "norm.scale": ()}]
FROZEN = {"frozen.weight": (3, 5)}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: shape for group in SHAPES for name, shape in group.items()} | FROZEN
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.cat([flat, torch.full((-flat.numel() % multiple,), 99.0)])


def write_zero(
    folder: Path, stage: int, ranks: int, *, prefix: str = "bf16_", **changes: Any
) -> dict[str, torch.Tensor]:
    """Write one save and `latest` beside it; returns what its ranks hold together."""
    save = folder / "global_step3"
    save.mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    full = weights()
    buffers = {"norm.mean": torch.arange(5.0).bfloat16(), "norm.count": torch.tensor(3)}
    parts: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    for group in SHAPES:
        if stage < 3:
            flat = padded(torch.cat([full[name].reshape(-1) for name in group]), 2 * ranks)
            for rank, piece in enumerate(flat.chunk(ranks)):
                parts[rank].append(piece.clone())
        else:
            pieces = [padded(full[name].reshape(-1), ranks).chunk(ranks) for name in group]
            for rank in range(ranks):
                parts[rank].append(torch.cat([piece[rank] for piece in pieces]))
    tied = {"head.weight": "embed.weight"}
    for rank in range(ranks):
        empty = {
            name: torch.empty(0) if stage == 3 else full[name].bfloat16() for name in [*full, *tied] if name in full
        }
        frozen = {
            name: padded(full[name].reshape(-1), ranks).chunk(ranks)[rank].clone() if stage == 3 else full[name]
            for name in FROZEN
        }
        model = {
            "module": {**empty, "head.weight": empty["embed.weight"], **buffers},
            "buffer_names": list(buffers),
            "param_shapes": [{name: torch.Size(shape) for name, shape in group.items()} for group in SHAPES],
            "frozen_param_shapes": {name: torch.Size(shape) for name, shape in FROZEN.items()},
            "frozen_param_fragments": frozen,
            "shared_params": tied,
            "ds_version": "0.19.8",
            "global_steps": 3,
        }
        if stage == 3:
            torch.save(model | changes, save / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        elif rank == 0:
            torch.save(model | changes, save / "mp_rank_00_model_states.pt")
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        optimizer = {
            "zero_stage": stage,
            "partition_count": ranks if stage == 3 else [ranks] * len(SHAPES),
            key: parts[rank],
        }
        state = {"optimizer_state_dict": optimizer, "ds_version": "0.19.8"}
        torch.save(state, save / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    wide = {name: value.float() if value.is_floating_point() else value for name, value in buffers.items()}
    return {**wide, **full, "head.weight": full["embed.weight"]}

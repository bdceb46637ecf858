"""Tensors to save in any format, and how what was read is compared with them."""

import argparse
import random
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from torch import nn

from mymodels.checkpoints import Checkpoint

COMMON_DTYPES = [torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8]
COMMON_DTYPES += [torch.uint8, torch.bool, torch.complex64]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]
FLOAT8 += [torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else []
LEGACY_DTYPES = [*COMMON_DTYPES, torch.bfloat16, torch.complex128]  # torch itself reads no others in the old format
NUMPY_DTYPES = [*COMMON_DTYPES, *UNSIGNED]
SAFETENSORS_DTYPES = [*NUMPY_DTYPES, torch.bfloat16, *FLOAT8]
TORCH_DTYPES = [*LEGACY_DTYPES, *UNSIGNED, *FLOAT8]


def source(dtypes: list[torch.dtype]) -> dict[str, torch.Tensor]:
    """Random bytes of each dtype, NaN among them, a scalar, an empty tensor, and signs that only bits tell apart."""
    tensors = {}
    for dtype in dtypes:
        high = 2 if dtype == torch.bool else 256
        name = f"layers.{str(dtype).removeprefix('torch.')}.weight"
        tensors[name] = torch.randint(0, high, (3, 5 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    special = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan])
    return tensors | {"special": special, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4, dtype=torch.int64)}


def large() -> torch.Tensor:
    """More than any reader buffers by chance."""
    return torch.randint(0, 2**60, (9, 3000))


class Holder(nn.Module):
    """A module whose state dict is the given tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(ids)))


def assert_same(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert found.device.type == "cpu", name
    a, b = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected))
    assert torch.equal(a, b), name


def assert_reads(checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor]) -> None:
    """The names, shapes and dtypes without reading anything, then each tensor, bit for bit."""

    def too_early(name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    read, checkpoint._read = checkpoint._read, too_early
    assert set(checkpoint) == set(expected) and len(checkpoint) == len(expected)
    for name, tensor in expected.items():
        info = checkpoint.info[name]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype), name
        assert (info.numel, info.nbytes) == (tensor.numel(), tensor.numel() * tensor.itemsize), name
    checkpoint._read = read
    for name, tensor in expected.items():
        assert_same(checkpoint[name], tensor, name)


def state_dict(**changes) -> dict[str, torch.Tensor]:
    """A small model's new random weights."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2, **changes)).state_dict()


def one_sentence(error: BaseException, name: str) -> str:
    message = str(error)
    assert "\n" not in message and name in message and 20 < len(message) < 900, message
    return message


def sharded_safetensors(folder: Path):
    huggingface_hub.save_torch_state_dict(tensors := source(SAFETENSORS_DTYPES), folder, max_shard_size=200)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder, tensors


def training_checkpoint() -> dict:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    loss = model(torch.randn(3, 4)).square().mean()
    loss.backward()
    optimizer.step()
    scheduler.step()
    return {
        "epoch": 3,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "loss": loss.detach(),
        "best_loss": np.float64(0.25),
        "history": np.arange(3.0),
        "args": argparse.Namespace(lr=1e-3, output=Path("out")),
        "torch_rng_state": torch.get_rng_state(),
        "numpy_rng_state": np.random.get_state(),
        "python_rng_state": random.getstate(),
    }

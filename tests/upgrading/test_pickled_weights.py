"""Weights in `pytorch_model.bin`: the same tensors as safetensors, bit for bit; a pickle with more in it is refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mymodels.checkpoints import CheckpointError
from mymodels.hub.static.repo_snapshot import read_folder
from mymodels.hub.upgrading.edit_engine import Edited
from mymodels.hub.upgrading.pickled_weights import has_pickled_weights, with_safetensors
from mymodels.hub.upgrading.write_folder import write_copy

STATE = {
    "wte.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
    "half.weight": torch.tensor([[1.5, -0.0], [65504.0, 6e-8]], dtype=torch.float16),
    "brain.weight": torch.tensor([float("nan"), float("inf"), -3e38], dtype=torch.bfloat16),
    "ids": torch.arange(5),
    "flags": torch.tensor([True, False]),
}


def folder_of(path: Path, shards: list[dict[str, torch.Tensor]]) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "toy"}')
    names = ["pytorch_model.bin"]
    if len(shards) > 1:
        names = [f"pytorch_model-{i + 1:05}-of-{len(shards):05}.bin" for i in range(len(shards))]
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, shard in zip(names, shards):
        torch.save(shard, path / name)
    return path


@pytest.mark.parametrize("count", [1, 2])
def test_the_same_bits_as_safetensors(count: int, tmp_path: Path) -> None:
    items = list(STATE.items())
    source = folder_of(tmp_path / "old", [dict(items[i::count]) for i in range(count)])
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    folder = read_folder(source)
    assert has_pickled_weights(folder)
    (tmp_path / "made").mkdir()
    (tmp_path / "new").mkdir()
    new = write_copy(with_safetensors(folder, tmp_path / "made"), Edited(), tmp_path / "new", link=False)
    assert not list(new.glob("*.bin*"))
    loaded = {name: tensor for file in new.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert loaded.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8)), name  # NaN and -0.0 too
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_safetensors_beside_them_are_kept(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "old", [STATE])
    (source / "model.safetensors").write_bytes(b"as it is")
    folder = read_folder(source)
    assert not has_pickled_weights(folder) and with_safetensors(folder, tmp_path) is folder


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "old", [{}])
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Runs(str(tmp_path / "ran"))}))
    (tmp_path / "made").mkdir()
    with pytest.raises(CheckpointError):
        with_safetensors(read_folder(source), tmp_path / "made")
    assert not (tmp_path / "ran").exists()

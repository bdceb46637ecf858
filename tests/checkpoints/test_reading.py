"""Every format is written by its own ecosystem here and read bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from states import (
    LEGACY_DTYPES,
    NUMPY_DTYPES,
    SAFETENSORS_DTYPES,
    TORCH_DTYPES,
    Holder,
    Tied,
    assert_reads,
    assert_same,
    large,
    sharded_safetensors,
    source,
    training_checkpoint,
)
from tiny import gpt2_pair
from torch import nn

from mymodels.checkpoints import CheckpointError, load_state_dict, open_checkpoint


def torch_zip(folder: Path):
    torch.save(tensors := source(TORCH_DTYPES), folder / "model.pt")
    return folder / "model.pt", tensors


def torch_legacy(folder: Path):
    torch.save(tensors := source(LEGACY_DTYPES), folder / "model.pt", _use_new_zipfile_serialization=False)
    return folder / "model.pt", tensors


def safetensors_file(folder: Path):
    safetensors.torch.save_file(
        tensors := source(SAFETENSORS_DTYPES), folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder / "model.safetensors", tensors


def sharded_bin(folder: Path):
    huggingface_hub.save_torch_state_dict(
        tensors := source(TORCH_DTYPES), folder, max_shard_size=200, safe_serialization=False
    )
    assert len(list(folder.glob("*.bin"))) > 1
    return folder, tensors


def numpy_npz(folder: Path, save=np.savez):
    tensors = source(NUMPY_DTYPES)
    save(folder / "model.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    return folder / "model.npz", tensors


def numpy_npz_compressed(folder: Path):
    return numpy_npz(folder, np.savez_compressed)


def torchscript_trace(folder: Path):
    module = Holder(source(TORCH_DTYPES))
    torch.jit.trace(module, torch.ones(4)).save(str(folder / "model.pt"))
    return folder / "model.pt", module.state_dict()


def torchscript_script(folder: Path):
    module = Holder(source(TORCH_DTYPES))
    torch.jit.save(torch.jit.script(module), str(folder / "model.pt"))
    return folder / "model.pt", module.state_dict()


def exported(folder: Path):
    module = Holder(source(TORCH_DTYPES))
    torch.export.save(torch.export.export(module, (torch.ones(4),)), folder / "model.pt2")
    return folder / "model.pt2", module.state_dict()


def distributed(folder: Path):
    dcp.save(tensors := source(TORCH_DTYPES), checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp", tensors


FILES = [torch_zip, torch_legacy, safetensors_file, numpy_npz, numpy_npz_compressed]
FILES += [torchscript_trace, torchscript_script, exported]
WRITERS = [*FILES, sharded_safetensors, sharded_bin, distributed]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", WRITERS)
def test_every_format_is_read_bit_for_bit(write, tmp_path: Path) -> None:
    path, tensors = write(tmp_path)
    checkpoint = open_checkpoint(path)
    assert_reads(checkpoint, tensors)
    assert checkpoint.sections == {"": list(checkpoint)} and checkpoint.aliases == {} and checkpoint.extras == {}
    for name, tensor in load_state_dict(path).items():
        assert_same(tensor, tensors[name], name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", FILES)
@pytest.mark.parametrize("ending", [".bin", ".safetensors", ".npz", ".gguf", ".onnx", ".json", ".index", ".tar", ""])
def test_content_decides_not_the_name(write, ending: str, tmp_path: Path) -> None:
    path, tensors = write(tmp_path)
    checkpoint = open_checkpoint(path.rename(tmp_path / f"renamed{ending}"))
    assert_reads(checkpoint, tensors)
    assert {info.file for info in checkpoint.info.values()} == {f"renamed{ending}"}


@pytest.mark.parametrize("length", [0x7B20, 0x4B50])  # as bytes: " {" and "PK"
def test_safetensors_whose_length_looks_like_another_format(length: int, tmp_path: Path) -> None:
    path, tensors = tmp_path / "model.safetensors", {"w": torch.randn(3)}
    pad = length - len(json.dumps({"__metadata__": {"pad": ""}, "w": {"dtype": "F32", "shape": [3]}}))
    for size in range(pad - 80, pad, 4):
        safetensors.torch.save_file(tensors, path, metadata={"pad": "x" * size})
        if int.from_bytes(path.read_bytes()[:8], "little") == length:
            break
    else:
        raise AssertionError("no header of this length was written")
    assert_reads(open_checkpoint(path), tensors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "write",
    [w for w in WRITERS if w not in (torch_legacy, numpy_npz_compressed)],  # these are read whole, or packed
)
def test_data_is_read_only_when_asked_for(write, tmp_path: Path, monkeypatch) -> None:
    """After opening, one tensor is changed on disk: the new bytes arrive, or a checksum no longer fits."""
    monkeypatch.setattr(sys.modules[write.__module__], "source", lambda dtypes: {"large": large(), "last": large()})
    path, tensors = write(tmp_path)
    checkpoint = open_checkpoint(path)
    name = "large"
    old, new = tensors[name], tensors[name] ^ 1
    for file in [path] if path.is_file() else [file for file in path.iterdir() if file.suffix != ".json"]:
        data = file.read_bytes()
        if (at := data.find(old.numpy().tobytes())) > 0:
            with file.open("r+b") as opened:
                opened.seek(at)
                opened.write(new.numpy().tobytes())
            break
    else:
        raise AssertionError("the tensor's bytes were not found on disk")
    try:
        found = checkpoint[name]
    except CheckpointError as error:
        assert repr(name) in str(error) and "damaged" in str(error)
    else:
        assert_same(found, new)


def test_sharded_save_pretrained(tmp_path: Path) -> None:
    stock, _ = gpt2_pair()
    stock.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    expected = stock.state_dict()
    del expected["lm_head.weight"]  # tied, and left out by transformers
    for path in (tmp_path, str(tmp_path), tmp_path / "model.safetensors.index.json"):
        checkpoint = open_checkpoint(path)
        assert_reads(checkpoint, expected)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {name: info.file for name, info in checkpoint.info.items()} == index["weight_map"]
    assert checkpoint.format == "sharded safetensors"


def test_save_model_ties(tmp_path: Path) -> None:
    module = Tied()
    safetensors.torch.save_model(module, str(tmp_path / "model.safetensors"))
    checkpoint = open_checkpoint(tmp_path)
    assert_reads(checkpoint, module.state_dict())
    assert len(checkpoint.aliases) == 1
    assert {*checkpoint.aliases, *checkpoint.aliases.values()} == {"embed.weight", "head.weight"}
    loaded = load_state_dict(tmp_path)
    assert loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr()


@pytest.mark.parametrize("zipped", [True, False])
def test_ties_in_pickles(zipped: bool, tmp_path: Path) -> None:
    module = Tied()
    torch.save(module.state_dict(), tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(tmp_path)
    assert_reads(checkpoint, module.state_dict())
    assert checkpoint.aliases == {"head.weight": "embed.weight"}
    loaded = load_state_dict(tmp_path)
    assert loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr()


def test_views_of_one_storage_are_not_tied(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    tensors = {"whole": whole, "rows": whole[1:3], "columns": whole[:, 2:4], "turned": whole.t()}
    torch.save(tensors, tmp_path / "views.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert_reads(checkpoint, tensors)
    assert checkpoint.aliases == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compile_", [torch.jit.script, lambda m: torch.jit.trace(m, torch.tensor([1, 2]))])
def test_torchscript_has_the_names_of_its_state_dict(compile_, tmp_path: Path) -> None:
    module = Tied()
    module.register_buffer("steps", torch.tensor(3))
    module.constant = torch.randn(2)  # a plain attribute: saved, but no weight
    module.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    torch.jit.save(compile_(module.eval()), str(tmp_path / "model.pt"))
    expected = torch.jit.load(str(tmp_path / "model.pt")).state_dict()
    assert {"steps", "inner.1.running_mean"} <= set(expected) and "constant" not in expected
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    assert_reads(checkpoint, expected)
    assert checkpoint.aliases == {"head.weight": "embed.weight"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["script", "export"])
def test_views_in_archives_of_programs(kind: str, tmp_path: Path) -> None:
    """Buffers that begin in the middle of a storage, skip columns, or are turned."""
    whole = torch.randn(4, 6)
    module = Holder({"whole": whole, "rows": whole[1:3], "columns": whole[:, 2:4], "turned": whole[2:].t()})
    if kind == "script":
        torch.jit.save(torch.jit.script(module), str(tmp_path / "model.pt"))
    else:
        torch.export.save(torch.export.export(module, (torch.ones(4),)), tmp_path / "model.pt2")
    checkpoint = open_checkpoint(tmp_path)
    assert_reads(checkpoint, module.state_dict())
    assert checkpoint.aliases == {}


@pytest.mark.filterwarnings("ignore")
def test_exported_ties_and_constants(tmp_path: Path) -> None:
    module = Tied()
    module.embed.weight.data = torch.randn(4, 7).t()  # not contiguous
    program = torch.export.export(module, (torch.tensor([1, 2]),))
    torch.export.save(program, tmp_path / "model.pt2")
    checkpoint = open_checkpoint(tmp_path)
    assert_reads(checkpoint, program.state_dict)
    assert checkpoint.aliases == {"head.weight": "embed.weight"}


@pytest.mark.filterwarnings("ignore")
def test_distributed_training_checkpoint(tmp_path: Path) -> None:
    saved = training_checkpoint()
    state = {"model": saved["model_state_dict"], "optim": saved["optimizer_state_dict"], "epoch": 3}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    checkpoint = open_checkpoint(tmp_path)
    assert_reads(checkpoint, saved["model_state_dict"])
    assert checkpoint.extras["epoch"] == 3
    assert all((tmp_path / info.file).is_file() for info in checkpoint.info.values())


SHARDED = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(5)
whole = {"rows": torch.randn(7, 3), "columns": torch.randn(2, 9).bfloat16(), "copied": torch.arange(4)}
places = {"rows": [Shard(0)], "columns": [Shard(1)], "copied": [Replicate()]}
dcp.save({"model": {n: distribute_tensor(t, mesh, places[n]) for n, t in whole.items()}}, checkpoint_id=f"{folder}/dcp")
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads sometimes abort the interpreter's own exit
"""


@pytest.mark.slow
def test_distributed_checkpoint_of_two_processes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SHARDED)
    runs = [subprocess.Popen([sys.executable, tmp_path / "script.py", str(rank), tmp_path]) for rank in (0, 1)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    torch.manual_seed(5)
    expected = {"rows": torch.randn(7, 3), "columns": torch.randn(2, 9).bfloat16(), "copied": torch.arange(4)}
    assert_reads(open_checkpoint(tmp_path / "dcp"), expected)


@pytest.mark.filterwarnings("ignore")
def test_distributed_checkpoint_without_a_piece(tmp_path: Path) -> None:
    dcp.save({"w": torch.randn(9, 9)}, checkpoint_id=tmp_path, no_dist=True)
    piece = next(tmp_path.glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:-400])
    with pytest.raises(CheckpointError, match=f"{piece.name} is missing or truncated"):
        open_checkpoint(tmp_path)
    piece.unlink()
    with pytest.raises(CheckpointError, match=f"{piece.name} is missing or truncated"):
        open_checkpoint(tmp_path)

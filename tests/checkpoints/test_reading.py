"""Each format is written by its own ecosystem and read bit for bit, lazily, by content; bad files are one sentence."""

import argparse
import gzip
import importlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from tiny import gpt2_pair, mygpt2_config
from torch import nn
from transformers import AutoModelForCausalLM

from mymodels import MyGPT2ForCausalLM
from mymodels.checkpoints import Checkpoint, CheckpointError, load_state_dict, open_checkpoint, save_checkpoint

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


# ----- each format, by its own writer: folder → (path, what it holds) -----


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


def sharded_safetensors(folder: Path):
    huggingface_hub.save_torch_state_dict(tensors := source(SAFETENSORS_DTYPES), folder, max_shard_size=200)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder, tensors


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
    monkeypatch.setattr(sys.modules[__name__], "source", lambda dtypes: {"large": large(), "last": large()})
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


# ----- what the libraries write of whole models -----


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
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(5)
whole = {"rows": torch.randn(7, 3), "columns": torch.randn(2, 9).bfloat16(), "copied": torch.arange(4)}
places = {"rows": [Shard(0)], "columns": [Shard(1)], "copied": [Replicate()]}
dcp.save({"model": {n: distribute_tensor(t, mesh, places[n]) for n, t in whole.items()}}, checkpoint_id=f"{folder}/dcp")
dist.destroy_process_group()
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


# ----- training checkpoints -----


def state_dict(**changes) -> dict[str, torch.Tensor]:
    """A small model's new random weights."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2, **changes)).state_dict()


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


@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoint(zipped: bool, tmp_path: Path) -> None:
    saved = training_checkpoint()
    torch.save(saved, tmp_path / "last.pth.tar", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(tmp_path / "last.pth.tar")
    assert_reads(checkpoint, saved["model_state_dict"])
    assert list(checkpoint.sections) == ["model_state_dict"]
    assert set(checkpoint.extras) == set(saved) - {"model_state_dict"}
    assert checkpoint.extras["epoch"] == 3 and checkpoint.extras["best_loss"] == 0.25
    assert checkpoint.extras["loss"] == saved["loss"] and checkpoint.extras["args"] == saved["args"]
    assert checkpoint.extras["optimizer_state_dict"]["param_groups"][0]["lr"] < 1e-3
    optimizer = torch.optim.AdamW(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).parameters())
    optimizer.load_state_dict(checkpoint.extras["optimizer_state_dict"])
    torch.set_rng_state(checkpoint.extras["torch_rng_state"])


def test_lightning_checkpoint(tmp_path: Path) -> None:
    saved = training_checkpoint()
    weights = {f"model.{name}": tensor for name, tensor in saved["model_state_dict"].items()}
    callback = {"best_model_score": torch.tensor(0.5), "current_score": torch.tensor(0.6), "best_model_path": "a.ckpt"}
    progress = {"total": {"ready": 4}, "current": {"ready": 4}}
    lightning = {
        "epoch": 1,
        "global_step": 4,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": weights,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": progress, "_results": {"loss": torch.randn(3)}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": callback},
        "optimizer_states": [saved["optimizer_state_dict"]],
        "lr_schedulers": [saved["scheduler_state_dict"]],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3, "class_weights": [1.0, 2.0]},
    }
    torch.save(lightning, tmp_path / "epoch=1.ckpt")
    checkpoint = open_checkpoint(tmp_path / "epoch=1.ckpt")
    assert_reads(checkpoint, weights)
    assert set(checkpoint.extras) == set(lightning) - {"state_dict"}
    assert checkpoint.extras["hyper_parameters"] == lightning["hyper_parameters"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state": {"model": weights}},
        lambda weights: {"state": {"model": weights, "step": 4}, "version": (1, 2)},
        lambda weights: {"net": weights, "optimizer": torch.optim.SGD([torch.zeros(1)]).state_dict()},
        lambda weights: {"iteration": 5, "args": argparse.Namespace(a=1), "model": {"language_model": weights}},
        lambda weights: [weights, {"epoch": 2}],
        lambda weights: (3, weights),
    ],
)
def test_weights_are_found_however_nested(wrap, tmp_path: Path) -> None:
    weights = state_dict()
    torch.save(wrap(weights), tmp_path / "model.pt")
    assert_reads(open_checkpoint(tmp_path), weights)


def test_several_models_are_sections(tmp_path: Path) -> None:
    models = {"modelA_state_dict": state_dict(), "modelB_state_dict": state_dict(bias=False)}
    saved = training_checkpoint()
    optimizers = {"optimizerA_state_dict": saved["optimizer_state_dict"], "epoch": 7}
    torch.save(models | optimizers, tmp_path / "gan.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.sections == {section: list(weights) for section, weights in models.items()}
    assert_reads(checkpoint, {f"{s}.{name}": t for s, weights in models.items() for name, t in weights.items()})
    assert set(checkpoint.extras) == set(optimizers)
    for section, weights in models.items():
        assert_reads(checkpoint.section(section), weights)
        assert_reads(open_checkpoint(tmp_path, section=section), weights)
        assert open_checkpoint(tmp_path, section=section).extras["epoch"] == 7
    with pytest.raises(CheckpointError, match="no section 'modelC'; it has 'modelA_state_dict', 'modelB_state_dict'"):
        open_checkpoint(tmp_path, section="modelC")


def test_ties_within_a_section(tmp_path: Path) -> None:
    models = {"generator": Tied().state_dict(), "critic": Tied().state_dict()}
    torch.save(models, tmp_path / "gan.pt")
    part = open_checkpoint(tmp_path, section="critic")
    assert_reads(part, models["critic"])
    assert part.aliases == {"head.weight": "embed.weight"}


@pytest.mark.parametrize("names", [("model", "ema"), ("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_moving_average_beside_the_model(names: tuple[str, str], tmp_path: Path) -> None:
    model, average = state_dict(), state_dict()
    torch.save({names[0]: model, names[1]: average, "epoch": 1, "decay": 0.99}, tmp_path / "model.pt")
    assert_reads(open_checkpoint(tmp_path, section=names[0]), model)
    assert_reads(open_checkpoint(tmp_path, section=names[1]), average)


def test_moving_average_in_its_own_wrapping(tmp_path: Path) -> None:
    model, average = state_dict(), state_dict()
    torch.save({"model": model, "ema": {"decay": 0.99, "shadow": average}}, tmp_path / "model.pt")
    assert_reads(open_checkpoint(tmp_path, section="model"), model)
    assert_reads(open_checkpoint(tmp_path, section="ema.shadow"), average)


def test_data_parallel_names_stay(tmp_path: Path) -> None:
    weights = nn.DataParallel(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))).state_dict()
    assert all(name.startswith("module.") for name in weights)
    torch.save({"state_dict": weights, "epoch": 1}, tmp_path / "model.pt")
    assert_reads(open_checkpoint(tmp_path), weights)


def test_flax_like_tree_is_one_model(tmp_path: Path) -> None:
    layer = lambda: {"attention": {"kernel": torch.randn(3, 3)}, "norm": {"scale": torch.ones(3)}}  # noqa: E731
    tree = {"encoder": {"layer_0": layer(), "layer_1": layer()}, "decoder": {"layer_0": layer()}}
    torch.save({"params": tree, "step": 4}, tmp_path / "model.pt")
    expected = {
        f"{a}.{b}.{c}.{d}": tensor
        for a, layers in tree.items()
        for b, parts in layers.items()
        for c, leaves in parts.items()
        for d, tensor in leaves.items()
    }
    assert_reads(open_checkpoint(tmp_path), expected)
    assert open_checkpoint(tmp_path).extras == {"step": 4}


def test_list_of_tensors_and_bare_tensor(tmp_path: Path) -> None:
    tensors = [torch.randn(2), torch.arange(3), torch.tensor(1.5)]
    torch.save(tensors, tmp_path / "list.pt")
    assert_reads(open_checkpoint(tmp_path / "list.pt"), {"0": tensors[0], "1": tensors[1], "2": tensors[2]})
    torch.save(tensors[0], tmp_path / "one.pt")
    assert_reads(open_checkpoint(tmp_path / "one.pt"), {"tensor": tensors[0]})
    torch.save(nn.Parameter(tensors[0]), tmp_path / "parameter.pt")
    assert_reads(open_checkpoint(tmp_path / "parameter.pt"), {"tensor": tensors[0]})


def test_scalars_in_a_state_dict_are_weights(tmp_path: Path) -> None:
    weights = {"logit_scale": torch.tensor(2.6), "norm.num_batches_tracked": torch.tensor(4), "w": torch.randn(2)}
    torch.save({"model": weights, "loss": torch.tensor(0.5)}, tmp_path / "model.pt")
    assert_reads(open_checkpoint(tmp_path), weights)


@pytest.mark.parametrize("zipped", [True, False])
def test_saved_on_a_gpu(zipped: bool, tmp_path: Path, monkeypatch) -> None:
    tensors = source(TORCH_DTYPES if zipped else LEGACY_DTYPES)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(tensors, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert b"cuda:0" in (tmp_path / "model.pt").read_bytes()
    assert_reads(open_checkpoint(tmp_path), tensors)
    assert {tensor.device.type for tensor in load_state_dict(tmp_path).values()} == {"cpu"}


@pytest.mark.parametrize("beside", [{"losses": torch.ones(9)}, {"center": torch.zeros(1, 3), "epoch": 2}])
def test_tensors_beside_a_model_are_extras(beside: dict, tmp_path: Path) -> None:
    """A history or the like at the top does not become a weight, nor change the weights' names."""
    torch.save({"model": (weights := state_dict()), **beside}, tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert_reads(checkpoint, weights)
    assert set(checkpoint.extras) == set(beside)


@pytest.mark.parametrize(
    "tree",
    [
        {0: torch.zeros(2), "0": torch.ones(2)},
        {"a": {"b": torch.zeros(2), "c": {"d": torch.zeros(2)}}, "a.b": torch.ones(2)},
        {"a": {"b.c": torch.zeros(2)}, "a.b": {"c": torch.ones(2)}},
    ],
)
def test_no_tensor_is_lost_when_names_collide(tree: dict, tmp_path: Path) -> None:
    torch.save(tree, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    one_sentence(caught.value, str(tmp_path / "model.pt"))


def test_sparse_and_trained_tensors(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(2, 2))
    sparse = torch.eye(3).to_sparse()
    torch.save({"w": weight, "s": sparse}, tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint["w"].requires_grad and checkpoint.info["s"].shape == (3, 3)
    assert torch.equal(checkpoint["s"].to_dense(), torch.eye(3))


def test_legacy_shards_are_read_in_any_order(tmp_path: Path) -> None:
    """One shard of this format is in memory at a time; the others come back."""
    tensors = {f"w{i}": torch.randn(3) for i in range(3)}
    for i in range(3):
        file = tmp_path / f"pytorch_model-{i}.bin"
        torch.save({f"w{i}": tensors[f"w{i}"]}, file, _use_new_zipfile_serialization=False)
    index = {"metadata": {}, "weight_map": {f"w{i}": f"pytorch_model-{i}.bin" for i in range(3)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    assert_reads(checkpoint, tensors)
    for name in ("w0", "w2", "w0", "w1"):
        assert_same(checkpoint[name], tensors[name], name)


def test_numpy_layouts_and_names(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(3, 4))
    arrays = {"params/Dense_0/kernel": matrix.astype(">f4"), "columns": np.asfortranarray(matrix), "every": matrix[::2]}
    np.savez(tmp_path / "model.npz", **arrays)
    expected = {name: torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) for name, array in arrays.items()}
    assert_reads(open_checkpoint(tmp_path), expected)


@pytest.mark.parametrize("array", [np.array(["a", "b"]), np.array(["2020-01-01"], "M8[D]"), np.zeros(2, "i4,f8")])
def test_numpy_array_that_is_no_tensor(array: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", w=np.ones(2), x=array)
    opened = open_checkpoint(tmp_path)
    assert list(opened) == ["w"] and opened.extras["x"].startswith("array of ")


# ----- pickles that run code -----

NET = """
import os
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.tied = torch.nn.Linear(3, 2)
        self.tied.weight = self.linear.weight

    def __setstate__(self, state):
        with open("ran.txt", "a") as file:
            file.write(f"{os.getpid()}\\n")
        super().__setstate__(state)
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module(zipped: bool, tmp_path: Path, monkeypatch) -> None:
    """Refused by its name; with `allow_pickle` its code runs in the current folder, in another process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module_name = f"net_{'zip' if zipped else 'legacy'}"
    (tmp_path / f"{module_name}.py").write_text(NET)
    net = importlib.import_module(module_name).Net()
    torch.save({"net": net, "epoch": 3}, "whole.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("whole.pt")
    assert f"{module_name}.Net" in str(caught.value) and "allow_pickle=True" in str(caught.value)
    assert not Path("ran.txt").exists()
    checkpoint = open_checkpoint("whole.pt", allow_pickle=True)
    assert_reads(checkpoint, net.state_dict())
    assert checkpoint.extras["epoch"] == 3 and checkpoint.aliases == {"tied.weight": "linear.weight"}
    pids = set(map(int, Path("ran.txt").read_text().split()))
    assert len(pids) == 1 and os.getpid() not in pids


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module_names_torch_classes(zipped: bool, tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.container\.Sequential"):
        open_checkpoint(tmp_path)


class Evil:
    """Its pickle creates a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def evil_zip(folder: Path, evil: Evil) -> Path:
    torch.save({"w": torch.ones(2), "x": evil}, folder / "model.bin")
    return folder


def evil_legacy(folder: Path, evil: Evil) -> Path:
    torch.save({"w": torch.ones(2), "x": evil}, folder / "model.bin", _use_new_zipfile_serialization=False)
    return folder


def evil_bare(folder: Path, evil: Evil) -> Path:
    (folder / "model.bin").write_bytes(pickle.dumps(evil))
    return folder


def evil_npz(folder: Path, evil: Evil) -> Path:
    np.savez(folder / "model.npz", w=np.ones(2), x=np.array([evil], dtype=object))
    return folder


def evil_metadata(folder: Path, evil: Evil) -> Path:
    (folder / ".metadata").write_bytes(pickle.dumps(evil))
    return folder


def evil_distributed_part(folder: Path, evil: Evil) -> Path:
    dcp.save({"w": torch.ones(2), "x": evil}, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def evil_shard(folder: Path, evil: Evil) -> Path:
    torch.save({"x": evil}, folder / "pytorch_model-1.bin")
    index = {"metadata": {}, "weight_map": {"x": "pytorch_model-1.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def evil_torchscript(folder: Path, evil: Evil) -> Path:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(folder / "good.pt"))
    with zipfile.ZipFile(folder / "good.pt") as good, zipfile.ZipFile(folder / "model.pt", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, pickle.dumps(evil) if name.endswith("/data.pkl") else good.read(name))
    (folder / "good.pt").unlink()
    return folder


EVIL = [evil_zip, evil_legacy, evil_bare, evil_metadata, evil_shard, evil_torchscript]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", EVIL)
def test_malicious_pickle_does_not_run(write, tmp_path: Path) -> None:
    path = write(tmp_path, Evil(tmp_path / "it_ran"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    if write in (evil_zip, evil_legacy, evil_metadata, evil_shard):
        assert f"{os.system.__module__}.system" in str(caught.value)
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [evil_npz, evil_distributed_part])
def test_malicious_pickle_beside_the_weights_is_left_alone(write, tmp_path: Path) -> None:
    opened = open_checkpoint(write(tmp_path, Evil(tmp_path / "it_ran")))
    assert (
        list(opened) == ["w"]
        and torch.equal(opened["w"].float(), torch.ones(2))
        and isinstance(opened.extras["x"], str)
    )
    assert not (tmp_path / "it_ran").exists()


# ----- what is no checkpoint -----


def saved_bytes(**options) -> bytes:
    torch.save(source(LEGACY_DTYPES), buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def numpy_bytes() -> bytes:
    np.savez(buffer := io.BytesIO(), a=np.arange(50), b=np.arange(60))
    return buffer.getvalue()


WRONG = {
    "empty.bin": lambda: b"",
    "pointer.safetensors": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "page.bin": lambda: b"<!DOCTYPE html>\n<html><body>Not found</body></html>",
    "lower.pt": lambda: b"\n<html lang=en><head></head></html>",
    "keras.h5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(600),
    "packed.pt": lambda: gzip.compress(saved_bytes()),
    "cut.pt": lambda: saved_bytes()[:-200],
    "half.pt": lambda: saved_bytes()[: len(saved_bytes()) // 2],
    "legacy_cut.pt": lambda: saved_bytes(_use_new_zipfile_serialization=False)[:-20],
    "legacy_head.pt": lambda: saved_bytes(_use_new_zipfile_serialization=False)[:60],
    "cut.safetensors": lambda: safetensors.torch.save(source(SAFETENSORS_DTYPES))[:-5],
    "head.safetensors": lambda: safetensors.torch.save(source(SAFETENSORS_DTYPES))[:40],
    "seven.safetensors": lambda: b"\x10\0\0\0\0\0\0",
    "random.bin": lambda: random.Random(3).randbytes(5000),
    "random.safetensors": lambda: random.Random(4).randbytes(5000),
    "random.onnx": lambda: random.Random(5).randbytes(5000),
    "zeros.bin": lambda: bytes(5000),
    "text.txt": lambda: b"These are not the weights you are looking for.\n" * 20,
    "bare.pkl": lambda: pickle.dumps({"w": [1.0, 2.0]}),
    "old.pkl": lambda: pickle.dumps({"w": [1.0, 2.0]}, protocol=0),
    "config.json": lambda: b'{"model_type": "gpt2", "n_embd": 32}',
    "list.json": lambda: b"[1, 2]",
    "cut.json": lambda: b'{"weight_map": {"w": "a.saf',
    "map.json": lambda: b'{"weight_map": []}',
    "cut.npz": lambda: numpy_bytes()[:-100],
    "half.npz": lambda: numpy_bytes()[:900],
    "no_tensors.pt": lambda: (torch.save({"epoch": 3}, buffer := io.BytesIO()), buffer.getvalue())[1],
}


def one_sentence(error: BaseException, name: str) -> str:
    message = str(error)
    assert "\n" not in message and name in message and 20 < len(message) < 900, message
    return message


@pytest.mark.parametrize("name", WRONG)
def test_wrong_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRONG[name]())
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    one_sentence(caught.value, str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("empty.bin", "empty"),
        ("pointer.safetensors", "git lfs pull"),
        ("page.bin", "web page"),
        ("keras.h5", "HDF5"),
        ("packed.pt", "unpack"),
        ("cut.pt", "truncated"),
        ("bare.pkl", "bare pickle"),
        ("config.json", "weight_map"),
    ],
)
def test_wrong_file_says_what_it_is(name: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRONG[name]())
    with pytest.raises(CheckpointError, match=hint):
        open_checkpoint(tmp_path / name)


def test_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="a zip archive of something else"):
        open_checkpoint(tmp_path / "model.pt")


def test_nothing_there(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    for path in (tmp_path / "missing", tmp_path / "missing.pt", "missing.safetensors"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            open_checkpoint(path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nobody/nothing") as caught:
        open_checkpoint("nobody/nothing")
    one_sentence(caught.value, "nobody/nothing")


def test_folder_that_is_not_clear(tmp_path: Path) -> None:
    sharded_safetensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"shards .* but not their index"):
        open_checkpoint(tmp_path)
    torch.save(state_dict(), tmp_path / "a.pt")
    (inner := tmp_path / "run" / "best").mkdir(parents=True)
    torch.save(state_dict(), inner / "a.pt")
    torch.save(state_dict(), inner / "b.pt")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(a.pt, b.pt\): name the file"):
        open_checkpoint(inner)
    with pytest.raises(CheckpointError, match=f"did you mean {inner}"):
        open_checkpoint(tmp_path / "run")


# ----- the Hub's cache -----


def hub_cache(cache: Path, name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A repo in the layout of `huggingface_hub`'s cache: a snapshot of links to blobs."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(sha := "0123456789abcdef0123456789abcdef01234567")
    (blobs := repo / "blobs").mkdir()
    (snapshot := repo / "snapshots" / sha).mkdir(parents=True)
    (staging := cache / "staging").mkdir()
    _, tensors = sharded_safetensors(staging)
    for i, file in enumerate(sorted(staging.iterdir())):
        file.rename(blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:064x}")
    return snapshot, tensors


def test_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    snapshot, tensors = hub_cache(tmp_path, "x")
    assert_reads(open_checkpoint(snapshot), tensors)
    assert_reads(open_checkpoint(snapshot / "model.safetensors.index.json"), tensors)


@pytest.mark.parametrize("name", ["someone/tiny", "tiny"])
def test_repo_id_offline(name: str, tmp_path: Path, monkeypatch) -> None:
    _, tensors = hub_cache(tmp_path / "hub", name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert_reads(open_checkpoint(name), tensors)
    assert_reads(open_checkpoint(name, revision="main"), tensors)
    with pytest.raises(FileNotFoundError, match=name):
        open_checkpoint(name, revision="other")


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    snapshot, _ = hub_cache(tmp_path, "x")
    shard = next(snapshot.glob("*.safetensors"))
    (tmp_path / "secret").write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{shard.name}.*leads out of the folder"):
        open_checkpoint(snapshot)


# ----- what mymodels writes is read by others -----


@pytest.mark.parametrize("shard_size", ["2GB", 200])
def test_written_safetensors_is_read_by_safetensors(shard_size, tmp_path: Path) -> None:
    tensors = source(SAFETENSORS_DTYPES)
    save_checkpoint(tensors, tmp_path, max_shard_size=shard_size)
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor, name)
    assert_reads(open_checkpoint(tmp_path), tensors)


@pytest.mark.parametrize("shard_size", ["2GB", 200])
def test_written_bin_is_read_by_torch(shard_size, tmp_path: Path) -> None:
    tensors = source(TORCH_DTYPES)
    save_checkpoint(tensors, tmp_path, format="bin", max_shard_size=shard_size)
    found = {}
    for file in tmp_path.glob("*.bin"):
        found |= torch.load(file, weights_only=True)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor, name)
    assert_reads(open_checkpoint(tmp_path), tensors)


@pytest.mark.parametrize("shard_size", ["2GB", "20KB"])
@pytest.mark.parametrize("format", ["model", "safetensors", "bin"])
def test_written_folder_is_read_by_transformers(format: str, shard_size: str, tmp_path: Path) -> None:
    model = MyGPT2ForCausalLM(mygpt2_config()).eval()
    if format == "model":
        save_checkpoint(model, tmp_path, max_shard_size=shard_size)
    else:
        model.config.save_pretrained(tmp_path)
        save_checkpoint(model.state_dict(), tmp_path, format=format, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*model-*-of-*"))) > 2) == (shard_size == "20KB")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(loaded).__name__ == "MyGPT2ForCausalLM"
    for name, tensor in model.state_dict().items():
        assert_same(loaded.state_dict()[name], tensor, name)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_written_ties_are_read_by_others(tmp_path: Path) -> None:
    module, other = Tied(), Tied()
    save_checkpoint(module, tmp_path / "a")
    missing, unexpected = safetensors.torch.load_model(other, tmp_path / "a" / "model.safetensors")
    assert not missing and not unexpected
    assert_same(other.head.weight, module.head.weight)
    save_checkpoint(module, tmp_path / "b", format="bin")
    found = torch.load(tmp_path / "b" / "pytorch_model.bin", weights_only=True)
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    for folder in ("a", "b"):
        assert_reads(open_checkpoint(tmp_path / folder), module.state_dict())


@pytest.mark.parametrize(
    ("module", "extra", "name", "content"),
    [
        ("onnx", "onnx", "model.onnx", b"\x08\x08\x12\x00\x3a\x00"),
        ("gguf", "gguf", "model.gguf", b"GGUF\x03\0\0\0"),
        ("tensorflow", "tf", "model.ckpt.index", bytes(40) + bytes.fromhex("57fb808b247547db")),
    ],
)
def test_missing_extra_is_named(module, extra, name, content, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    assert f"pip install 'mymodels[{extra}]'" in one_sentence(caught.value, str(tmp_path / name.removesuffix(".index")))

"""Models are found in whatever a training script saved, and no pickle's code runs unasked."""

import argparse
import importlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from states import (
    LEGACY_DTYPES,
    TORCH_DTYPES,
    Tied,
    assert_reads,
    assert_same,
    one_sentence,
    source,
    state_dict,
    training_checkpoint,
)
from torch import nn

from mymodels import sandbox
from mymodels.checkpoints import CheckpointError, load_state_dict, open_checkpoint


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

def rebuild(tensor):
    return Rebuilt()

class Rebuilt:
    def __reduce__(self):
        return rebuild, (torch.ones(2),)
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module(zipped: bool, tmp_path: Path, monkeypatch) -> None:
    """What its class alone could read is refused; with `allow_pickle` its code runs, in another process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module_name = f"net_{'zip' if zipped else 'legacy'}"
    (tmp_path / f"{module_name}.py").write_text(NET)
    net = importlib.import_module(module_name).Net()
    torch.save({"net": net, "epoch": 3}, "whole.pt", _use_new_zipfile_serialization=zipped)
    assert_reads(open_checkpoint("whole.pt"), net.state_dict())
    net.attribute = importlib.import_module(module_name).Rebuilt()
    torch.save({"net": net, "epoch": 3, "other": net.attribute}, "whole.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("whole.pt")
    assert f"{module_name}.rebuild" in str(caught.value) and "allow_pickle=True" in str(caught.value)
    assert not Path("ran.txt").exists()
    checkpoint = open_checkpoint("whole.pt", allow_pickle=True)
    assert_reads(checkpoint, net.state_dict())
    assert checkpoint.extras["epoch"] == 3 and checkpoint.aliases == {"tied.weight": "linear.weight"}
    if sandbox.available().confined:  # it could write in its scratch folder only
        assert not Path("ran.txt").exists()
    else:
        pids = set(map(int, Path("ran.txt").read_text().split()))
        assert len(pids) == 1 and os.getpid() not in pids


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

"""`mymodels inspect`, `convert` and `check`: what they say, what they write, and that they execute nothing."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import mygpt2_config, stock_bert_config
from transformers import AutoModelForCausalLM, BertModel, Trainer, TrainingArguments

from mymodels import MyGPT2ForCausalLM, cli
from mymodels.checkpoints import CheckpointError, load_state_dict, open_checkpoint, save_checkpoint
from mymodels.checkpoints.comparing import compare_checkpoints, max_difference
from mymodels.checkpoints.converting import convert_checkpoint
from mymodels.checkpoints.inspecting import inspect_checkpoint

HUB_REPO = Path(__file__).parents[2] / "hub_repo"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.fixture
def training_file(tmp_path: Path) -> Path:
    """A checkpoint as a training script writes it."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    path = tmp_path / "last.pth.tar"
    content = {
        "epoch": 7,
        "loss": torch.tensor(0.25),
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "args": argparse.Namespace(lr=3e-4, data=Path("/data")),
    }
    torch.save(content, path)
    return path


def printed(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """The exit code and what the command printed, line breaks of tables undone."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_inspect_a_hub_folder(capsys: pytest.CaptureFixture) -> None:
    code, out, _ = printed(capsys, "inspect", HUB_REPO / "mygpt2", "--json")
    found = json.loads(out)
    model = AutoModelForCausalLM.from_pretrained(HUB_REPO / "mygpt2")
    assert code == 0 and found["format"] == "sharded safetensors"
    assert (
        found["parameters"] == sum(p.numel() for p in model.parameters()) and found["bytes"] == 4 * found["parameters"]
    )
    names = {name: list(p.shape) for name, p in model.named_parameters()}
    assert {name: tensor["shape"] for name, tensor in found["tensors"].items()} == names
    assert sum(found["modules"].values()) == found["parameters"]
    assert {path.name for path in (HUB_REPO / "mygpt2").iterdir()} == set(found["files"])
    assert all("unknown" not in file["purpose"] for file in found["files"].values())
    assert all(entry["exists"] for entry in found["auto_map"].values()) and len(found["auto_map"]) == 4
    code, out, _ = printed(capsys, "inspect", HUB_REPO / "mygpt2")
    assert code == 0 and "model.layers.*.mlp" in out and "architecture and settings" in out


def test_inspect_says_what_stands_beside_the_weights(training_file: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = printed(capsys, "inspect", training_file, "--json")
    found = json.loads(out)
    assert found["sections"] == {"model_state_dict": 4} and list(found["tensors"]) == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]
    assert found["extras"]["epoch"] == "7" and found["extras"]["loss"] == "0.25"
    assert found["extras"]["optimizer_state_dict"] == "optimizer: state of 4 parameters, 1 groups, lr 0.0003"
    assert "lr=0.0003" in found["extras"]["args"]
    assert code == 0 and "besides the weights" in printed(capsys, "inspect", training_file)[1]


def test_inspect_an_optimizer_file_alone(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert len(inspect_checkpoint(tmp_path / "optimizer.pt")["tensors"]) == 6


def test_inspect_a_folder_of_the_trainer(tmp_path: Path) -> None:
    model = MyGPT2ForCausalLM(mygpt2_config())
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, 97, (8, 6))]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    found = inspect_checkpoint(tmp_path / "checkpoint-2")
    assert found["extras"]["global_step"] == "2" and found["extras"]["max_steps"] == "2"
    assert found["files"]["optimizer.pt"]["purpose"] == "training state"
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert len(inspect_checkpoint(tmp_path / "checkpoint-2" / "optimizer.pt")["tensors"]) > 2


def test_missing_code_is_seen(tmp_path: Path) -> None:
    MyGPT2ForCausalLM(mygpt2_config()).save_pretrained(tmp_path)
    (tmp_path / "modeling_mygpt2.py").unlink()
    found = inspect_checkpoint(tmp_path)["auto_map"]
    assert found["AutoConfig"]["exists"] and not found["AutoModelForCausalLM"]["exists"]


def test_ties_and_duplicates(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    tensors = {
        "embed": weight,
        "head": weight,
        "copy": weight.clone(),
        "ones": torch.ones(3),
        "more_ones": torch.ones(3),
    }
    torch.save(tensors, tmp_path / "tied.pt")
    found = inspect_checkpoint(tmp_path / "tied.pt")
    assert found["tied"] == {"head": "embed"} and found["duplicates"] == [["embed", "copy"]]
    assert found["parameters"] == 24 + 24 + 6


def test_nothing_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = MyGPT2ForCausalLM(mygpt2_config())
    model.save_pretrained(tmp_path / "repo")
    for file in (tmp_path / "repo").glob("*.py"):
        file.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n" + file.read_text())
    torch.save(model, tmp_path / "whole.pt")
    model.attribute = Touch(tmp_path / "executed")
    torch.save(model, tmp_path / "worse.pt")
    assert printed(capsys, "inspect", tmp_path / "repo")[0] == 0
    code, out, _ = printed(capsys, "inspect", tmp_path / "whole.pt")
    assert code == 0 and "MyGPT2ForCausalLM" in out
    code, _, err = printed(capsys, "inspect", tmp_path / "worse.pt")
    assert code == 1 and err.count("\n") == 1 and f"{os.system.__module__}.system" in err and "--allow-pickle" in err
    assert "model.save_pretrained(folder)" in err and not (tmp_path / "executed").exists()


class Touch:
    """Its pickle makes a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickled_module(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = MyGPT2ForCausalLM(mygpt2_config())
    torch.save(model, tmp_path / "whole.pt")
    code, _, _ = printed(capsys, "convert", tmp_path / "whole.pt", tmp_path / "out")
    written = open_checkpoint(tmp_path / "out")
    assert code == 0 and written.aliases
    assert all(torch.equal(written[name], tensor) for name, tensor in model.state_dict().items())


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = {
        "same": torch.randn(3),
        "moved": torch.zeros(4),
        "cast": torch.ones(2),
        "shape": torch.ones(2),
        "gone": torch.ones(1),
    }
    b = {
        "same": a["same"],
        "moved": torch.tensor([0, 0, -0.5, 0]),
        "cast": torch.ones(2).half(),
        "shape": torch.ones(3),
    }
    save_file(a, tmp_path / "a.safetensors")
    torch.save({"model": b | {"new": torch.ones(1)}}, tmp_path / "b.pt")
    code, out, _ = printed(capsys, "inspect", tmp_path / "a.safetensors", "--diff", tmp_path / "b.pt", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 1 and {name: row["status"] for name, row in rows.items()} == {
        "same": "equal",
        "moved": "different",
        "cast": "dtype",
        "shape": "shape",
        "gone": "missing",
        "new": "extra",
    }
    assert rows["moved"]["max_difference"] == 0.5 and rows["cast"]["max_difference"] == 0
    assert printed(capsys, "inspect", tmp_path / "a.safetensors", "--diff", tmp_path / "a.safetensors")[0] == 0


def test_largest_difference_with_nan_and_infinity() -> None:
    nan, inf = float("nan"), float("inf")
    assert max_difference(torch.tensor([nan, inf, 1.0]), torch.tensor([nan, inf, 1.25])) == 0.25
    assert max_difference(torch.tensor([nan]), torch.tensor([0.0])) != max_difference(
        torch.tensor([0.0]), torch.tensor([0.0])
    )
    assert max_difference(torch.tensor([2**62 + 1]), torch.tensor([2**62])) > 0


@pytest.mark.parametrize("target", ["safetensors", "bin", "pt"])
@pytest.mark.parametrize("source", ["safetensors", "bin", "pt"])
def test_convert_keeps_every_byte(source: str, target: str, tmp_path: Path) -> None:
    tensors = {f"t.{i}": (torch.randn(3, 5) * 3).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "part": torch.randn(8, 8)[2:5, ::2]}
    tensors["tied"] = tensors["t.0"]
    first = tmp_path / ("first.pt" if source == "pt" else "first")
    if source == "pt":
        torch.save(tensors, first)
    else:
        save_checkpoint(tensors, first, format=source, max_shard_size=200)
    second = tmp_path / ("second.pt" if target == "pt" else "second")
    convert_checkpoint(first, second, format=target, max_shard_size=150)
    written = open_checkpoint(second)
    assert set(written) == set(tensors) and written.aliases == {"tied": "t.0"}
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor)
    assert not compare_checkpoints(open_checkpoint(first), written)[0]["max_difference"]
    if target == "pt":  # no tensor drags its whole storage along
        assert second.stat().st_size < 8000 and torch.load(second, weights_only=True).keys() == tensors.keys()


def test_convert_casts_floats_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tensors = {"weight": torch.randn(4), "count": torch.arange(4)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert printed(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "out", "--dtype", "bf16")[0] == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["weight"], tensors["weight"].bfloat16()) and torch.equal(
        written["count"], tensors["count"]
    )


def test_several_models_become_several_folders_or_one_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    models = {
        name: torch.nn.Linear(3, size).state_dict()
        for name, size in (("modelA_state_dict", 2), ("modelB_state_dict", 4))
    }
    torch.save(models | {"epoch": 3}, tmp_path / "both.pt")
    code, out, _ = printed(capsys, "convert", tmp_path / "both.pt", tmp_path / "out")
    assert code == 0 and "not converted: epoch" in out
    for name, state_dict in models.items():
        written = load_file(tmp_path / "out" / name / "model.safetensors")
        assert all(torch.equal(written[key], tensor) for key, tensor in state_dict.items()) and len(written) == 2
    convert_checkpoint(tmp_path / "both.pt", tmp_path / "again.pt", format="pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again.keys() == models.keys()
    convert_checkpoint(tmp_path / "both.pt", tmp_path / "B", section="modelB_state_dict")
    assert open_checkpoint(tmp_path / "B").info["weight"].shape == (4, 3)


def test_convert_takes_the_rest_of_a_hub_folder_along(tmp_path: Path) -> None:
    stock = BertModel(stock_bert_config()).eval()
    stock.save_pretrained(tmp_path / "stock")
    convert_checkpoint(tmp_path / "stock", tmp_path / "bin", format="bin", max_shard_size="20KB")
    convert_checkpoint(tmp_path / "bin", tmp_path / "back", max_shard_size="30KB")
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert "config.json" in names and not any(name.endswith(".bin") for name in names)
    loaded, info = BertModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), loaded.state_dict().values()))


def test_convert_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"a.b": torch.ones(2)}, tmp_path / "a.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    for destination, form in ((tmp_path / "out", "safetensors"), (tmp_path / "a.pt", "pt"), (tmp_path / "a.pt", "bin")):
        code, _, err = printed(capsys, "convert", tmp_path / "a.pt", destination, "--format", form)
        assert code == 1 and err.count("\n") == 1 and destination.name in err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "dear" and len(load_state_dict(tmp_path / "a.pt")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "out"]


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    torch.save({"fine": torch.ones(2), "odd": torch.ones(2).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"'odd' is torch\.sparse_coo.*save as pt"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_check_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_checkpoint({f"w{i}": torch.randn(8) for i in range(4)}, tmp_path / "model", max_shard_size=64)
    assert printed(capsys, "check", tmp_path / "model", "--full")[:2] == (0, "ok (every byte read)\n")
    shard = tmp_path / "model" / "model-00002-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert printed(capsys, "check", tmp_path / "model")[0] == 0  # same size, data not read
    code, out, _ = printed(capsys, "check", tmp_path / "model", "--full")
    assert code == 1 and shard.name in out and "SHA-256" in out and "1 problem" in out
    assert printed(capsys, "check", tmp_path / "model", "--full", "--write-manifest")[0] == 0
    shard.write_bytes(data[:-4])
    problems = json.loads(printed(capsys, "check", tmp_path / "model", "--json")[1])
    assert len(problems) == 2 and all(shard.name in problem["message"] for problem in problems)
    assert printed(capsys, "check", tmp_path / "absent")[0] == 1

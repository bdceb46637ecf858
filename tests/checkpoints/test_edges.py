"""Edges where a checkpoint could go wrong without a word: names, ties, dtypes, folders, what is whose."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from safetensors.torch import save_file
from tiny import mygpt2_config
from torch import nn
from transformers import AutoConfig, BertConfig, BertModel

from mymodels import MyGPT2ForCausalLM, cli
from mymodels.checkpoints import (
    CheckpointError,
    check_checkpoint,
    load_checkpoint_and_dispatch,
    load_state_dict,
    open_checkpoint,
    replace_folder,
    save_checkpoint,
    write_manifest,
)
from mymodels.checkpoints.converting import convert_checkpoint
from mymodels.checkpoints.writing import parse_size

ONE = {"a": torch.ones(2)}


def test_a_tied_model_straight_from_meta(tmp_path: Path) -> None:
    model = MyGPT2ForCausalLM(mygpt2_config())
    with init_empty_weights():
        empty = MyGPT2ForCausalLM(mygpt2_config())
    loaded = load_checkpoint_and_dispatch(empty, save_checkpoint(model, tmp_path / "model"), dtype="bfloat16")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [None, "auto", "float16", torch.float16])
def test_dtypes_by_name(dtype, tmp_path: Path) -> None:
    folder = save_checkpoint(ONE, tmp_path / "one")
    expected = torch.float32 if dtype in (None, "auto") else torch.float16
    assert load_state_dict(folder, dtype=dtype)["a"].dtype == expected
    with pytest.raises(CheckpointError, match="'int3' is no floating-point dtype: use float32"):
        load_state_dict(folder, dtype="int3")


def test_buffers_that_are_not_saved_move_along(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("position_ids", torch.arange(2), persistent=False)
    load_checkpoint_and_dispatch(model, save_checkpoint(model.state_dict(), tmp_path / "m"), device_map="meta")
    assert model.position_ids.is_meta and model.weight.is_meta


def test_only_the_model_s_own_weights_are_replaced(tmp_path: Path) -> None:
    folder = save_checkpoint({"w": torch.ones(9), "v": torch.ones(9)}, tmp_path / "m", max_shard_size=40)
    others = [
        "model_ema.safetensors",
        "model_best.bin",
        "modelcard.json",
        "models.index.json",
        "adapter_model.safetensors",
    ]
    for name in others:
        (folder / name).write_text("{}")
    save_checkpoint(ONE, folder)
    assert {path.name for path in folder.iterdir()} == {*others, "model.safetensors", "manifest.json"}


def test_an_alias_never_hides_a_stored_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors", metadata={"b": "a", "c": "a"})
    save_file({"b": torch.ones(2)}, tmp_path / "2.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = open_checkpoint(tmp_path)
    assert torch.equal(opened["b"], torch.ones(2)) and torch.equal(opened["c"], torch.zeros(2))
    assert opened.aliases == {"c": "a"}


def test_a_tied_tensor_named_format(tmp_path: Path) -> None:
    weight = torch.randn(3)
    opened = open_checkpoint(save_checkpoint({"a": weight, "format": weight}, tmp_path / "m"))
    assert torch.equal(opened["a"], weight) and torch.equal(opened["format"], weight)


def test_convert_says_the_new_dtype_in_the_config(tmp_path: Path) -> None:
    small = {
        "vocab_size": 9,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 4,
    }
    BertModel(BertConfig(**small)).save_pretrained(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", dtype=torch.bfloat16)
    assert AutoConfig.from_pretrained(tmp_path / "b").dtype == torch.bfloat16
    assert BertModel.from_pretrained(tmp_path / "b", dtype="auto").dtype == torch.bfloat16


def test_values_beyond_the_new_dtype_are_not_made_infinite(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'big' has values beyond torch\.float16's range"):
        save_checkpoint({"big": torch.tensor([1e6])}, tmp_path / "m", dtype="float16")
    save_checkpoint({"mask": torch.tensor([0.0, -float("inf")])}, tmp_path / "m", dtype="float16")
    assert check_checkpoint(tmp_path / "m", full=True) == []  # -inf and 0 are a mask


class Intruder:
    """Pickles as BUILD on a class, which would set an attribute of that class in this process."""

    def __init__(self, target: type):
        self.target = target

    def pickled(self) -> bytes:
        state = pickle.dumps(({}, {"intruded": 1}), protocol=2)[2:-1]
        return b"\x80\x02c" + f"{self.target.__module__}\n{self.target.__qualname__}\n".encode() + state + b"b."


def test_a_distributed_table_cannot_change_this_process(tmp_path: Path) -> None:
    dcp.save(ONE, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / ".metadata").write_bytes(Intruder(dcp.metadata.Metadata).pickled())
    assert pickle.Unpickler(io.BytesIO(Intruder(Intruder).pickled())).load().intruded == 1  # it would have
    with pytest.raises(CheckpointError, match="change a class of this program"):
        open_checkpoint(tmp_path)
    assert not hasattr(dcp.metadata.Metadata, "intruded")


def test_a_subfolder_of_the_hub_s_cache(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / "sha" / "unet"
    shutil.copytree(save_checkpoint({"a": torch.ones(9), "b": torch.ones(9)}, tmp_path / "m", max_shard_size=40), blobs)
    folder.mkdir(parents=True)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(f"../../../blobs/{file.name}")
    assert set(open_checkpoint(folder)) == {"a", "b"}


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    stock = MyGPT2ForCausalLM(mygpt2_config())
    stock.save_pretrained(tmp_path, max_shard_size="20KB")
    save_file({"lone": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert list(open_checkpoint(tmp_path)) == ["lone"]
    _, info = MyGPT2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"lone"}


def test_a_folder_with_a_file_of_any_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w.x": torch.ones(1)}, "epoch": 1}, tmp_path / "last.ckpt")
    (tmp_path / "notes.txt").write_text("dear")
    (tmp_path / "model.safetensors").mkdir()
    assert list(open_checkpoint(tmp_path)) == ["w.x"]


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_checkpoint(ONE, "~/m")
    (tmp_path / "m" / "manifest.json").write_text("{}")
    assert len(check_checkpoint("~/m")) == 1 and list(open_checkpoint("~/m")) == ["a"]


def test_convert_takes_subfolders_along_but_nothing_from_elsewhere(tmp_path: Path) -> None:
    folder = save_checkpoint(ONE, tmp_path / "m")
    for name in ("1_Pooling/config.json", "checkpoint-5/notes.txt", ".cache/x.json", "onnx/model.onnx"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    save_file(ONE, folder / "golden.safetensors")
    convert_checkpoint(folder, tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {"1_Pooling/config.json", "golden.safetensors", "model.safetensors", "manifest.json"}
    (folder / "notes.txt").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match=r"'notes\.txt' leads out of the folder"):
        convert_checkpoint(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_models_are_not_taken_for_training_state(tmp_path: Path) -> None:
    linear = nn.Sequential(nn.Linear(2, 2)).state_dict()
    torch.save(
        {"optimus_net": linear, "x_scaler": linear, "optimizer_state_dict": {"m": torch.ones(2)}}, tmp_path / "a.pt"
    )
    assert set(open_checkpoint(tmp_path / "a.pt").sections) == {"optimus_net", "x_scaler"}
    torch.save({"logit_scale": torch.tensor(2.0), "tower": {"block": {"w": torch.ones(2)}}}, tmp_path / "b.pt")
    assert set(open_checkpoint(tmp_path / "b.pt")) == {"logit_scale", "tower.block.w"}


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500_000_000), ("2GB", 2 * 10**9), (7, 7), ("1.5 KiB", 1536), ("9", 9)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["lots", 0, -5, "", "5 MBit", "GB", None])
def test_what_is_no_size_is_said_before_anything_is_made(text, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no size: use bytes, or text such as 500MB"):
        save_checkpoint(ONE, tmp_path / "deep" / "m", max_shard_size=text)
    assert not list(tmp_path.iterdir())


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_file({"a\x1b[31m": torch.ones(1)}, tmp_path / "a.safetensors")
    assert cli.main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "a\\x1b[31m" in out


def test_the_manifest_leaves_other_checkpoints_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = save_checkpoint(ONE, tmp_path / "run")
    (folder / "checkpoint-5").mkdir()
    save_checkpoint(ONE, folder / "best")
    (folder / "a\u00a0b.txt").write_text("a name with a no-break space")
    write_manifest(folder)
    (folder / "checkpoint-5" / "new").write_text("x")
    (folder / "best" / "new").write_text("x")
    assert check_checkpoint(folder, full=True) == []
    assert cli.main(["check", str(folder / "model.safetensors"), "--write-manifest"]) == 1
    assert "is no folder, so it has no manifest" in capsys.readouterr().err


def test_without_an_exchange_opening_brings_the_old_one_back(tmp_path: Path) -> None:
    folder = save_checkpoint(ONE, tmp_path / "m")
    staging = tmp_path / ".m.saving-abcdefgh"
    staging.mkdir()
    os.rename(folder, staging / "old")  # where a writer without an atomic exchange is killed
    assert list(open_checkpoint(folder)) == ["a"] and [path.name for path in tmp_path.iterdir()] == ["m"]


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replace_folder(tmp_path / "new") as folder:
        (folder / "x").write_text("x")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())

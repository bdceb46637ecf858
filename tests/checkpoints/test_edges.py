"""Edges where a checkpoint could go wrong without a word: names, ties, dtypes, folders, what is whose."""

import enum
import io
import json
import os
import pickle
import resource
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
    replace_file,
    replace_folder,
    save_checkpoint,
    write_manifest,
)
from mymodels.checkpoints.converting import convert_checkpoint
from mymodels.checkpoints.writing import parse_size
from mymodels.sandbox import run

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
    with pytest.raises(CheckpointError, match="'int3' is not a floating-point dtype: use float32"):
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
    with pytest.raises(CheckpointError, match=r"'big' has values outside torch\.float16's range"):
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
    with pytest.raises(CheckpointError, match="change a class of this process"):
        open_checkpoint(tmp_path)
    assert not hasattr(dcp.metadata.Metadata, "intruded")


def test_a_subfolder_of_the_hub_s_cache(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / "sha" / "unet"
    shutil.copytree(save_checkpoint({"a": torch.ones(9), "b": torch.ones(9)}, tmp_path / "m", max_shard_size=40), blobs)
    folder.mkdir(parents=True)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(f"../../../blobs/{file.name}")
    assert set(open_checkpoint(folder)) == {"a", "b"}


def test_a_single_file_takes_precedence_over_an_index_as_in_transformers(tmp_path: Path) -> None:
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
    ("text", "size"), [("500MB", 500_000_000), ("2GB", 2 * 10**9), (7, 7), ("3KiB", 3072), ("9", 9)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["lots", 0, -5, "", "5 MBit", "GB", None])
def test_invalid_sizes_are_refused_before_anything_is_created(text, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a size: use bytes, or text such as 500MB"):
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
    assert "is not a folder, so it has no manifest" in capsys.readouterr().err


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


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_views_that_are_not_the_same_tensor(format: str, tmp_path: Path) -> None:
    a, w = torch.randn(3, dtype=torch.complex64), torch.randn(2, 3)
    tensors = {
        "a": a,
        "b": a.conj(),
        "c": a.imag,
        "d": a.conj().imag,
        "w": w,
        "flat": w.view(-1),
        "bits": w.view(torch.int32),
    }
    saved = open_checkpoint(save_checkpoint(tensors, tmp_path / "m", format=format))
    one_dtype = {name: tensor for name, tensor in tensors.items() if name in ("a", "b", "w", "flat")}
    torch.save(one_dtype, tmp_path / "m.pt")  # which refuses the others
    convert_checkpoint(tmp_path / "m.pt", tmp_path / "again.pt", format="pt")
    for opened in (saved, open_checkpoint(tmp_path / "m.pt"), open_checkpoint(tmp_path / "again.pt")):
        for name in tensors if opened is saved else one_dtype:
            assert torch.equal(opened[name].resolve_conj(), tensors[name].resolve_conj()), (opened, name)
    assert cli.main(["inspect", str(tmp_path / "m.pt")]) == 0


def test_a_tensor_in_two_shards_of_which_one_ties_it(tmp_path: Path) -> None:
    weight = torch.zeros(2)
    torch.save({"a": weight, "b": weight}, tmp_path / "1.bin")
    torch.save({"b": torch.ones(2)}, tmp_path / "2.bin")
    for home in ("1.bin", "2.bin"):
        index = {"weight_map": {"a": "1.bin", "b": home, "c": "2.bin"}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="tensor 'b' is"):
            open_checkpoint(tmp_path)


def test_what_comes_while_saving_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="meanwhile"), replace_folder(tmp_path / "m", overwrite=False) as folder:
        (folder / "x").write_text("ours")
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "thesis").write_text("theirs")
    assert (tmp_path / "m" / "thesis").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileExistsError, match="meanwhile"), replace_folder(tmp_path / "f") as folder:
        (tmp_path / "f").write_text("theirs")
    assert (tmp_path / "f").read_text() == "theirs"
    with pytest.raises(FileExistsError, match="exists"), replace_file(tmp_path / "g", overwrite=False) as file:
        file.write_text("ours")
        (tmp_path / "g").write_text("theirs")
    assert (tmp_path / "g").read_text() == "theirs"

    def late(folder: Path) -> None:
        (tmp_path / "m" / "late").write_text("theirs")

    with replace_folder(tmp_path / "m", keep=lambda name: name != "x", finish=late) as folder:
        (folder / "x").write_text("ours")
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"x", "thesis", "late"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "g", "m"]


def test_a_folder_removed_while_saving_is_written_all_the_same(tmp_path: Path) -> None:
    save_checkpoint(ONE, tmp_path / "m")
    with replace_folder(tmp_path / "m", keep=lambda name: True) as folder:
        (folder / "x").write_text("ours")
        shutil.rmtree(tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "old.pt"])
def test_models_from_one_open_checkpoint_are_apart(name: str, tmp_path: Path) -> None:
    tensors = nn.Linear(2, 2).state_dict()
    if name == "m.safetensors":
        save_file(tensors, tmp_path / name)
    else:
        torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=name == "m.pt")
    opened = open_checkpoint(tmp_path / name)
    first, second = (load_checkpoint_and_dispatch(nn.Linear(2, 2), opened) for _ in range(2))
    third = load_state_dict(opened)
    fourth, fifth = load_state_dict(tmp_path / name), load_state_dict(tmp_path / name)
    for values in (first.state_dict(), third, fourth):
        values["weight"].zero_()
    for values in (second.state_dict(), fifth, opened):
        assert torch.equal(values["weight"], tensors["weight"])


def test_a_small_table_that_claims_gigabytes(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x05\x96" + (6 * 2**30).to_bytes(8, "little") + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


def test_buffers_of_a_layer_on_disk(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    folder, inputs = save_checkpoint(model.state_dict(), tmp_path / "m"), torch.randn(3, 2)
    expected = model(inputs)
    with init_empty_weights():
        empty = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    loaded = load_checkpoint_and_dispatch(empty, folder, {"0": "cpu", "1": "disk"}, offload_folder=tmp_path / "off")
    assert torch.equal(loaded(inputs), expected)


def test_an_untied_checkpoint_for_a_tied_model(tmp_path: Path) -> None:
    untied = MyGPT2ForCausalLM(mygpt2_config(tie_word_embeddings=False))
    folder = save_checkpoint(untied, tmp_path / "m")
    with pytest.raises(
        CheckpointError, match=r"'lm_head.weight' differ, but are tied in the model.*tie_word_embeddings=False"
    ):
        load_checkpoint_and_dispatch(MyGPT2ForCausalLM(mygpt2_config()), folder)


def test_code_of_a_pickle_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "its_code.py").write_text(
        "import torch\n\n\ndef make(state):\n    open('runs', 'x')\n    net = Net(2, 2)\n"
        "    net.load_state_dict(state)\n    return net\n\n\nclass Net(torch.nn.Linear):\n"
        "    def __reduce__(self):\n        return make, (dict(self.state_dict()),)\n"
    )
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(__import__("its_code").Net(2, 2), tmp_path / "model" / "model.pt")
    boxes = []
    monkeypatch.setattr(
        "mymodels.checkpoints.unpickling.run", lambda *args, **how: boxes.append(run(*args, **how)) or boxes[-1]
    )
    assert len(open_checkpoint(tmp_path / "model", allow_pickle=True)) == 2
    assert len(boxes) == 1  # in which the code runs once: it cannot make its file again


def test_odd_keys_and_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the key 1 is a int: a tensor's name must be text"):
        save_checkpoint({1: torch.ones(1)}, tmp_path / "m")
    folder = save_checkpoint(ONE, tmp_path / "m")
    os.mkfifo(folder / "pipe")
    save_checkpoint(ONE, folder, dtype="float8_e4m3fn")
    assert (folder / "pipe").is_fifo() and check_checkpoint(folder, full=True) == []


class PickledByOldPython(pickle.Pickler):
    """Members of enums as Python 3.11.0 to 3.11.3 write them, and so the Python of Debian 12."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_a_distributed_table_of_an_old_python(tmp_path: Path) -> None:
    dcp.save(ONE, checkpoint_id=tmp_path / "m", no_dist=True)
    table = tmp_path / "m" / ".metadata"
    value = pickle.loads(table.read_bytes())
    with table.open("wb") as file:
        PickledByOldPython(file).dump(value)
    assert b"getattr" in table.read_bytes()
    assert torch.equal(open_checkpoint(tmp_path / "m")["a"], ONE["a"])
    with table.open("wb") as file:
        file.write(b"\x80\x02cbuiltins\ngetattr\nctorch\nSize\n\x8c\x05numel\x86R.")
    with pytest.raises(CheckpointError, match="calls getattr for what is no enum"):
        open_checkpoint(tmp_path / "m")


def test_the_manifest_covers_a_distributed_table_and_stays_here(tmp_path: Path) -> None:
    dcp.save(ONE, checkpoint_id=tmp_path / "m", no_dist=True)
    (tmp_path / "elsewhere.json").write_text("dear")
    (tmp_path / "m" / "manifest.json").symlink_to("../elsewhere.json")
    write_manifest(tmp_path / "m")
    assert (tmp_path / "elsewhere.json").read_text() == "dear"
    assert check_checkpoint(tmp_path / "m", full=True) == []
    table = tmp_path / "m" / ".metadata"
    table.write_bytes(table.read_bytes()[:-1] + b"?")
    assert any(problem.file == ".metadata" for problem in check_checkpoint(tmp_path / "m", full=True))

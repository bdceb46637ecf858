"""A part is not taken for the whole, nothing is left out without a word, and advice works for the very file."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import warm_python
from safetensors.torch import load_file, save_file
from states import one_sentence
from torch import nn

from mymodels.checkpoints import (
    CheckpointError,
    check_checkpoint,
    load_checkpoint_and_dispatch,
    load_state_dict,
    open_checkpoint,
    save_checkpoint,
)
from mymodels.checkpoints.comparing import compare_checkpoints
from mymodels.checkpoints.converting import convert_checkpoint
from mymodels.checkpoints.inspecting import inspect_checkpoint
from mymodels.cli import main
from mymodels.training.importing import import_checkpoint

WEIGHTS = {"a.w": torch.randn(3, 4), "a.b": torch.randn(4)}


def refusal(path: Path, name: str = "") -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return one_sentence(caught.value, name or path.name)


def assert_equal(found, expected) -> None:
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


# Parts


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_lone_shard_is_incomplete(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model-00001-of-00003.{suffix}"
    save_file(WEIGHTS, path) if suffix == "safetensors" else torch.save(WEIGHTS, path)
    for full in (True, False):
        (problem,) = check_checkpoint(path, full=full)
        assert f"model-00002-of-00003.{suffix}" in problem.message and "missing" in problem.message
        assert check_checkpoint(tmp_path, full=full)
    with pytest.raises(CheckpointError, match="is shard 1 of 3"):
        convert_checkpoint(path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is shard 1 of 3"):
        load_checkpoint_and_dispatch(nn.ModuleDict({"a": nn.ParameterDict(WEIGHTS_AB)}), path, strict=False)
    assert "is shard 1 of 3" in inspect_checkpoint(path)["part_of"]
    for number in (2, 3):
        (tmp_path / f"model-0000{number}-of-00003.{suffix}").write_bytes(path.read_bytes())
    assert check_checkpoint(path, full=True) == []  # this file is sound, and nothing of its set is missing
    save_file(WEIGHTS, tmp_path / "model-00001-of-00001.safetensors")
    assert check_checkpoint(tmp_path / "model-00001-of-00001.safetensors", full=True) == []


WEIGHTS_AB = {"w": WEIGHTS["a.w"], "b": WEIGHTS["a.b"]}


@pytest.mark.slow
def test_ranks_of_fsdp2(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("fsdp_script.py")
    ranks = [subprocess.Popen([sys.executable, script, tmp_path, str(rank), "2", str(port)]) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    whole = torch.load(tmp_path / "whole.pt")
    for imported in ("", "import torch.distributed.tensor\n"):  # which lets torch load the class
        code = f"{imported}from mymodels.checkpoints import open_checkpoint\nopen_checkpoint({str(tmp_path / 'rank0.pt')!r})"
        run = warm_python.run([sys.executable, "-c", code])
        assert "gather it" in run.stderr.splitlines()[-1]
    assert "consolidate the files" in refusal(tmp_path / "hf")
    (part,) = [problem.message for problem in check_checkpoint(next((tmp_path / "hf").glob("shard-00001*")), full=True)]
    assert "is one process's part" in part
    opened = open_checkpoint(tmp_path / "dcp")
    assert_equal(opened, whole)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(opened.extras["optimizer"])
    assert all(bool(state["exp_avg"].any()) for state in optimizer.state.values()) and opened.extras["epoch"] == 3
    assert "state of 4 parameters" in inspect_checkpoint(tmp_path / "dcp")["extras"]["optimizer"]


def test_zero_3(tmp_path: Path) -> None:
    empty = {"h.w": torch.empty(0), "h.b": torch.empty(0)}
    saved = {"module": empty, "param_shapes": [{"h.w": torch.Size([3, 4])}], "ds_version": "0.16"}
    torch.save(saved, tmp_path / "mp_rank_00_model_states.pt")
    assert "name the folder" in refusal(tmp_path / "mp_rank_00_model_states.pt")


def test_wrapper_tensors_are_not_read_as_each_other(tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"a.w": nested, "a.b": torch.ones(2)}, tmp_path / "n.pt")
    assert "nested tensor" in refusal(tmp_path / "n.pt")
    with pytest.raises(CheckpointError, match="nested"):
        save_checkpoint({"a": nested}, tmp_path / "out")


class Kind(torch.Tensor):
    """A tensor of a class of one's own."""


def test_a_tensor_of_a_class_of_its_own(tmp_path: Path) -> None:
    torch.save({"a.w": torch.ones(2).as_subclass(Kind)}, tmp_path / "k.pt")
    assert "as_subclass(torch.Tensor)" in refusal(tmp_path / "k.pt")
    torch.save({"a.w": torch.ones(2).as_subclass(Kind).as_subclass(torch.Tensor)}, tmp_path / "k.pt")
    assert torch.equal(open_checkpoint(tmp_path / "k.pt")["a.w"], torch.ones(2))


def test_quantised_torchscript(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.save(torch.jit.script(Net()), str(tmp_path / "q.pt"))
    assert "quantised TorchScript" in refusal(tmp_path / "q.pt")


# Left out


def test_several_models_of_accelerate(tmp_path: Path) -> None:
    from accelerate import Accelerator

    first, second = nn.Linear(2, 3), nn.Linear(3, 2)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(first.parameters())
    accelerator.prepare(first, second, optimizer)
    accelerator.save_state(tmp_path / "state")
    assert (tmp_path / "state" / "model_1.safetensors").is_file()
    opened = open_checkpoint(tmp_path / "state")
    assert list(opened.sections) == ["model", "model_1"] and "optimizer.bin" in opened.left_out
    assert_equal(opened.section("model"), first.state_dict())
    assert_equal(opened.section("model_1"), second.state_dict())
    convert_checkpoint(tmp_path / "state", tmp_path / "out")
    assert_equal(load_file(tmp_path / "out" / "model_1" / "model.safetensors"), second.state_dict())
    again = open_checkpoint(tmp_path / "out")
    assert {row["status"] for row in compare_checkpoints(opened, again)} == {"equal"}


def test_a_folder_of_sentence_transformers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    folder = tmp_path / "st"
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    (folder / "modules.json").write_text(json.dumps(modules))
    save_file(WEIGHTS, folder / "model.safetensors")
    dense = {"linear.weight": torch.randn(2, 2)}
    torch.save(dense, folder / "2_Dense" / "pytorch_model.bin")
    torch.save({"x": torch.ones(1)}, folder / "other.pt")
    assert main(["convert", str(folder), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert "other.pt" in (shown := capsys.readouterr().out) and "2_Dense" not in shown
    written = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    assert torch.equal(written["linear.weight"], dense["linear.weight"].bfloat16())
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()


def test_what_a_trainer_leaves_beside_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = nn.Linear(2, 2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save({"last_epoch": 1}, tmp_path / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, tmp_path / "rng_state.pth")
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"))
    source = convert_checkpoint(tmp_path, tmp_path / "again")
    assert set(source.left_out) >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    with pytest.raises(CheckpointError, match="no model"):
        convert_checkpoint(tmp_path / "optimizer.pt", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_folder_with_two_files_names_the_one_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(WEIGHTS, tmp_path / "a.pth")
    torch.save(WEIGHTS, tmp_path / "b.tar")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "not opened" in (shown := capsys.readouterr().out) and "b.tar" in shown.split("models")[0]


def test_an_adapter_stays_one(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    def base() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=16))

    model = get_peft_model(base(), LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True))
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(8)[None]
    for format in ("safetensors", "bin"):
        convert_checkpoint(tmp_path / "adapter", tmp_path / format, format=format, max_shard_size="1KB")
        loaded = PeftModel.from_pretrained(base(), tmp_path / format)
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


# Loading


def test_names_of_wrappers_and_nothing_loaded(tmp_path: Path) -> None:
    part = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for pattern in ("module.{}", "_orig_mod.module.{}", "_forward_module.{}", "_fsdp_wrapped_module.{}"):
        stored = {pattern.format(name): torch.randn_like(value) for name, value in part.state_dict().items()}
        torch.save({"encoder": stored, "decoder": stored}, tmp_path / "m.pt")
        for strict in (True, False):
            opened = open_checkpoint(tmp_path / "m.pt", section="encoder")
            loaded = load_checkpoint_and_dispatch(part, opened, strict=strict)
            assert_equal({pattern.format(name): value for name, value in loaded.state_dict().items()}, stored)
    amid = {f"0._orig_mod.{name}": torch.randn_like(value) for name, value in part[0].state_dict().items()}
    amid |= {f"1._checkpoint_wrapped_module.{name}": value for name, value in part[1].state_dict().items()}
    torch.save(amid, tmp_path / "amid.pt")
    assert torch.equal(load_checkpoint_and_dispatch(part, tmp_path / "amid.pt")[0].weight, amid["0._orig_mod.weight"])
    torch.save({f"other.{name}": value for name, value in stored.items()}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="none of its 4 tensors"):
        load_checkpoint_and_dispatch(part, tmp_path / "none.pt", strict=False)


def test_a_part_behind_wrappers_is_a_part(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    path = tmp_path / "model-00001-of-00002.safetensors"
    save_file({f"module.0.{name}": value.clone() for name, value in model[0].state_dict().items()}, path)
    for load in (
        lambda: load_checkpoint_and_dispatch(model, path, strict=False),
        lambda: import_checkpoint(path, model, strict=False),
        lambda: load_state_dict(path),
    ):
        with pytest.raises(CheckpointError, match="is shard 1 of 2"):
            load()


def test_quantised_by_the_config_alone(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    before = model.weight.clone()
    weights = {"weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "bias": torch.ones(4)}
    save_file(weights, tmp_path / "model.safetensors")
    assert load_checkpoint_and_dispatch(nn.Linear(4, 4), tmp_path, dtype="float32").weight.sum() == 16
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        for load in (load_checkpoint_and_dispatch, lambda model, path: import_checkpoint(path, model)):
            with pytest.raises(CheckpointError, match=r"is quantised, float8 with scales: .*quantization_config from"):
                load(model, path)
    assert torch.equal(model.weight, before)


def test_the_account_of_what_was_not_loaded(tmp_path: Path) -> None:
    torch.save({"0.weight": torch.ones(2, 2), "1.weight": torch.ones(3, 3), "x": torch.ones(1)}, tmp_path / "m.pt")
    part = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = part[1].weight.clone()
    with pytest.warns(UserWarning, match="loaded only partly.*0.bias"):
        loaded, info = load_checkpoint_and_dispatch(part, tmp_path / "m.pt", strict=False, output_loading_info=True)
    assert info == {
        "missing_keys": ["0.bias", "1.bias"],
        "unexpected_keys": ["x"],
        "mismatched_keys": ["1.weight"],
    }
    assert torch.equal(loaded[0].weight, torch.ones(2, 2)) and torch.equal(loaded[1].weight, before)


def test_numbers_of_another_kind_and_quantised_ones_are_refused(tmp_path: Path) -> None:
    linear = nn.Linear(2, 2)
    before = linear.weight.clone()
    bias = torch.ones(2)
    float8 = torch.ones(2, 2).to(torch.float8_e4m3fn)
    for weight, more in (
        (torch.ones(2, 2, dtype=torch.complex64), {}),
        (torch.ones(2, 2, dtype=torch.int8), {}),
        (torch.ones(2, 2, dtype=torch.int64), {}),
        (float8, {"weight_scale_inv": bias}),
    ):
        torch.save({"weight": weight, "bias": bias} | more, tmp_path / "m.pt")
        for strict in (True, False):
            with pytest.raises(CheckpointError, match=r"quantised|cannot store"):
                load_checkpoint_and_dispatch(linear, tmp_path / "m.pt", strict=strict)
    assert torch.equal(linear.weight, before)
    torch.save({"weight": float8, "bias": bias}, tmp_path / "m.pt")  # a plain cast
    assert torch.equal(
        load_checkpoint_and_dispatch(linear, tmp_path / "m.pt", dtype="float32").weight, torch.ones(2, 2)
    )


def test_quantised_ones_are_not_cast(tmp_path: Path) -> None:
    stored = {"h.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "h.weight_scale_inv": torch.ones(1, 1)}
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="float8 with scales"):
        convert_checkpoint(tmp_path, tmp_path / "out", dtype="bfloat16")
    convert_checkpoint(tmp_path, tmp_path / "out")
    assert_equal(
        {k: v.float() for k, v in load_file(tmp_path / "out" / "model.safetensors").items()},
        {k: v.float() for k, v in stored.items()},
    )
    assert inspect_checkpoint(tmp_path)["quantisation"] == "float8 with scales"


# Files


def test_metadata_is_not_a_tensor(tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(2)}, tmp_path / "e.safetensors", metadata={"name": "emb_params"})
    assert list(open_checkpoint(tmp_path / "e.safetensors")) == ["emb_params"]
    tied = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    tied["head"].weight = tied["embed"].weight
    safetensors.torch.save_model(tied, tmp_path / "t.safetensors")
    assert set(open_checkpoint(tmp_path / "t.safetensors")) == {"embed.weight", "head.weight"}
    data = safetensors.torch.save({"w": torch.ones(2)})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) | {"__metadata__": None}
    text = json.dumps(header).encode()
    (tmp_path / "null.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[-8:])
    truth = load_file(tmp_path / "null.safetensors")
    assert_equal(open_checkpoint(tmp_path / "null.safetensors"), truth)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="torch before 2.8")
def test_float4(tmp_path: Path) -> None:
    def saved(data: list[int], path: Path) -> torch.Tensor:
        tensor = torch.tensor([data], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        torch.save({"w": tensor}, path.with_suffix(".pt"))
        save_file({"w": tensor}, path)
        return tensor

    first = saved([0x21, 0xF7], tmp_path / "a.safetensors")
    saved([0x21, 0x77], tmp_path / "b.safetensors")
    for suffix in (".pt", ".safetensors"):
        a, b = (open_checkpoint((tmp_path / name).with_suffix(suffix)) for name in "ab")
        assert a.info["w"].shape == (1, 2) and torch.equal(a["w"].view(torch.uint8), first.view(torch.uint8))
        (row,) = compare_checkpoints(a, b)
        assert row["max_difference"] == 12.0  # -6 and 6
        assert check_checkpoint((tmp_path / "a").with_suffix(suffix), full=True) == []
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")
    assert torch.equal(open_checkpoint(tmp_path / "out")["w"].view(torch.uint8), first.view(torch.uint8))


def test_difference_of_quantised_and_of_prefixed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, value in (("a", 1.0), ("b", 1.5)):
        torch.save(
            {"w": torch.quantize_per_tensor(torch.full((2,), value), 0.5, 0, torch.qint8)}, tmp_path / f"{name}.pt"
        )
    (row,) = compare_checkpoints(open_checkpoint(tmp_path / "a.pt"), open_checkpoint(tmp_path / "b.pt"))
    assert row["max_difference"] == 0.5
    half = torch.tensor([1 + 2j]).to(torch.complex32)
    torch.save({"w": half}, tmp_path / "c.pt")
    (row,) = compare_checkpoints(open_checkpoint(tmp_path / "c.pt"), open_checkpoint(tmp_path / "c.pt"))
    assert row["status"] == "equal"
    base = {f"h.{i}.w": torch.randn(3) for i in range(4)}
    save_file(base, tmp_path / "base.safetensors")
    headed = {f"transformer.{name}": value for name, value in base.items()} | {"head.w": torch.ones(2)}
    headed["transformer.h.3.w"] = base["h.3.w"] + 1
    save_file(headed, tmp_path / "head.safetensors")
    for first, second in (("base", "head"), ("head", "base")):
        assert (
            main(["inspect", str(tmp_path / f"{first}.safetensors"), "--diff", str(tmp_path / f"{second}.safetensors")])
            == 1
        )
        shown = capsys.readouterr().out
        assert (
            "with the prefix 'transformer.'" in shown
            and "3 equal except for the prefix" in shown
            and "1 different" in shown
        )


def test_formats_that_are_not_read_are_not_damaged(tmp_path: Path) -> None:
    files = {
        "array.npy": (b"\x93NUMPY\x01\x00" + bytes(100), "savez"),
        "model.ckpt.data-00000-of-00001": (bytes(range(1, 200)), ".index"),
        "model.ckpt.meta": (b"\n\x05hello" * 20, ".index"),
    }
    for name, (data, advice) in files.items():
        (tmp_path / name).write_bytes(data)
        message = refusal(tmp_path / name)
        assert advice in message and "damaged" not in message, name


def test_the_newest_of_a_trainers_folder_is_meant(tmp_path: Path) -> None:
    for step in (500, 1500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file(WEIGHTS, tmp_path / f"checkpoint-{step}" / "model.safetensors")
    assert "checkpoint-1500" in refusal(tmp_path)


def test_check_takes_the_option_it_advises(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(
        {"model": nn.Linear(2, 2), "seed": divmod, "path": shutil.which}, tmp_path / "m.pt"
    )  # a function of Python's
    assert main(["check", str(tmp_path / "m.pt")]) == 1 and "--allow-pickle" in capsys.readouterr().out
    assert main(["check", "--full", "--allow-pickle", str(tmp_path / "m.pt")]) == 0

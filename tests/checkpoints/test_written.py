"""What mymodels writes is read by safetensors, torch and transformers."""

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from states import (
    SAFETENSORS_DTYPES,
    TORCH_DTYPES,
    Tied,
    assert_reads,
    assert_same,
    one_sentence,
    source,
)
from tiny import mygpt2_config
from transformers import AutoModelForCausalLM

from mymodels import MyGPT2ForCausalLM
from mymodels.checkpoints import CheckpointError, open_checkpoint, save_checkpoint
from mymodels.extras import install_command


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
    assert install_command(extra) in one_sentence(caught.value, str(tmp_path / name.removesuffix(".index")))

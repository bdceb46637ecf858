"""Weights onto devices: CPU, meta and disk here; CUDA and MPS by the device map alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from tiny import batch, mygpt2_config

from mymodels import MyGPT2ForCausalLM
from mymodels.checkpoints import (
    CheckpointError,
    load_checkpoint_and_dispatch,
    load_state_dict,
    open_checkpoint,
    save_checkpoint,
)
from mymodels.checkpoints.dispatch import resolve_device_map


@pytest.fixture
def model() -> MyGPT2ForCausalLM:
    return MyGPT2ForCausalLM(mygpt2_config()).eval()


@pytest.fixture
def folder(model: MyGPT2ForCausalLM, tmp_path: Path) -> Path:
    return save_checkpoint(model, tmp_path / "model", max_shard_size="20KB")


def empty(**changes) -> MyGPT2ForCausalLM:
    with init_empty_weights():
        model = MyGPT2ForCausalLM(mygpt2_config(**changes))
    model.tie_weights()
    return model.eval()


def test_a_saved_model_is_loaded_by_transformers_and_as_a_state_dict(model, folder: Path) -> None:
    loaded, info = MyGPT2ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state_dict = load_state_dict(folder)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
        assert name == "lm_head.weight" or torch.equal(tensor, state_dict[name])
    assert len(list(folder.glob("*.safetensors"))) > 2 and (folder / "modeling_mygpt2.py").is_file()


def test_state_dict_on_a_device_in_a_dtype(folder: Path) -> None:
    half = load_state_dict(folder, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    shapes = load_state_dict(folder, device="meta")
    assert {tensor.device.type for tensor in shapes.values()} == {"meta"}
    assert {name: tensor.shape for name, tensor in shapes.items()} == {name: t.shape for name, t in half.items()}


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(5, 3)
    save_checkpoint({"embed": weight, "head": weight}, tmp_path / "tied")
    loaded = load_state_dict(tmp_path / "tied")
    assert loaded["head"] is loaded["embed"] and torch.equal(loaded["head"], weight)


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, "sequential", torch.device("cpu")])
def test_from_meta_to_cpu(device_map, model, folder: Path) -> None:
    loaded = load_checkpoint_and_dispatch(empty(), folder, device_map=device_map)
    inputs = batch()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_part_of_it_on_disk(model, folder: Path, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.embed_positions": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    loaded = load_checkpoint_and_dispatch(empty(), folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert loaded.model.layers[1].mlp.up_proj.weight.is_meta and not loaded.model.layers[0].mlp.up_proj.weight.is_meta
    inputs = batch()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1, model\.layers\.2 on disk: pass offload_folder"):
        load_checkpoint_and_dispatch(empty(), folder, device_map=device_map)


def test_all_of_it_on_disk_ties_included(model, folder: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint_and_dispatch(empty(), folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert all(parameter.is_meta for parameter in loaded.parameters())
    inputs = batch()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_any_format_and_dtype(model, tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", **{name: tensor.numpy() for name, tensor in model.state_dict().items()})
    loaded = load_checkpoint_and_dispatch(empty(), tmp_path / "weights.npz", dtype=torch.float16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight.half())


def test_the_head_s_name_alone_is_enough_for_a_tied_model(model, tmp_path: Path) -> None:
    state_dict = model.state_dict()
    state_dict.pop("model.embed_tokens.weight")
    loaded = load_checkpoint_and_dispatch(empty(), save_checkpoint(state_dict, tmp_path / "head"))
    assert torch.equal(loaded.model.embed_tokens.weight, model.lm_head.weight)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_what_does_not_fit_is_named_before_anything_changes(folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.0\.self_attn\.k_proj\.bias' of shape \(32,\) for \(16,\)"
    ):
        load_checkpoint_and_dispatch(empty(num_key_value_heads=2), folder)
    deeper = empty(n_layer=4)
    with pytest.raises(CheckpointError, match=r"16 tensors of the model are missing and 0 are unexpected.*layers\.3"):
        load_checkpoint_and_dispatch(deeper, folder)
    assert all(parameter.is_meta for parameter in deeper.parameters())
    loaded = load_checkpoint_and_dispatch(deeper, folder, strict=False)
    assert loaded.model.layers[3].mlp.up_proj.weight.is_meta and not loaded.model.norm.weight.is_meta


@pytest.mark.parametrize("device", ["cuda", "cuda:7", 3, "mps"])
def test_a_device_this_machine_lacks(device, folder: Path) -> None:
    if (device == "cuda" and torch.cuda.is_available()) or (device == "mps" and torch.backends.mps.is_available()):
        pytest.skip("it has this one")
    with pytest.raises(CheckpointError, match="which this machine does not have: choose cpu or disk"):
        load_state_dict(folder, device=device)
    with pytest.raises(CheckpointError, match="which this machine does not have"):
        load_checkpoint_and_dispatch(empty(), folder, device_map={"model": "cpu", "lm_head": device})
    with pytest.raises(CheckpointError, match="'gpu' is not a device"):
        load_state_dict(folder, device="gpu")
    with pytest.raises(CheckpointError, match="no entry for 'lm_head"):
        load_checkpoint_and_dispatch(
            empty(tie_word_embeddings=False), open_checkpoint(folder), {"model": "cpu"}, strict=False
        )


@pytest.mark.parametrize(
    ("kind", "memory"), [("cuda", {0: "130KB", 1: "90KB", "cpu": "1GB"}), ("mps", {"mps": "130KB", "cpu": "1GB"})]
)
def test_the_map_for_devices_that_are_not_here(kind: str, memory: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    places = resolve_device_map(empty(), "auto", max_memory=memory)
    assert {str(place) for place in places.values()} >= {f"{kind}:0" if kind == "cuda" else "mps", "cpu"}
    assert resolve_device_map(empty(), 1) == {"": torch.device("cuda:1")}
    assert resolve_device_map(empty(), {"model": "cuda:0", "lm_head": "disk"})["lm_head"] == "disk"

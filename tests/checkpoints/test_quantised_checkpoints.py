"""Quantised checkpoints are recognised by what their writers store, plain ones are not taken for them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mymodels.checkpoints import open_checkpoint
from mymodels.checkpoints.inspecting import inspect_checkpoint
from mymodels.checkpoints.quantised import quantisation
from mymodels.cli import main

E4M3 = torch.float8_e4m3fn


def tensors(**dtypes: torch.dtype) -> dict[str, torch.Tensor]:
    return {f"h.0.mlp.{name.replace('__', '.')}": torch.empty(4, 4, dtype=dtype) for name, dtype in dtypes.items()}


F32, I32, I8, U8 = torch.float32, torch.int32, torch.int8, torch.uint8
# The names that each library's own writer stores.
STORED = {
    "GPTQ": tensors(qweight=I32, qzeros=I32, scales=torch.float16, g_idx=I32),
    "GPTQ or AWQ": tensors(qweight=I32, qzeros=I32, scales=torch.float16),
    "bitsandbytes NF4 (4 bit)": tensors(weight=U8, weight__absmax=F32)
    | {"h.0.weight.quant_state.bitsandbytes__nf4": torch.empty(9, dtype=U8)},
    "bitsandbytes (8 bit)": tensors(weight=I8, SCB=F32),
    "compressed-tensors": tensors(weight_packed=I32, weight_scale=F32, weight_shape=torch.int64),
    "quanto": tensors(weight___data=I8, weight___scale=F32, input_scale=F32),
    "torchao": tensors(_weight_qdata=I8, _weight_scale=F32),
    "HQQ": tensors(W_q=U8, scale=F32, zero=F32),
    "AQLM": tensors(codes=I8, codebooks=F32, scales=F32),
    "MXFP4": tensors(gate_up_proj_blocks=U8, gate_up_proj_scales=U8, gate_up_proj_bias=F32),
    "float8 with scales": tensors(weight=E4M3, weight_scale_inv=F32),
    "int8 with scales": tensors(weight=I8, weight_scale=F32),
    "int8 without scales": tensors(weight=I8),
}


@pytest.mark.parametrize("phrase", STORED)
def test_recognised_by_tensors(phrase: str) -> None:
    assert quantisation(STORED[phrase] | {"wte.weight": torch.zeros(3, 3)}) == phrase


@pytest.mark.parametrize(
    "stored",
    [
        tensors(weight=E4M3, weight_scale=F32),
        tensors(weight=E4M3, scale_weight=F32),
        tensors(weight=E4M3, input_scale=F32),
    ],
)
def test_float8_with_scales_of_any_name(stored: dict[str, torch.Tensor]) -> None:
    assert quantisation(stored) == "float8 with scales"


@pytest.mark.parametrize(
    ("config", "phrase"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ (4 bit)"),
        ({"quant_method": "awq", "bits": 4, "zero_point": True}, "AWQ (4 bit)"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes NF4 (4 bit)",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes (8 bit)"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "float8 with scales"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto (int8)"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"some": 1}, "a quantiser that quantization_config does not name"),
    ],
)
def test_recognised_by_config(config: dict, phrase: str) -> None:
    assert quantisation(["wte.weight"], {"quantization_config": config}) == phrase
    assert quantisation(["wte.weight"], {"text_config": {"quantization_config": config}}) == phrase


def test_plain_weights() -> None:
    plain = tensors(weight=F32, bias=F32, scale=F32, W_q=F32, codebooks=F32, centroids=F32, position_ids=torch.int64)
    assert quantisation(plain, {"model_type": "gpt2", "quantization_config": None}) is None
    assert quantisation(plain.keys(), None) is None
    assert quantisation(tensors(weight=E4M3, bias=torch.bfloat16)) is None  # a plain cast: no scales, nothing to undo
    assert quantisation(tensors(attention_mask=U8, bias=torch.bool, logit_scale=F32)) is None


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["qint8", "qint4"])
def test_what_quanto_writes(bits: str, tmp_path: Path) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(nn.Linear(64, 64))
    quanto.quantize(model, weights=getattr(quanto, bits))
    quanto.freeze(model)
    torch.save(model.state_dict(), tmp_path / "q.pt")
    assert quantisation(open_checkpoint(tmp_path / "q.pt")) == "quanto"


def gptq(inputs: int, outputs: int, bits: int) -> dict[str, torch.Tensor]:
    groups = inputs // 32
    return {
        "qweight": torch.zeros(inputs * bits // 32, outputs, dtype=I32),
        "qzeros": torch.zeros(groups, outputs * bits // 32, dtype=I32),
        "scales": torch.ones(groups, outputs, dtype=torch.float16),
        "g_idx": torch.arange(inputs, dtype=I32) // 32,
        "bias": torch.zeros(outputs, dtype=torch.float16),
    }


def awq(inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    return {
        "qweight": torch.zeros(inputs, outputs // 8, dtype=I32),
        "qzeros": torch.zeros(inputs // 32, outputs // 8, dtype=I32),
        "scales": torch.ones(inputs // 32, outputs, dtype=torch.float16),
    }


def nf4(inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [outputs, inputs]}).encode()
    return {
        "weight": torch.zeros((inputs * outputs + 1) // 2, 1, dtype=U8),
        "weight.absmax": torch.zeros(inputs * outputs // 64, dtype=U8),
        "weight.quant_map": torch.zeros(16),
        "weight.nested_absmax": torch.zeros(1),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=U8),
    }


def int8(inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.zeros(outputs, inputs, dtype=I8),
        "SCB": torch.zeros(outputs),
        "weight_format": torch.tensor(0, dtype=U8),
    }


@pytest.mark.parametrize(
    ("stored", "real"),
    [
        (gptq(64, 96, 4), 64 * 96 + 96),
        (gptq(64, 96, 3), 64 * 96 + 96),
        (gptq(64, 96, 8), 64 * 96 + 96),
        (gptq(64, 96, 2), 64 * 96 + 96),
        ({name: one for name, one in gptq(64, 96, 8).items() if name != "g_idx"}, 64 * 96 + 96),
        (awq(64, 96), 64 * 96),
        (nf4(64, 96), 64 * 96),
        (int8(64, 96), 64 * 96),
    ],
)
def test_real_parameters_are_counted(stored: dict[str, torch.Tensor], real: int, tmp_path: Path, capsys) -> None:
    tensors = {f"model.layers.0.mlp.up_proj.{name}": tensor for name, tensor in stored.items()} | {
        "wte.weight": torch.zeros(5, 3)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    shown = inspect_checkpoint(tmp_path)
    assert shown["parameters"] == real + 15 == sum(shown["modules"].values())
    assert shown["quantised_modules"] == {"model.layers.0.mlp.up_proj": 64 * 96} and shown["quantisation"]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "6,144 of the parameters" in capsys.readouterr().out

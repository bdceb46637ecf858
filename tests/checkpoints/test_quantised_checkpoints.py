"""Quantised checkpoints are recognised by what their writers store, plain ones are not taken for them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mymodels.checkpoints import open_checkpoint
from mymodels.checkpoints.quantised import quantisation

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
    "int8 without scales beside it": tensors(weight=I8),
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

"""Whether and how a checkpoint is quantised, by `quantization_config` and by the tensors that quantisers store."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint
from .safetensors_files import read_json

# `quant_method` of transformers' and other configs → the common name
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "float8 with scales",
    "fbgemm_fp8": "float8 with scales",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "bitnet": "BitNet",
    "auto-round": "AutoRound",
    "mymodels-int8": "int8 by mymodels.quantize",
}
# Pattern of tensor names → method. The first that matches any tensor is used.
_NAMES = (
    (re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$"), "bitsandbytes {0} (4 bit)"),
    (re.compile(r"\.(absmax|nested_absmax)$"), "bitsandbytes (4 bit)"),
    (re.compile(r"\.SCB$"), "bitsandbytes (8 bit)"),
    (re.compile(r"_scale_inv$"), "float8 with scales"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
    (re.compile(r"weight\._(data|scale|shift)(\._\w+)?$"), "quanto"),
    (re.compile(r"weight_qdata$"), "torchao"),
    (re.compile(r"\._packed_params(\.|$)"), "torch's own quantisation"),
    (re.compile(r"_quantized$"), "ONNX's quantisation"),
)
# Tensors of one module, by the last part of their names → method, where a single name would be ambiguous.
_MODULES = (
    ({"qweight", "g_idx"}, "GPTQ"),
    ({"qweight"}, "GPTQ or AWQ"),
    ({"W_q", "zero", "scale"}, "HQQ"),
    ({"codes", "codebooks"}, "AQLM"),
    ({"indices", "centroids"}, "VPTQ"),
    ({"gate_up_proj_blocks", "gate_up_proj_scales"}, "MXFP4"),
)
_INTEGERS = {torch.int8, torch.uint8}
_PACKED = {torch.int32, torch.uint32}
_TINY = {getattr(torch, name) for name in dir(torch) if name.startswith(("float8_", "float4_"))}
_NARROW = _INTEGERS | _PACKED | _TINY
_QUANTISED = {getattr(torch, name) for name in dir(torch) if re.fullmatch(r"q(u)?int\d+(x\d)?", name)}
_SCALE = re.compile(r"scales?(_inv|_\d|_weight)?$|^scale_")


def quantisation(
    checkpoint_or_names: "Checkpoint | Mapping[str, Any] | Iterable[str]", config: Mapping[str, Any] | None = None
) -> str | None:
    """How a checkpoint is quantised, as a phrase such as `"GPTQ (4 bit)"`; None if it is not.

    Weights cast to float8 without scales are not quantised, as their values are the weights. Neither is GGUF, which is
    read dequantised.

    Args:
        checkpoint_or_names: a `Checkpoint`, tensor names, or a mapping of names to objects with `dtype` and `shape`
            (`TensorInfo`, tensors); with these, a low-bit matrix with scales is recognised under any name. No tensor is
            read.
        config: the model's `config.json`, as a dict.
    """
    given = checkpoint_or_names.info if isinstance(checkpoint_or_names, Checkpoint) else checkpoint_or_names
    tensors = given if isinstance(given, Mapping) else list(given)
    if found := _by_config(config or {}):
        return found
    stored_in: dict[str, set[str]] = defaultdict(set)
    for name in tensors:
        module, _, last = name.rpartition(".")
        stored_in[module].add(last)
    for pattern, phrase in _NAMES:
        if match := next((match for name in tensors if (match := pattern.search(name))), None):
            return phrase.format(*map(str.upper, match.groups(""))) if "{" in phrase else phrase
    for stored, phrase in _MODULES:
        if any(stored <= names for names in stored_in.values()):
            return phrase
    return _by_dtypes(tensors) if isinstance(tensors, Mapping) else None


def config_beside(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `config.json` beside a checkpoint's files; {} if there is none, or the checkpoint is in memory."""
    where = Path(checkpoint.path)
    path = (where if where.is_dir() else where.parent) / "config.json"
    return read_json(path) if where.exists() and path.is_file() else {}


def _by_config(config: Mapping[str, Any]) -> str | None:
    for part in (config, *(value for key, value in config.items() if key.endswith("_config"))):
        if not isinstance(part, Mapping):
            continue
        for key in ("quantization_config", "compression_config", "quantization"):
            details = part.get(key)
            if isinstance(details, Mapping) and details:
                return _method(details)
    return None


def _method(details: Mapping[str, Any]) -> str:
    method = str(details.get("quant_method") or details.get("quant_algo") or "").lower()
    if method == "bitsandbytes" or any(details.get(f"load_in_{n}bit") for n in (4, 8)):
        four = bool(details.get("load_in_4bit") or details.get("_load_in_4bit"))
        kind = str(details.get("bnb_4bit_quant_type") or "").upper()
        return " ".join(filter(None, ("bitsandbytes", kind if four else "", "(4 bit)" if four else "(8 bit)")))
    name = _METHODS.get(method, method) or "a quantiser that quantization_config does not name"
    bits = details.get("bits") or details.get("w_bit") or details.get("nbits") or details.get("weights")
    if isinstance(bits, int) and not isinstance(bits, bool):
        return f"{name} ({bits} bit)"
    return f"{name} ({bits})" if isinstance(bits, str) else name


def _by_dtypes(tensors: Mapping[str, Any]) -> str | None:
    """The method shown by dtypes: a low-bit matrix with a tensor of scales, or a dtype with built-in scale."""
    modules: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if getattr(tensor, "dtype", None) in _QUANTISED:
            return f"torch's own quantisation ({str(tensor.dtype).removeprefix('torch.')})"
        module, _, last = name.rpartition(".")
        modules[module][last] = tensor
    for beside in modules.values():
        narrow = [tensor.dtype for last, tensor in beside.items() if _is_narrow(last, tensor)]
        if narrow and any(_SCALE.search(last) for last in beside):
            dtype = str(narrow[0]).removeprefix("torch.")
            return "float8 with scales" if dtype.startswith("float8") else f"{dtype} with scales"
    for name, tensor in tensors.items():
        if getattr(tensor, "dtype", None) in _INTEGERS and _is_narrow(name, tensor):
            return f"{str(tensor.dtype).removeprefix('torch.')} without scales"
    return None


def _is_narrow(name: str, tensor: Any) -> bool:
    """Whether a tensor may be a quantised matrix; integers only if the name has "weight", unlike masks and ids."""
    dtype = getattr(tensor, "dtype", None)
    if dtype not in _NARROW or len(tensor.shape) < 2 or _SCALE.search(name.rpartition(".")[2]):
        return False
    return dtype not in _INTEGERS | _PACKED or "weight" in name.rpartition(".")[2]

"""What is in a checkpoint or a Hub repo folder, as data; none of its code is run."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..messages import one_line, shorten
from .adapters import adapter_config, describe_adapter
from .checkpoint import Checkpoint
from .nested_objects import Leaf, unread
from .opening import locate, open_checkpoint
from .plain_pickle import Unopened
from .quantised import quantisation
from .quantised_sizes import packed_weights
from .safetensors_files import read_json

_PURPOSES = (
    (r"^\.metadata$", "index of the tensors"),
    (r"^config\.json$", "architecture and settings"),
    (r"^generation_config\.json$", "defaults of generate()"),
    (r"\.index\.json$", "index of the shards"),
    (r"^golden\.safetensors$", "recorded inputs and outputs, to test loading"),
    (r"^adapter_", "adapter (PEFT)"),
    (r"\.safetensors$", "weights"),
    (r"^pytorch_model.*\.bin$", "weights (pickle)"),
    (r"^(optimizer|scheduler|scaler|rng_state)", "training state"),
    (r"^training_args\.bin$", "training arguments (pickle)"),
    (r"^trainer_state\.json$", "training history"),
    (r"\.(pt|pth|bin|tar|ckpt)$", "PyTorch file (pickle)"),
    (r"\.(h5|msgpack|onnx|gguf|npz|tflite|ot|pt2)$|\.ckpt|\.data-\d+-of-\d+$|\.distcp$", "weights in another format"),
    (r"^manifest\.json$", "size and SHA-256 of every file"),
    (r"^configuration_.*\.py$", "code: configuration"),
    (r"^modeling_.*\.py$", "code: model"),
    (r"^tokenization_.*\.py$", "code: tokenizer"),
    (r"\.py$", "code"),
    (r"^(tokenizer|vocab|merges|spiece|special_tokens|added_tokens)|\.model$", "tokenizer"),
    (r"^chat_template", "chat template"),
    (r"^(preprocessor|processor)_config\.json$", "preprocessing"),
    (r"^README\.md$", "model card"),
    (r"^LICENSE", "license"),
    (r"^\.gitattributes$", "Git LFS settings"),
)


def inspect_checkpoint(
    path: str | os.PathLike,
    *,
    section: str | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    duplicates: bool = True,
) -> dict[str, Any]:
    """What `mymodels inspect` shows, as JSON-ready data.

    Args:
        path: as for `open_checkpoint`, also `section`, `allow_pickle` and `revision`.
        duplicates: read the tensors to find those with equal bytes.

    Returns:
        `path`, `format`, `parameters`, `bytes`, `dtypes` (name → parameters), `modules` (name → parameters), `tensors`
        (name → shape, dtype, file), `tied` (name → the name stored), `duplicates` (lists of names with equal bytes),
        `sections` (name → number of tensors), `extras` (name → description), `quantisation` (the method, or None),
        `quantised_modules` (name → parameters, for GPTQ, AWQ and bitsandbytes; `parameters` counts these unpacked,
        without scales), `adapter` (its kind and base, or None), `part_of` (why this is only a part of a model, or ""),
        `left_out` (files of weights in the folder that were not opened); for a folder also `files` (name → size,
        purpose) and `auto_map` (class → file, whether it exists).

    Raises:
        CheckpointError, FileNotFoundError: as `open_checkpoint`.
    """
    where = locate(path, revision=revision)
    folder = where if where.is_dir() else None
    opened = open_checkpoint(where, section=section, allow_pickle=allow_pickle)
    beside = where if folder else where.parent
    config = read_json(beside / "config.json") if (beside / "config.json").is_file() else None
    stored = {name: info for name, info in opened.info.items() if name not in opened.aliases}
    dtypes: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    packed = packed_weights(opened, config)
    for name, info in stored.items():
        dtypes[info.dtype_name] += info.numel
        if packed is None or name not in packed.beside | packed.packed:
            modules[_module(name)] += info.numel
    for module, count in packed.modules.items() if packed else ():
        modules[_module(f"{module}.weight")] += count
    return {
        "path": str(path),
        "format": opened.format,
        "parameters": sum(modules.values()),
        "bytes": sum(info.nbytes for info in stored.values()),
        "dtypes": dict(dtypes.most_common()),
        "modules": dict(modules),
        "sections": {name or "(top)": len(names) for name, names in opened.sections.items()},
        "extras": {
            name: describe(value) for name, value in {**unread(opened.extras), **_trainer_state(folder)}.items()
        },
        "quantisation": quantisation(opened, config)
        or (opened.extras.get("quantisation") and "GGUF, read dequantised"),
        "quantised_modules": packed.modules if packed else {},
        "adapter": describe_adapter(adapter_config(beside)),
        "part_of": opened.part_of,
        "left_out": opened.left_out,
        "tied": opened.aliases,
        "duplicates": _duplicates(opened) if duplicates else [],
        "tensors": {
            name: {"shape": list(info.shape), "dtype": info.dtype_name, "file": info.file}
            for name, info in opened.info.items()
        },
        **({"files": _files(folder), "auto_map": _auto_map(folder)} if folder else {}),
    }


def _trainer_state(folder: Path | None) -> dict[str, Any]:
    """The progress of transformers' Trainer when it wrote this folder."""
    if folder is None or not (folder / "trainer_state.json").is_file():
        return {}
    state = read_json(folder / "trainer_state.json")
    return {
        key: state[key] for key in ("epoch", "global_step", "max_steps", "best_metric") if state.get(key) is not None
    }


def _module(name: str) -> str:
    """The module of a tensor, with `*` for the number of a layer: `model.layers.*.self_attn`."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")[:-1]]
    depth = parts.index("*") + 2 if "*" in parts else 2
    return ".".join(parts[:depth]) or name


def describe(value: Any) -> str:
    """A line that describes a value besides the weights: its kind, and the value itself if that is short."""
    if isinstance(value, Leaf):
        return f"tensor {value.info.shape}"
    if isinstance(value, Unopened):
        return f"{_short(value, 200)}, not unpickled, as its class is not imported"
    if isinstance(value, type) and issubclass(
        value, Unopened
    ):  # a class; from Python 3.11.0 to 3.11.3 an enum's member
        return f"{shorten(value.qualified, 200)}, not imported"
    if isinstance(value, torch.Tensor):
        return (
            f"{value.item():.6g}" if value.numel() == 1 and not value.is_complex() else f"tensor {tuple(value.shape)}"
        )
    if isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys():
        groups = value["param_groups"]
        rates = ", ".join(
            f"{group['lr']:.3g}" for group in _values(groups) if isinstance(group, Mapping) and "lr" in group
        )
        count = len(_values(value["state"]))
        return f"optimizer: state of {count} parameters, {len(_values(groups))} groups" + (
            f", lr {rates}" if rates else ""
        )
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key}: {_short(item)}" for key, item in list(value.items())[:6])
        return f"{inner}{', …' if len(value) > 6 else ''}" if value else "empty"
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
        return "; ".join(describe(item) for item in value)
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"{type(value).__name__} of {len(value)}"
    return _short(value, 200)


def _values(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, Mapping) else list(container)


def _short(value: Any, width: int = 40) -> str:
    if isinstance(value, Leaf):
        return f"tensor {value.info.shape}"
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)}"
    if isinstance(value, (Mapping, list, tuple)) and len(value) > 4:
        return f"{type(value).__name__} of {len(value)}"
    return one_line(value, width)


def _duplicates(checkpoint: Checkpoint) -> list[list[str]]:
    """Groups of tensors with equal bytes; tensors with one value throughout, such as new norms, are left out."""
    alike = defaultdict(list)
    for name, info in checkpoint.info.items():
        if name not in checkpoint.aliases and info.numel > 1:
            alike[info.shape, info.dtype].append(name)
    candidates = [name for names in alike.values() if len(names) > 1 for name in names]
    found = defaultdict(list)
    for name in tqdm(candidates, desc="comparing", unit="tensor", disable=None):
        tensor = checkpoint[name]
        if tensor.layout != torch.strided or tensor.is_quantized:
            continue
        data = tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
        size = tensor.dtype.itemsize
        if not torch.equal(data[size:], data[:-size]):  # not one value throughout
            found[checkpoint.info[name].shape, hashlib.sha256(data.numpy().data).digest()].append(name)
    return [names for names in found.values() if len(names) > 1]


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: {"size": (folder / name).stat().st_size, "purpose": _purpose(name)} for name in names}


def _purpose(name: str) -> str:
    base = name.rsplit("/", 1)[-1]
    return next((text for pattern, text in _PURPOSES if re.search(pattern, base)), "unknown, not needed for loading")


def _auto_map(folder: Path) -> dict[str, dict[str, Any]]:
    """Auto class → the file with its code and whether that exists, from `config.json` and `tokenizer_config.json`."""
    found = {}
    for name in ("config.json", "tokenizer_config.json"):
        auto_map = read_json(folder / name).get("auto_map") if (folder / name).is_file() else None
        for auto_class, references in auto_map.items() if isinstance(auto_map, dict) else ():
            for reference in references if isinstance(references, list) else [references]:
                if isinstance(reference, str):
                    repo, _, target = reference.rpartition("--")
                    module, _, class_name = target.rpartition(".")
                    file = f"{module.replace('.', '/')}.py"
                    exists = bool(repo) or _defines(folder / file, class_name)
                    found[auto_class] = {"target": reference, "file": file, "exists": exists} | (
                        {"repo": repo} if repo else {}
                    )
    return found


def _defines(file: Path, class_name: str) -> bool:
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return bool(re.search(rf"^class {re.escape(class_name)}\b", text, re.MULTILINE))

"""Any checkpoint into safetensors, `.bin` or `.pt`."""

import json
import os
import re
import shutil
from pathlib import Path

import torch

from .checkpoint import Checkpoint, CheckpointError, resolve_dtype
from .integrity import write_manifest
from .opening import locate, open_checkpoint
from .replacing import replace_file, replace_folder
from .safetensors_files import inside, read_json
from .writing import parse_size, separate, storable, torch_save, write_shards

FORMATS = ("safetensors", "bin", "pt")
# Files of a folder that are weights of some format; the rest (config, tokenizer, code, card) is taken along.
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|pt2|h5|msgpack|ot|onnx|gguf|npz|tflite|distcp)$|\.index\.json$|\.ckpt|^manifest\.json$|"
    r"^checkpoint$|^saved_model\.pb$|\.data-\d+-of-\d+$|\.index$|^\."
)


def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    max_shard_size: int | str = "2GB",
    dtype: str | torch.dtype | None = None,
    format: str = "safetensors",
    section: str | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
) -> Checkpoint:
    """Write the weights of `source`, of any format that is read, to `destination` as one of three.

    Every byte of a tensor stays unless `dtype` converts it. `destination` becomes a folder (`"safetensors"`, `"bin"`)
    with the other files of a source folder beside the weights, or a file (`"pt"`). A source with several models
    becomes a folder for each, or one file with a state dict for each. What a training checkpoint holds beside the
    models (`Checkpoint.extras`) is not taken along.

    Args:
        source: what `open_checkpoint` opens; `section`, `allow_pickle` and `revision` are its.
        destination: must not exist yet, or be an empty folder.
        max_shard_size: bytes, or text such as `"500MB"`; a `.pt` file is never split.
        dtype: what floating-point tensors are converted to.
        format: `"safetensors"`, `"bin"` or `"pt"`.

    Returns:
        the source, opened.

    Raises:
        CheckpointError: the source cannot be read, or a tensor cannot be stored in that format.
        FileExistsError: `destination` exists.
        OSError: the disk is full, or the place read-only; nothing is left there.
    """
    dtype, max_shard_size = resolve_dtype(dtype), parse_size(max_shard_size)
    if format not in FORMATS:
        raise CheckpointError(f"the format {format!r} is not written: choose one of {', '.join(FORMATS)}")
    where = locate(source, revision=revision)
    checkpoint = open_checkpoint(where, section=section, allow_pickle=allow_pickle)
    if format == "pt":
        if os.path.lexists(destination):
            raise FileExistsError(f"{destination} exists: choose another file, or remove it first")
        with replace_file(destination, overwrite=False) as file:
            models = {name: _state_dict(checkpoint.section(name), dtype) for name in checkpoint.sections}
            torch_save(models if len(models) > 1 else next(iter(models.values())), file)
        return checkpoint
    folders = _folder_names(checkpoint)
    with replace_folder(destination, overwrite=False) as folder:
        if where.is_dir():
            _copy_others(where, folder, dtype)
        for name, inner in folders.items():
            (folder / inner).mkdir(parents=True, exist_ok=True)
            part = checkpoint.section(name)
            write_shards(part, folder / inner, max_shard_size=max_shard_size, dtype=dtype, format=format)
            if inner:
                write_manifest(folder / inner)
        if len(folders) == 1:
            write_manifest(folder)
    return checkpoint


def _state_dict(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    stored = {
        name: storable(name, checkpoint[name], dtype, "pt") for name in checkpoint if name not in checkpoint.aliases
    }
    separate(stored)
    return {name: stored[checkpoint.aliases.get(name, name)] for name in checkpoint}


def _folder_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Section → the folder its weights go to, `""` for the only one."""
    if len(checkpoint.sections) == 1:
        return dict.fromkeys(checkpoint.sections, "")
    names = {name: re.sub(r"[^\w.-]", "_", name).lstrip(".") or "model" for name in checkpoint.sections}
    if len(set(names.values())) < len(names):
        names = {name: f"{i}-{inner}" for i, (name, inner) in enumerate(names.items())}
    return names


def _copy_others(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        skipped = any(_WEIGHTS.search(part) or re.fullmatch(r"checkpoint-\d+", part) for part in name.parts)
        golden = name.as_posix() == "golden.safetensors" and dtype is None
        if file.is_file() and (golden or not skipped):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(source, name.as_posix(), source), folder / name)
    config = folder / "config.json"
    if dtype is not None and config.is_file():  # transformers 5 loads what it says there
        content = read_json(config)
        changed = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in content}
        config.write_text(json.dumps(content | changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

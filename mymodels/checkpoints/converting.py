"""Convert a checkpoint of any format to safetensors, `.bin` or `.pt`."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from .adapters import CONFIG as ADAPTER_CONFIG
from .adapters import adapter_config, merged_config
from .adapters import merge_adapter as merge
from .atomic_write import replace_file, replace_folder
from .checkpoint import Checkpoint, CheckpointError, resolve_dtype
from .integrity import write_manifest
from .nested_objects import OPTIMIZER
from .opening import locate, open_checkpoint, weight_files
from .quantised import config_beside, quantisation
from .safetensors_files import inside, read_json
from .writing import parse_size, separate, storable, torch_save, write_shards

FORMATS = ("safetensors", "bin", "pt")
# Files of a folder that are weights of some format; all others (config, tokenizer, code, card) are copied.
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|pt2|h5|msgpack|ot|onnx|gguf|npz|tflite|distcp)$|\.index\.json$|\.ckpt|^manifest\.json$|"
    r"^checkpoint$|^latest(_universal)?$|^zero_to_fp32\.py$|^saved_model\.pb$|\.data-\d+-of-\d+$|\.index$|^\."
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
    merge_adapter: str | os.PathLike | None = None,
) -> Checkpoint:
    """Write the weights of `source`, of any format, to `destination` as safetensors, `.bin` or `.pt`.

    The bytes of a tensor change only if `dtype` converts it. `destination` becomes a folder (`"safetensors"`, `"bin"`)
    with the weights and the other files of a source folder, or a file (`"pt"`). A source with several models becomes
    a folder for each, or one file with a state dict for each. The modules of a sentence-transformers folder
    (`2_Dense/`) are converted too, each in its own folder. What a training checkpoint holds besides the models
    (`Checkpoint.extras`) and the files in `left_out` of the returned checkpoint are not converted.

    Args:
        source: as for `open_checkpoint`, also `section`, `allow_pickle` and `revision`.
        destination: must not exist yet, or be an empty folder.
        max_shard_size: bytes, or text such as `"500MB"`; a `.pt` file is never split.
        dtype: what floating-point tensors are converted to.
        format: `"safetensors"`, `"bin"` or `"pt"`.
        merge_adapter: of a LoRA adapter's folder, the base model (a folder, file or Hub repo) that its weights are
            merged into, as PEFT's `merge_and_unload` does; the base's other files are copied.

    Returns:
        the source, opened.

    Raises:
        CheckpointError: the source cannot be read, is a part of a model or no model, or is quantised and `dtype` was
            given; or a tensor cannot be stored in that format.
        FileExistsError: `destination` exists.
        OSError: the disk is full, or the folder read-only; nothing is written.
    """
    dtype, max_shard_size = resolve_dtype(dtype), parse_size(max_shard_size)
    if format not in FORMATS:
        raise CheckpointError(f"the format {format!r} is not written: choose one of {', '.join(FORMATS)}")
    where = locate(source, revision=revision)
    checkpoint = open_checkpoint(where, section=section, allow_pickle=allow_pickle)
    base: Checkpoint | None = None
    adapter = where
    if merge_adapter is not None:
        config = adapter_config(where if where.is_dir() else where.parent)
        if not config:
            raise CheckpointError(f"{where} has no {ADAPTER_CONFIG}, so it is not an adapter: name an adapter's folder")
        where = locate(merge_adapter)
        base = open_checkpoint(where, allow_pickle=allow_pickle)
        if how := quantisation(base, config_beside(base)):
            raise CheckpointError(f"{where} is quantised, {how}: merge into the base that is not quantised")
        _refuse(where, base, dtype)
        checkpoint = merge(checkpoint, config, base)
    _refuse(where, checkpoint, dtype)
    if format == "pt":
        if os.path.lexists(destination):
            raise FileExistsError(f"{destination} exists: choose another file, or remove it first")
        with replace_file(destination, overwrite=False) as file:
            models = {name: _state_dict(checkpoint.section(name), dtype) for name in checkpoint.sections}
            torch_save(models if len(models) > 1 else next(iter(models.values())), file)
        return checkpoint
    folders = _folder_names(checkpoint)
    files = {Path(info.file).name for info in checkpoint.info.values()}
    alone = all(re.match(r"adapter_model\.", file) for file in files)  # PEFT reads only this name, and no shards
    named: dict[str, Any] = {"stem": "adapter_model", "max_shard_size": sys.maxsize} if alone else {}
    with replace_folder(destination, overwrite=False) as folder:
        if where.is_dir():
            _copy_others(where, folder, dtype)
        if base is not None:
            _finish_merge(adapter, folder, base, checkpoint)
        for name, inner in folders.items():
            (folder / inner).mkdir(parents=True, exist_ok=True)
            part = checkpoint.section(name)
            sized = {"max_shard_size": max_shard_size} | named
            write_shards(part, folder / inner, dtype=dtype, format=format, **sized)
            if inner:
                write_manifest(folder / inner)
        for module in _modules(where):
            part = open_checkpoint(where / module, allow_pickle=allow_pickle)
            write_shards(part, folder / module, max_shard_size=max_shard_size, dtype=dtype, format=format)
            written = {info.file for info in part.info.values()}
            checkpoint.left_out = [
                name for name in checkpoint.left_out if Path(name).name not in written or Path(name).parts[0] != module
            ]
        checkpoint.left_out = [name for name in checkpoint.left_out if not (folder / name).is_file()]
        if len(folders) == 1:
            write_manifest(folder)
    return checkpoint


def _refuse(where: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """Raise if the checkpoint is not a model, only a part of one, or quantised and to be cast."""
    if OPTIMIZER in checkpoint.format:
        raise CheckpointError(f"{where} holds {OPTIMIZER}: there are no weights to convert, copy the file instead")
    if checkpoint.part_of:
        raise CheckpointError(checkpoint.part_of)
    how = quantisation(checkpoint, config_beside(checkpoint)) if dtype is not None else None
    if how and checkpoint.format.split()[0] != "GGUF":
        raise CheckpointError(
            f"{where} is quantised, {how}: casting it would make its values wrong; convert it without a dtype, or "
            f"dequantise it with the quantiser's package first"
        )


def _finish_merge(adapter: Path, folder: Path, base: Checkpoint, merged: Checkpoint) -> None:
    """Copy the tokenizer saved with the adapter, and change the config to describe the merged weights."""
    for file in sorted(adapter.iterdir()) if adapter.is_dir() else ():
        if file.is_file() and re.match(
            r"(tokenizer|vocab|merges|spiece|special_tokens|added_tokens|chat_template)", file.name
        ):
            shutil.copyfile(inside(adapter, file.name, adapter), folder / file.name)
    path = folder / "config.json"
    if path.is_file():
        config = merged_config(read_json(path), base, merged)
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _modules(where: Path) -> list[str]:
    """The folders with weights of their own that `modules.json` of a sentence-transformers folder names."""
    path = where / "modules.json"
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        names = [str(entry.get("path") or "") for entry in entries]
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: it is not a list of modules ({error}): copy or download it again") from error
    return [name for name in names if name and inside(where, name, path).is_dir() and weight_files(where / name)]


def _state_dict(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    stored = {
        name: storable(name, checkpoint[name], dtype, "pt") for name in checkpoint if name not in checkpoint.aliases
    }
    separate(stored)
    return {name: stored[checkpoint.aliases.get(name, name)] for name in checkpoint}


def _folder_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Section → the folder to write it to; `""` if there is only one section."""
    if len(checkpoint.sections) == 1:
        return dict.fromkeys(checkpoint.sections, "")
    names = {name: re.sub(r"[^\w.-]", "_", name).lstrip(".") or "model" for name in checkpoint.sections}
    if len(set(names.values())) < len(names):
        names = {name: f"{i}-{inner}" for i, (name, inner) in enumerate(names.items())}
    return names


def _copy_others(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy what is not weights, and set the dtype in `config.json`."""
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        skipped = any(_WEIGHTS.search(part) or re.fullmatch(r"checkpoint-\d+", part) for part in name.parts)
        golden = name.as_posix() == "golden.safetensors" and dtype is None
        if file.is_file() and (golden or not skipped):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(source, name.as_posix(), source), folder / name)
    config = folder / "config.json"
    if dtype is not None and config.is_file():  # transformers 5 loads in the dtype that it names
        content = read_json(config)
        changed = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in content}
        config.write_text(json.dumps(content | changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

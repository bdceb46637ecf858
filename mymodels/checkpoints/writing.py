"""Write checkpoints: sharded safetensors with an index (or `.bin`, `.pt`), crash-safe, a shard at a time."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .atomic_write import replace_file, replace_folder
from .checkpoint import (
    DTYPE_NAMES,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    plain_tensor,
    resolve_dtype,
    view_of,
    widened,
)
from .integrity import is_weight_file, write_manifest
from .safetensors_files import read_json

_PATTERNS = {"safetensors": "model{suffix}.safetensors", "bin": "pytorch_model{suffix}.bin"}


def save_checkpoint(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    save_directory: str | os.PathLike,
    *,
    max_shard_size: int | str = "2GB",
    dtype: str | torch.dtype | None = None,
    format: str = "safetensors",
) -> Path:
    """Save a model or a state dict as a checkpoint folder; an interruption leaves the old or the new one.

    Weights that transformers would read from the folder are replaced; other files (config, tokenizer, code) are kept. A
    `manifest.json` with the size and SHA-256 of every file is written last. At most one shard more than `model` itself
    is in memory: a `Checkpoint` is read while it is written.

    Args:
        model: a model, a state dict, or a `Checkpoint`. A `PreTrainedModel` is saved with config and code, by its
            `save_pretrained`. Tied tensors are stored once.
        save_directory: created with its parents if it does not exist.
        max_shard_size: bytes, or text such as `"500MB"`.
        dtype: what floating-point tensors are converted to; None keeps their dtypes.
        format: `"safetensors"` or `"bin"`.

    Returns:
        `save_directory` as a `Path`.

    Raises:
        CheckpointError: a tensor cannot be stored in this format.
        OSError: the disk is full or the folder read-only; the folder is unchanged.
    """
    dtype, max_shard_size = resolve_dtype(dtype), parse_size(max_shard_size)
    if format not in _PATTERNS:
        raise CheckpointError(
            f"the format {format!r} is not one of {', '.join(_PATTERNS)}; for .pt use save_torch_file"
        )
    with replace_folder(save_directory, keep=lambda name: not is_weight_file(name), finish=write_manifest) as folder:
        if isinstance(model, PreTrainedModel):
            if dtype is not None or format != "safetensors":
                raise CheckpointError("a PreTrainedModel is saved as it is: cast it first, model.to(dtype)")
            save_model_files(model, folder, max_shard_size)
        else:
            state_dict = model.state_dict() if isinstance(model, torch.nn.Module) else model
            write_shards(state_dict, folder, max_shard_size=max_shard_size, dtype=dtype, format=format)
    return Path(save_directory)


def save_model_files(
    model: PreTrainedModel,
    folder: Path,
    max_shard_size: int | str,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """`save_pretrained` with the tensors (of `state_dict`, if it is given) sorted by name, so that the bytes are reproducible."""
    tensors = model.state_dict() if state_dict is None else state_dict
    model.save_pretrained(folder, state_dict=dict(sorted(tensors.items())), max_shard_size=max_shard_size)
    for file in folder.glob("*.safetensors"):
        _apply_umask(file)


def save_tokenizer_files(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer, independent of how it was loaded or last called, with a class that every release has."""
    if tokenizer.is_fast:  # the padding and truncation of the last call would become the saved default
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    normalise_tokenizer_config(folder)


def normalise_tokenizer_config(folder: Path) -> None:
    """Remove fields that depend on how a tokenizer was loaded from its config, and name a class that every release has."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = read_json(path)
    for trace in ("is_local", "local_files_only"):
        config.pop(trace, None)
    if config.get("tokenizer_class") == "TokenizersBackend":  # written by transformers 5, unknown to 4.x
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _apply_umask(file: Path) -> None:
    """Give a file the mode of the user's umask; safetensors 0.8 makes it readable by its owner only."""
    probe = file.with_name(f"{file.name}.mode")
    probe.touch()
    shutil.copymode(probe, file)
    probe.unlink()


def parse_size(size: int | str) -> int:
    """Bytes of an integer, or of text such as `"500MB"`.

    Raises:
        CheckpointError: it is not a size, or not positive.
    """
    try:
        count = int(size) if str(size).isdigit() else convert_file_size_to_int(str(size))
    except ValueError:
        count = 0
    if count <= 0:
        raise CheckpointError(f"max_shard_size={size!r} is not a size: use bytes, or text such as 500MB or 2GB")
    return count


def write_shards(
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    max_shard_size: int | str = "2GB",
    dtype: torch.dtype | None = None,
    format: str = "safetensors",
    stem: str | None = None,
) -> None:
    """Write `tensors` into the existing `folder`, as one file or as shards with an index; see `save_checkpoint`.

    `stem` is another name for the file than transformers' own, such as `adapter_model`.
    """
    info, aliases = describe(tensors)
    if format == "safetensors":  # this key of the metadata has another meaning
        aliases = {alias: name for alias, name in aliases.items() if alias != "format"}
    sizes = {name: _stored(info[name], dtype).nbytes for name in info if name not in aliases}
    if not sizes:
        raise CheckpointError("there are no tensors to save")
    pattern = f"{stem}{{suffix}}.{format}" if stem else _PATTERNS[format]
    split = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern=pattern, max_shard_size=max_shard_size
    )
    weight_map = dict(split.tensor_to_filename)
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="writing", disable=None) as progress:
        for file, names in split.filename_to_tensors.items():
            shard = {name: storable(name, tensors[name], dtype, format) for name in names}
            separate(shard)
            tied = {alias: name for alias, name in aliases.items() if name in shard}
            if format == "safetensors":
                save_file(shard, folder / file, metadata={"format": "pt", **tied})
                _apply_umask(folder / file)
            else:
                weight_map |= dict.fromkeys(tied, file)
                torch_save(shard | {alias: shard[name] for alias, name in tied.items()}, folder / file)
            progress.update(sum(sizes[name] for name in names))
            del shard
    if split.is_sharded:
        total = {"total_parameters": sum(info[name].numel for name in sizes), "total_size": sum(sizes.values())}
        index = {"metadata": total, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        suffixed = pattern.format(suffix="") + ".index.json"
        (folder / suffixed).write_text(text, encoding="utf-8")


def describe(tensors: Mapping[str, Any]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The `TensorInfo` of each tensor, and tied names: name → the name it is stored under."""
    if isinstance(tensors, Checkpoint):
        return tensors.info, tensors.aliases
    info, aliases = {}, {}
    first: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(f"the key {name!r} is a {type(name).__name__}: a tensor's name must be text")
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{name!r} is a {type(tensor).__name__}, not a tensor: remove it from the state dict")
        tensor = plain_tensor(tensor, name, "the state dict")
        info[name] = TensorInfo(tuple(tensor.shape), tensor.dtype, "")
        if tensor.is_meta:
            raise CheckpointError(f"tensor {name!r} is on the meta device and has no data: load the weights first")
        strided = tensor.layout == torch.strided and tensor.numel() > 0
        if strided and first.setdefault(view_of(tensor), name) != name:
            aliases[name] = first[view_of(tensor)]
    return info, aliases


def separate(shard: dict[str, torch.Tensor]) -> None:
    """Copy tensors that share memory with another tensor but are not tied to it, such as views of another shape."""
    storages = set()
    for name, tensor in shard.items():
        storage = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
        if storage and storage in storages:
            shard[name] = tensor.clone()
        storages.add(storage)


def _stored(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return info._replace(dtype=dtype) if dtype is not None and info.dtype.is_floating_point else info


def storable(name: str, tensor: torch.Tensor, dtype: torch.dtype | None, format: str) -> torch.Tensor:
    """The tensor as it is written: on the CPU, contiguous, in a storage of its own."""
    if format == "safetensors" and name == "__metadata__":
        raise CheckpointError(f"a tensor cannot be named {name!r} in a safetensors file: rename it")
    if format == "safetensors" and (tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES):
        kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        raise CheckpointError(f"tensor {name!r} is {kind}, which safetensors cannot store: convert it, or save as pt")
    tensor = plain_tensor(tensor, name, "the state dict").detach()
    if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
        cast = tensor.to("cpu", dtype)
        if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and _count_infinite(cast) > _count_infinite(tensor):
            raise CheckpointError(
                f"tensor {name!r} has values outside {dtype}'s range, which would become infinite: use bfloat16"
            )
        tensor = cast
    tensor = tensor.cpu()
    if tensor.layout != torch.strided or tensor.is_quantized:
        return tensor
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone()


def _count_infinite(tensor: torch.Tensor) -> int:
    return int((~widened(tensor).isfinite()).sum())


def torch_save(value: Any, path: Path) -> None:
    """`torch.save` that raises the operating system's error for a full disk."""
    with path.open("wb") as file:
        failed: list[OSError] = []

        class Writer:
            def write(self, data: Any) -> int:
                try:
                    return file.write(data)
                except OSError as error:  # torch would raise a RuntimeError without it
                    failed.append(error)
                    raise

            def flush(self) -> None:
                file.flush()

        try:
            torch.save(value, Writer())  # type: ignore[arg-type]
        except RuntimeError:
            if failed:
                raise failed[0] from None
            raise


def save_torch_file(value: Any, path: str | os.PathLike) -> Path:
    """`torch.save(value, path)`, crash-safe: `path` is the complete old or new file at every moment."""
    with replace_file(path) as staged:
        torch_save(value, staged)
    return Path(path)

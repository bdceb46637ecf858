"""Inputs of `forward` from a file or a mapping, for models whose inputs cannot be generated from the config."""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..checkpoints.checkpoint import CheckpointError
from ..messages import first_line, printable

READERS = (".safetensors", ".npz", ".json")

Inputs = Mapping[str, Any] | str | os.PathLike


def read_inputs(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Arguments of `forward` by name, checked.

    Args:
        inputs: a `.safetensors`, `.npz` or JSON file that holds one array for each argument of `forward`, or a mapping
            from names to tensors, arrays or nested lists. The first dimension is the batch. Floating-point numbers of
            JSON and float64 arrays of NumPy become float32; tensors keep their dtype.

    Raises:
        CheckpointError: the file cannot be read, holds pickled objects, or an array is ragged, empty, has no batch
            dimension, or holds NaN or infinite values; the message names file and argument.
        FileNotFoundError: the file does not exist.

    Example:
        >>> read_inputs({"pixel_values": torch.rand(2, 3, 32, 32)})["pixel_values"].shape
        torch.Size([2, 3, 32, 32])
    """
    where, values = ("inputs", inputs) if isinstance(inputs, Mapping) else _read(Path(inputs))
    if not values:
        raise CheckpointError(f"{where} holds no array: pass one for each argument of forward, by its name")
    return {str(name): _to_tensor(where, str(name), value) for name, value in sorted(values.items())}


def write_inputs(inputs: Inputs, folder: Path) -> str:
    """Write the result of `read_inputs` to a file in `folder`, for a clean process; returns its path."""
    path = folder / "inputs.safetensors"
    save_file(read_inputs(inputs), path)
    return str(path)


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: name the file with the inputs")
    kind = path.suffix.lower()
    if kind not in READERS:
        raise CheckpointError(f"{path}: inputs are read from {', '.join(READERS)} files, not from {kind or 'this one'}")
    try:
        if kind == ".safetensors":
            return str(path), dict(load_file(path))
        if kind == ".npz":
            return str(path), _read_npz(path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (SafetensorError, zipfile.BadZipFile, ValueError, EOFError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as {kind}: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f'{path} is not a JSON object: write {{"argument of forward": nested lists of numbers}}')
    return str(path), found


def _read_npz(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):  # such as a pickle or a .npy file with this suffix
            raise CheckpointError(f"{path} is not an .npz archive: write it with numpy.savez")
    arrays = {}
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            try:
                arrays[name] = archive[name]
            except ValueError as error:
                if "allow_pickle" not in str(error):
                    raise
                raise CheckpointError(
                    f"{path}: {printable(name)!r} is pickled Python objects, which are not loaded: save arrays of numbers"
                ) from None
    return arrays


def _to_tensor(where: str, name: str, value: Any) -> torch.Tensor:
    what = f"{where}: {printable(name)!r}"
    if not isinstance(value, torch.Tensor):
        try:
            array = np.asarray(value)
        except ValueError:
            raise CheckpointError(f"{what} is ragged: its lists must have equal lengths, so pad them") from None
        if array.dtype.kind not in "biuf":
            raise CheckpointError(f"{what} is not an array of numbers: encode it first, texts as input_ids")
        value = torch.tensor(array.astype(np.float32) if array.dtype == np.float64 else array)
    if value.dim() == 0 or value.numel() == 0:
        raise CheckpointError(
            f"{what} has the shape {tuple(value.shape)}: pass at least one row, the batch dimension first"
        )
    if value.is_floating_point() and not value.isfinite().all():
        raise CheckpointError(f"{what} holds NaN or infinite values: pass finite numbers")
    return value.detach().cpu().contiguous()

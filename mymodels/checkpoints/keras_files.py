"""HDF5 files of Keras and TensorFlow: `tf_model.h5`, `.weights.h5`, saved models, and `.keras` archives."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoint import Checkpoint, CheckpointError, TensorInfo
from .foreign_names import from_tensorflow, is_saved_by_transformers, renamed_checkpoint
from .kinds import is_zip
from .third_party_formats import array_dtype, import_library, to_torch

_WEIGHTS_OF_ARCHIVE = "model.weights.h5"


def open_keras(path: Path) -> Checkpoint:
    """Open the weights in an HDF5 file or a `.keras` archive; an optimizer's variables are in the extras.

    Raises:
        CheckpointError: the file is damaged, or two weights have the same name.
    """
    h5py = import_library("h5py", "h5", path, "an HDF5 file of Keras")
    archived = is_zip(path)
    stream = zipfile.ZipFile(path).open(_WEIGHTS_OF_ARCHIVE) if archived else None  # noqa: SIM115  # read from later
    file = h5py.File(stream or path, "r")
    root = file.get("model_weights", file)
    named = dict(_listed_weights(root))
    datasets = named or dict(_walk(h5py, root))
    info, found, others = {}, {}, {}
    for name, dataset in datasets.items():
        if name.split("/")[0] in ("optimizer", "optimizer_weights"):
            others["optimizer"] = "an optimizer's variables"
            continue
        if dataset.attrs.get("dtype") in ("bfloat16", b"bfloat16") and dataset.dtype.itemsize == 2:
            dtype: torch.dtype | None = torch.bfloat16  # Keras 3 stores its bits as integers
        else:
            dtype = array_dtype(dataset.dtype) if dataset.dtype.kind in "biufc" else None
        if dtype is None:
            others[name] = f"{dataset.dtype} {dataset.shape}"
            continue
        key = name.removesuffix(":0")
        if key in info:
            raise CheckpointError(f"{path} has two weights called {key!r}: it cannot be read")
        info[key], found[key] = TensorInfo(tuple(dataset.shape), dtype, path.name), dataset
    if not info:
        raise CheckpointError(
            f"{path} is an HDF5 file without Keras weights: it holds {', '.join(list(file)[:5]) or 'nothing'}"
        )

    def read(name: str) -> torch.Tensor:
        array = np.asarray(found[name][()])
        return (
            to_torch(array.view(np.uint16)).view(torch.bfloat16)
            if info[name].dtype == torch.bfloat16
            else to_torch(array)
        )

    raw = Checkpoint(path, "Keras archive" if archived else "Keras (HDF5)", info, read, extras=others)
    shard = (
        not named and "layer_names" in root.attrs
    )  # a shard of transformers, whose names have no scope for the class
    own = bool(named) and all(name.startswith("tf_") for name in info)
    level = 0 if shard else 1
    known = not archived and (own or shard or (bool(named) and is_saved_by_transformers(path, "tf_model")))
    return renamed_checkpoint(raw, lambda name, shape: from_tensorflow(name, shape, level), "tf_model.h5", known=known)


def _texts(values: Any) -> list[str]:
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values]


def _attribute(group: Any, name: str) -> list[str]:
    """A list of names; Keras splits a long one over several attributes."""
    if name in group.attrs:
        return _texts(group.attrs[name])
    found: list[str] = []
    number = 0
    while f"{name}{number}" in group.attrs:
        found += _texts(group.attrs[f"{name}{number}"])
        number += 1
    return found


def _listed_weights(root: Any) -> Iterator[tuple[str, Any]]:
    """The weights that Keras 2 lists in attributes of each layer's group."""
    for layer in _attribute(root, "layer_names"):
        group = root.get(layer)
        for name in _attribute(group, "weight_names") if hasattr(group, "keys") else ():
            yield name, group[name]


def _walk(h5py: Any, group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in group.items():
        if isinstance(item, h5py.Dataset):
            yield f"{prefix}{name}", item
        else:
            yield from _walk(h5py, item, f"{prefix}{name}/")

"""Weights in pickles, which transformers 4.3x wrote: the upgraded folder gets the same tensors as safetensors."""

import re
from dataclasses import replace
from pathlib import Path

from ...checkpoints import open_checkpoint
from ...checkpoints.writing import write_shards
from ..static.repo_snapshot import Folder

_PICKLED = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?")
_SAFE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


def has_pickled_weights(folder: Folder) -> bool:
    """Whether the weights are in `pytorch_model.bin` alone."""
    names = list(folder.files)
    return any(map(_PICKLED.fullmatch, names)) and not any(map(_SAFE.fullmatch, names))


def with_safetensors(folder: Folder, scratch: Path) -> Folder:
    """The folder with its pickled weights replaced by safetensors, bit for bit; unchanged if it has no others.

    Reading runs no code of the pickle, see `open_checkpoint`.

    Args:
        folder: the original; its files are not touched.
        scratch: an existing folder for the new files, which must outlive the result.

    Raises:
        CheckpointError: a file is damaged, or holds more than tensors.
    """
    if not has_pickled_weights(folder):
        return folder
    write_shards(open_checkpoint(folder.path), scratch)
    kept = {name: file for name, file in folder.files.items() if not _PICKLED.fullmatch(name)}
    return replace(folder, files=kept | {file.name: file for file in sorted(scratch.iterdir())})

"""Weights on disk: open any format lazily; write sharded safetensors crash-safe.

Imported on first use: finding the files of a folder needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .atomic_write import replace_file, replace_folder
    from .checkpoint import Checkpoint, TensorInfo
    from .dispatch import load_checkpoint_and_dispatch, load_state_dict
    from .errors import CheckpointError
    from .integrity import check_checkpoint, write_manifest
    from .opening import open_checkpoint
    from .writing import save_checkpoint, save_torch_file

_LAZY = {
    "Checkpoint": ".checkpoint",
    "CheckpointError": ".errors",
    "TensorInfo": ".checkpoint",
    "check_checkpoint": ".integrity",
    "load_checkpoint_and_dispatch": ".dispatch",
    "load_state_dict": ".dispatch",
    "open_checkpoint": ".opening",
    "replace_file": ".atomic_write",
    "replace_folder": ".atomic_write",
    "save_checkpoint": ".writing",
    "save_torch_file": ".writing",
    "write_manifest": ".integrity",
}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TensorInfo",
    "check_checkpoint",
    "load_checkpoint_and_dispatch",
    "load_state_dict",
    "open_checkpoint",
    "replace_file",
    "replace_folder",
    "save_checkpoint",
    "save_torch_file",
    "write_manifest",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)

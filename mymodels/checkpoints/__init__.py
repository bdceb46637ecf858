"""Weights on disk: open any format lazily; write sharded safetensors crash-safe."""

from .atomic_write import replace_file, replace_folder
from .checkpoint import Checkpoint, CheckpointError, TensorInfo
from .dispatch import load_checkpoint_and_dispatch, load_state_dict
from .integrity import check_checkpoint, write_manifest
from .opening import open_checkpoint
from .writing import save_checkpoint, save_torch_file

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

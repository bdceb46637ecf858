"""Names, shapes and dtypes of the checkpoint's tensors from the file headers, read once for all checks."""

from collections.abc import Mapping

from ...checkpoints import CheckpointError, open_checkpoint
from ...checkpoints.checkpoint import TensorInfo
from ...checkpoints.opening import weight_files
from .repo_snapshot import Folder


def tensor_headers(folder: Folder) -> Mapping[str, TensorInfo]:
    """The tensors of the folder's checkpoint by name; empty if there is none, or none that can be read."""
    if "headers" not in folder.memo:
        folder.memo["headers"] = _read(folder)
    return folder.memo["headers"]


def _read(folder: Folder) -> Mapping[str, TensorInfo]:
    if folder.odd or not weight_files(folder.path):
        return {}
    if all((folder.path / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        return {}  # two checkpoints, reported by `weights`: unclear which one is used
    try:
        return dict(open_checkpoint(folder.path).info)
    except (CheckpointError, OSError):
        return {}  # reported by `weights`

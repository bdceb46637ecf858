"""Find a checkpoint by its path or the id of a Hub repo, and its files in a folder; imports neither torch nor transformers."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from ..messages import first_line
from .atomic_write import repair
from .errors import CheckpointError
from .kinds import OPENED, kind_of

WEIGHTS = (  # in a folder, the first that exists is opened; the order begins with transformers' own
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model*.safetensors.index.json",
    "model*.safetensors",
    "*.safetensors.index.json",
    "*.safetensors",
    "pytorch_model*.bin.index.json",
    "pytorch_model*.bin",
    ".metadata",
    "saved_model.pb",
    "*.index",
    "*.bin.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pt2",
    "*.tar",
    "*.gguf",
    "*.onnx",
    "*.npz",
    "tf_model.h5",
    "tf_model.h5.index.json",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
    "*.keras",
    "*.h5",
    "*.msgpack",
)
TRAINING_STATE = re.compile(r"^(optimizer|scheduler|scaler|sampler|random_states|rng_state|training_args|golden)")


def locate(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    everything: bool = False,
    **download: Any,
) -> Path:
    """`path` itself, or the local copy of the Hub repo of this name, which is downloaded if it is not cached.

    Args:
        path: a file, a folder, or the id of a Hub repo.
        revision, token: as for `open_checkpoint`.
        everything: also download other weights where there is safetensors.
        download: further arguments of `snapshot_download`.

    Raises:
        FileNotFoundError: there is no such file, folder or repo.
        CheckpointError: `path` is a local file or folder, and `revision` is given.
    """
    found = Path(path).expanduser()
    if not found.exists():
        with contextlib.suppress(OSError):
            repair(found)  # a killed writer may have moved it away
    if found.exists() or found.with_name(found.name + ".index").is_file():
        if revision is not None:
            raise CheckpointError(
                f"{path} is local, and --revision {revision} (revision=) is for Hub repos: leave it out"
            )
        return found
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) or found.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        raise FileNotFoundError(f"there is no file or folder {path}")
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = HfApi(token=token).list_repo_files(str(path), revision=revision)
    except Exception:  # offline: use the cache
        files = []
    others = ["*.bin", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.ckpt*", "*.pt", "*.pth", "*.tflite"]
    ignore = others if not everything and any(file.endswith(".safetensors") for file in files) else None
    try:
        return Path(snapshot_download(str(path), revision=revision, token=token, ignore_patterns=ignore, **download))
    except Exception as error:
        raise FileNotFoundError(
            f"there is no file or folder {path}, and no Hub repo could be fetched: {first_line(error, 600)}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The file to open a folder's checkpoint by, such as its index; several files if that is ambiguous."""
    for pattern in WEIGHTS:
        found = [
            file for file in sorted(folder.glob(pattern)) if file.is_file() and not TRAINING_STATE.match(file.name)
        ]
        if pattern == "*.index":
            found = [file for file in found if kind_of(file) == "TensorFlow index"]
        if found:
            return found
    others = [file for file in sorted(folder.iterdir()) if file.is_file() and not TRAINING_STATE.match(file.name)]
    return [file for file in others if file.suffix != ".json" and kind_of(file) in OPENED]

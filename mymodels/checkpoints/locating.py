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
OTHER_WEIGHTS = ["*.bin", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.ckpt*", "*.pt", "*.pth", "*.tflite"]
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
    from huggingface_hub import snapshot_download

    def fetched(ignored: list[str] | None) -> Path:
        given = {"revision": revision, "token": token, "ignore_patterns": ignored, **download}
        return Path(snapshot_download(str(path), **given))

    try:
        folder = fetched(None if everything else OTHER_WEIGHTS)
        # the Hub is not asked for its list of files: off line, a repo that was fetched once must be found again
        has_weights = any(".safetensors" in file.name for file in weight_files(folder))
        return folder if everything or has_weights else fetched(None)
    except Exception as error:
        raise FileNotFoundError(_why_not_fetched(path, revision, error)) from error


def _why_not_fetched(path: str | os.PathLike, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors

    missing = f"there is no file or folder {path}, and "
    if isinstance(error, errors.GatedRepoError):
        return missing + "the Hub's repo is gated: ask for access on its page, and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return missing + "the Hub has no such repo, or it is private: check the name, or log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return missing + f"the Hub's repo has no revision {revision}"
    if type(error) is errors.LocalEntryNotFoundError and error.__cause__ is not None:
        return missing + (
            f"the Hub did not answer ({first_line(error.__cause__)}), nor is "
            f"{'it' if revision is None else f'its revision {revision}'} in the cache"
        )
    return missing + f"no Hub repo could be fetched: {first_line(error, 600)}"


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

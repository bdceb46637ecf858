"""`open_checkpoint`: find out by content what a file or folder is, and open it lazily."""

import contextlib
import os
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..messages import first_line
from .checkpoint import Checkpoint, CheckpointError, is_zip, unreadable
from .foreign import open_gguf, open_npz, open_onnx, open_tensorflow
from .replacing import repair
from .safetensors_files import open_index, open_safetensors, read_json
from .torch_archives import open_distributed, open_exported, open_torchscript
from .torch_files import open_torch_file

_TF_INDEX_MAGIC = bytes.fromhex("57fb808b247547db")  # the last bytes of a TensorFlow index file
_LEGACY_TORCH = re.compile(rb"\x80[\x02-\x05](?:\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", re.DOTALL)
_WEIGHTS = (  # in a folder, the first that is there is the checkpoint: first what transformers takes, in its order
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
)
_BESIDE = re.compile(r"^(optimizer|scheduler|scaler|rng_state|training_args|golden)")


def open_checkpoint(
    path: str | os.PathLike,
    *,
    section: str | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Checkpoint:
    """Open any checkpoint as a lazy mapping of name → tensor. What it is, its content decides, not its name.

    Read are: safetensors; sharded safetensors or `.bin` with their index; whatever `torch.save` wrote (state dicts,
    training checkpoints however nested); TorchScript; `torch.export`; `torch.distributed.checkpoint` folders; ONNX
    (extra `onnx`); TensorFlow checkpoints and SavedModels (extra `tf`); `.npz`; GGUF (extra `gguf`).

    Args:
        path: a file, a folder, the prefix of a TensorFlow checkpoint, or the id of a Hub repo.
        section: of a file with several models, the one to open; see `Checkpoint.sections`.
        allow_pickle: let a pickle that needs more than plain data run its code, in another process but with your
            rights. Without it such a file is refused, and what it asked for named.
        revision: branch, tag or commit of a Hub repo.
        token: as in `huggingface_hub`.

    Returns:
        A `Checkpoint`; nothing but names, shapes and dtypes has been read.

    Raises:
        CheckpointError: the file is of none of these formats, damaged, or not whole.
        FileNotFoundError: there is no such file, folder or repo.

    Example:
        >>> checkpoint = open_checkpoint("gpt2/pytorch_model.bin")
        >>> checkpoint.info["wte.weight"].shape
        (50257, 768)
        >>> weight = checkpoint["wte.weight"]
    """
    where = locate(path, revision=revision, token=token)
    opener = partial(_open_folder if where.is_dir() else open_file, where, allow_pickle)
    checkpoint = _open_whole(where, opener) if where.is_dir() and not allow_pickle else opener()
    return checkpoint if section is None else checkpoint.section(section)


def locate(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    everything: bool = False,
    **download: Any,
) -> Path:
    """`path` itself, or the local copy of the Hub repo of this name, downloaded if need be; `download` goes to the Hub's client.

    Where there is safetensors, other weights are left out unless `everything` is wanted.

    Raises:
        FileNotFoundError: there is neither.
    """
    found = Path(path).expanduser()
    if not found.exists():
        with contextlib.suppress(OSError):
            repair(found)  # a writer that was killed may have set it aside
    if found.exists() or found.with_name(found.name + ".index").is_file():
        return found
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) or found.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        raise FileNotFoundError(f"there is no file or folder {path}")
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = HfApi(token=token).list_repo_files(str(path), revision=revision)
    except Exception:  # offline: what the cache has
        files = []
    others = ["*.bin", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.ckpt*", "*.pt", "*.pth", "*.tflite"]
    ignore = others if not everything and any(file.endswith(".safetensors") for file in files) else None
    try:
        return Path(snapshot_download(str(path), revision=revision, token=token, ignore_patterns=ignore, **download))
    except Exception as error:
        raise FileNotFoundError(
            f"there is no file or folder {path}, and no Hub repo could be fetched: {first_line(error, 600)}"
        ) from error


def _open_whole(folder: Path, opener: Callable[[], Checkpoint]) -> Checkpoint:
    """Open a folder file by file, and again if a writer has replaced it meanwhile, lest two saves are mixed."""
    for _ in range(100):
        before = _identity(folder)
        try:
            checkpoint = opener()
        except (CheckpointError, OSError):
            if _identity(folder) == before:
                raise
            continue
        if _identity(folder) == before:
            return checkpoint
    raise CheckpointError(f"{folder} is being written again and again: open it when its writer has finished")


def _identity(folder: Path) -> tuple[int, ...]:
    try:
        stat = folder.stat()
    except FileNotFoundError:
        return ()
    return stat.st_dev, stat.st_ino, stat.st_ctime_ns


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that its checkpoint is opened by: an index, or one file; more if that is not clear."""
    for pattern in _WEIGHTS:
        found = [file for file in sorted(folder.glob(pattern)) if file.is_file() and not _BESIDE.match(file.name)]
        if pattern == "*.index":
            found = [file for file in found if kind_of(file) == "TensorFlow index"]
        if found:
            return found
    others = [file for file in sorted(folder.iterdir()) if file.is_file() and not _BESIDE.match(file.name)]
    return [file for file in others if file.suffix != ".json" and kind_of(file) in ("PyTorch", *_OPENERS)]


def _open_folder(folder: Path, allow_pickle: bool) -> Checkpoint:
    files = weight_files(folder)
    if not files:
        inner = [path.parent for path in sorted(folder.glob("*/*")) if weight_files(path.parent)]
        hint = f"; did you mean {inner[0]}?" if inner else ""
        raise CheckpointError(f"{folder} holds no checkpoint: none of {', '.join(_WEIGHTS[:8])} and the like{hint}")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:6])
        if re.search(r"-of-\d+", files[0].name):
            raise CheckpointError(
                f"{folder} holds shards ({names}) but not their index; copy {files[0].name} index too"
            )
        raise CheckpointError(f"{folder} holds several checkpoints ({names}): name the file")
    if files[0].name == ".metadata":
        return _guarded(open_distributed, folder, "the folder")
    if files[0].name == "saved_model.pb":
        return _guarded(open_tensorflow, folder / "variables" / "variables", "the checkpoint")
    return open_file(files[0], allow_pickle)


def open_file(path: Path, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint that the file `path` is, or is the index of."""
    if not path.exists():
        if not path.with_name(path.name + ".index").is_file():
            raise FileNotFoundError(f"{path} is gone")
        return _guarded(open_tensorflow, path, "the checkpoint")
    kind = kind_of(path)
    if kind == "index":
        opener = partial(open_file, allow_pickle=allow_pickle)
        sharded = partial(open_index, path, opener, _index_format(path))
        return sharded() if allow_pickle else _open_whole(path.parent, sharded)
    if kind == "PyTorch":
        return _guarded(partial(open_torch_file, allow_pickle=allow_pickle), path, "the file")
    if kind == "TensorFlow index":
        return _guarded(open_tensorflow, _tf_prefix(path), "the checkpoint")
    if kind in _OPENERS:
        return _guarded(_OPENERS[kind], path, "the file")
    raise CheckpointError(f"{path} is {kind}")


_OPENERS: dict[str, Callable[[Path], Checkpoint]] = {
    "safetensors": open_safetensors,
    "TorchScript": open_torchscript,
    "torch.export": open_exported,
    "NumPy": open_npz,
    "GGUF": open_gguf,
    "ONNX": open_onnx,
}


def _guarded(opener: Callable[[Path], Checkpoint], path: Path, what: str) -> Checkpoint:
    try:
        return opener(path)
    except (CheckpointError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # from deep inside a third-party reader
        raise unreadable(path, what, error) from error


def _tf_prefix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".index" else path  # TensorFlow 1 also wrote a single file


def _index_format(path: Path) -> str:
    weight_map = read_json(path).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    return "sharded safetensors" if all(str(file).endswith(".safetensors") for file in files) else "sharded PyTorch"


def kind_of(path: Path) -> str:
    """What a file is by its content: the name of a format, or, of a file that is no checkpoint, what to do about it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(max(size - 8, 0))
        tail = file.read()
    if not size:
        return "an empty file: copy or download it again"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head.startswith(b"GGUF"):
        return "GGUF"
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if _LEGACY_TORCH.match(head):
        return "PyTorch"
    if tail == _TF_INDEX_MAGIC:
        return "TensorFlow index"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "a web page, not the file: the download failed; fetch it again"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file, which is not read; save it with transformers or TensorFlow as safetensors or a checkpoint"
    if head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")) or head[257:262] == b"ustar":
        return "a compressed or packed archive: unpack it and name the file inside"
    if head.lstrip()[:1] == b"{" or path.suffix == ".json":
        return "index"
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    if head[:1] == b"\x80":
        return "a bare pickle, not made by torch.save, which only running its code would open; save it with torch.save"
    if _looks_like_onnx(path, size):
        return "ONNX"
    return "in none of the formats that are read; if it was one, it is damaged: copy or download it again"


def _kind_of_zip(path: Path) -> str:
    if not is_zip(path):
        return "a zip archive without its end: truncated, copy or download it again"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises what it comes across
        return "a zip archive with a damaged table of contents: copy or download it again"
    inner = {name.split("/", 1)[-1] for name in names}
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy"
    if "archive_format" in inner or "serialized_exported_program.json" in names:
        return "torch.export"
    if "data.pkl" in inner and "constants.pkl" in inner:
        return "TorchScript"
    if "data.pkl" in inner:
        return "PyTorch"
    return "a zip archive of something else: unpack it and name the file inside"


def _looks_like_onnx(path: Path, size: int) -> bool:
    """Whether the file is a protobuf message with the fields of an ONNX model, the graph (7) among them."""

    def varint() -> int:
        value = shift = 0
        while shift < 64 and (byte := file.read(1)):
            value |= (byte[0] & 127) << shift
            shift += 7
            if byte[0] < 128:
                return value
        raise EOFError

    with path.open("rb") as file:
        try:
            while file.tell() < size:
                field, wire = divmod(varint(), 8)
                if field not in (1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26) or wire not in (0, 2):
                    return False
                if field == 7 and wire == 2:
                    return True
                length = varint()
                if wire == 2:
                    file.seek(min(length, size), 1)
        except EOFError:
            pass
    return False

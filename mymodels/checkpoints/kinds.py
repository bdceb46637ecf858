"""The format of a file, found by its content."""

import pickletools
import re
import zipfile
from pathlib import Path

# the kinds of single files that `open_checkpoint` opens; an index is opened with the files it names
OPENED = "PyTorch", "pickle", "safetensors", "TorchScript", "torch.export", "NumPy", "GGUF", "ONNX", "HDF5", "Flax"
_TF_INDEX_MAGIC = bytes.fromhex("57fb808b247547db")  # the last bytes of a TensorFlow index file
_LEGACY_TORCH = re.compile(
    rb"L119547037146038801333356L\n\.|\x80[\x02-\x05](?:\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", re.DOTALL
)


def kind_of(path: Path) -> str:
    """The name of a file's format; for a file that cannot be opened, what it is and what to do about it."""
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
        return "HDF5"
    if head.startswith(b"\x93NUMPY"):
        return (
            "one NumPy array without a name, not a state dict: save the arrays under names, numpy.savez(file, **arrays)"
        )
    if path.suffix == ".msgpack" or re.match(rb"(\xde..|\xdf....|[\x81-\x8f])[\xa1-\xbf\xd9]", head, re.DOTALL):
        return "Flax"
    if path.name == "checkpoint" and head.startswith(b"model_checkpoint_path"):
        return "TensorFlow's pointer to its newest checkpoint, which is missing: copy its .index and .data files too"
    if re.search(r"\.data-\d+-of-\d+$", path.name):
        return "the data of a TensorFlow checkpoint without its .index file: copy that file too"
    if path.suffix == ".meta":
        return "the graph of a TensorFlow checkpoint, without weights: name its .index file"
    if head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")) or head[257:262] == b"ustar":
        return "a compressed or packed archive: unpack it and name the file inside"
    if head.lstrip()[:1] == b"{" or path.suffix == ".json":
        return "index"
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    if head[:1] == b"\x80" or _looks_like_pickle(head, tail):
        return "pickle"
    if _looks_like_onnx(path, size):
        return "ONNX"
    return "in no known format, or damaged: copy or download it again"


def _looks_like_pickle(head: bytes, tail: bytes) -> bool:
    """Whether a file may be a pickle of protocol 0 or 1, which have no magic number."""
    if not tail.endswith(b".") or head[:1] not in b"(c}]L":
        return False
    operations = 0
    try:
        for _ in pickletools.genops(head):
            operations += 1
    except ValueError:  # the head ends within an operation
        pass
    return operations > 3


def _kind_of_zip(path: Path) -> str:
    if not is_zip(path):
        return "a truncated zip archive: copy or download it again"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises many kinds
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
    if "model.weights.h5" in names:
        return "HDF5"
    return "a zip archive of another kind: unpack it and name the file inside"


def _looks_like_onnx(path: Path, size: int) -> bool:
    """Whether the file is a protobuf message with the fields of an ONNX model, including the graph (7)."""

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


def is_zip(path: Path) -> bool:
    """`zipfile.is_zipfile`, which raises on some damaged files."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False

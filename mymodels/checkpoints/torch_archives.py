"""Other formats of torch: TorchScript and `torch.export` archives, `torch.distributed.checkpoint` folders.

None of their code is run: tensors are found through the archives' tables, and pickled tables are read by an unpickler
that allows only the types these tables consist of.
"""

import enum
import io
import math
import pathlib
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, CheckpointError, TensorInfo
from .nested_objects import Leaf, nested_checkpoint
from .safetensors_files import inside, parse_json
from .torch_files import load_data, load_plain

_TORCHSCRIPT_ADVICE = "save it again from the program that made it"


class _Object:
    """An instance of any TorchScript class."""

    def __init__(self, *args: Any) -> None: ...


class _Storage(str):
    """A pickled storage: the name of its record, and its dtype."""

    dtype: torch.dtype


class _View:
    """A pickled tensor: a view of a storage."""

    def __init__(self, storage: _Storage, offset: int, size: tuple, stride: tuple, *rest: Any):
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)


_STORAGE_DTYPES = {
    "UntypedStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "UInt16Storage": torch.uint16,
    "UInt32Storage": torch.uint32,
    "UInt64Storage": torch.uint64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_STORAGE_DTYPES |= {f"Q{name}Storage": getattr(torch, f"q{name.lower()}") for name in ("Int8", "UInt8", "Int32")}
_STORAGE_DTYPES |= {f"F{name[1:]}Storage": getattr(torch, name) for name in dir(torch) if name.startswith("float8_")}


class _TableUnpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Sets pickled state on instances only: `BUILD` on a class or a function would change this process."""

    dispatch = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def load_build(self) -> None:
        if callable(self.stack[-2]):  # type: ignore[attr-defined]
            raise CheckpointError("it tries to change a class of this process; do not use it")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]
    del dispatch[pickle.BYTEARRAY8[0]]  # allocates any length that is claimed


class _TorchScriptUnpickler(_TableUnpickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return self.classes.setdefault(
                f"{module}.{name}", type(name, (_Object,), {"qualified": f"{module}.{name}"})
            )
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name == "_rebuild_qtensor":
            raise CheckpointError(
                "it is a quantised TorchScript program, whose weights are packed: save the model before quantising it"
            )
        if module == "torch._utils" and name.startswith("_rebuild_tensor"):
            return _View
        if module == "torch" and name.endswith("Storage"):
            return name
        return type(name, (_Object,), {})  # lists of numbers and so on: created and ignored

    def persistent_load(self, pid: tuple) -> _Storage:
        _, kind, key, *_ = pid
        storage = _Storage(key)
        storage.dtype = _STORAGE_DTYPES[kind]
        return storage


def _top(archive: zipfile.ZipFile) -> str:
    """The name of the archive's top folder, with a slash."""
    return archive.namelist()[0].split("/")[0] + "/"


def _record(archive: zipfile.ZipFile, name: str) -> bytearray:
    return bytearray(archive.read(name))  # zipfile checks the CRC


def _check_byteorder(archive: zipfile.ZipFile, path: Path) -> None:
    name = _top(archive) + "byteorder"
    if name in archive.namelist() and archive.read(name) != b"little":
        raise CheckpointError(
            f"{path} was written on a big-endian machine; {_TORCHSCRIPT_ADVICE} on a little-endian one"
        )


def _as_tensor(data: bytearray, dtype: torch.dtype, size: tuple, stride: tuple, offset: int) -> torch.Tensor:
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.as_strided(size, stride, offset).clone()


def _saved_names(archive: zipfile.ZipFile, top: str) -> dict[str, set[str]]:
    """Class → attributes that its code declares as parameters or buffers; other tensors are constants."""
    names: dict[str, set[str]] = {}
    for file in archive.namelist():
        if not file.startswith(f"{top}code/") or not file.endswith(".py"):
            continue
        module = file.removeprefix(f"{top}code/").removesuffix(".py").replace("/", ".")
        text = archive.read(file).decode("utf-8")
        for found in re.finditer(r"^class (\w+)\(Module\):\n((?:  __\w+__ = \[.*\]\n)*)", text, re.MULTILINE):
            declared = re.findall(r"__(?:parameters|buffers)__ = \[(.*)\]", found[2])
            names[f"{module}.{found[1]}"] = set(re.findall(r'"([^"]+)"', " ".join(declared)))
    return names


def open_torchscript(path: Path) -> Checkpoint:
    """Open the parameters and buffers in a TorchScript archive (`torch.jit.save`); no code is run."""
    archive = zipfile.ZipFile(path)
    _check_byteorder(archive, path)
    top = _top(archive)
    try:
        root = _TorchScriptUnpickler(io.BytesIO(archive.read(f"{top}data.pkl"))).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    declared = _saved_names(archive, top)
    views: dict[str, _View] = {}

    def visit(module: Any, prefix: str) -> None:
        saved = declared.get(getattr(module, "qualified", ""), set())
        for name, value in vars(module).items():
            if isinstance(value, _View) and name in saved:
                views[prefix + name] = value
            elif isinstance(value, _Object):
                visit(value, f"{prefix}{name}.")

    visit(root, "")
    if not views:
        raise CheckpointError(f"{path} is a TorchScript archive without parameters; {_TORCHSCRIPT_ADVICE}")

    def read(name: str) -> torch.Tensor:
        view = views[name]
        data = _record(archive, f"{top}data/{view.storage}")
        return _as_tensor(data, view.storage.dtype, view.size, view.stride, view.offset)

    info = {name: TensorInfo(view.size, view.storage.dtype, path.name) for name, view in views.items()}
    first: dict[tuple, str] = {}
    aliases = {}
    for name, view in views.items():
        if first.setdefault((view.storage, view.offset, view.size, view.stride), name) != name:
            aliases[name] = first[view.storage, view.offset, view.size, view.stride]
    return Checkpoint(path, "TorchScript", info, read, aliases=aliases)


# ScalarType of torch.export's schema → name of the dtype
_EXPORT_DTYPES = (
    {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 28: "uint16", 34: "uint32", 35: "uint64"}
    | {6: "float16", 7: "float32", 8: "float64", 12: "bool", 13: "bfloat16"}
    | {9: "complex32", 10: "complex64", 11: "complex128"}
    | {29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu"}
)


def open_exported(path: Path) -> Checkpoint:
    """Open the parameters and buffers in a `torch.export` archive (`.pt2`, torch 2.8 or newer)."""
    archive = zipfile.ZipFile(path)
    _check_byteorder(archive, path)
    top = _top(archive)
    tables = [name for name in archive.namelist() if name.startswith(f"{top}data/weights/") and name.endswith(".json")]
    if not tables:
        raise CheckpointError(
            f"{path} is a torch.export archive without a table of weights, as torch before 2.8 wrote it; "
            f"export the model again with a newer torch"
        )
    entries: dict[str, dict[str, Any]] = {}
    for table in tables:
        model = table.rsplit("/", 1)[1].removesuffix("_weights_config.json")
        found = parse_json(archive.read(table), path, table)["config"]
        entries |= {f"{model}.{name}" if len(tables) > 1 else name: entry for name, entry in found.items()}
    info, layout = {}, {}
    for name, entry in entries.items():
        meta = entry["tensor_meta"]
        size, stride = (tuple(number["as_int"] for number in meta[key]) for key in ("sizes", "strides"))
        dtype = getattr(torch, _EXPORT_DTYPES[meta["dtype"]])
        info[name] = TensorInfo(size, dtype, path.name)
        layout[name] = (size, stride, meta["storage_offset"]["as_int"])

    def read(name: str) -> torch.Tensor:
        data = _record(archive, f"{top}data/weights/{entries[name]['path_name']}")
        if entries[name].get("use_pickle"):
            return load_plain(io.BytesIO(data), path).detach()
        return _as_tensor(data, info[name].dtype, *layout[name])

    first: dict[tuple, str] = {}
    aliases = {}
    for name, entry in entries.items():
        key = (entry["path_name"], layout[name])
        if first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return Checkpoint(path, "torch.export", info, read, aliases=aliases)


_TABLE_TYPES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": (
        "Size",
        "device",
        *(str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype)),
    ),
    "collections": ("OrderedDict", "defaultdict"),
    "builtins": ("set", "dict", "list", "tuple"),
}


def _member_of_enum(owner: Any, name: str) -> Any:
    """`getattr`, by which Python 3.11.0 to 3.11.3 pickle a member of an enum; for nothing else."""
    if not isinstance(owner, enum.EnumMeta) or name not in owner.__members__:
        raise CheckpointError("its table calls getattr for what is no enum, which does not belong there; do not use it")
    return owner[name]


class _DistributedUnpickler(_TableUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib"):
            return pathlib.PurePosixPath  # its paths are not used
        if (module, name) == ("builtins", "getattr"):
            return _member_of_enum
        if name not in _TABLE_TYPES.get(module, ()):
            raise CheckpointError(
                f"its table names {module}.{name}, which does not belong in such a table; do not use it"
            )
        return getattr(import_module(module), name)


def open_distributed(folder: Path) -> Checkpoint:
    """Open a `torch.distributed.checkpoint` folder, written by any number of processes, with torch's loader."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

    table = folder / ".metadata"
    try:
        metadata = _DistributedUnpickler(io.BytesIO(table.read_bytes())).load()
    except CheckpointError as error:
        raise CheckpointError(f"{table}: {error}") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(
            f"{table} is not the table of a torch.distributed.checkpoint folder; copy or save it again"
        )
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    places: dict[str, Any] = {}
    for index, place in metadata.storage_data.items():
        file = inside(folder, place.relative_path, table)
        if not file.is_file() or file.stat().st_size < place.offset + place.length:
            raise CheckpointError(f"{file} is missing or truncated; it holds {index.fqn!r}: copy or save it again")
        places.setdefault(index.fqn, place)

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return metadata  # torch's method would unpickle it without restriction

    def read(key: str) -> torch.Tensor:
        entry: Any = metadata.state_dict_metadata[key]
        tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "torch.distributed is uninitialized, assuming a single process"
            load(tensors, storage_reader=Reader(folder), no_dist=True)
        return tensors[key]

    tree: dict[Any, Any] = {}
    for key, entry in metadata.state_dict_metadata.items():
        where = (metadata.planner_data or {}).get(key, (key,)) if isinstance(metadata.planner_data, Mapping) else (key,)
        node = tree
        for part in where[:-1]:
            node = node.setdefault(part, {})
        if isinstance(entry, TensorStorageMetadata):
            covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if covered < math.prod(entry.size):
                raise CheckpointError(f"{table}: the chunks of {key!r} do not cover it; save the checkpoint again")
            node[where[-1]] = Leaf(
                TensorInfo(tuple(entry.size), entry.properties.dtype, places[key].relative_path), key
            )
        else:
            place = places[key]
            with (folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                data = io.BytesIO(file.read(place.length))
            try:
                node[where[-1]] = load_data(data, folder / place.relative_path)
            except CheckpointError as error:  # not a weight, so the weights can still be read
                node[where[-1]] = f"not opened: {error}"
    return nested_checkpoint(folder, "torch.distributed.checkpoint", _with_lists(tree), "", read)


def _with_lists(node: Any) -> Any:
    """The nested object with lists where torch stored dicts with integer keys, which the keys of a dict never are."""
    if not isinstance(node, dict):
        return node
    values = {key: _with_lists(value) for key, value in node.items()}
    if values and all(type(key) is int for key in values):
        return [values[key] for key in sorted(values)]
    values = {str(key): value for key, value in values.items()}
    groups, state = values.get("param_groups"), values.get("state")
    if isinstance(groups, list) and isinstance(state, dict) and all(key.isdigit() for key in state):
        values["state"] = {
            int(key): value for key, value in state.items()
        }  # torch stored an optimizer's integer keys as strings
    return values

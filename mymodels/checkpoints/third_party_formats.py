"""Files of NumPy, ONNX, TensorFlow and GGUF, each read by its own library."""

import math
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..extras import install_command
from .checkpoint import Checkpoint, CheckpointError, TensorInfo
from .safetensors_files import inside


def import_library(module: str, extra: str, path: Path, what: str) -> Any:
    """The library that reads a file.

    Raises:
        CheckpointError: it is not installed; the message has the command for it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise CheckpointError(f"{path} is {what}; to read it, run {install_command(extra)}") from error


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype that NumPy or ml_dtypes calls `name`, if there is one."""
    dtype = getattr(torch, {"bool_": "bool"}.get(name, name), None)
    return dtype if isinstance(dtype, torch.dtype) and not re.fullmatch(r"u?int[1-7]", name) else None


def array_dtype(dtype: np.dtype) -> torch.dtype | None:
    """The torch dtype of an array of numbers; NumPy files store bfloat16 as two untyped bytes."""
    return torch.bfloat16 if _is_bare(dtype) and dtype.itemsize == 2 else torch_dtype(dtype.name)


def _is_bare(dtype: np.dtype) -> bool:
    """Whether the dtype is untyped bytes, as NumPy stores types of ml_dtypes."""
    return dtype.kind == "V" and dtype.names is None and dtype.subdtype is None


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The same bytes as a tensor; ml_dtypes' types (bfloat16, float8) are unknown to `torch.from_numpy`."""
    dtype = array_dtype(array.dtype)
    assert dtype is not None
    shape, array = array.shape, np.ascontiguousarray(array)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    flat = torch.from_numpy(array.reshape(-1).view(np.uint8).copy())
    return flat.view(dtype).reshape(shape) if array.size else torch.empty(shape, dtype=dtype)


def open_npz(path: Path) -> Checkpoint:
    """Open a NumPy `.npz` archive; arrays of objects, which are pickles, are not read."""
    archive = np.load(path, allow_pickle=False)
    info, others = {}, {}
    for name in archive.files:
        with archive.zip.open(name if name in archive.zip.namelist() else f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(file)
        torch_dtype = array_dtype(dtype)
        if torch_dtype is None and _is_bare(dtype):
            raise CheckpointError(
                f"{path}: array {name!r} has a type that NumPy does not know ({dtype.str}, such as float8): save it as float32"
            )
        if torch_dtype is None:  # text, objects
            others[name] = f"array of {dtype}, shape {tuple(shape)}"
            continue
        info[name] = TensorInfo(tuple(shape), torch_dtype, path.name)
    if not info:
        raise CheckpointError(f"{path} holds no arrays of numbers, only {', '.join(others) or 'nothing'}: no weights")
    return Checkpoint(path, "NumPy", info, lambda name: to_torch(archive[name]), extras=others)


def _bodies(model: Any) -> Iterator[Any]:
    """The graph of an ONNX model, the subgraphs in its nodes, and its functions."""
    waiting = [model.graph, *model.functions]
    while waiting:
        body = waiting.pop(0)
        yield body
        for node in body.node:
            for attribute in node.attribute:
                waiting += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)


def _onnx_floats(onnx: Any) -> set[int]:
    kinds = onnx.TensorProto
    return {kinds.FLOAT, kinds.DOUBLE, kinds.FLOAT16, kinds.BFLOAT16}


def open_onnx(path: Path) -> Checkpoint:
    """Open the initialisers of an ONNX model, including external, sparse and subgraph ones.

    Floating-point constants of the graph with more than one element are included, as exporters fold weights into them.
    """
    onnx = import_library("onnx", "onnx", path, "an ONNX model")
    model = onnx.load(path, load_external_data=False)
    helper = onnx.helper
    initializers: dict[str, Any] = {}
    sparse: dict[str, Any] = {}
    constants = 0
    for body in _bodies(model):
        for tensor in getattr(body, "initializer", ()):
            initializers.setdefault(tensor.name, tensor)
        for entry in getattr(body, "sparse_initializer", ()):
            sparse.setdefault(entry.values.name, entry)
        for node in body.node:
            for attribute in node.attribute if node.op_type == "Constant" else ():
                folded = attribute.t if attribute.name == "value" else None
                if folded is not None and folded.data_type in _onnx_floats(onnx) and math.prod(folded.dims) > 1:
                    initializers.setdefault(node.output[0], folded)
                elif attribute.name == "sparse_value":
                    sparse.setdefault(node.output[0], attribute.sparse_tensor)
                else:
                    constants += 1
    info, strings = {}, {}
    for name, entry in sparse.items():
        dtype = torch_dtype(helper.tensor_dtype_to_np_dtype(entry.values.data_type).name)
        if dtype is None or entry.values.data_location == onnx.TensorProto.EXTERNAL:
            raise CheckpointError(f"{path}: the sparse initialiser {name!r} cannot be read: store it dense")
        info[name] = TensorInfo(tuple(entry.dims), dtype, path.name)
    for name, tensor in initializers.items():
        if tensor.data_type == onnx.TensorProto.STRING:
            strings[name] = list(tensor.string_data)
            continue
        dtype = torch_dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type).name)
        if dtype is None:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            raise CheckpointError(f"{path}: initialiser {name!r} has the type {kind}, which torch does not have")
        where = path.name
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            external = {entry.key: entry.value for entry in tensor.external_data}
            where = external["location"]
            file = inside(path.parent, where, path)
            needed = int(external.get("offset", 0)) + math.prod(tensor.dims) * dtype.itemsize
            if not file.is_file() or file.stat().st_size < needed:
                raise CheckpointError(
                    f"{file} is missing or truncated; {path.name} stores {name!r} there: copy both again"
                )
        info[name] = TensorInfo(tuple(tensor.dims), dtype, where)
    if not info:
        raise CheckpointError(f"{path} is an ONNX model without initialisers: it holds no weights")

    def read(name: str) -> torch.Tensor:
        if name in sparse:
            entry = sparse[name]
            values = to_torch(onnx.numpy_helper.to_array(entry.values))
            indices = to_torch(onnx.numpy_helper.to_array(entry.indices)).long()
            if indices.dim() == 2:  # coordinates, not positions in the flattened tensor
                strides = [math.prod(entry.dims[i + 1 :]) for i in range(len(entry.dims))]
                indices = (indices * torch.tensor(strides)).sum(1)
            flat = torch.zeros(math.prod(entry.dims), dtype=values.dtype)
            flat[indices] = values
            return flat.reshape(tuple(entry.dims))
        return to_torch(onnx.numpy_helper.to_array(initializers[name], base_dir=str(path.parent)))

    return Checkpoint(
        path, "ONNX", info, read, extras=strings | ({"constants of the graph": constants} if constants else {})
    )


def open_tensorflow(prefix: Path) -> Checkpoint:
    """Open a TensorFlow checkpoint by its prefix (`model.ckpt` for `model.ckpt.index`, `variables/variables`)."""
    tensorflow = import_library("tensorflow", "tf", prefix, "a TensorFlow checkpoint")
    reader = tensorflow.train.load_checkpoint(str(prefix))
    shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    info, others = {}, {}
    for name in sorted(shapes):
        dtype = torch_dtype(dtypes[name].base_dtype.name)
        if dtype is None:  # texts, such as the object graph
            others[name] = f"{dtypes[name].name} {shapes[name]}"
        else:
            info[name] = TensorInfo(tuple(shapes[name]), dtype, prefix.name)

    def read(name: str) -> torch.Tensor:
        return to_torch(np.asarray(reader.get_tensor(name)))

    return Checkpoint(prefix, "TensorFlow", info, read, extras=others)


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file, or all files of the split one it belongs to; quantised tensors are read as float32."""
    first = _open_one_gguf(path)
    count = first.extras.get("split.count")
    if not isinstance(count, int) or count < 2:
        return first
    found = re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.gguf", path.name)
    names = [f"{found[1]}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)] if found else []
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing or not names:
        what = (
            f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} are missing"
            if names
            else "its name has no number"
        )
        raise CheckpointError(f"{path} is one of {count} files of a split GGUF, and {what}: copy them beside it")
    parts = [first if name == path.name else _open_one_gguf(path.with_name(name)) for name in names]
    homes = {name: part for part in parts for name in part}
    total = first.extras.get("split.tensors.count")
    if len(homes) != sum(map(len, parts)) or (isinstance(total, int) and total != len(homes)):
        raise CheckpointError(
            f"{path}: the {count} files of this split GGUF belong to different models: copy them all again"
        )
    quantised = {key: kind for part in parts for key, kind in part.extras.get("quantisation", {}).items()}
    extras = {**parts[0].extras} | ({"quantisation": quantised} if quantised else {})
    return Checkpoint(
        path, f"GGUF in {count} files", {n: p.info[n] for n, p in homes.items()}, lambda n: homes[n][n], extras=extras
    )


def _open_one_gguf(path: Path) -> Checkpoint:
    gguf = import_library("gguf", "gguf", path, "a GGUF file")
    reader = gguf.GGUFReader(path)
    kinds = gguf.GGMLQuantizationType
    plain = {kinds[name]: dtype for name, dtype in _GGUF_DTYPES.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    info = {
        # GGUF has the fastest dimension first
        name: TensorInfo(
            tuple(int(size) for size in reversed(tensor.shape)), plain.get(tensor.tensor_type, torch.float32), path.name
        )
        for name, tensor in tensors.items()
    }

    def read(name: str) -> torch.Tensor:
        tensor, (shape, dtype, _) = tensors[name], info[name]
        if tensor.tensor_type not in plain:
            try:
                return to_torch(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(shape)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is quantised as {kinds(tensor.tensor_type).name}, which the gguf library "
                    f"cannot dequantise: convert it to F16 with llama-quantize of llama.cpp"
                ) from error
        return torch.from_numpy(tensor.data.reshape(-1).view(np.uint8).copy()).view(dtype).reshape(shape)

    quantised = {
        name: kinds(tensor.tensor_type).name for name, tensor in tensors.items() if tensor.tensor_type not in plain
    }
    extras = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return Checkpoint(path, "GGUF", info, read, extras=extras | ({"quantisation": quantised} if quantised else {}))


_GGUF_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}

"""`Checkpoint`: a lazy mapping of name → tensor, as which every format is opened."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import CheckpointError, unreadable

# safetensors' names of torch's dtypes; used in files and in messages
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",  # torch 2.7
    "F4": "float4_e2m1fn_x2",  # torch 2.8; two numbers per byte
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype) for name, dtype in _DTYPES.items() if hasattr(torch, dtype)
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def resolve_dtype(dtype: "str | torch.dtype | None") -> torch.dtype | None:
    """The dtype of a name such as `"bfloat16"`; None for None and `"auto"`, which mean the checkpoint's own.

    Raises:
        CheckpointError: it is not a floating-point dtype.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is None or dtype == "auto":
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"{dtype!r} is not a floating-point dtype: use float32, bfloat16, float16 or auto")
    return found


class TensorInfo(NamedTuple):
    """Shape, dtype and file of a tensor, known before its data is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str  # name of the file that holds it

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES.get(self.dtype, str(self.dtype).removeprefix("torch."))


class Checkpoint(Mapping[str, torch.Tensor]):
    """A lazy mapping of name → tensor over the files of a checkpoint, made by `open_checkpoint`.

    `checkpoint[name]` reads one tensor, on the CPU (clone it before you change it in place); `checkpoint.info[name]` has its shape and dtype without reading it.

    Attributes:
        path: the file or folder that was opened.
        format: the format in words, such as `"sharded safetensors"`.
        info: name → `TensorInfo`.
        sections: the models in it: section → names of its tensors. There is one section, `""`, unless a file holds
            several models; then each name of the mapping starts with its section and a dot.
        extras: what a training checkpoint holds besides the weights, name → value; empty for other formats. Objects of
            classes that were not imported are `Unopened`.
        left_out: files of weights in the folder that this checkpoint does not include.
        part_of: why this is only a part of a model, as a sentence; `""` if it is not known to be one.
        aliases: tied names recorded by the writer: name → the name that is stored. Both can be read.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        info: dict[str, TensorInfo],
        read: Callable[[str], torch.Tensor],
        *,
        sections: dict[str, list[str]] | None = None,
        extras: Mapping[str, Any] | None = None,
        aliases: dict[str, str] | None = None,
        part_of: str = "",
    ):
        self.path, self.format, self._read = path, format, read
        self.aliases = aliases or {}
        self.info = info | {alias: info[name] for alias, name in self.aliases.items() if alias not in info}
        self.sections = sections or {"": list(self.info)}
        self.extras: Mapping[str, Any] = extras or {}
        self.left_out: list[str] = []
        self.part_of = part_of

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self.info[name]
        try:
            tensor = self._read(self.aliases.get(name, name))
        except (CheckpointError, MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # from any third-party reader: the file was changed or is damaged
            raise unreadable(self.path, f"tensor {name!r} of {info.file}", error) from error
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} in {info.file} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, "
                f"but the header says {info.shape} and {info.dtype}: write the file again"
            )
        return tensor

    def __contains__(self, name: object) -> bool:  # the method of `Mapping` would read the tensor
        return name in self.info

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.format}, {len(self)} tensors)"

    def section(self, name: str) -> "Checkpoint":
        """One of several models in a checkpoint, under that model's own names.

        Raises:
            CheckpointError: there is no such section.
        """
        if name not in self.sections:
            known = ", ".join(repr(section) for section in self.sections)
            raise CheckpointError(f"{self.path} has no section {name!r}; it has {known}")
        if len(self.sections) == 1:
            return self
        prefix = f"{name}." if name else ""
        names = {prefix + key: key for key in self.sections[name]}
        part = Checkpoint(
            self.path,
            self.format,
            {key: self.info[full] for full, key in names.items()},
            lambda key: self[prefix + key],
            sections={name: list(names.values())},
            extras=self.extras,
            aliases={names[a]: names[b] for a, b in self.aliases.items() if a in names and b in names},
            part_of=self.part_of,
        )
        part.left_out = self.left_out
        return part


def view_of(tensor: torch.Tensor) -> tuple:
    """A key that two tensors share if and only if they are the same view of the same memory, so tied."""
    signs = (tensor.is_conj(), tensor.is_neg())
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), signs


_FLOAT4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a form that torch can compare: dense, dequantised, with 8- and 4-bit floats as float32."""
    if tensor.is_quantized:
        return tensor.dequantize()
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):  # two numbers per byte, the lower bits first
        data = tensor.contiguous().view(torch.uint8).long()
        return _FLOAT4[torch.stack([data & 15, data >> 4], -1)].flatten(-2)
    if tensor.dtype == torch.complex32:
        return tensor.to(torch.complex64)
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def plain_tensor(tensor: Any, name: str, where: Any) -> torch.Tensor:
    """The tensor itself, or the local values of a distributed one that is replicated.

    Wrapper subclasses have no memory of their own (`data_ptr()` is 0), so they must not be stored or compared by it.

    Raises:
        CheckpointError: it is a process's shard of a tensor, or of a class (quantised, nested) without plain values.
    """
    kind = type(tensor)
    qualified = getattr(tensor, "qualified", f"{kind.__module__}.{kind.__qualname__}")
    if kind.__name__ in ("DTensor", "ShardedTensor"):
        local = getattr(tensor, "_local_tensor", None)
        placements = getattr(tensor, "placements", ())
        if local is not None and local.shape == tensor.shape and not any(map(_is_partial, placements)):
            return local
        raise CheckpointError(
            f"{where}: tensor {name!r} is one process's shard of a distributed tensor ({qualified}): gather it, with "
            f"get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint, "
            f"or save with torch.distributed.checkpoint.save, whose folders can be opened"
        )
    if isinstance(tensor, torch.Tensor) and tensor.is_nested:
        raise CheckpointError(
            f"{where}: tensor {name!r} is a nested tensor, with rows of different lengths: save each row "
            f"(tensor.unbind()) under a name of its own"
        )
    if not isinstance(tensor, torch.Tensor) and isinstance(next(iter(tensor.args), None), torch.Tensor):
        raise CheckpointError(
            f"{where}: tensor {name!r} is a {qualified}, a subclass of Tensor that may interpret its values: save "
            f"tensor.as_subclass(torch.Tensor) if its values are plain numbers"
        )
    if not isinstance(tensor, torch.Tensor) or is_traceable_wrapper_subclass(tensor):
        raise CheckpointError(
            f"{where}: tensor {name!r} is a {qualified}, which has no plain values, as quantised tensors: "
            f"save the model before it is quantised, or its tensors after tensor.dequantize()"
        )
    return tensor


def _is_partial(placement: Any) -> bool:
    return type(placement).__name__ in ("Partial", "_Partial", "_NormPartial")

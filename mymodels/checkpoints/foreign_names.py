"""Torch's names and layout for weights that transformers 4 saved from its TensorFlow and Flax models."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .checkpoint import Checkpoint, CheckpointError, TensorInfo
from .safetensors_files import read_json

Axes = tuple[int, ...] | None  # permutation of the stored axes, or the axes to keep; None changes nothing
_CONVOLUTION = (3, 2, 0, 1)  # height, width, in, out → out, in, height, width
_KERAS_PARAMETERS = {
    "kernel": "weight",
    "embeddings": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "pointwise_kernel": "pointwise.weight",
    "depthwise_kernel": "depthwise.weight",
}
_FLAX_PARAMETERS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def _to_torch_layout(shape: tuple[int, ...]) -> Axes:
    return _CONVOLUTION if len(shape) == 4 else tuple(reversed(range(len(shape)))) if len(shape) > 1 else None


def from_tensorflow(name: str, shape: tuple[int, ...], level: int = 1) -> tuple[str, Axes]:
    """Torch's name of a variable of a TF model of transformers, and the permutation of its axes.

    `level` is the number of scopes before the model's own, usually one: the name of its class.
    """
    name = name.removesuffix(":0")
    name = re.sub(r"/[^/]*___([^/]*)/", r"/\1/", f"/{name}").replace(
        "_._", "/"
    )  # a scope's other name; a list's number
    parts = [part for part in name.split("/") if part]
    parts = parts[level:] if len(parts) > level else parts
    transposed = parts[-1] in ("kernel", "pointwise_kernel", "depthwise_kernel") or {"emb_projs", "out_projs"} & set(
        parts
    )
    parts[-1] = _KERAS_PARAMETERS.get(parts[-1], parts[-1])
    if parts[-1] == "bias" and len(shape) == 2 and shape[0] == 1:  # GPT-2's biases are stored as one row
        return ".".join(parts), (1,)
    return ".".join(parts), _to_torch_layout(shape) if transposed else None


def from_flax(name: str, shape: tuple[int, ...]) -> tuple[str, Axes]:
    """Torch's name of a parameter of a Flax model of transformers, and the permutation of its axes."""
    parts = name.split(".")
    if parts[0] in ("params", "batch_stats") and len(parts) > 1:
        parts = parts[1:]
    transposed = parts[-1] == "kernel"
    parts[-1] = _FLAX_PARAMETERS.get(parts[-1], parts[-1])
    return ".".join(parts), _to_torch_layout(shape) if transposed else None


def is_saved_by_transformers(path: Path, stem: str) -> bool:
    """Whether transformers saved a file: its name begins with `stem`, or `config.json` beside it has a `model_type`."""
    config = path.parent / "config.json"
    return path.name.startswith(stem) or (config.is_file() and "model_type" in read_json(config))


def renamed_checkpoint(
    raw: Checkpoint, rule: Callable[[str, tuple[int, ...]], tuple[str, Axes]], stem: str, *, known: bool = False
) -> Checkpoint:
    """A checkpoint with torch's names and layout if transformers saved it; otherwise as it is stored.

    Raises:
        CheckpointError: two of its tensors would get the same name.
    """
    if not known and not is_saved_by_transformers(raw.path, stem):
        raw.extras = {**raw.extras, "layout": "names and matrices as they are stored: kernels are [in, out]"}
        return raw
    return rearranged(raw, {name: rule(name, info.shape) for name, info in raw.info.items()})


def rearranged(raw: Checkpoint, places: Mapping[str, tuple[str, Axes]]) -> Checkpoint:
    """A checkpoint renamed and permuted: `places` maps each name to a new name and a permutation."""
    stored: dict[str, tuple[str, Axes]] = {}
    info: dict[str, TensorInfo] = {}
    for name, (new, axes) in places.items():
        if new in stored:
            raise CheckpointError(
                f"{raw.path}: {name!r} and {stored[new][0]!r} would both be {new!r} in torch: it cannot be read"
            )
        stored[new] = (name, axes)
        shape = raw.info[name].shape
        info[new] = raw.info[name]._replace(shape=tuple(shape[axis] for axis in axes) if axes else shape)

    def read(name: str) -> torch.Tensor:
        source, axes = stored[name]
        if axes is None:
            return raw[source]
        tensor = raw[source]
        return tensor.permute(axes).contiguous() if len(axes) == tensor.dim() else tensor.reshape(info[name].shape)

    transposed = sum(axes is not None and len(axes) > 1 for _, axes in stored.values())
    extras = {**raw.extras, "layout": f"torch's names; {transposed} kernels were transposed from [in, out]"}
    return Checkpoint(raw.path, f"{raw.format} (transformers 4)", info, read, extras=extras)

"""Nested objects, as training scripts save them: find the models in them, and what is stored besides."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .checkpoint import Checkpoint, CheckpointError, TensorInfo, plain_tensor, view_of
from .pickled_modules import ModuleState
from .plain_pickle import Unopened, UnopenedTensor
from .third_party_formats import array_dtype, to_torch

# Keys under which training checkpoints store what is not a model.
_TRAINING_STATE = re.compile(
    r"(^|[_.-])(optim|optimizers?|schedulers?|rng|rng_states?|random_states?|callbacks?|loops?)([_.-]|$)", re.IGNORECASE
)
_METRIC = re.compile(r"loss|step|epoch|iter|acc|best|metric|score|lr|time|ppl|perplexity|f1", re.IGNORECASE)


class FoundModels(NamedTuple):
    """What a nested object holds: section → name → tensor, and everything else."""

    models: dict[str, dict[str, Any]]
    extras: dict[str, Any]


class Leaf(NamedTuple):
    """The place of a tensor in a nested object that has not been read yet."""

    info: TensorInfo
    key: str


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, or a NumPy array of numbers."""
    if isinstance(value, np.ndarray):  # arrays of numbers are weights too
        return array_dtype(value.dtype) is not None
    return isinstance(value, (torch.Tensor, Leaf, UnopenedTensor))


def entries_of(node: Any) -> list[tuple[str, Any]]:
    """The (key, value) pairs of a mapping, list or tuple; none for anything else."""
    if isinstance(node, Mapping):
        return [(str(key), value) for key, value in node.items()]
    if isinstance(node, (list, tuple)) and not is_tensor(node):
        return [(str(i), value) for i, value in enumerate(node)]
    return []


def leaves_of(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in a nested object that has no entries itself."""
    for key, value in entries_of(node):
        name = f"{path}.{key}" if path else key
        if entries_of(value):
            yield from leaves_of(value, name)
        else:
            yield name, value


def is_training_state(key: str, value: Any) -> bool:
    """Whether an entry of a training checkpoint is an optimizer, a metric, a random state or the like, and no model."""
    if isinstance(value, torch.Tensor) and not value.is_nested and value.dim() == 0:
        return bool(_METRIC.search(key))
    if isinstance(value, np.ndarray) and value.ndim < 2 and _METRIC.search(key):  # a metric's history
        return True
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], str) and value[0] == "MT19937":
        return True  # NumPy's random state
    return bool(_TRAINING_STATE.search(key)) or _is_optimizer(value)


def find_models(node: Any, path: str = "") -> FoundModels:
    """Find the models in a nested object: a bare state dict, or any training checkpoint around one or more.

    A dict of tensors is a model. A dict of several dicts of tensors is several models, unless their keys have no dots
    and they are nested deeper: then it is one model, stored as a tree.
    """
    if is_tensor(node):
        return FoundModels({path: {"tensor": node}}, {})
    entries = entries_of(node)
    inner = {k: v for k, v in entries if not is_tensor(v) and any(is_tensor(leaf) for _, leaf in leaves_of(v))}
    models = {k: v for k, v in inner.items() if not is_training_state(k, v)}
    tensors = {k: v for k, v in entries if is_tensor(v) and not (inner and is_training_state(k, v))}
    name = partial("{}.{}".format, path) if path else str
    extras = {name(k): v for k, v in entries if k not in models and k not in tensors}
    if tensors and not models:
        return FoundModels({path: tensors}, extras)
    parts = [find_models(value, name(key)) for key, value in models.items()]
    found = {section: model for part in parts for section, model in part.models.items()}
    dotted = any("." in key for model in found.values() for key in model)
    if dotted and tensors:  # a tensor next to state dicts
        extras |= {name(key): value for key, value in tensors.items()}
    if dotted or not tensors:
        flat = all(len(list(leaves_of(value))) == len(entries_of(value)) for value in models.values())
        if len(parts) == 1 or flat or dotted:
            return FoundModels(found, {k: v for part in parts for k, v in part.extras.items()} | extras)
    tree = dict(leaves_of(models)) | tensors
    others = {name(key): value for key, value in tree.items() if not is_tensor(value)}
    return FoundModels({path: {key: value for key, value in tree.items() if is_tensor(value)}}, others | extras)


def _named_by_section(parts: FoundModels) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The tensors by the names they have in a `Checkpoint`, and its sections."""
    several = len(parts.models) > 1
    tensors = {f"{s}.{k}" if several and s else k: t for s, model in parts.models.items() for k, t in model.items()}
    return tensors, {section: list(model) for section, model in parts.models.items()}


OPTIMIZER = "an optimizer's state, no model"  # part of `Checkpoint.format`


class _Extras(Mapping[str, Any]):
    """`Checkpoint.extras` in which a `Leaf` is read on access."""

    def __init__(self, values: Mapping[str, Any], read: Callable[[str], torch.Tensor]):
        self.unread, self._read = values, read

    def __getitem__(self, name: str) -> Any:
        return self._filled(self.unread[name])

    def _filled(self, value: Any) -> Any:
        if isinstance(value, Leaf):
            return self._read(value.key)
        if isinstance(value, Mapping):
            return {key: self._filled(item) for key, item in value.items()}
        return [self._filled(item) for item in value] if isinstance(value, list) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.unread)

    def __len__(self) -> int:
        return len(self.unread)


def unread(extras: Mapping[str, Any]) -> Mapping[str, Any]:
    """`Checkpoint.extras` without reading: it has a `Leaf` for each tensor that is on disk."""
    return extras.unread if isinstance(extras, _Extras) else extras


def nested_checkpoint(path: Path, format: str, node: Any, file: str, read: Any = None) -> Checkpoint:
    """The `Checkpoint` of a nested object.

    Args:
        path: the file or folder, for messages.
        format: for `Checkpoint.format`.
        node: the nested object.
        file: name of the file that holds the tensors.
        read: reads the tensor of a `Leaf` by its key.

    Raises:
        CheckpointError: there are no tensors in it, or it is one rank's part of a model.
    """
    _refuse_rank_files(path, node)
    own = _is_optimizer(node)
    parts = FoundModels({}, {}) if own else find_models(node)
    if not parts.models:  # such as an optimizer's own file
        leaves = {name: value for name, value in leaves_of(node) if is_tensor(value)}
        parts = FoundModels({"": leaves} if leaves else {}, {k: v for k, v in entries_of(node) if not is_tensor(v)})
        format = f"{format}: {OPTIMIZER}" if own or any(_is_optimizer(v) for _, v in entries_of(node)) else format
    if not parts.models and OPTIMIZER in format:
        raise CheckpointError(
            f"{path} holds {OPTIMIZER}, which has no tensors yet, as before the first step: there is nothing to read"
        )
    if not parts.models:
        raise CheckpointError(f"{path} holds no tensors, only {class_name(node)}: it is not a checkpoint of weights")
    if classes := list(dict.fromkeys(_module_classes(node))):
        format = f"{format}: pickled modules ({', '.join(classes)}), whose code was not run"
    found, sections = _named_by_section(parts)
    names = Counter(name for name, value in leaves_of(node) if is_tensor(value))
    if names and names.most_common(1)[0][1] > 1:
        raise CheckpointError(
            f"{path} has two tensors at {names.most_common(1)[0][0]!r}, their keys joined: rename one"
        )
    info: dict[str, TensorInfo] = {}
    first: dict[tuple, str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Any] = {}
    for name, tensor in found.items():
        if isinstance(tensor, Leaf):
            info[name], tensors[name] = tensor.info, tensor
            continue
        if isinstance(tensor, np.ndarray):
            dtype = array_dtype(tensor.dtype)
            assert dtype is not None
            info[name], tensors[name] = TensorInfo(tuple(tensor.shape), dtype, file), tensor
            continue
        tensor = tensors[name] = plain_tensor(tensor, name, path)
        info[name] = TensorInfo(tuple(tensor.shape), tensor.dtype, file)
        if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta:
            view = view_of(tensor)
            if first.setdefault(view, name) != name:
                aliases[name] = first[view]

    def get(name: str) -> torch.Tensor:
        tensor = tensors[name]
        if isinstance(tensor, Leaf):
            return read(tensor.key)
        if isinstance(tensor, np.ndarray):
            return to_torch(tensor)
        if tensor.is_meta:
            raise CheckpointError(f"{path}: tensor {name!r} was saved from the meta device and has no data")
        return tensor.detach()

    extras = _Extras(parts.extras, read) if read else parts.extras
    return Checkpoint(path, format, info, get, sections=sections, extras=extras, aliases=aliases)


def _module_classes(node: Any) -> Iterator[str]:
    if isinstance(node, ModuleState):
        yield node.qualified.rpartition(".")[2]
    else:
        for _, value in entries_of(node):
            yield from _module_classes(value)


def class_name(node: Any) -> str:
    """The class of a value, also of one that was not unpickled."""
    return node.qualified if isinstance(node, (Unopened, ModuleState)) else type(node).__name__


def _is_optimizer(node: Any) -> bool:
    return isinstance(node, Mapping) and {"state", "param_groups"} <= node.keys()


def _refuse_rank_files(path: Path, node: Any) -> None:
    """Raise for a file of one rank of DeepSpeed's ZeRO: it has only a part of the weights."""
    optimizer = node.get("optimizer_state_dict") if isinstance(node, Mapping) else None
    if isinstance(optimizer, Mapping) and {"zero_stage", "partition_count"} <= optimizer.keys():
        raise CheckpointError(
            f"{path} has one rank's part of the optimizer state and weights of DeepSpeed's ZeRO: name the folder, whose "
            f"files are joined"
        )
    module = node.get("module") if isinstance(node, Mapping) and "param_shapes" in node else None
    empty = [name for name, value in leaves_of(module) if isinstance(value, torch.Tensor) and not value.numel()]
    if empty:
        raise CheckpointError(
            f"{path} is one rank's file of DeepSpeed's ZeRO-3: {len(empty)} tensors such as {empty[0]!r} are empty here, their "
            f"values are in the ranks' *_optim_states.pt: name the folder, whose files are joined"
        )

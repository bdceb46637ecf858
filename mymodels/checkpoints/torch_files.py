"""Files that `torch.save` wrote: state dicts, training checkpoints, and, on demand, whole pickled modules."""

import re
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..messages import first_line
from . import plain_pickle
from .checkpoint import Checkpoint, CheckpointError, TensorInfo, is_zip, plain_tensor, unreadable, view_of
from .pickled_modules import ModuleState, NeedsItsCode, with_state_dicts
from .plain_pickle import PLAIN_TYPES, Unopened, UnopenedTensor, find_unopened
from .third_party_formats import array_dtype, to_torch

HOW_TO_SAVE = (
    "A pickled module loads only where its code lies as it did when it was saved; where it still does, save it as "
    "torch.save(model.state_dict(), path) or model.save_pretrained(folder)"
)
# Names under which training checkpoints keep what is not a model.
_BESIDE = re.compile(
    r"(^|[_.-])(optim|optimizers?|schedulers?|rng|rng_states?|random_states?|callbacks?|loops?)([_.-]|$)", re.IGNORECASE
)
_NUMBER = re.compile(r"loss|step|epoch|iter|acc|best|metric|score|lr|time|ppl|perplexity|f1", re.IGNORECASE)


class Parts(NamedTuple):
    """A nested object taken apart: section → name → tensor, and what stands beside the models."""

    models: dict[str, dict[str, Any]]
    extras: dict[str, Any]


class Leaf(NamedTuple):
    """A tensor that has not been read, standing where it will in a nested object."""

    info: TensorInfo
    key: str


def _is_tensor(value: Any) -> bool:
    if isinstance(value, np.ndarray):  # of numbers; scripts save them as weights too
        return array_dtype(value.dtype) is not None
    return isinstance(value, (torch.Tensor, Leaf, UnopenedTensor))


def _entries(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [(str(key), value) for key, value in node.items()]
    if isinstance(node, (list, tuple)) and not _is_tensor(node):
        return [(str(i), value) for i, value in enumerate(node)]
    return []


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in _entries(node):
        name = f"{path}.{key}" if path else key
        if _entries(value):
            yield from _leaves(value, name)
        else:
            yield name, value


def _is_beside(key: str, value: Any) -> bool:
    if isinstance(value, torch.Tensor) and not value.is_nested and value.dim() == 0:
        return bool(_NUMBER.search(key))
    if isinstance(value, np.ndarray) and value.ndim < 2 and _NUMBER.search(key):  # a history
        return True
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], str) and value[0] == "MT19937":
        return True  # NumPy's random state
    return bool(_BESIDE.search(key)) or _is_optimizer(value)


def take_apart(node: Any, path: str = "") -> Parts:
    """Find the models in a nested object: a bare state dict, or any training checkpoint around one or more.

    A dict of tensors is a model. A dict with several dicts of tensors is several models, unless their names have no
    dots and they nest deeper: that is one model, kept as a tree.
    """
    if _is_tensor(node):
        return Parts({path: {"tensor": node}}, {})
    entries = _entries(node)
    inner = {k: v for k, v in entries if not _is_tensor(v) and any(_is_tensor(leaf) for _, leaf in _leaves(v))}
    models = {k: v for k, v in inner.items() if not _is_beside(k, v)}
    tensors = {k: v for k, v in entries if _is_tensor(v) and not (inner and _is_beside(k, v))}
    name = partial("{}.{}".format, path) if path else str
    extras = {name(k): v for k, v in entries if k not in models and k not in tensors}
    if tensors and not models:
        return Parts({path: tensors}, extras)
    parts = [take_apart(value, name(key)) for key, value in models.items()]
    found = {section: model for part in parts for section, model in part.models.items()}
    dotted = any("." in key for model in found.values() for key in model)
    if dotted and tensors:  # a tensor beside state dicts
        extras |= {name(key): value for key, value in tensors.items()}
    if dotted or not tensors:
        flat = all(len(list(_leaves(value))) == len(_entries(value)) for value in models.values())
        if len(parts) == 1 or flat or dotted:
            return Parts(found, {k: v for part in parts for k, v in part.extras.items()} | extras)
    tree = dict(_leaves(models)) | tensors
    others = {name(key): value for key, value in tree.items() if not _is_tensor(value)}
    return Parts({path: {key: value for key, value in tree.items() if _is_tensor(value)}}, others | extras)


def _flat(parts: Parts) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The tensors under the names that the mapping gives them, and the sections."""
    several = len(parts.models) > 1
    tensors = {f"{s}.{k}" if several and s else k: t for s, model in parts.models.items() for k, t in model.items()}
    return tensors, {section: list(model) for section, model in parts.models.items()}


OPTIMIZER = "an optimizer's state, no model"


class _Extras(Mapping[str, Any]):
    """What stands beside the models; a `Leaf` in it is read when it is asked for."""

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
    """`Checkpoint.extras` for a look that reads nothing: with a `Leaf` for each tensor that is still on disk."""
    return extras.unread if isinstance(extras, _Extras) else extras


def nested_checkpoint(path: Path, format: str, node: Any, file: str, read: Any = None) -> Checkpoint:
    """A `Checkpoint` over a nested object; `read` gets the key of a `Leaf`."""
    _refuse_partitions(path, node)
    own = _is_optimizer(node)
    parts = Parts({}, {}) if own else take_apart(node)
    if not parts.models:  # such as an optimizer's own file
        leaves = {name: value for name, value in _leaves(node) if _is_tensor(value)}
        parts = Parts({"": leaves} if leaves else {}, {k: v for k, v in _entries(node) if not _is_tensor(v)})
        format = f"{format}: {OPTIMIZER}" if own or any(_is_optimizer(v) for _, v in _entries(node)) else format
    if not parts.models and OPTIMIZER in format:
        raise CheckpointError(
            f"{path} holds {OPTIMIZER}, and it is without tensors, as before the first step: there is nothing to read in it"
        )
    if not parts.models:
        raise CheckpointError(f"{path} holds no tensors, only {_kind(node)}: it is no checkpoint of weights")
    if classes := list(dict.fromkeys(_module_classes(node))):
        format = f"{format}: modules pickled whole ({', '.join(classes)}), whose code was not run"
    found, sections = _flat(parts)
    names = Counter(name for name, value in _leaves(node) if _is_tensor(value))
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
        for _, value in _entries(node):
            yield from _module_classes(value)


def _kind(node: Any) -> str:
    return node.qualified if isinstance(node, (Unopened, ModuleState)) else type(node).__name__


def _is_optimizer(node: Any) -> bool:
    return isinstance(node, Mapping) and {"state", "param_groups"} <= node.keys()


def _refuse_partitions(path: Path, node: Any) -> None:
    """Raise for the files of one of DeepSpeed's ranks: with ZeRO-3 a model's tensors are empty in them."""
    optimizer = node.get("optimizer_state_dict") if isinstance(node, Mapping) else None
    if isinstance(optimizer, Mapping) and {"zero_stage", "partition_count"} <= optimizer.keys():
        raise CheckpointError(
            f"{path} is one rank's part of an optimizer's state and weights by DeepSpeed's ZeRO: name the folder, which is "
            f"put together"
        )
    module = node.get("module") if isinstance(node, Mapping) and "param_shapes" in node else None
    empty = [name for name, value in _leaves(module) if isinstance(value, torch.Tensor) and not value.numel()]
    if empty:
        raise CheckpointError(
            f"{path} is one rank's file of DeepSpeed's ZeRO-3: {len(empty)} tensors such as {empty[0]!r} are empty here, their "
            f"values lie in the ranks' *_optim_states.pt: name the folder, which is put together"
        )


def open_torch_file(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """A file made by `torch.save`, opened with `weights_only=True`; tensors of today's zip files stay on disk.

    Args:
        allow_pickle: run whatever code the file asks for, in another process, if it is not plain data.

    Raises:
        CheckpointError: the file is damaged, or needs more than plain data and `allow_pickle` is false.
    """
    if not is_zip(path):
        return _open_legacy(path, allow_pickle)
    try:
        node = load_data(path)
    except NotPlain:
        if not allow_pickle:
            raise
        return _unpickle_elsewhere(path)
    return nested_checkpoint(path, "PyTorch (torch.save)", node, path.name)


class NotPlain(CheckpointError):
    """A pickle that asks for more than plain data."""


def load_plain(file: Any, path: Path | None = None) -> Any:
    """`torch.load` with `weights_only=True`, on the CPU, memory-mapped if it can be; `path` names a stream."""
    where = path or file
    try:
        with torch.serialization.safe_globals(PLAIN_TYPES):
            if not isinstance(file, Path):
                return torch.load(file, map_location="cpu", weights_only=True)
            # a path lets torch map the file into memory, but one named .safetensors it would read as such
            if file.suffix != ".safetensors" and is_zip(file):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            with file.open("rb") as stream:
                return torch.load(stream, map_location="cpu", weights_only=True)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        needs = re.search(r"GLOBAL ([\w.]+)|Can only \w+[^,]*, .*?but got <class '([\w.]+)'>", str(error))
        if not needs:
            reason = str(error).split("WeightsUnpickler error:")[-1].strip()
            raise unreadable(where, "the file", RuntimeError(reason)) from error
        wanted = [needs[1] or needs[2]]
        try:
            with torch.serialization.safe_globals(PLAIN_TYPES):
                wanted = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)) or wanted
        except Exception:
            pass  # the older file format: the first one is known
        raise NotPlain(_asks_for(where, wanted)) from error


def _asks_for(where: Any, wanted: list[str]) -> str:
    shown = ", ".join(wanted[:8]) + (f" and {len(wanted) - 8} more" if len(wanted) > 8 else "")
    return (
        f"{where} is a pickle that asks for {shown}, which is more than tensors and modules, whose code is not needed; it "
        f"was not opened. {HOW_TO_SAVE}. {_ALLOW}"
    )


_ALLOW = (
    "If you trust the file, --allow-pickle (allow_pickle=True) runs its code in another process, with your rights, and "
    "takes out the tensors"
)


def load_data(file: Any, path: Path | None = None) -> Any:
    """`load_plain`, and for what it refuses the plain data and tensors all the same, other objects as `Unopened`.

    Raises:
        CheckpointError: the file is damaged, or tensors lie in objects of classes that would have to be run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's on newer pickle protocols
        try:
            return load_plain(file, path)
        except CheckpointError as error:
            refused = error
        try:
            node = with_state_dicts(_load_inert(file))
        except NeedsItsCode as error:
            raise NotPlain(f"{path or file}: {error}. {_ALLOW}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{path or file}: {error}") from None
        except plain_pickle.AsksForCode as error:
            raise NotPlain(_asks_for(path or file, [str(error)])) from None
        except Exception:  # it is damaged for this reader too
            raise refused from None
    within = sorted({one.qualified for one in _outside_of_beside(node) if holds_tensors(one)})
    if within:
        raise NotPlain(_asks_for(path or file, within))
    return node


def _load_inert(file: Any) -> Any:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": False, "pickle_module": plain_pickle}
    if not isinstance(file, Path):
        file.seek(0)
        return torch.load(file, **options)
    if file.suffix != ".safetensors" and is_zip(file):
        return torch.load(file, mmap=True, **options)
    with file.open("rb") as stream:
        return torch.load(stream, **options)


def _outside_of_beside(node: Any) -> Iterator[Unopened]:
    """The unopened objects of a file, but for those under names that are no model's anyway."""
    if isinstance(node, Unopened):
        yield node
    for key, value in _entries(node):
        if not _is_beside(key, value):
            yield from _outside_of_beside(value)


def holds_tensors(unopened: Unopened) -> bool:
    """Whether an object that was not opened has tensors in it, so that weights may be missed; a tensor itself has not."""
    if isinstance(unopened, UnopenedTensor):
        return False  # named when it is met among a model's tensors
    if unopened.qualified.startswith("numpy.random."):
        return False  # a generator's state
    for one in find_unopened(unopened):
        for part in one.contents():
            values = [part, *(value for _, value in _leaves(part))]
            if any(_is_tensor(value) for value in values):
                return True
    return False


@lru_cache(maxsize=1)
def _legacy_file(path: Path, modified: int, size: int) -> Checkpoint:
    return nested_checkpoint(path, "PyTorch (torch.save before 1.6)", load_data(path), path.name)


def _open_legacy(path: Path, allow_pickle: bool) -> Checkpoint:
    """The format before torch 1.6 has no table of its tensors and is read whole, and again when it was let go of.

    At most one such file stays in memory, so a sharded checkpoint of them costs one shard.
    """
    stat = path.stat()
    load = partial(_legacy_file, path, stat.st_mtime_ns, stat.st_size)
    try:
        whole = load()
    except NotPlain:
        if not allow_pickle:
            raise
        return _unpickle_elsewhere(path)

    def read(name: str) -> torch.Tensor:
        return load()[name].clone()  # the loaded file is kept, and may be read again

    checkpoint = Checkpoint(
        path, whole.format, whole.info, read, sections=whole.sections, extras=whole.extras, aliases=whole.aliases
    )
    weakref.finalize(checkpoint, _legacy_file.cache_clear)
    return checkpoint


def _unpickle_elsewhere(path: Path) -> Checkpoint:
    script = Path(__file__).with_name("unpickle_script.py")
    folder = tempfile.TemporaryDirectory(prefix="mymodels-unpickled-")
    plain = Path(folder.name) / "plain.pt"
    run = subprocess.run([sys.executable, script, path, plain], capture_output=True, text=True)
    if run.returncode:
        reason = ([line for line in run.stderr.splitlines() if line.strip()] or [f"exit code {run.returncode}"])[-1]
        raise CheckpointError(f"{path}: unpickling it failed ({reason.strip()[:300]}). {HOW_TO_SAVE}.")
    checkpoint = nested_checkpoint(path, "PyTorch (pickled objects)", load_plain(plain, path), path.name)
    weakref.finalize(checkpoint, folder.cleanup)
    return checkpoint


def open_pickle(path: Path) -> Checkpoint:
    """A bare pickle of arrays, tensors or modules, as `pickle.dump` writes it; none of its code is run."""
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            node = with_state_dicts(plain_pickle.load(file, encoding="latin1"))  # of Python 2, as detectron2's
    except (MemoryError, KeyboardInterrupt):
        raise
    except (NeedsItsCode, plain_pickle.AsksForCode) as error:
        what = (
            f"asks for {error}"
            if isinstance(error, plain_pickle.AsksForCode)
            else f"cannot be read without its code ({error})"
        )
        raise CheckpointError(f"{path} is a bare pickle, not made by torch.save, and {what}: {_LOAD_THERE}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # whatever a damaged pickle gives to a reader
        raise CheckpointError(
            f"{path} is a bare pickle, not made by torch.save, that is damaged or holds more than plain data "
            f"({first_line(error)}): {_LOAD_THERE}"
        ) from error
    within = sorted({one.qualified for one in _outside_of_beside(node) if holds_tensors(one)})
    if within or isinstance(node, Unopened):
        raise CheckpointError(
            f"{path} is a bare pickle, not made by torch.save, and asks for {', '.join(within[:8]) or _kind(node)}, whose "
            f"code would be run: {_LOAD_THERE}"
        )
    if not any(_is_tensor(value) for _, value in _leaves([node])):
        raise CheckpointError(f"{path} is a bare pickle without arrays or tensors ({_kind(node)}): it holds no weights")
    return nested_checkpoint(path, "pickle", node, path.name)


_LOAD_THERE = "load it where it was made, and save its weights with torch.save"

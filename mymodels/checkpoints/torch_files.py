"""Files that `torch.save` wrote: state dicts, training checkpoints and pickled modules; also bare pickles."""

import re
import warnings
import weakref
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from ..messages import first_line
from . import plain_pickle
from .checkpoint import Checkpoint, CheckpointError, unreadable
from .kinds import is_zip
from .nested_objects import class_name, entries_of, is_tensor, is_training_state, leaves_of, nested_checkpoint
from .pickled_modules import NeedsClassCode, with_state_dicts
from .plain_pickle import PLAIN_TYPES, Unopened, UnopenedTensor, find_unopened
from .unpickling import unpickle

HOW_TO_SAVE = (
    "A pickled module loads only with the code it was saved with; where that is available, save it as "
    "torch.save(model.state_dict(), path) or model.save_pretrained(folder)"
)


def open_torch_file(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a file of `torch.save` without running its code; tensors in zip files (torch 1.6 and newer) stay on disk.

    Args:
        allow_pickle: if the file needs more than plain data, run its code in the box, see `sandbox`.

    Raises:
        CheckpointError: the file is damaged, or needs more than plain data and `allow_pickle` is false.
    """
    if not is_zip(path):
        return _open_legacy(path, allow_pickle)
    try:
        node = load_data(path)
    except NotPlainData:
        if not allow_pickle:
            raise
        return _unpickle(path)
    return nested_checkpoint(path, "PyTorch (torch.save)", node, path.name)


class NotPlainData(CheckpointError):
    """A pickle needs more than plain data."""


def load_plain(file: Any, path: Path | None = None) -> Any:
    """`torch.load` with `weights_only=True`, on the CPU, memory-mapped if possible.

    Args:
        file: a path or an open file.
        path: the name of an open file, for messages.

    Raises:
        NotPlainData: it needs more than plain data.
        CheckpointError: it is damaged.
    """
    where = path or file
    try:
        with torch.serialization.safe_globals(PLAIN_TYPES):
            if not isinstance(file, Path):
                return torch.load(file, map_location="cpu", weights_only=True)
            # torch maps a file into memory by its path, but would read one named .safetensors as safetensors
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
            pass  # the format before torch 1.6: only the first name is known
        raise NotPlainData(_unsafe_globals_message(where, wanted)) from error


def _unsafe_globals_message(where: Any, wanted: list[str]) -> str:
    shown = ", ".join(wanted[:8]) + (f" and {len(wanted) - 8} more" if len(wanted) > 8 else "")
    return (
        f"{where} is a pickle that needs the code of {shown}; only tensors, modules and plain data are read without code, so it "
        f"was not opened. {HOW_TO_SAVE}. {_ALLOW}"
    )


_ALLOW = (
    "--allow-pickle (allow_pickle=True) runs its code in another process, confined where the machine can do it, to extract "
    "the tensors"
)


def load_data(file: Any, path: Path | None = None) -> Any:
    """`load_plain`; if it refuses the file, plain data and tensors are read, and other objects become `Unopened`.

    Raises:
        CheckpointError: the file is damaged, or tensors are in objects of classes whose code would have to run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of newer pickle protocols
        try:
            return load_plain(file, path)
        except CheckpointError as error:
            refused = error
        try:
            node = with_state_dicts(_load_without_code(file))
        except NeedsClassCode as error:
            raise NotPlainData(f"{path or file}: {error}. {_ALLOW}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{path or file}: {error}") from None
        except plain_pickle.UnsafeGlobal as error:
            raise NotPlainData(_unsafe_globals_message(path or file, [str(error)])) from None
        except Exception:  # this reader cannot read it either
            raise refused from None
    within = sorted({one.qualified for one in _unopened_in_models(node) if holds_tensors(one)})
    if within:
        raise NotPlainData(_unsafe_globals_message(path or file, within))
    return node


def _load_without_code(file: Any) -> Any:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": False, "pickle_module": plain_pickle}
    if not isinstance(file, Path):
        file.seek(0)
        return torch.load(file, **options)
    if file.suffix != ".safetensors" and is_zip(file):
        return torch.load(file, mmap=True, **options)
    with file.open("rb") as stream:
        return torch.load(stream, **options)


def _unopened_in_models(node: Any) -> Iterator[Unopened]:
    """The unopened objects of a file, except those under keys of training state."""
    if isinstance(node, Unopened):
        yield node
    for key, value in entries_of(node):
        if not is_training_state(key, value):
            yield from _unopened_in_models(value)


def holds_tensors(unopened: Unopened) -> bool:
    """Whether an unopened object contains tensors, so that weights may be missed; false for a tensor itself."""
    if isinstance(unopened, UnopenedTensor):
        return False  # `plain_tensor` refuses it among a model's tensors
    if unopened.qualified.startswith("numpy.random."):
        return False  # a generator's state
    for one in find_unopened(unopened):
        for part in one.contents():
            values = [part, *(value for _, value in leaves_of(part))]
            if any(is_tensor(value) for value in values):
                return True
    return False


@lru_cache(maxsize=1)
def _legacy_file(path: Path, modified: int, size: int) -> Checkpoint:
    return nested_checkpoint(path, "PyTorch (torch.save before 1.6)", load_data(path), path.name)


def _open_legacy(path: Path, allow_pickle: bool) -> Checkpoint:
    """Open a file in the format before torch 1.6, which has no table of tensors and can only be read completely.

    At most one such file stays in memory, and others are read again, so a sharded checkpoint needs memory for one shard.
    """
    stat = path.stat()
    load = partial(_legacy_file, path, stat.st_mtime_ns, stat.st_size)
    try:
        opened = load()
    except NotPlainData:
        if not allow_pickle:
            raise
        return _unpickle(path)

    def read(name: str) -> torch.Tensor:
        return load()[name].clone()  # the loaded file is cached, and may be read again

    checkpoint = Checkpoint(
        path, opened.format, opened.info, read, sections=opened.sections, extras=opened.extras, aliases=opened.aliases
    )
    weakref.finalize(checkpoint, _legacy_file.cache_clear)
    return checkpoint


def _unpickle(path: Path) -> Checkpoint:
    node, keep = unpickle(path, HOW_TO_SAVE)
    return keep(nested_checkpoint(path, "PyTorch (pickled objects)", node, path.name))


def open_pickle(path: Path) -> Checkpoint:
    """Open a pickle of arrays, tensors or modules that `pickle.dump` wrote; none of its code is run."""
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            node = with_state_dicts(
                plain_pickle.load(file, encoding="latin1")
            )  # for pickles of Python 2, such as detectron2's
    except (MemoryError, KeyboardInterrupt):
        raise
    except (NeedsClassCode, plain_pickle.UnsafeGlobal) as error:
        what = (
            f"needs the code of {error}"
            if isinstance(error, plain_pickle.UnsafeGlobal)
            else f"cannot be read without its code ({error})"
        )
        raise CheckpointError(
            f"{path} is a bare pickle, not made by torch.save, and {what}: {_HOW_TO_CONVERT}"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path} is a bare pickle, not made by torch.save, that is damaged or holds more than plain data "
            f"({first_line(error)}): {_HOW_TO_CONVERT}"
        ) from error
    within = sorted({one.qualified for one in _unopened_in_models(node) if holds_tensors(one)})
    if within or isinstance(node, Unopened):
        raise CheckpointError(
            f"{path} is a bare pickle, not made by torch.save, and needs the code of {', '.join(within[:8]) or class_name(node)}: "
            f"{_HOW_TO_CONVERT}"
        )
    if not any(is_tensor(value) for _, value in leaves_of([node])):
        raise CheckpointError(
            f"{path} is a bare pickle without arrays or tensors ({class_name(node)}): it holds no weights"
        )
    return nested_checkpoint(path, "pickle", node, path.name)


_HOW_TO_CONVERT = "load it with the program that wrote it, and save its weights with torch.save"

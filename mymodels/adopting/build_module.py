"""Import the author's class, build it from its arguments and load weights into it. Errors are one sentence."""

import dataclasses
import importlib
import io
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints import Checkpoint, CheckpointError, open_checkpoint
from ..messages import one_line
from .constructor import Constructor

_TRAINED = (
    "model_args",
    "model_config",
    "config",
    "hyper_parameters",
    "hparams",
    "args",
    "cfg",
)  # of a training checkpoint
FIVE = hasattr(PreTrainedModel, "get_expanded_tied_weights_keys")  # transformers 5 requires a call of `post_init`


def import_class(path: Path, name: str) -> type:
    """Import a class from a file, in the way that other files of its folder would.

    Raises:
        CheckpointError: the file cannot be imported.
    """
    root = path.resolve().parent
    parts = [path.stem]
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    module_name = ".".join(parts)
    loaded = sys.modules.get(module_name)
    if loaded is not None and Path(getattr(loaded, "__file__", "") or "").resolve() != path.resolve():
        raise CheckpointError(f"{path}: a module {module_name} is imported already from elsewhere: rename the file")
    try:
        with no_output():
            return getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{path} imports {error.name}, which is not installed: install it, or take the import out"
        ) from None
    except BaseException as error:
        raise CheckpointError(f"{path}{line_in(error, path)} cannot be imported: {error_text(error)}") from None


@contextmanager
def no_output() -> Iterator[None]:
    """A context that suppresses what the author's code prints."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def error_text(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself without a limit"
    text = one_line(error, 300)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def line_in(error: BaseException, path: Path) -> str:
    """`:line` in the author's file where an exception was raised, or ""."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()]
    return f":{frames[-1].lineno}" if frames else ""


def build(cls: Any, constructor: Constructor, path: Path) -> nn.Module:
    """Build the module in eval mode, with the author's initial weights.

    Raises:
        CheckpointError: the constructor raises.
    """
    module = sys.modules[cls.__module__]
    positional, named = [], {}
    for argument in constructor.arguments:
        values = {
            f.argument: tuple(f.value) if f.is_tuple and f.value is not None else f.value for f in argument.fields
        }
        made: Any = next(iter(values.values()), None)
        if argument.kind == "config":
            made = make_config(constructor)
        elif argument.kind in ("dataclass", "object"):
            after = {name: values.pop(name) for name in argument.set_after}
            try:
                made = getattr(module, argument.type_name)(**values)
            except Exception as error:
                raise CheckpointError(
                    f"{path}{line_in(error, path)}: {argument.type_name} cannot be built: {error_text(error)}"
                ) from None
            for name, value in after.items():
                setattr(made, name, value)
        elif argument.kind == "namespace":
            made = SimpleNamespace(**values)
        elif argument.kind == "dict":
            made = values
        if argument.keyword:
            named[argument.name] = made
        else:
            positional.append(made)
    try:
        with no_output():
            built = cls(*positional, **named)
    except BaseException as error:
        raise CheckpointError(
            f"{path}{line_in(error, path)}: {cls.__name__} cannot be built: {error_text(error)}"
        ) from None
    if not isinstance(built, nn.Module):
        raise CheckpointError(f"{path}: {cls.__name__} is not an nn.Module or PreTrainedModel: name a class of modules")
    if isinstance(built, PreTrainedModel) and not hasattr(built, "all_tied_weights_keys") and FIVE:
        raise CheckpointError(
            f"{path}: {cls.__name__} never calls self.post_init(): add it as the last line of __init__"
        )
    return built


def make_config(constructor: Constructor) -> Any:
    assert constructor.config_class is not None
    values = {f.name: f.value for f in constructor.fields}
    config = constructor.config_class(**constructor.config_values)
    for name, value in values.items():
        setattr(config, name, value)
    return config


def check_twice(first: nn.Module, second: nn.Module, name: str) -> None:
    """Check that the same arguments build the same module each time.

    Raises:
        CheckpointError: they do not.
    """
    one, two = describe(first), describe(second)
    if one == two:
        shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
        if shared:
            names = [n for n, p in first.named_parameters() if id(p) in shared]
            raise CheckpointError(
                f"{name}: two modules built from the same arguments share the parameter {names[0]}, so it is made outside of "
                "__init__: make it there"
            )
        return
    changed = sorted(n for n in {*one, *two} if one.get(n) != two.get(n))
    raise CheckpointError(
        f"{name} cannot be built twice from the same arguments: {changed[0]} is {one.get(changed[0], 'not there')} the first time "
        f"and {two.get(changed[0], 'not there')} the second: make what differs an argument of the constructor"
    )


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict.

    Raises:
        CheckpointError: an entry is not a tensor.
    """
    for name, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{type(module).__name__}: {name} in its state_dict is a {type(value).__name__} and not a tensor (get_extra_state), "
                "which safetensors cannot hold: make it a buffer, or an argument of the constructor"
            )
    return module.state_dict()


def describe(module: nn.Module) -> dict[str, str]:
    return {name: f"of shape {list(value.shape)}" for name, value in tensors_of(module).items()}


def check_shared(module: nn.Module) -> dict[str, str]:
    """Parameters shared between modules: tied name → the name it is tied to.

    Raises:
        CheckpointError: a module is registered twice, or inside itself.
    """
    _check_recursion(module, type(module).__name__)
    _check_hidden(module)
    modules: dict[int, str] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if id(part) in modules and next(part.parameters(), None) is not None:
            raise CheckpointError(
                f"{type(module).__name__}: {name} and {modules[id(part)]} are one module under two names, so its weights would be "
                "saved under one and missing under the other: register it once, and call it twice in forward"
            )
        modules.setdefault(id(part), name)
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            ties[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return ties


def _check_hidden(module: nn.Module) -> None:
    """Check that no parameters are in a Python list or dictionary, which no state_dict contains."""
    known = {id(parameter) for parameter in module.parameters()}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers", "_modules") or not isinstance(value, (list, tuple, dict)):
                continue
            for inner in value.values() if isinstance(value, dict) else value:
                held = [inner] if isinstance(inner, nn.Parameter) else []
                held += list(inner.parameters()) if isinstance(inner, nn.Module) else []
                if any(id(parameter) not in known for parameter in held):
                    kind = type(value).__name__
                    raise CheckpointError(
                        f"{type(module).__name__}: {f'{path}.{name}'.lstrip('.')} is a {kind} of parameters or modules, which no "
                        "checkpoint holds: make it an nn.ModuleList, nn.ModuleDict or nn.ParameterList"
                    )


def _check_recursion(module: nn.Module, name: str, above: tuple[int, ...] = ()) -> None:
    for child_name, child in module.named_children():
        if id(child) in (*above, id(module)):
            raise CheckpointError(
                f"{name}: {child_name} holds the module that it is part of: keep that out of the attributes of the module"
            )
        _check_recursion(child, name, (*above, id(module)))


def recorded_arguments(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """The constructor's arguments that a training checkpoint stores with the weights."""
    found: dict[str, Any] = {}
    for name in _TRAINED:
        value = checkpoint.extras.get(name) if checkpoint is not None else None
        value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        if isinstance(value, Mapping):
            found = {**value, **found}
    return found


def open_weights(path: str, section: str | None, allow_pickle: bool) -> Checkpoint:
    checkpoint = open_checkpoint(path, section=section, allow_pickle=allow_pickle)
    if checkpoint.part_of:
        raise CheckpointError(f"{path} is only a part of a model: {checkpoint.part_of}")
    if len(checkpoint.sections) > 1:
        raise CheckpointError(
            f"{path} holds several models ({', '.join(checkpoint.sections)}): name one with --section"
        )
    return checkpoint


def match_keys(module: nn.Module, checkpoint: Checkpoint, ties: Mapping[str, str], name: str) -> dict[str, str]:
    """Key of the module → key of the checkpoint; they differ at most by a prefix.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape.
    """
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    stored = list(checkpoint)
    best: dict[str, str] = {}
    for prefix in _prefixes(stored, wanted):
        named = {key: prefix + key for key in wanted if prefix + key in checkpoint.info}
        if len(named) > len(best):
            best = named
    for tied, target in ties.items():
        if tied not in best and target in best:
            best[tied] = best[target]
        elif target not in best and tied in best:
            best[target] = best[tied]
    missing = sorted(set(wanted) - set(best))
    unexpected = sorted(set(stored) - set(best.values()) - set(checkpoint.aliases))
    if missing or unexpected:
        what = [f"it lacks {_some(missing)}"] if missing else []
        what += [f"it has {_some(unexpected)}, which {name} does not have"] if unexpected else []
        raise CheckpointError(
            f"{checkpoint.path} is not a checkpoint of {name} as it was built: {'; '.join(what)}: check the class and --config"
        )
    for key, stored_key in sorted(best.items()):
        shape = tuple(checkpoint.info[stored_key].shape)
        if shape != wanted[key]:
            raise CheckpointError(
                f"{checkpoint.path}: {stored_key} has the shape {list(shape)}, but {name} was built with {list(wanted[key])}: "
                "give the constructor's arguments that it was trained with, --config NAME=VALUE"
            )
    return best


def _prefixes(stored: list[str], wanted: Mapping[str, Any]) -> list[str]:
    """Prefixes that may turn keys of the module into keys of the file, `""` first."""
    found = [""]
    for key in stored[:50]:
        for own in wanted:
            if key != own and key.endswith(own) and key[: -len(own)].endswith("."):
                found.append(key[: -len(own)])
    return list(dict.fromkeys(found))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load(module: nn.Module, checkpoint: Checkpoint, keys: Mapping[str, str]) -> set[torch.dtype]:
    """Load the weights in the checkpoint's dtype; returns the dtypes of its floating-point tensors."""
    tensors = {key: checkpoint[stored] for key, stored in keys.items()}
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(dtypes) == 1 and dtypes != {torch.float32}:
        module.to(next(iter(dtypes)))
    module.load_state_dict(tensors, strict=True)
    return dtypes

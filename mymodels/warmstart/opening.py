"""Open any source of `warm_start`: its tensors by name, and its config."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..checkpoints import Checkpoint, CheckpointError, TensorInfo, open_checkpoint
from ..checkpoints.nested_objects import nested_checkpoint
from ..checkpoints.opening import locate
from ..checkpoints.quantised import quantisation
from ..released import OwnCodeError, check_code, is_installed
from .adapter_sources import refuse_adapter
from .found_config import config_in_file, config_in_folder


class Opened(NamedTuple):
    """An opened source, before its names are mapped.

    Attributes:
        tensors: its tensors by name, read on access.
        where: its name in messages.
        folder: folder that may hold its tokenizer.
        module: the source itself, if it is a model.
        given: its config, as an argument or from `config.json`.
        beside: config fields stored in the checkpoint itself; `given` overrides them.
        usual: usual values of fields of its kind.
        own_code: a phrase for its custom code; empty if it has none.
        info: shape and dtype of every tensor.
    """

    tensors: Mapping[str, torch.Tensor]
    where: str
    folder: Path | None
    module: torch.nn.Module | None
    given: dict[str, Any]
    beside: Mapping[str, Any]
    usual: Mapping[str, Any]
    own_code: str
    info: dict[str, TensorInfo]

    @property
    def raw(self) -> dict[str, Any]:
        return {**self.beside, **self.given}


def open_tensors(
    source: Any,
    *,
    config: PretrainedConfig | Mapping[str, Any] | None = None,
    section: str | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> Opened:
    """Open a source; the arguments are `warm_start`'s.

    Raises:
        CheckpointError: it cannot be read, is quantised, an adapter, a part of a checkpoint, or has code of its own.
    """
    folder, raw, where, module = None, _as_dict(config), "the source", None
    own_code = ""
    beside: dict[str, Any] = {}  # config fields in the checkpoint itself
    if isinstance(source, torch.nn.Module):
        if type(source).__name__ in ("DataParallel", "DistributedDataParallel", "OptimizedModule"):
            source = getattr(source, "module", None) or getattr(source, "_orig_mod", source)
        own = getattr(source, "config", None)
        if isinstance(own, PretrainedConfig):
            raw = raw or {**own.to_dict(), "architectures": [type(source).__name__]}
        if isinstance(source, PreTrainedModel) and has_own_code(type(source)):
            own_code = f"a {type(source).__name__}"
        where, module = f"the {type(source).__name__}", source
        source = source.state_dict()
    elif isinstance(source, (str, os.PathLike)):
        where = str(source)
        path = locate(source, revision=revision, token=token)
        folder = path if path.is_dir() else path.parent
        if path.is_dir():
            refuse_adapter(where, (), folder)
        source = open_checkpoint(path, allow_pickle=allow_pickle)
    elif not isinstance(source, Mapping):
        raise CheckpointError(
            f"a {type(source).__name__} cannot be a source: pass a path, a Hub repo's id, a model or a state dict"
        )
    elif not isinstance(source, Checkpoint) and any(
        isinstance(value, Mapping) for value in source.values()
    ):  # a training checkpoint in memory
        source, folder = nested_checkpoint(Path(where), "training checkpoint", source, ""), Path(os.devnull)
    usual: Mapping[str, Any] = {}
    if isinstance(source, Checkpoint):
        where = str(source.path) if where == "the source" else where
        found = source.path if source.path.is_dir() else source.path.parent
        folder = folder or found
        source = source if section is None else source.section(section)
        if source.part_of:
            raise CheckpointError(source.part_of)  # which names the file
        if not raw and (raw := config_in_folder(folder)):
            own_code = _check_code(raw, folder, where, trust_remote_code)
        if "model_type" not in raw:
            beside, usual = config_in_file(source.extras)
    elif section is not None:
        raise CheckpointError(f"section={section!r} is for files, and {where} is not one: pass that part of it")
    given, raw = raw, {**beside, **raw}
    info = _describe(source, where)
    refuse_adapter(where, info)
    how = quantisation(info, raw)
    if how and "without scales" not in how:  # without scales, it is refused only if such a tensor is used
        raise CheckpointError(
            f"{where} is quantised: {how}; quantised weights are not supported: use the model that it was made "
            "from, or dequantise it with the library that quantised it and save the result"
        )
    return Opened(source, where, folder, module, given, beside, usual, own_code, info)


def _check_code(raw: Mapping[str, Any], folder: Path, where: str, trusted: bool) -> str:
    """A phrase for a folder's custom code, for the report; empty if it has none.

    Raises:
        CheckpointError: it has custom code, and is not trusted.
    """
    try:
        check_code(raw, folder, saved=True)
    except OwnCodeError as error:
        name = (raw.get("architectures") or ["model with code of its own"])[0]
        if trusted:
            return f"a {name} with code of its own"
        reason = str(error).replace(str(folder), where).partition(", and mymodels'")[0].partition(": load it by")[0]
        raise CheckpointError(
            f"{reason}, so its weights may mean something else here: read that code, then pass trust_remote_code=True "
            "(--trust-remote-code) if they mean the same"
        ) from None
    return ""


def has_own_code(cls: type) -> bool:
    """Whether a model's class is neither ours nor transformers' own."""
    return not is_installed(cls) and cls.__module__.split(".")[0] != "transformers"


def _as_dict(config: Any) -> dict[str, Any]:
    if config is None or isinstance(config, Mapping):
        return dict(config or {})
    if isinstance(config, PretrainedConfig):
        return config.to_dict()
    raise CheckpointError(f"config= is a {type(config).__name__}: pass the source's config, or its fields as a dict")


def _describe(source: Mapping[str, Any], where: str) -> dict[str, TensorInfo]:
    if isinstance(source, Checkpoint):
        return source.info
    info = {}
    for name, tensor in source.items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(name, str):
            raise CheckpointError(
                f"{where} holds a {type(tensor).__name__} at {name!r}, which is not a named tensor: pass the state dict"
            )
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{where}: tensor {name!r} is {tensor.layout}: make it dense, tensor.to_dense()")
        if tensor.is_meta:
            raise CheckpointError(f"{where}: tensor {name!r} is on the meta device and has no data: load the weights")
        info[name] = TensorInfo(tuple(tensor.shape), tensor.dtype, "")
    return info


def read_tensor(source: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """One tensor of a source."""
    return source[name].detach()

"""A source of weights in our terms: its tensors under our names, unfused, and its config as one of ours."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..checkpoints import Checkpoint, CheckpointError, TensorInfo, open_checkpoint
from ..checkpoints.opening import locate
from ..checkpoints.safetensors_files import read_json
from ..checkpoints.torch_files import nested_checkpoint
from ..released import OwnCodeError, check_code, is_installed
from .configs import source_config
from .names import Family, Renamed, family_of, plain, recognise, translate
from .values import Value, Why, constant

HEADS = {
    "mygpt2": ("lm_head.weight", "model.embed_tokens.weight"),
    "mybert": ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
}


@dataclass
class Source:
    """What is known of a source before its data is read."""

    where: str  # what to call it
    folder: Path | None  # where its tokenizer may be
    info: dict[str, TensorInfo]  # every tensor, under its own name
    family: Family
    config: PretrainedConfig  # as a config of ours
    raw_config: dict[str, Any]  # its `config.json`
    tensors: dict[str, Value]  # under our names
    why: dict[str, Why]  # its tensors that have no place in ours
    assumed: list[str]  # what had to be assumed


def open_source(
    source: Any,
    *,
    target: str,
    config: PretrainedConfig | Mapping[str, Any] | None = None,
    like: PretrainedConfig | None = None,
    section: str | None = None,
    rename: Mapping[str, str] | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Open whatever `warm_start` takes as its source; see there.

    Args:
        target: our model type that its architecture must be of.
        config: its config, where there is no `config.json` beside it.
        like: the target's config, which settles what the source does not say.
        trust_remote_code: read a folder with code of its own as if its weights meant what they mean in its family.

    Raises:
        CheckpointError: it cannot be read, is of another architecture, has code of its own, or two tensors of one name.
    """
    own = ""
    folder, raw, where = None, _as_dict(config), "the source"
    if isinstance(source, torch.nn.Module):
        if type(source).__name__ in ("DataParallel", "DistributedDataParallel", "OptimizedModule"):
            source = getattr(source, "module", None) or getattr(source, "_orig_mod", source)
        its_config = getattr(source, "config", None)
        if isinstance(its_config, PretrainedConfig):
            raw = raw or {**its_config.to_dict(), "architectures": [type(source).__name__]}
        if isinstance(source, PreTrainedModel) and has_own_code(type(source)):
            own = f"a {type(source).__name__}"
        where = f"the {type(source).__name__}"
        source = source.state_dict()
    elif isinstance(source, (str, os.PathLike)):
        where = str(source)
        path = locate(source, revision=revision, token=token)
        folder = path if path.is_dir() else path.parent
        source = open_checkpoint(path, allow_pickle=allow_pickle)
    elif not isinstance(source, Mapping):
        raise CheckpointError(
            f"a {type(source).__name__} is no source: pass a path, a Hub repo's id, a model or a state dict"
        )
    elif not isinstance(source, Checkpoint) and any(
        isinstance(value, Mapping) for value in source.values()
    ):  # a training checkpoint, loaded
        source, folder = nested_checkpoint(Path(where), "training checkpoint", source, ""), Path(os.devnull)
    if isinstance(source, Checkpoint):
        where = str(source.path) if where == "the source" else where
        found = source.path if source.path.is_dir() else source.path.parent
        folder = folder or found
        source = source if section is None else source.section(section)
        beside = folder / "config.json"
        if not raw and beside.is_file():
            raw = read_json(beside)
            own = _check_code(raw, folder, where, trust_remote_code)
    elif section is not None:
        raise CheckpointError(f"section={section!r} is for files, and {where} is none: pass that part of it")
    info = _describe(source, where)
    family, ours, unfit = _rename(source, info, raw, target, rename or {}, where)
    shapes = {name: value.shape for name, value in ours.items()}
    found_config, assumed = source_config(raw, shapes, family, like, where)
    if not {"tie_word_embeddings", "model_type"} & raw.keys():  # no whole config
        found_config.tie_word_embeddings = _is_tied(source, ours, family)
    if own:
        assumed.append(f"the source is {own}: its weights are read as {family.name}'s, which its own code may not do")
    return Source(where, folder, info, family, found_config, raw, ours, unfit, assumed)


def _check_code(raw: Mapping[str, Any], folder: Path, where: str, trusted: bool) -> str:
    """What a folder's own code makes of it, for the report; empty if it has none."""
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
                f"{where} holds a {type(tensor).__name__} at {name!r}, which is no tensor with a name: pass the state dict"
            )
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{where}: tensor {name!r} is {tensor.layout}: make it dense, tensor.to_dense()")
        if tensor.is_meta:
            raise CheckpointError(f"{where}: tensor {name!r} is on the meta device and has no data: load the weights")
        info[name] = TensorInfo(tuple(tensor.shape), tensor.dtype, "")
    return info


def _rename(
    source: Mapping[str, torch.Tensor],
    info: Mapping[str, TensorInfo],
    raw: Mapping[str, Any],
    target: str,
    rename: Mapping[str, str],
    where: str,
) -> tuple[Family, dict[str, Value], dict[str, Why]]:
    names: dict[str, str] = {}  # as the tables see them → as they are
    for name in info:
        seen = plain(name)
        for pattern, replacement in rename.items():
            try:
                seen = re.sub(pattern, replacement, seen)
            except (re.error, IndexError) as error:
                raise CheckpointError(
                    f"rename={{{pattern!r}: {replacement!r}}} is no regular expression: {error}"
                ) from None
        if seen in names:
            raise CheckpointError(
                f"{where}: {names[seen]!r} and {name!r} are both {seen!r} once wrappers are taken off and rename= is "
                "applied: name one with section=, or rename the other"
            )
        names[seen] = name
    model_type = raw.get("model_type")
    family = family_of(model_type)
    if family is None and isinstance(model_type, str) and not rename and raw.get("auto_map") is None:
        raise _wrong(where, model_type, target)
    if family is not None and family.target != target:
        raise _wrong(where, family.name, target)
    family, outer = recognise({seen: info[name].shape for seen, name in names.items()}, family, where)
    if family.target != target:
        raise _wrong(where, family.name, target)
    tied = raw.get("tie_word_embeddings", True)
    ours: dict[str, Value] = {}
    why: dict[str, Why] = {}
    # nanoGPT and its kin have stock GPT-2's names, but matrices as nn.Linear has them
    fused = next((info[name].shape for seen, name in names.items() if seen.endswith("attn.c_attn.weight")), ())
    linear = len(fused) == 2 and fused[0] == 3 * fused[1]
    for seen, renamed in translate(names, family, outer, tied=tied).items():
        name = names[seen]
        if renamed.why is not None:
            why[name] = renamed.why
            continue
        value = Value(info[name].shape, info[name].dtype, partial(_read, source, name), (name,))
        ours |= _unfuse(name, value, renamed, renamed.transposed and not linear)
    table = "bert.embeddings.position_embeddings.weight"
    if family.position_offset and table in ours:
        ours[table] = ours[table].rows("rows before position 0 cut", slice(family.position_offset, None))
    for name in family.zeros:
        if name not in ours and "bert.embeddings.word_embeddings.weight" in ours:
            width = ours["bert.embeddings.word_embeddings.weight"].shape[1]
            like = Value((2, width), torch.float32, torch.empty)
            ours[name] = constant((2, width), 0.0, like, f"zeros, as {family.name} has none")
    return family, ours, why


def _wrong(where: str, family: str, target: str) -> CheckpointError:
    fits = {"mygpt2": "GPT-2", "mybert": "BERT, RoBERTa or DistilBERT"}[target]
    other = {"mygpt2": "MyBert", "mybert": "MyGPT2"}[target]
    this = {"mygpt2": "MyGPT2", "mybert": "MyBert"}[target]
    known = family_of(family)
    hint = f"use it for {other}" if known and known.target != target else f"{this} starts from {fits} weights"
    return CheckpointError(f"{where} is a {family} checkpoint, and {this} has another architecture: {hint}")


def _read(source: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    return source[name].detach()


def _unfuse(name: str, value: Value, renamed: Renamed, transposed: bool) -> dict[str, Value]:
    if len(value.shape) == 3 and value.shape[0] == 1:  # TensorFlow's GPT-2 has convolutions of width 1
        value = value.then("", lambda tensor: tensor[0], value.shape[1:])
    if transposed:
        value = value.then("transposed", torch.t, value.shape[::-1])
    parts = len(renamed.ours)
    if parts == 1:
        return {renamed.ours[0]: value}
    if not value.shape or value.shape[0] % parts:
        raise CheckpointError(f"tensor {name!r} of shape {value.shape} cannot be split into {parts}: it is damaged")
    step = value.shape[0] // parts
    return {
        ours: value.rows(f"split in {parts}", slice(i * step, (i + 1) * step), resized=False)
        for i, ours in enumerate(renamed.ours)
    }


def _is_tied(source: Mapping[str, torch.Tensor], ours: Mapping[str, Value], family: Family) -> bool:
    """Whether a source that does not say it has one matrix for embeddings and head."""
    head, embeddings = (ours.get(name) for name in HEADS[family.target])
    if head is None or embeddings is None or head.shape != embeddings.shape:
        return head is None
    return torch.equal(head.compute(), embeddings.compute())

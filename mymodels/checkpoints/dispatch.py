"""Load any checkpoint into a state dict or a model, on any devices; accelerate chooses them and moves data."""

import os
import re
import warnings
from collections.abc import Collection, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory, offload_weight, save_offload_index, set_module_tensor_to_device
from tqdm import tqdm
from transformers import PreTrainedModel

from .checkpoint import Checkpoint, CheckpointError, resolve_dtype
from .opening import open_checkpoint
from .quantised import config_beside, quantisation

Device = int | str | torch.device


def load_state_dict(
    path: str | os.PathLike | Checkpoint, *, device: Device = "cpu", dtype: str | torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Read a checkpoint, saved on any device, into a state dict on `device`; tied tensors stay tied.

    Args:
        path: what `open_checkpoint` opens or returns.
        device: where the tensors go: `"cpu"`, `"cuda"`, `"cuda:1"`, `1`, `"mps"`, `"meta"` (shapes only), …
        dtype: what floating-point tensors are converted to, or its name; None and `"auto"` keep them.

    Raises:
        CheckpointError: the checkpoint cannot be read, is only a part of a model, or this machine has no such device.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    if checkpoint.part_of:
        raise CheckpointError(checkpoint.part_of)
    place, dtype = _available(device, ""), resolve_dtype(dtype)
    state_dict: dict[str, torch.Tensor] = {}
    stored = [name for name in checkpoint if name not in checkpoint.aliases]
    for name in tqdm(stored, desc="loading", unit="tensor", disable=None):
        kind = _cast(checkpoint.info[name].dtype, dtype)
        if place.type == "meta":
            state_dict[name] = torch.empty(checkpoint.info[name].shape, dtype=kind, device="meta")
        else:
            value = checkpoint[name]
            state_dict[name] = value.to(place, kind, copy=checkpoint is path)
    state_dict |= {alias: state_dict[name] for alias, name in checkpoint.aliases.items()}
    return {name: state_dict[name] for name in checkpoint}


def load_checkpoint_and_dispatch(
    model: torch.nn.Module,
    checkpoint: str | os.PathLike | Checkpoint,
    device_map: str | Device | Mapping[str, Device] | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    no_split_module_classes: list[str] | None = None,
    offload_folder: str | os.PathLike | None = None,
    *,
    offload_buffers: bool = False,
    dtype: str | torch.dtype | None = None,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    force_hooks: bool = False,
    strict: bool = True,
    output_loading_info: bool = False,
) -> Any:
    """accelerate's function of this name, for every format `open_checkpoint` reads, one tensor at a time.

    Unlike accelerate's function it is strict by default. Parts of names that wrappers add (`module.`, `_orig_mod.`, …)
    are removed.

    Args:
        model: may be on the meta device (`accelerate.init_empty_weights`), which halves the memory needed.
        checkpoint: what `open_checkpoint` opens or returns; its names are the model's.
        device_map: None keeps the model's device (for meta: the CPU); a device is used for the complete model;
            `"auto"`, `"balanced"`, `"balanced_low_0"`, `"sequential"` let accelerate place the modules; or a dict of
            module name → device, `"cpu"` or `"disk"`.
        max_memory: device → bytes or text like `"1GB"`, for the automatic maps.
        no_split_module_classes: names of module classes that stay on one device; default: those the model declares.
        offload_folder: folder for modules placed on `"disk"`.
        dtype: what floating-point tensors are converted to, or its name; None and `"auto"` keep the checkpoint's.
        offload_buffers, skip_keys, preload_module_classes, force_hooks: as for `accelerate.dispatch_model`.
        strict: whether missing and unexpected names and mismatched shapes are errors. If false, a warning lists what was
            not loaded.
        output_loading_info: also return the loading info, as transformers' `from_pretrained` does.

    Returns:
        the model, with accelerate's hooks if it is on several devices; with `output_loading_info`, `(model, info)`, where
        `info` has the lists `missing_keys`, `unexpected_keys` and `mismatched_keys`.

    Raises:
        CheckpointError: names, shapes or kinds of dtypes do not fit, nothing would be loaded, the checkpoint is
            quantised, this machine has no such device, or `offload_folder` is missing; the model is not changed.

    Examples:
        >>> with accelerate.init_empty_weights():
        ...     model = MyGPT2ForCausalLM(config)
        >>> model = load_checkpoint_and_dispatch(model, "old/model.onnx", device_map="auto")
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    dtype = resolve_dtype(dtype)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    source = without_wrappers(opened, model.state_dict())
    loading_info = _compare(model, source, strict)
    places = resolve_device_map(model, device_map, max_memory, no_split_module_classes, dtype)
    if "disk" in places.values() and offload_folder is None:
        names = ", ".join(name or "the model" for name, place in places.items() if place == "disk")
        raise CheckpointError(f"the device map places {names} on disk: pass offload_folder=")
    groups = list(_tied_groups(model).values())
    placed = {name: _place(name, places) for names in groups for name in names}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    offloaded: dict[str, dict] = {}
    for names in tqdm(groups, desc="loading", unit="tensor", disable=None):
        stored = next((name for name in names if name in source and name not in loading_info["mismatched_keys"]), None)
        if stored is None:
            continue  # only if not strict
        kind = _cast(source.info[stored].dtype, dtype)
        value = source[stored].to(dtype=kind)
        if opened is checkpoint:  # the caller may read it again, so it must not share memory with the model
            value = value.clone()
        homes: dict[Device, str] = {}
        for name in names:
            place = "cpu" if name in buffers and placed[name] == "disk" and not offload_buffers else placed[name]
            if place == "disk":
                Path(str(offload_folder)).mkdir(parents=True, exist_ok=True)
                offload_weight(value, name, str(offload_folder), index=offloaded)
                set_module_tensor_to_device(model, name, "meta")
            elif homes.setdefault(place, name) == name:
                set_module_tensor_to_device(model, name, place, value=value, dtype=kind)
            else:
                module, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(module), attribute, attrgetter(homes[place])(model))
    if offloaded:
        save_offload_index(offloaded, str(offload_folder))
    if force_hooks or len(set(places.values())) > 1 or "disk" in places.values():
        model = dispatch_model(
            model,
            places,
            offload_dir=offload_folder,
            offload_buffers=offload_buffers,
            skip_keys=skip_keys or getattr(model, "_skip_keys_device_placement", None),
            preload_module_classes=preload_module_classes,
            force_hooks=True,
        )
    else:
        for name, buffer in model.named_buffers():
            if name not in source and not buffer.is_meta:  # not saved, such as position ids
                set_module_tensor_to_device(model, name, placed[name], value=buffer)
    return (model, loading_info) if output_loading_info else model


def load_in_place(
    model: torch.nn.Module, checkpoint: str | os.PathLike | Checkpoint, *, strict: bool = True
) -> dict[str, list[str]]:
    """Copy a checkpoint into the existing tensors of a model, so that an existing optimizer keeps its parameters.

    Returns:
        the loading info of `load_checkpoint_and_dispatch`: three lists, which are empty if `strict`.

    Raises:
        CheckpointError: names or shapes do not fit; the model is not changed.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    source = without_wrappers(source, model.state_dict())
    loading_info = _compare(model, source, strict)
    for names in tqdm(list(_tied_groups(model).values()), desc="loading", unit="tensor", leave=False, disable=None):
        stored = next((name for name in names if name in source and name not in loading_info["mismatched_keys"]), None)
        if stored is not None:  # else a buffer that is not saved, or not strict
            attrgetter(stored)(model).detach().copy_(source[stored])
    return loading_info


# Parts of names added by DataParallel, torch.compile, FSDP, activation checkpointing and DeepSpeed.
_WRAPPERS = re.compile(
    r"^(?:module\.)+|(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_forward_module|_checkpoint_wrapped_module)\."
)


def without_wrapper(name: str) -> str:
    """A tensor's name without the parts that wrappers add."""
    while (shorter := _WRAPPERS.sub("", name)) != name:
        name = shorter
    return name


def without_wrappers(checkpoint: Checkpoint, wanted: Collection[str]) -> Checkpoint:
    """The checkpoint with `without_wrapper` applied to its names, if more of them are in `wanted` then."""
    names = {without_wrapper(name): name for name in checkpoint}
    if len(names) < len(checkpoint) or sum(name in wanted for name in names) <= sum(
        name in wanted for name in checkpoint
    ):
        return checkpoint
    aliases = {without_wrapper(alias): without_wrapper(name) for alias, name in checkpoint.aliases.items()}
    info = {name: checkpoint.info[full] for name, full in names.items()}
    return Checkpoint(
        checkpoint.path,
        checkpoint.format,
        info,
        lambda name: checkpoint[names[name]],
        aliases=aliases,
        part_of=checkpoint.part_of,
    )


def resolve_device_map(
    model: torch.nn.Module,
    device_map: str | Device | Mapping[str, Device] | None,
    max_memory: dict[int | str, int | str] | None = None,
    no_split_module_classes: list[str] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Device]:
    """Module name → device for any `device_map` that `load_checkpoint_and_dispatch` takes; `""` is the complete model."""
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        unsplit = no_split_module_classes or list(getattr(model, "_no_split_modules", None) or [])
        if device_map != "sequential" and max_memory is None:
            low = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, None, unsplit, dtype=dtype, low_zero=low)
        places = infer_auto_device_map(model, max_memory, no_split_module_classes=unsplit, dtype=dtype)
    elif isinstance(device_map, Mapping):
        places = dict(device_map)
    elif device_map is None:
        now = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        places = {"": "cpu" if now.type == "meta" else now}
    else:
        places = {"": device_map}
    return {name: place if place == "disk" else _available(place, name) for name, place in places.items()}


def _available(device: Device, module: str) -> torch.device:
    try:
        place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError:
        raise CheckpointError(
            f"{device!r} is not a device: use cpu, cuda, cuda:1, mps, meta or, in a map, disk"
        ) from None
    counts = {"cuda": torch.cuda.device_count, "mps": lambda: int(torch.backends.mps.is_available())}
    if place.type in counts and (place.index or 0) >= counts[place.type]():
        what = f"module {module!r}" if module else "the weights"
        raise CheckpointError(
            f"{what} cannot be placed on {place}, which this machine does not have: choose cpu or disk"
        )
    return place


def _cast(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and stored.is_floating_point else stored


def _place(name: str, places: Mapping[str, Device]) -> Device:
    module = name
    while module and module not in places:
        module = module.rpartition(".")[0]
    if module not in places:
        raise CheckpointError(f"the device map has no entry for {name!r}: add its module, or '' for all other modules")
    return places[module]


def _compare(model: torch.nn.Module, source: Checkpoint, strict: bool) -> dict[str, list[str]]:
    """Missing, unexpected and mismatched names.

    Raises:
        CheckpointError: there are some and `strict` is true, nothing would be loaded, or dtypes do not fit.
    """
    wanted = model.state_dict()
    groups = [names for names in _tied_groups(model).values() if names[0] in wanted]
    missing = [names[0] for names in groups if not any(name in source for name in names)]
    extra = [name for name in source if name not in wanted]
    shapes = [name for name in source if name in wanted and tuple(wanted[name].shape) != source.info[name].shape]
    if groups and len(extra) + len(shapes) == len(source):
        raise CheckpointError(
            f"{source.path}: none of its {len(source)} tensors would be loaded: its first is {next(iter(source), '')!r}, the "
            f"model's {groups[0][0]!r}; rename them, or choose another section of the file, or another model"
        )
    if source.part_of:
        raise CheckpointError(source.part_of)
    if not quantisation(wanted):
        _refuse_quantised(source)
    for name in source:
        if (
            name in wanted
            and name not in shapes
            and _number_kind(wanted[name].dtype) != _number_kind(source.info[name].dtype)
        ):
            raise CheckpointError(
                f"{source.path}: tensor {name!r} is {source.info[name].dtype_name}, but {wanted[name].dtype} in the model, "
                f"which cannot store it: build the model with that dtype, or convert the tensor first"
            )
    if shapes and strict:
        name = shapes[0]
        raise CheckpointError(
            f"{source.path}: {len(shapes)} tensors do not fit the model, the first is {name!r} of shape "
            f"{source.info[name].shape} for {tuple(wanted[name].shape)}: build the model from the checkpoint's config, or "
            f"pass strict=False to leave them out"
        )
    if strict:
        _check_ties(groups, source)
    if strict and (missing or extra):
        raise CheckpointError(
            f"{source.path}: {len(missing)} tensors of the model are missing and {len(extra)} are unexpected, such as "
            f"{', '.join(map(repr, (missing[:2] + extra[:2])))}: see `mymodels inspect`, or pass strict=False"
        )
    lacking = {"missing": missing, "of another shape": shapes}
    if any(lacking.values()):
        shown = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            for what, names in (lacking | {"unexpected": extra}).items()
            if names
        )
        warnings.warn(
            f"{source.path} was loaded only partly, the other tensors of the model keep their values: {shown}",
            stacklevel=3,
        )
    return {"missing_keys": missing, "unexpected_keys": extra, "mismatched_keys": shapes}


def _refuse_quantised(source: Checkpoint) -> None:
    """Raise if the tensors, or the `config.json` beside them, show that the weights are quantised."""
    if source.format.startswith("GGUF"):  # read dequantised
        return
    config = config_beside(source)
    stored, declared = quantisation(source), quantisation(source, config)
    if stored or declared:
        remedy = "" if stored else ", or remove quantization_config from config.json if the weights are plain numbers"
        raise CheckpointError(
            f"{source.path} is quantised, {stored or declared}: its values are not weights without their scales; load it with "
            f"from_pretrained and the quantiser's package, or dequantise it first{remedy}"
        )


def _number_kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else "integer"


def _check_ties(groups: list[list[str]], source: Checkpoint) -> None:
    """Raise if the model ties tensors that differ in the checkpoint: one of them would be lost."""
    for names in groups:
        stored = [name for name in names if name in source and name not in source.aliases]
        if any(not torch.equal(source[stored[0]], source[name]) for name in stored[1:]):
            raise CheckpointError(
                f"{source.path}: {' and '.join(map(repr, stored))} differ, but are tied in the model: build it untied "
                f"(tie_word_embeddings=False), or pass strict=False to take the first"
            )


def _tied_groups(model: torch.nn.Module) -> dict[int, list[str]]:
    """The names of each parameter and buffer, by identity: tied ones have several."""
    groups: dict[int, list[str]] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        groups.setdefault(id(tensor), []).append(name)
    return groups

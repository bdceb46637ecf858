"""Weights onto devices: any checkpoint into a state dict or a model; accelerate decides places and moves data."""

import os
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory, offload_weight, save_offload_index, set_module_tensor_to_device
from tqdm import tqdm
from transformers import PreTrainedModel

from .checkpoint import Checkpoint, CheckpointError, resolve_dtype
from .opening import open_checkpoint

Device = int | str | torch.device


def load_state_dict(
    path: str | os.PathLike | Checkpoint, *, device: Device = "cpu", dtype: str | torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Read a whole checkpoint, saved on whatever device, into a state dict on `device`; tied tensors stay tied.

    Args:
        path: what `open_checkpoint` opens, or has opened.
        device: where the tensors go: `"cpu"`, `"cuda"`, `"cuda:1"`, `1`, `"mps"`, `"meta"` (shapes only), …
        dtype: what floating-point tensors are converted to, or its name; None and `"auto"` keep them.

    Raises:
        CheckpointError: the checkpoint cannot be read, or this machine has no such device.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
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
) -> torch.nn.Module:
    """accelerate's function of this name, for every format `open_checkpoint` reads, one tensor at a time.

    Unlike accelerate's it is strict unless told otherwise.

    Args:
        model: may be on the meta device (`accelerate.init_empty_weights`), so that it is never in memory twice.
        checkpoint: what `open_checkpoint` opens, or has opened; its names are the model's.
        device_map: None puts everything where the model is (from meta: on the CPU); a device, all of it there;
            `"auto"`, `"balanced"`, `"balanced_low_0"`, `"sequential"` let accelerate place the modules; or a dict of
            module name → device, `"cpu"` or `"disk"`.
        max_memory: device → bytes or text like `"1GB"`, for the automatic maps.
        no_split_module_classes: names of module classes that stay on one device; default: what the model declares.
        offload_folder: where modules placed on `"disk"` go.
        dtype: what floating-point tensors are converted to, or its name; None and `"auto"` keep the checkpoint's.
        offload_buffers, skip_keys, preload_module_classes, force_hooks: as for `accelerate.dispatch_model`.
        strict: whether names that are missing or left over are an error.

    Returns:
        the model, with accelerate's hooks if it is on several devices.

    Raises:
        CheckpointError: names or shapes do not fit, this machine has no such device, or no folder for `"disk"` is given;
            the model is not changed.

    Example:
        >>> with accelerate.init_empty_weights():
        ...     model = MyGPT2ForCausalLM(config)
        >>> model = load_checkpoint_and_dispatch(model, "old/model.onnx", device_map="auto")
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    dtype = resolve_dtype(dtype)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    _compare(model, source, strict)
    places = resolve_device_map(model, device_map, max_memory, no_split_module_classes, dtype)
    if "disk" in places.values() and offload_folder is None:
        names = ", ".join(name or "the model" for name, place in places.items() if place == "disk")
        raise CheckpointError(f"the device map places {names} on disk: pass offload_folder, a folder for it")
    groups = list(_tied_groups(model).values())
    placed = {name: _place(name, places) for names in groups for name in names}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    offloaded: dict[str, dict] = {}
    for names in tqdm(groups, desc="loading", unit="tensor", disable=None):
        stored = next((name for name in names if name in source), None)
        if stored is None:
            continue  # only if not strict
        kind = _cast(source.info[stored].dtype, dtype)
        value = source[stored].to(dtype=kind)
        if source is checkpoint:  # it may be read again, and must not change with the model
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
        return dispatch_model(
            model,
            places,
            offload_dir=offload_folder,
            offload_buffers=offload_buffers,
            skip_keys=skip_keys or getattr(model, "_skip_keys_device_placement", None),
            preload_module_classes=preload_module_classes,
            force_hooks=True,
        )
    for name, buffer in model.named_buffers():
        if name not in source and not buffer.is_meta:  # not saved, such as position ids
            set_module_tensor_to_device(model, name, placed[name], value=buffer)
    return model


def load_in_place(model: torch.nn.Module, checkpoint: str | os.PathLike | Checkpoint) -> None:
    """Copy a checkpoint into the very tensors a model has, on their devices, so that an optimizer made before keeps them.

    Raises:
        CheckpointError: names or shapes do not fit; the model is not changed.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    _compare(model, source, strict=True)
    for names in tqdm(list(_tied_groups(model).values()), desc="loading", unit="tensor", leave=False, disable=None):
        stored = next((name for name in names if name in source), None)
        if stored is not None:  # else a buffer that is not saved
            attrgetter(stored)(model).detach().copy_(source[stored])


def resolve_device_map(
    model: torch.nn.Module,
    device_map: str | Device | Mapping[str, Device] | None,
    max_memory: dict[int | str, int | str] | None = None,
    no_split_module_classes: list[str] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Device]:
    """Module name → device for any `device_map` that `load_checkpoint_and_dispatch` takes; `""` is the whole model."""
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        whole = no_split_module_classes or list(getattr(model, "_no_split_modules", None) or [])
        if device_map != "sequential" and max_memory is None:
            low = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, None, whole, dtype=dtype, low_zero=low)
        places = infer_auto_device_map(model, max_memory, no_split_module_classes=whole, dtype=dtype)
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
        raise CheckpointError(f"{device!r} is no device: use cpu, cuda, cuda:1, mps, meta or, in a map, disk") from None
    counts = {"cuda": torch.cuda.device_count, "mps": lambda: int(torch.backends.mps.is_available())}
    if place.type in counts and (place.index or 0) >= counts[place.type]():
        what = f"module {module!r}" if module else "the weights"
        raise CheckpointError(f"{what} should go to {place}, which this machine does not have: choose cpu or disk")
    return place


def _cast(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and stored.is_floating_point else stored


def _place(name: str, places: Mapping[str, Device]) -> Device:
    module = name
    while module and module not in places:
        module = module.rpartition(".")[0]
    if module not in places:
        raise CheckpointError(f"the device map has no place for {name!r}: add the module, or '' for all the rest")
    return places[module]


def _compare(model: torch.nn.Module, source: Checkpoint, strict: bool) -> None:
    wanted = model.state_dict()
    groups = [names for names in _tied_groups(model).values() if names[0] in wanted]
    missing = [names[0] for names in groups if not any(name in source for name in names)]
    extra = [name for name in source if name not in wanted]
    shapes = [name for name in source if name in wanted and tuple(wanted[name].shape) != source.info[name].shape]
    if shapes:
        name = shapes[0]
        raise CheckpointError(
            f"{source.path}: {len(shapes)} tensors do not fit the model, the first is {name!r} of shape "
            f"{source.info[name].shape} for {tuple(wanted[name].shape)}: build the model from the checkpoint's config"
        )
    if strict:
        _check_ties(groups, source)
    if strict and (missing or extra):
        raise CheckpointError(
            f"{source.path}: {len(missing)} tensors of the model are missing and {len(extra)} are left over, such as "
            f"{', '.join(map(repr, (missing[:2] + extra[:2])))}: see `mymodels inspect`, or pass strict=False"
        )


def _check_ties(groups: list[list[str]], source: Checkpoint) -> None:
    """A model that ties what the checkpoint has apart would lose one of the two."""
    for names in groups:
        stored = [name for name in names if name in source and name not in source.aliases]
        if any(not torch.equal(source[stored[0]], source[name]) for name in stored[1:]):
            raise CheckpointError(
                f"{source.path}: {' and '.join(map(repr, stored))} differ, but are one tensor in the model: build it untied "
                f"(tie_word_embeddings=False), or pass strict=False to take the first"
            )


def _tied_groups(model: torch.nn.Module) -> dict[int, list[str]]:
    """The names of each parameter and buffer; those of a tied one stand together."""
    groups: dict[int, list[str]] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        groups.setdefault(id(tensor), []).append(name)
    return groups

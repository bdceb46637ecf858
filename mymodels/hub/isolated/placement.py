"""Stage: build the model on the meta device, and load it with some of its blocks offloaded to disk."""

import inspect
import re
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .comparing import QUANTISED, difference, unpadded_outputs
from .golden_outputs import read_inputs
from .load_repo import build, config_of, load

INT8 = "mymodels-int8"  # the quantisation method of `mymodels.quantize`


def run(job: dict[str, Any], events: Any) -> None:
    name = job["classes"][0]
    with events.check("meta", name) as check:
        with torch.device("meta"):
            skeleton = build(name, config_of(job))
        real = [n for n, parameter in skeleton.named_parameters() if not parameter.is_meta]
        own = [n for n in real if not _is_library_parameter(skeleton, n)]
        if own:
            check.fail(f"{len(own)} parameters have data under torch.device('meta'), the first is {own[0]}")
        elif real:
            check.warn(
                f"{real[0]} has data under torch.device('meta'); the library's code creates it, not the folder's"
            )
    if check.failed:
        return
    with events.check("no split", name) as check:
        check_no_split(check, job, skeleton)
    expected = Path(job["scratch"], "outputs.safetensors")
    with events.check("device map", name) as check:
        if not expected.exists():
            check.skip("forward was not run, so there are no outputs to compare with")
            return
        device_map = half_on_disk(skeleton)
        if "disk" not in device_map.values():
            check.not_applicable("the model has no list of blocks to split")
            return
        model, _ = load(job, name, device_map=device_map, offload_folder=f"{job['scratch']}/offload")
        quantised = getattr(model, "is_quantized", False)
        if quantised and getattr(model, "quantization_method", None) != INT8:
            check.skip("the model is quantised, and a state that is rounded to another step changes the outputs")
            return
        try:
            seen = unpadded_outputs(model, read_inputs(job))
        except (RuntimeError, AssertionError) as error:
            reader = attention_without_weights(error, model, device_map)
            if not reader:
                raise
            what = f"{reader} is an nn.MultiheadAttention, which reads the weights of its parts past accelerate's hooks"
            check.warn(f"{what}: no weights of this model can be kept on the disk")
            return
        check.fail_if(difference(seen, load_file(expected), QUANTISED if quantised else None))


# what torch says of a weight that accelerate has not brought in: plainly, and with rows of unequal length
_NO_DATA = re.compile(r"\bdevice meta\b|\bmeta tensors?\b|fast path was not hit because .*device")


def attention_without_weights(error: BaseException, model: torch.nn.Module, device_map: dict[str, str]) -> str:
    """The `nn.MultiheadAttention` on the disk that raised because its weights have no data; empty for other errors."""
    if not _NO_DATA.search(str(error)):
        return ""
    on_disk = {
        id(part): name
        for path, place in device_map.items()
        if place == "disk"
        for name, part in model.get_submodule(path).named_modules(prefix=path)
        if isinstance(part, torch.nn.MultiheadAttention)
    }
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.TransformerEncoderLayer):  # its fast path reads them too
            owner = owner.self_attn
        if id(owner) in on_disk:
            return on_disk[id(owner)]
    return ""


def _is_library_parameter(model: torch.nn.Module, name: str) -> bool:
    """Whether the class that makes a parameter is one of transformers or torch."""
    path, _, attribute = name.rpartition(".")
    for klass in type(model.get_submodule(path)).__mro__:
        try:
            makes = attribute in inspect.getsource(klass.__dict__["__init__"])
        except (KeyError, OSError, TypeError):
            continue
        if makes:
            return klass.__module__.split(".")[0] in ("transformers", "torch")
    return False


def check_no_split(check: Any, job: dict[str, Any], skeleton: torch.nn.Module) -> None:
    """At least one class of `_no_split_modules`, which a device map keeps on one device, is in the model."""
    wanted = getattr(skeleton, "_no_split_modules", None)
    wanted = [wanted] if isinstance(wanted, str) else sorted(map(str, wanted or []))
    there = {type(module).__name__ for module in skeleton.modules()}
    if wanted and not there & set(wanted):
        what = f"_no_split_modules names {', '.join(wanted)}, but the model has no module of these classes"
        check.fail(what) if job["auto_map"] else check.warn(what)
    elif not wanted:
        check.not_applicable("the class has no _no_split_modules")


def half_on_disk(skeleton: torch.nn.Module) -> dict[str, str]:
    """A device map with the second half of each list of blocks on disk and all else on the CPU."""
    on_disk: set[str] = set()
    for path, module in skeleton.named_modules():
        if isinstance(module, torch.nn.ModuleList) and not any(f"{path}.".startswith(f"{done}.") for done in on_disk):
            on_disk.update(f"{path}.{number}" for number in range(len(module) // 2, len(module)))
    device_map: dict[str, str] = {}

    def assign(path: str, module: torch.nn.Module) -> None:
        inner = f"{path}." if path else ""
        if path in on_disk or not any(name.startswith(inner) for name in on_disk):
            device_map[path] = "disk" if path in on_disk else "cpu"
            return
        for name, child in module.named_children():
            assign(f"{inner}{name}", child)
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            device_map[f"{inner}{name}"] = "cpu"

    assign("", skeleton)
    return device_map

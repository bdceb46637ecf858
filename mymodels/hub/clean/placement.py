"""Stage: build the model on the meta device, and load it with a part of it kept on the disk."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .golden_outputs import read_inputs
from .inputs import difference, make_inputs, shown_outputs
from .loading import build, config_of, load


def run(job: dict[str, Any], events: Any) -> None:
    name = job["classes"][0]
    with events.check("meta", name) as check:
        with torch.device("meta"):
            skeleton = build(name, config_of(job))
        real = [n for n, parameter in skeleton.named_parameters() if not parameter.is_meta]
        if real:
            check.fail(f"{len(real)} parameters have data under torch.device('meta'), the first is {real[0]}")
    if check.failed:
        return
    expected = Path(job["scratch"], "outputs.safetensors")
    with events.check("device map", name) as check:
        if not expected.exists():
            check.skip("no outputs to compare with")
            return
        device_map = half_on_disk(skeleton)
        if "disk" not in device_map.values():
            check.skip("the model has no list of blocks to split")
            return
        model, _ = load(job, name, device_map=device_map, offload_folder=f"{job['scratch']}/offload")
        seen = shown_outputs(model, read_inputs(job) or make_inputs(model))
        check.fail_if(difference(seen, load_file(expected)))


def half_on_disk(skeleton: torch.nn.Module) -> dict[str, str]:
    """A device map with the later half of the blocks on the disk; what is tied stays together."""
    on_disk: set[str] = set()
    for path, module in skeleton.named_modules():
        if isinstance(module, torch.nn.ModuleList) and not any(f"{path}.".startswith(f"{done}.") for done in on_disk):
            on_disk.update(f"{path}.{number}" for number in range(len(module) // 2, len(module)))
    device_map: dict[str, str] = {}

    def cover(path: str, module: torch.nn.Module) -> None:
        inner = f"{path}." if path else ""
        if path in on_disk or not any(name.startswith(inner) for name in on_disk):
            device_map[path] = "disk" if path in on_disk else "cpu"
            return
        for name, child in module.named_children():
            cover(f"{inner}{name}", child)
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            device_map[f"{inner}{name}"] = "cpu"

    cover("", skeleton)
    return device_map

"""Stage: build the model on the meta device, and load it with a part of it kept on the disk."""

from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes
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
        model, _ = load(job, name, device_map=device_map, offload_folder=f"{job['scratch']}/offload")
        seen = shown_outputs(model, read_inputs(job) or make_inputs(model))
        check.fail_if(difference(seen, load_file(expected)))


def half_on_disk(skeleton: torch.nn.Module) -> dict[str, str]:
    """A device map with about half of the model on the disk, whole blocks together."""
    skeleton.tie_weights()  # type: ignore[operator]
    keep = list(getattr(skeleton, "_no_split_modules", None) or [])
    total = compute_module_sizes(skeleton)[""]
    device_map = infer_auto_device_map(skeleton, max_memory={"cpu": total // 2}, no_split_module_classes=keep)
    if set(device_map.values()) != {"cpu", "disk"}:
        names = list(dict(skeleton.named_children()))
        device_map = dict.fromkeys(names, "cpu") | {names[-1]: "disk"}
    return device_map

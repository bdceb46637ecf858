"""The number of parameters of a quantised checkpoint, from the shapes of its packed tensors."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .checkpoint import Checkpoint, CheckpointError

# Last parts of the names of tensors that quantisers store with packed weights, and that are not parameters.
_AUXILIARY = {
    *("qzeros", "scales", "g_idx", "SCB", "weight_format", "absmax", "quant_map", "nested_absmax", "nested_quant_map"),
    *("weight_scale", "weight_scale_inv", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale"),
}
_STATE = ".quant_state.bitsandbytes__"


class Packed(NamedTuple):
    """The quantised weights of a checkpoint."""

    modules: dict[str, int]  # module → number of parameters, unpacked
    beside: set[str]  # names of tensors that are not parameters
    packed: set[str]  # names of tensors that `modules` counts
    bits: list[int]  # the bit widths that were found


def packed_weights(checkpoint: Checkpoint, config: Mapping[str, Any] | None = None) -> Packed | None:
    """The packed weights of a GPTQ, AWQ or bitsandbytes checkpoint; None if it has none of them.

    For GPTQ and AWQ only shapes are used: those of the scales and of the packed rows or columns. The shape of a 4-bit
    weight of bitsandbytes is in its small `quant_state`, which is read.

    Raises:
        CheckpointError: a `quant_state` is damaged.
    """
    tensors: dict[str, set[str]] = defaultdict(set)
    for name in checkpoint.info:
        module, _, last = name.rpartition(".")
        tensors[module].add(last)
    details = (config or {}).get("quantization_config") or {}
    bits = details.get("bits") or details.get("w_bit")
    found = Packed({}, set(), set(), [])
    for module, names in tensors.items():
        prefix = f"{module}." if module else ""
        if {"qweight", "scales"} <= names:
            rows, columns = checkpoint.info[f"{prefix}qweight"].shape
            outputs = checkpoint.info[f"{prefix}scales"].shape[-1]
            if columns == outputs:  # GPTQ packs rows; its index has one number for each input
                if "g_idx" in names:
                    inputs = checkpoint.info[f"{prefix}g_idx"].numel
                else:  # the zero points are packed with as many bits, along the outputs
                    zeros = (
                        checkpoint.info[f"{prefix}qzeros"].shape[-1] * 32 // outputs
                        if "qzeros" in names and outputs
                        else 0
                    )
                    inputs = rows * 32 // (bits or zeros) if bits or zeros else 0
                width = rows * 32 // inputs if inputs else 0
            else:  # AWQ packs columns
                inputs, width = rows, columns * 32 // outputs if outputs else 0
            _record(found, prefix, "qweight", names, inputs * outputs, width)
        elif {"weight", "SCB"} <= names and checkpoint.info[f"{prefix}weight"].dtype == torch.int8:
            _record(found, prefix, "weight", names, checkpoint.info[f"{prefix}weight"].numel, 8)
    for name in checkpoint.info:
        weight, marked, _ = name.partition(_STATE)
        if marked and weight in checkpoint.info:
            found.modules[weight.rpartition(".")[0]] = math.prod(_unpacked_shape(checkpoint, name))
            found.packed.add(weight)
            found.beside.update(one for one in checkpoint.info if one.startswith(f"{weight}."))
            found.bits.extend({4} - set(found.bits))
    return found if found.modules else None


def _record(found: Packed, prefix: str, weight: str, names: set[str], count: int, bits: int) -> None:
    found.modules[prefix.rstrip(".")] = count
    found.packed.add(f"{prefix}{weight}")
    found.beside.update(f"{prefix}{name}" for name in names & _AUXILIARY)
    found.bits.extend({bits} - set(found.bits))


def _unpacked_shape(checkpoint: Checkpoint, name: str) -> list[int]:
    try:
        shape = json.loads(bytes(checkpoint[name].numpy().tobytes()))["shape"]
        return [int(size) for size in shape]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: {name!r} is not a quant_state of bitsandbytes ({error}): copy or download the file again"
        ) from error

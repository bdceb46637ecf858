"""accelerate on machines without a GPU: several processes there too, for tests and to try things out."""

import os

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def make_accelerator(mixed_precision: str | None = None) -> Accelerator:
    """`Accelerator(mixed_precision=…)`, which without a GPU also runs what `accelerate launch` starts: DDP and FSDP2.

    accelerate by itself ignores on CPUs that it was started several times, and that it is to shard; and it keeps the
    precision of the first `Accelerator` of a process for all later ones.

    Raises:
        ValueError: started for DeepSpeed, which steps by itself and keeps its optimizer where no checkpoint of ours could.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ValueError(
            "this loop does not run under DeepSpeed: launch it with accelerate_configs/fsdp2.yaml, which shares out what "
            "ZeRO-3 does, or train by mymodels.Trainer, which takes accelerate_configs/deepspeed_zero3.yaml"
        )
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not torch.accelerator.is_available())
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.fsdp_plugin = FullyShardedDataParallelPlugin()  # what the launcher says, from the environment
        state.distributed_type = DistributedType.FSDP
    return accelerator


def unwrap(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """The model as it was before `accelerator.prepare`: not in autocast either.

    accelerate's `keep_fp32_wrapper=False` would also take off what transformers has wrapped `forward` in.
    """
    plain = accelerator.unwrap_model(model)
    if "_original_forward" in vars(plain):
        plain.forward = vars(plain).pop("_original_forward")
    return plain

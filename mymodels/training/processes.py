"""accelerate with several processes on machines without a GPU, for tests and trials."""

import os

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def make_accelerator(mixed_precision: str | None = None) -> Accelerator:
    """`Accelerator(mixed_precision=…)` that supports DDP and FSDP2 of `accelerate launch` also without a GPU.

    On CPUs, accelerate ignores that several processes were started and that FSDP is requested; and it uses the precision
    of a process's first `Accelerator` for all later ones.

    Raises:
        ValueError: launched with DeepSpeed, whose engine steps and saves the optimizer itself.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ValueError(
            "this loop does not run under DeepSpeed: launch it with accelerate_configs/fsdp2.yaml, which shards as ZeRO-3 "
            "does, or train with mymodels.Trainer, which supports accelerate_configs/deepspeed_zero3.yaml"
        )
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not torch.accelerator.is_available())
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.fsdp_plugin = FullyShardedDataParallelPlugin()  # settings of the launcher, from the environment
        state.distributed_type = DistributedType.FSDP
    return accelerator


def unwrap(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """The model as it was before `accelerator.prepare`, also without autocast.

    accelerate's `keep_fp32_wrapper=False` would also remove transformers' own wrappers of `forward`.
    """
    plain = accelerator.unwrap_model(model)
    if "_original_forward" in vars(plain):
        plain.forward = vars(plain).pop("_original_forward")
    return plain

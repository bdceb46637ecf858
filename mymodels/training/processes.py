"""accelerate on machines without a GPU: several processes there too, for tests and to try things out."""

import os

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType


def make_accelerator(mixed_precision: str | None = None) -> Accelerator:
    """`Accelerator(mixed_precision=…)`, which without a GPU also runs what `accelerate launch` starts: DDP and FSDP2.

    accelerate by itself ignores on CPUs that it was started several times, and that it is to shard.
    """
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not torch.accelerator.is_available())
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.fsdp_plugin = FullyShardedDataParallelPlugin()  # what the launcher says, from the environment
        state.distributed_type = DistributedType.FSDP
    return accelerator

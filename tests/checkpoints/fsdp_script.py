"""Run by torchrun-like processes of a test: each saves its own part of a model that FSDP2 shards.

`python fsdp_script.py FOLDER RANK WORLD_SIZE PORT`
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

if __name__ == "__main__":
    folder, rank, size, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=f"tcp://127.0.0.1:{port}")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    if size > 1:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    torch.save({"model": model.state_dict()}, f"{folder}/rank{rank}.pt")
    dcp.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, checkpoint_id=f"{folder}/dcp"
    )
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(whole, f"{folder}/whole.pt")
    writer = dcp.HuggingFaceStorageWriter(f"{folder}/hf", save_distributed=True)
    dcp.save(model.state_dict(), storage_writer=writer)
    dist.destroy_process_group()

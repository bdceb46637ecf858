"""Jobs for two processes on the CPU (gloo): forked from a server that has imported everything once."""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import mymodels

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["two_processes"])


def _in_child(job: Callable, rank: int, processes: int, port: int, folder: Path, arguments: tuple) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
    log = os.open(folder / f"{job.__name__}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(job(*arguments), folder / f"{job.__name__}-{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(job: Callable, folder: Path, *arguments, processes: int = 2, timeout: float = 300) -> list:
    """What `job(*arguments)` returns in each process."""
    with pytest.MonkeyPatch.context() as patch:  # the server finds what it is to preload by the environment alone
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [
        _server.Process(target=_in_child, args=(job, rank, processes, port, folder, arguments))
        for rank in range(processes)
    ]
    for child in children:
        child.start()
    deadline = time.monotonic() + timeout
    for child in children:
        child.join(max(deadline - time.monotonic(), 0))
    ended = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    logs = [(folder / f"{job.__name__}-{rank}.log").read_text()[-3000:] for rank in range(processes)]
    assert ended == [0] * processes, "\n".join(logs)
    return [torch.load(folder / f"{job.__name__}-{rank}.pt") for rank in range(processes)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gathered from all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def measure(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict:
    """Outputs, gradients of every parameter, and tokens, of one process or gathered from all."""
    model.eval()
    output = model(**inputs)
    output.loss.backward()
    shapes = {
        name: tuple(p.to_local().shape if isinstance(p, DTensor) else p.shape) for name, p in model.named_parameters()
    }
    gradients = {name: whole(p.grad).detach() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        result = {"logits": output.logits.detach(), "inference": model(**inputs).logits, "gradients": gradients}
        if model.can_generate():
            prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            result["tokens"] = model.generate(**prompt, do_sample=False, max_new_tokens=12)
    return result | {"loss": output.loss.detach(), "shapes": shapes}


def tensor_parallel(cases: dict[str, tuple[str, Path, dict]]) -> dict:
    """`measure` each model of (class of mymodels, folder, inputs), then save it gathered."""
    results = {}
    for name, (kind, folder, inputs) in cases.items():
        model = getattr(mymodels, kind).from_pretrained(folder, tp_plan="auto")
        results[name] = measure(model, inputs)
        model.save_pretrained(f"{folder}-again")
    return results


def refusals(folders: dict[str, tuple[str, Path]]) -> dict[str, str]:
    """What loading says."""
    said = {}
    for name, (kind, folder) in folders.items():
        try:
            getattr(mymodels, kind).from_pretrained(folder, tp_plan="auto")
        except ValueError as error:
            said[name] = str(error)
    return said


def pipeline(cases: dict[str, tuple[Path, list[dict]]]) -> dict:
    """Logits and tokens by transformers' own pipeline of as many stages as processes."""
    results = {}
    for name, (folder, given) in cases.items():
        split = DistributedConfig(pp_size=dist.get_world_size())
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=split).eval()
        with torch.no_grad():
            outputs = [
                (model(**inputs).logits, model.generate(**inputs, do_sample=False, max_new_tokens=12))
                for inputs in given
            ]
            ids = given[0]["input_ids"]
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            step = model(ids[:, -1:], past_key_values=cache).logits  # at the position that the cache tells
        results[name] = {"outputs": outputs, "step": step, "parameters": [name for name, _ in model.named_parameters()]}
    return results


def one_step(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1
    )  # Adam makes steps of noise where a gradient is 0 (key biases)
    model.train()
    model(**inputs).loss.backward()
    optimizer.step()


def fully_sharded(cases: dict[str, tuple[str, Path, dict]]) -> dict:
    """One training step, each process on its share of the rows; saved gathered and in shards."""
    results, size = {}, dist.get_world_size()
    for name, (kind, folder, inputs) in cases.items():
        split = DistributedConfig(fsdp_size=size)
        model = getattr(mymodels, kind).from_pretrained(folder, distributed_config=split)
        shares = {key: tensor.chunk(size)[dist.get_rank()] for key, tensor in inputs.items()}
        one_step(model, shares)
        results[name] = {key: whole(tensor).detach() for key, tensor in model.state_dict().items()}
        results[name + " local"] = {key: tensor.to_local().numel() for key, tensor in model.named_parameters()}
        model.save_pretrained(f"{folder}-gathered")
        model.save_pretrained(f"{folder}-sharded", distributed_checkpoint=True)
        dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}-dcp")
    return results


def reloaded(cases: dict[str, tuple[str, Path, DistributedConfig]]) -> dict:
    """The whole weights of models that are loaded in shares."""
    results = {}
    for name, (kind, folder, split) in cases.items():
        model = getattr(mymodels, kind).from_pretrained(folder, distributed_config=split)
        results[name] = {key: whole(tensor).detach() for key, tensor in model.state_dict().items()}
    return results

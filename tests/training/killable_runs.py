"""Training runs in processes of their own, to be killed: forked from a server that has imported everything once."""

import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import mygpt2_config
from transformers import TrainingArguments

from mymodels import MyGPT2ForCausalLM
from mymodels.training.loop import train
from mymodels.training.packing import DataCollatorForPacking
from mymodels.training.trainer import Trainer

SAVE_STEPS = 4
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["killable_runs"])


def examples(count: int = 23) -> list[dict[str, list[int]]]:
    """Sequences of 4 to 9 tokens, each token the one before plus one."""
    return [{"input_ids": [(start * 7 + i) % 90 + 2 for i in range(4 + start % 6)]} for start in range(count)]


def pad(batch: list[dict]) -> dict[str, torch.Tensor]:
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(e["input_ids"]) for e in batch], True, 0)
    return {"input_ids": rows, "attention_mask": (rows > 0).long(), "labels": rows.masked_fill(rows == 0, -100)}


def pad_and_mask(batch: list[dict]) -> dict[str, torch.Tensor]:
    """Leaves labels out at random, by the three generators there are."""
    padded = pad(batch)
    out = torch.rand(padded["labels"].shape) < 0.2
    out[random.randrange(len(batch))] |= torch.from_numpy(np.random.rand(out.shape[1]) < 0.2)
    padded["labels"] = padded["labels"].masked_fill(out, -100)
    return padded


def pack(batch: list[dict]) -> dict[str, torch.Tensor]:
    return DataCollatorForPacking()([{**example, "labels": example["input_ids"]} for example in batch])


COLLATORS = {"padded": pad, "masked": pad_and_mask, "packed": pack}


def model(dropout: float = 0.1) -> MyGPT2ForCausalLM:
    torch.manual_seed(3)
    drop = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
    return MyGPT2ForCausalLM(mygpt2_config(initializer_range=0.02, **drop))


def run(
    kind: str,
    output_dir: Path,
    *,
    batches: str = "padded",
    size: int = 2,
    accumulation: int = 2,
    dropout: float = 0.1,
    count: int = 23,
    **options,
) -> None:
    """Train for three epochs, resuming if there is a checkpoint, and write losses and weights to `result.pt`."""
    resume = any(output_dir.glob("checkpoint-*"))
    arguments = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-2,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        **options,
    }
    trained = model(dropout)
    if kind == "loop":
        losses = train(
            trained,
            examples(count),
            output_dir=str(output_dir),
            data_collator=COLLATORS[batches],
            resume_from_checkpoint=resume,
            **arguments,
        )
    else:
        settings = TrainingArguments(
            str(output_dir), logging_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False, **arguments
        )
        trainer = Trainer(trained, settings, data_collator=COLLATORS[batches], train_dataset=examples(count))
        trainer.train(resume_from_checkpoint=resume)
        losses = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    if os.environ.get("RANK", "0") == "0":
        weights = {name: tensor for name, tensor in trained.state_dict().items() if type(tensor) is torch.Tensor}
        torch.save({"losses": losses, "weights": weights}, output_dir / "result.pt")


def _in_child(kind: str, output_dir: Path, environment: dict[str, str], die: tuple[str, int] | None, options) -> None:
    os.environ.update(environment)
    log = os.open(output_dir.parent / f"{output_dir.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if die:
        _die_at(*die)
    run(kind, output_dir, **options)
    sys.stdout.flush()
    os._exit(0)


def _die_at(what: str, count: int) -> None:
    """Have this process killed at the `count`th optimizer step or flush of a file to the disk."""
    owner, name = {"step": (torch.optim.AdamW, "step"), "fsync": (os, "fsync")}[what]
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    def counting(*args, **kwargs):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counting)


def start(kind: str, output_dir: Path, *, processes: int = 1, fsdp: bool = False, die=None, **options) -> list:
    """Start a run; of several processes the first is the one that is to die."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:  # the server finds what it is to preload by the environment alone
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        if fsdp:
            environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
            environment |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        child = (kind, output_dir, environment if processes > 1 else {}, die if rank == 0 else None, options)
        process = _server.Process(target=_in_child, args=child)
        process.start()
        started.append(process)
    return started


def kill(processes: list) -> None:
    for process in processes:
        process.kill()
        process.join()


def finish(processes: list, output_dir: Path, timeout: float = 120) -> dict:
    """Wait for a run to end well, and read its result."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    ended = [process.exitcode for process in processes]
    kill(processes)
    assert ended == [0] * len(ended), (output_dir.parent / f"{output_dir.name}.log").read_text()[-3000:]
    return torch.load(output_dir / "result.pt")


def wait_for_death(processes: list, timeout: float = 120) -> None:
    """Wait for the first process to be killed as it was told, then kill the others."""
    processes[0].join(timeout)
    assert processes[0].exitcode == -signal.SIGKILL
    kill(processes)


def assert_same(a: dict, b: dict) -> None:
    """Losses and weights are the same, bit for bit."""
    assert a["losses"] == b["losses"]
    assert a["weights"].keys() == b["weights"].keys()
    for name, tensor in a["weights"].items():
        assert torch.equal(tensor, b["weights"][name]), name

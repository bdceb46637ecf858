"""Training checkpoints: the complete state of a run in one folder that is written atomically."""

import contextlib
import json
import logging
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel

from ..checkpoints import CheckpointError, replace_folder, write_manifest
from ..checkpoints.dispatch import load_in_place
from ..checkpoints.safetensors_files import read_json
from ..checkpoints.torch_files import load_plain
from ..checkpoints.writing import save_model_files, torch_save, write_shards
from ..library_logging import without_progress_bars
from ..messages import first_line
from ..released import is_installed, own_code, reader
from .checkpoint_dirs import STATE, remove_old_checkpoints, try_to_write

logger = logging.getLogger(__name__)

_MAY_CHANGE = {  # when a run is resumed; the product of batch size and accumulation is in `fixed`
    *("output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "description"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
}
OPTIMIZER, SCHEDULER, RANDOM = "optimizer.pt", "scheduler.pt", "rng_state.pth"  # transformers' names


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        fixed: settings that must be the same in a resumed run: `examples_per_step`, `num_examples` and `seed`.
        step: number of completed optimizer steps.
        losses: the loss of each step, the mean over the labels of all batches and processes.
        sampler: state of the shuffling generator before the current epoch; None before the first.
        best_metric: the lowest held-out loss so far, reached at step `best_step`; `metric`, the latest.
    """

    fixed: dict[str, int]
    step: int = 0
    losses: list[float] = field(default_factory=list)
    sampler: torch.Tensor | None = None
    metric: float | None = None
    best_metric: float | None = None
    best_step: int | None = None

    def add(self, loss: float) -> None:
        """Count a completed step."""
        self.step += 1
        self.losses.append(loss)

    @property
    def recent_loss(self) -> float:
        """Mean loss of the last 20 steps."""
        return sum(self.losses[-20:]) / len(self.losses[-20:])

    def note_held_out(self, loss: float) -> None:
        """Store the held-out loss after this step, and the step if it is the best."""
        self.metric = loss
        if math.isfinite(loss) and (self.best_metric is None or loss < self.best_metric):
            self.best_metric, self.best_step = loss, self.step


def versions() -> dict[str, str]:
    """Versions of the packages that a run depends on."""
    return {name: version(name) for name in ("mymodels", "torch", "transformers", "accelerate")}


def check_same_run(folder: Path, state: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a setting that must be the same in a resumed run differs."""
    for name, value in fixed.items():
        if state.get(name) != value:
            raise ValueError(
                f"{folder} was made with {name.replace('_', ' ')} {state.get(name)}, this run has {value}: choose batch "
                "size, gradient_accumulation_steps and number of processes with the same product, and the same data set "
                "and seed"
            )


def random_state() -> dict[str, Any]:
    """The states of this process's random number generators, as plain data and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), position, has_gauss, cached),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the states that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_training_checkpoint(
    output_dir: str | os.PathLike,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Any,
    scheduler: Any,
    progress: Progress,
    save_total_limit: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    max_shard_size: int | str = "2GB",
) -> Path:
    """Write `output_dir/checkpoint-STEP`, then remove old checkpoints; every process must call this.

    The folder contains the model as `save_checkpoint` writes it (sharded safetensors, config, code, manifest), gathered
    from all processes; `optimizer.pt` (its state by parameter name, for any number of processes), `scheduler.pt` (with
    the loss scaler), `rng_state.pth` (of every process, with the sampler and all losses) and `trainer_state.json` (step,
    losses, arguments, versions). All files can be read with `weights_only=True`.

    Args:
        model, optimizer: as prepared by `accelerator`.
        save_total_limit: number of checkpoints to keep, including the newest and the best.
        max_shard_size: of the weights, bytes or text such as `"500MB"`.
        arguments: arguments to record in `trainer_state.json`.

    Raises:
        OSError: the disk is full or read-only. Earlier checkpoints are kept.
    """
    folder = Path(output_dir) / f"checkpoint-{progress.step}"
    weights = accelerator.get_state_dict(model)
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer_state = get_optimizer_state_dict(model, optimizer.optimizer, options=gathered)
    random_states = gather_object([random_state()])
    if accelerator.is_main_process:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        losses = torch.tensor(progress.losses, dtype=torch.float64)
        described = {
            "global_step": progress.step,
            "loss": progress.losses[-1],
            "best_metric": progress.best_metric,
            "best_global_step": progress.best_step,
            "num_processes": accelerator.num_processes,
            "metric": progress.metric,
            **progress.fixed,
            "arguments": dict(arguments or {}),
            "versions": versions(),
        }
        with without_progress_bars(), replace_folder(folder, finish=write_manifest) as new:
            plain = accelerator.unwrap_model(model)
            save_weights(plain, new, max_shard_size, weights)
            torch_save(optimizer_state, new / OPTIMIZER)
            torch_save({"scheduler": scheduler.state_dict(), "scaler": scaler}, new / SCHEDULER)
            torch_save({"processes": random_states, "sampler": progress.sampler, "losses": losses}, new / RANDOM)
            (new / STATE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        best = None if progress.best_step is None else folder.with_name(f"checkpoint-{progress.best_step}")
        remove_old_checkpoints(folder.parent, folder, best, save_total_limit)
    accelerator.wait_for_everyone()
    return folder


def save_weights(
    model: torch.nn.Module, folder: Path, max_shard_size: int | str, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Save a transformers model with config and code, or the weights of any other module.

    Raises:
        CheckpointError: the state dict contains something other than tensors.
    """
    if isinstance(model, PreTrainedModel):
        save_model_files(model, folder, max_shard_size, weights)
    else:
        write_shards(model.state_dict() if weights is None else weights, folder, max_shard_size=max_shard_size)


@contextlib.contextmanager
def trial_save(model: torch.nn.Module, where: str | os.PathLike) -> Iterator[Path]:
    """A scratch folder in `where` to try saving a model before it is trained.

    Raises:
        ValueError: the `with` block raised an error, which becomes one sentence.
        OSError: the disk is full or read-only.
    """
    where, existed = Path(where), Path(where).exists()
    try_to_write(where)
    try:
        with without_progress_bars(), tempfile.TemporaryDirectory(dir=where, prefix=".trial-") as scratch:
            yield Path(scratch)
    except OSError:
        raise
    except Exception as error:
        reason = first_line(error).replace(f"{scratch}/", "")
        raise ValueError(f"{type(model).__name__} cannot be saved, so nothing was trained: {reason}") from error
    finally:
        if not existed:
            shutil.rmtree(where, ignore_errors=True)


def check_code_of_checkpoint(model: torch.nn.Module, folder: Path) -> None:
    """Raise a `ValueError` if a checkpoint was saved with other code than the model's, so that its weights may not fit."""
    if not isinstance(model, PreTrainedModel) or not (folder / "config.json").is_file():
        return
    if is_installed(type(model)):
        if reason := own_code(read_json(folder / "config.json"), reader(folder)):
            raise ValueError(
                f"{folder} has code of its own ({reason}), and this model is a {type(model).__name__} of mymodels: resume "
                "with a model of that code"
            )
        return
    file = Path(getattr(sys.modules.get(type(model).__module__), "__file__", None) or os.devnull)
    saved = folder / file.name
    if file.is_file() and saved.is_file() and saved.read_bytes() not in (file.read_bytes(), _flat(file)):
        raise ValueError(f"{saved} is not the code of this {type(model).__name__}, {file}: resume with the same code")


def _flat(file: Path) -> bytes:
    from ..hub.code_files import collect_code

    try:
        return collect_code([file])[file.name].encode()
    except CheckpointError:
        return b""


def _load(path: Path) -> Any:
    with path.open("rb") as file:  # not memory-mapped, because the file may be removed while its tensors are in use
        return load_plain(file, path)


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Load the model's weights from a training checkpoint; call it before `accelerator.prepare`.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    load_in_place(model, folder)


def load_training_state(
    folder: Path,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Any,
    scheduler: Any,
    fixed: dict[str, int],
    arguments: Mapping[str, Any] | None = None,
) -> Progress:
    """Load everything but the weights from a training checkpoint, for any devices and number of processes.

    Args:
        model, optimizer: as prepared by `accelerator`. Learning rate and weight decay stay those of `optimizer`.
        fixed: `examples_per_step`, `num_examples` and `seed` of this run, which must equal those of the checkpoint.
        arguments: arguments of this run; a warning names those that differ.

    Returns:
        The progress of the saved run.

    Raises:
        ValueError: `fixed` differs from the checkpoint's, or the optimizer is for other parameters.
    """
    state = read_json(folder / STATE)
    check_same_run(folder, state, fixed)
    before, now = state["arguments"], arguments or {}
    if differ := [name for name in sorted({*before, *now} - _MAY_CHANGE) if now and before.get(name) != now.get(name)]:
        logger.warning(
            "%s was made with %s: the resumed run differs from an uninterrupted one",
            *(folder, ", ".join(f"{name}={before.get(name)} (now {now.get(name)})" for name in differ)),
        )
    chosen = [(group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups]
    saved = _load(folder / OPTIMIZER)
    then = {name for group in saved["param_groups"] for name in group["params"]}
    trained = {name for name, tensor in accelerator.unwrap_model(model).named_parameters() if tensor.requires_grad}
    if then != trained:
        name = sorted(then ^ trained)[0]
        raise ValueError(
            f"{folder}: parameter {name!r} was{' not' if name in trained else ''} trained in the saved run, unlike now: "
            "freeze the same parameters"
        )
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer.optimizer, optim_state_dict=saved, options=options)
    schedule = _load(folder / SCHEDULER)
    scheduler.load_state_dict(schedule["scheduler"])
    scheduler.base_lrs = [rate for rate, _ in chosen]
    for group, (rate, decay) in zip(optimizer.param_groups, chosen):
        if rate != group["initial_lr"]:
            group["lr"] *= rate / group["initial_lr"]
        group["initial_lr"], group["weight_decay"] = rate, decay
    if accelerator.scaler and schedule["scaler"]:
        accelerator.scaler.load_state_dict(schedule["scaler"])
    rest = _load(folder / RANDOM)
    if len(rest["processes"]) == accelerator.num_processes:
        set_random_state(rest["processes"][accelerator.process_index])
    else:  # seeds that differ from the initial ones and between processes
        set_seed(state["global_step"] + 1, device_specific=True)
        logger.warning(
            "%s was made by %d processes, this run has %d: weights are restored exactly, dropout uses new random numbers",
            *(folder, len(rest["processes"]), accelerator.num_processes),
        )
    names = {"metric": "metric", "best_metric": "best_metric", "best_step": "best_global_step"}
    losses, sampler = rest["losses"].tolist(), rest["sampler"].clone()
    return Progress(fixed, state["global_step"], losses, sampler, **{ours: state[name] for ours, name in names.items()})

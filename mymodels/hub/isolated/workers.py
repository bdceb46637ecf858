"""Stages: the model in forked and spawned worker processes, and several processes that load at once."""

import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .comparing import difference, unpadded_outputs
from .golden_outputs import read_inputs
from .load_repo import build, clear_code_cache, config_of, load
from .stages import sentence

PROCESSES = 8
ATTEMPTS = 3
SPAWNED = "spawned-worker.pkl"


class Outputs(Dataset):
    """A dataset with one item: the model's outputs for the inputs, computed in the process that reads it."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor]):
        self.model, self.inputs = model, inputs

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return unpadded_outputs(self.model, self.inputs) if self.inputs else {"config": torch.ones(1)}


def run(job: dict[str, Any], events: Any) -> None:
    name = job["classes"][0]
    model, _ = load(job, name)
    inputs = read_inputs(job)  # empty if none could be generated
    items = Outputs(model, inputs)
    with events.check("pickle", name) as check:
        if parametrized := _parametrized(model):
            what = f"torch cannot pickle parametrised modules such as {parametrized}: share the state_dict instead"
            check.not_applicable(what)
        elif type(pickle.loads(pickle.dumps(model.config))) is not type(model.config):
            check.fail("the unpickled config is of another class")
        else:
            copy = Outputs(pickle.loads(pickle.dumps(model)), inputs)
            check.fail_if(difference(copy[0], items[0]))
    if check.failed:
        return
    for method in job["worker_methods"]:
        if method == "spawn" and parametrized:
            continue
        if method == "spawn" and job.get("confined"):
            _keep_for_spawned(job, items)
            continue
        with events.check(f"{method}ed worker", name) as check:
            loader = DataLoader(items, batch_size=None, num_workers=1, multiprocessing_context=method)
            check.fail_if(difference(next(iter(loader)), items[0]))


def _keep_for_spawned(job: dict[str, Any], items: Outputs) -> None:
    """Pickle what a spawned worker gets; another process of this job unpickles it, see `run_spawned`."""
    with Path(job["scratch"], SPAWNED).open("wb") as file:
        pickle.dump(sys.path, file)
        pickle.dump((items, items[0]), file)


def run_spawned(job: dict[str, Any], events: Any) -> None:
    """The model in a process that has never loaded the folder's code, as in a spawned worker."""
    kept = Path(job["scratch"], SPAWNED)
    if not kept.exists():
        return
    with events.check("spawned worker", job["classes"][0]) as check, kept.open("rb") as file:
        sys.path[:] = pickle.load(file)
        items, expected = pickle.load(file)
        check.fail_if(difference(items[0], expected))


def _parametrized(model: torch.nn.Module) -> str:
    """The first module with a parametrisation, such as weight norm; empty if there is none."""
    found = (path for path, module in model.named_modules() if hasattr(module, "parametrizations"))
    return next(found, "")


def run_parallel(job: dict[str, Any], events: Any) -> None:
    """Load in eight processes with an empty code cache, as when training starts on eight devices of a new machine.

    transformers copies code files in place, so a process may read a file that is half written. That is not a fault of
    the folder: the check fails only if every attempt does.
    """
    name = job["classes"][0]
    with events.check("parallel load", name) as check:
        failures: list[str] = []
        while len(failures) < ATTEMPTS and (failed := _load_at_once(job, name)):
            first = failed[0].read_text() if failed[0].exists() else "it crashed"
            failures.append(f"{len(failed)} of {PROCESSES} processes that load at once fail, the first with {first}")
        if len(failures) == ATTEMPTS:
            check.fail(failures[-1])
        elif failures:
            check.warn(f"in some attempts {failures[-1]}: a race in how transformers copies code files")


def _load_at_once(job: dict[str, Any], name: str) -> list[Path]:
    """Load in many processes with an empty code cache; returns the error files of those that failed."""
    clear_code_cache()
    start, go = os.pipe()
    processes = {}
    for number in range(PROCESSES):
        errors = Path(job["scratch"], f"parallel-{number}")
        errors.unlink(missing_ok=True)
        process = os.fork()
        if process == 0:
            _wait_and_load(job, name, start, go, errors)
        processes[process] = errors
    os.close(start)
    time.sleep(0.05)
    os.close(go)  # releases all processes at once
    return [errors for process, errors in processes.items() if os.waitpid(process, 0)[1] != 0]


def _wait_and_load(job: dict[str, Any], name: str, start: int, go: int, errors: Path) -> None:
    code = 1
    try:
        os.close(go)
        os.read(start, 1)
        if job["weights_size"] * PROCESSES < 2**31:
            load(job, name)
        else:  # without the weights: only the code files are copied
            with torch.device("meta"):
                build(name, config_of(job))
        code = 0
    except BaseException as error:
        errors.write_text(sentence(error))
    finally:
        os._exit(code)

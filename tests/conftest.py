"""Settings for every test: offline, quiet, the same random numbers each time, one thread (the models are tiny)."""

import atexit
import os
import shutil
import tempfile

os.environ.update(
    # each pytest process its own: tests call their folders alike, and so the copies of their code that transformers imports
    HF_MODULES_CACHE=tempfile.mkdtemp(prefix="mymodels-tests-modules-"),
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TQDM_DISABLE="1",
    TOKENIZERS_PARALLELISM="false",
)

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
import warm_python
from transformers.utils import logging

import mymodels  # noqa: F401  registers the models
from mymodels.hub import clean_process

logging.set_verbosity_error()
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def real_start() -> None:
    """For tests of how a clean process starts, see `quick_start`."""


@pytest.fixture(autouse=True)
def quick_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` and all that has clean processes forks them from one that has imported the libraries, once per session.

    Not where a test asks for `real_start`, and not with another release of transformers: these start as everybody's do.
    """
    if "real_start" in request.fixturenames:
        return

    def start(command: list, **how):
        with open(command[-1], encoding="utf-8") as job:
            other = json.load(job).get("release")
        return (subprocess.Popen if other else warm_python.Popen)(command, **how)

    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    monkeypatch.setattr(clean_process, "subprocess", SimpleNamespace(Popen=start, **names))

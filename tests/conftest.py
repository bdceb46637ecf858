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

import pytest
import torch
from transformers.utils import logging

import mymodels  # noqa: F401  registers the models

logging.set_verbosity_error()
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)

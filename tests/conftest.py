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
import re
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import warm_python
from transformers.utils import logging

import mymodels  # noqa: F401  registers the models
from mymodels.hub import clean_process, isolated_model

LEFT_OUT = pytest.StashKey[dict]()

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
    for module in (clean_process, isolated_model):
        monkeypatch.setattr(module, "subprocess", SimpleNamespace(Popen=start, **names))


# ---- which tests run


def _suite(item: pytest.Item, suites: dict[str, str]) -> str | None:
    return next((name for name in suites if item.get_closest_marker(name)), None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `-m` the fast tests run, and of a folder, file or test that was asked for and has none of these, all."""
    if config.option.markexpr:
        return
    suites = dict(line.split(": ", 1) for line in config.getini("markers") if "(make test-" in line)
    kept = {item for item in items if not _suite(item, suites)}
    for argument in config.args if config.args_source is pytest.Config.ArgsSource.ARGS else ():
        path, *names = str(argument).split("::")
        start = "::".join([os.path.relpath(config.invocation_params.dir / path, config.rootpath), *names])
        asked = {item for item in items if re.match(re.escape(start) + r"($|/|::|\[)", item.nodeid)}
        if not asked & kept:
            kept |= asked
    left_out = [item for item in items if item not in kept]
    items[:] = [item for item in items if item in kept]
    config.hook.pytest_deselected(items=left_out)
    counts = Counter(f"{name}: {suites[name]}" for item in left_out if (name := _suite(item, suites)))
    config.stash[LEFT_OUT] = dict(counts)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = dict(counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for suite, count in config.stash.get(LEFT_OUT, {}).items():
        terminalreporter.write_line(f"left out: {count} {suite}")

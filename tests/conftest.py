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

import base64
import gc
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm_python
from transformers.utils import logging

import mymodels  # noqa: F401  registers the models
from mymodels.hub import clean_process, isolated_process

LEFT_OUT = pytest.StashKey[dict]()
FORKING = "test_crash_safety.py"  # forks this process hundreds of times: first, while there is little to copy

logging.set_verbosity_error()
for name in ("COLUMNS", "LINES"):  # which pytest-xdist sets: outputs as wide as a pipe gets, with it and without
    os.environ.pop(name, None)
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
    for module in (clean_process, isolated_process):
        monkeypatch.setattr(module, "subprocess", SimpleNamespace(Popen=start, **names))


PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)


@pytest.fixture
def real_pictures() -> None:
    """For tests that look at the pictures of a fine-tuning, see `quick_pictures`."""


@pytest.fixture(autouse=True)
def quick_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One empty pixel each, as matplotlib takes longer to draw than a small model to train."""
    plots = sys.modules.get("mymodels.training.plots")
    if plots is not None and "real_pictures" not in request.fixturenames:
        monkeypatch.setattr(plots, "_save", lambda figure, path: Path(path).write_bytes(PICTURE))


# ---- which tests run and in what order


def _suites(config: pytest.Config) -> dict[str, str]:
    """The markers that a target of the Makefile is for, with what they mean."""
    return dict(line.split(": ", 1) for line in config.getini("markers") if "(make test-" in line)


def _suite(item: pytest.Item, suites: dict[str, str]) -> str | None:
    return next((name for name in suites if item.get_closest_marker(name)), None)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m` and one suite's marker, a file that does not have it is not read: most of them take longer than that suite's."""
    if config.option.markexpr in _suites(config) and collection_path.suffix == ".py":
        return f"mark.{config.option.markexpr}" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_finish() -> None:
    """What was imported stays: not to be looked through by each of the collections that transformers' Trainer asks for."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `-m` the fast tests run, and of a folder, file or test that was asked for and has none of these, all."""
    if config.option.markexpr:
        return
    suites = _suites(config)
    kept = {item for item in items if not _suite(item, suites)}
    for argument in config.args if config.args_source is pytest.Config.ArgsSource.ARGS else ():
        path, *names = str(argument).split("::")
        start = "::".join([os.path.relpath(config.invocation_params.dir / path, config.rootpath), *names])
        asked = {item for item in items if re.match(re.escape(start) + r"($|/|::|\[)", item.nodeid)}
        if not asked & kept:
            kept |= asked
    left_out = [item for item in items if item not in kept]
    # then the files with the most tests, so that two processes end together (with pytest-xdist's --no-loadscope-reorder)
    sizes = Counter(item.path for item in kept)
    items[:] = sorted(filter(kept.__contains__, items), key=lambda i: (i.path.name != FORKING, -sizes[i.path]))
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

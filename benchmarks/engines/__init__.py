"""The inference engines that `rivals.py` times, one a file, each set up as its own documentation recommends for speed.

A file has `Classifier` or `Generator` or both, made from the folder of a stock model, a precision and a number of threads:

    Classifier(folder, precision, threads).logits(batches)     batches of rows of token ids → logits `[rows, labels]` each
    Generator(folder, precision, threads).generate(prompts, tokens)  → the greedy tokens, as many for each prompt
    Generator(…).log_probs(prompts)                            → of the next token, `[prompts, vocab]`

All prompts of a call have one length. What an engine makes of the weights (files of its own) is kept beside the folder,
in `files_of`.
"""

import importlib
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Rows = list[list[int]]  # token ids
PADDING = 0


class Engine(NamedTuple):
    """Its file here, the packages it needs, the precisions that are compared for each kind of work, and `tolerance`.

    That is the largest difference of float32 logits from stock's.
    """

    module: str
    packages: tuple[str, ...]
    classifies: tuple[str, ...]
    generates: tuple[str, ...]
    tolerance: float = 1e-3


BOTH = ("float32", "int8")
ENGINES = {
    "stock": Engine("torch_models", (), ("float32",), ("float32",)),
    "ONNX Runtime": Engine("onnx_runtime", ("onnxruntime", "onnx"), BOTH, BOTH),
    "OpenVINO": Engine("open_vino", ("openvino", "nncf"), BOTH, BOTH),
    "CTranslate2": Engine("ctranslate", ("ctranslate2",), BOTH, BOTH),
    # keeps keys and values in float16, and takes GELU from a table in float16
    "llama.cpp": Engine("llama_cpp", ("xllamacpp", "gguf"), (), BOTH, tolerance=1e-2),
}


def missing(engine: str) -> list[str]:
    """The packages of an engine that are not installed."""
    return [package for package in ENGINES[engine].packages if find_spec(package) is None]


def versions() -> dict[str, str]:
    """The version of each package of an engine; "not installed" where it is not there."""
    found = {}
    for package in sorted({package for engine in ENGINES.values() for package in engine.packages}):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def load(engine: str) -> Any:
    """The module of an engine, or of "ours"."""
    return importlib.import_module(f".{'torch_models' if engine == 'ours' else ENGINES[engine].module}", __name__)


def files_of(folder: Path, name: str, package: str, write: Callable[[Path], Any]) -> Path:
    """The folder of what an engine made of the model in `folder`: by `write` the first time, later from the disk.

    It is made anew for another release of `package` and another kind of processor.
    """
    made = Path(f"{folder}-{name}-{version(package)}-{platform.machine()}")
    if not made.is_dir():
        unfinished = Path(f"{made}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(unfinished)
        unfinished.rename(made)
    return made


def padded(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Ids, padded on the right to the longest row, and their attention mask."""
    ids = np.full((len(rows), max(map(len, rows))), PADDING, dtype=np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)

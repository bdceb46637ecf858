"""Loads a folder whose checkpoint lacks parameters, with memory that nobody wrote made visible: it holds NaN.

`python load_incomplete.py AUTO_CLASS FOLDER …` does it under the transformers release that is first on the path, and prints for
each folder one line of JSON: of each parameter the number of NaN, the mean and the standard deviation.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers


@contextlib.contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """`torch.empty_like` and its kind fill floating-point tensors with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def load(folder: Path, auto: str) -> torch.nn.Module:
    """A model in float32 and evaluation mode."""
    with nan_in_new_memory():
        return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).float().eval()


def values_of(model: torch.nn.Module) -> dict[str, list[float]]:
    """Of each parameter the number of NaN, the mean and the standard deviation."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    return {name: [int(p.isnan().sum()), float(p.mean()), float(p.std(unbiased=False))] for name, p in values.items()}


def main(auto: str, *folders: str) -> None:
    transformers.logging.set_verbosity_error()
    for folder in folders:
        print(json.dumps({"release": transformers.__version__, **values_of(load(Path(folder), auto))}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

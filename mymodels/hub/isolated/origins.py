"""Whether tensors whose names are not in the files were nevertheless made from them, by two more loads.

One load reads files in which every value is changed: a tensor that stays the same was not read from them. Another
load has a different seed: a tensor that changes was initialised at random. A tensor that follows the files and not
the seed was made from the files, under any name and in any layout.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .load_repo import build, describe, load
from .stages import sentence

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
LARGEST = 8e9  # bytes; larger weights are not copied


def origins(job: dict[str, Any], name: str, model: Any, tensors: dict[str, Any], missing: set[str]) -> dict[str, Any]:
    """Load twice more and classify the tensors whose names are not in the files; empty if there are none.

    Returns:
        `random`: names that another seed changes; `unmoved`: names that other values in the files do not change;
        `computed`: of the latter, those that a newly built model has too and that need not be in the files. Or
        `error`: why this was not tried.
    """
    unknown = _not_in_files(job, model, tensors, missing)
    if not unknown:
        return {}
    if job["weights_size"] > LARGEST:
        return {"error": "the weights are too large to be loaded again"}
    try:
        with _other_values(job) as folder:
            moved = describe(load(job, name, folder=folder)[0])
        again = describe(load(job, name, seed=1)[0])
    except Exception as error:
        return {"error": sentence(error)}

    def same(other: dict[str, Any]) -> list[str]:
        return [n for n in unknown if other.get(n, {}).get("digest") == tensors[n]["digest"]]

    unmoved, kept = same(moved), set(same(again))
    return {
        "random": [n for n in unknown if n not in kept],
        "unmoved": unmoved,
        "computed": _computed(name, model, tensors, unmoved) if unmoved else [],
    }


def _not_in_files(job: dict[str, Any], model: Any, tensors: dict[str, Any], missing: set[str]) -> list[str]:
    stored = _stored_names(Path(job["folder"]))
    prefix = getattr(model, "base_model_prefix", "") or ""

    def is_stored(name: str) -> bool:
        return bool(stored & {name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")})

    held = {n: t for n, t in tensors.items() if t["persistent"] and not t["meta"] and n not in missing}
    shared = {held[n]["memory"] for n in held if is_stored(n)}  # tied to one that was found
    return [n for n in held if not is_stored(n) and held[n]["memory"] not in shared]


def _computed(name: str, model: Any, tensors: dict[str, Any], unmoved: list[str]) -> list[str]:
    patterns = [str(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or []]
    free = [n for n in unmoved if not tensors[n]["parameter"] or any(re.search(p, n) for p in patterns)]
    if not free:
        return []
    torch.manual_seed(2)
    fresh = describe(build(name, model.config, model.dtype))
    return [n for n in free if fresh.get(n, {}).get("digest") == tensors[n]["digest"]]


def _weight_files(folder: Path) -> list[Path]:
    kept = ("golden.", "training_args", "optimizer", "scheduler", "rng_state")
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", *PICKLED)]
    return [path for path in sorted(files) if path.is_file() and not path.name.startswith(kept)]


def _stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in _weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        else:
            with contextlib.suppress(Exception):
                held = torch.load(path, map_location="cpu", weights_only=True)
                names.update(str(key) for key in held)
    return names


@contextlib.contextmanager
def _other_values(job: dict[str, Any]) -> Iterator[str]:
    """A copy of the folder, under the same name, with every value in its weight files changed."""
    source = Path(job["folder"])
    copy = Path(job["scratch"], "other-values", source.name)
    weights = set(_weight_files(source))
    if not weights:
        raise FileNotFoundError("the folder has no weights that could be changed")

    def copy_entry(path: str, target: str) -> None:
        if Path(path) in weights:
            _write_other_values(Path(path), Path(target))
        elif Path(path).is_symlink():
            os.symlink(os.path.realpath(path), target)
        else:
            shutil.copyfile(path, target)

    try:
        shutil.copytree(source, copy, copy_function=copy_entry)
        yield str(copy)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _write_other_values(path: Path, target: Path) -> None:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file({name: _with_other_values(tensor) for name, tensor in held.items()}, target, metadata=metadata)
    else:
        torch.save(_with_other_values(torch.load(path, map_location="cpu", weights_only=True)), target)


def _with_other_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_other_values(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_other_values(inner) for inner in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return (value.float() * 0.5 + 0.3125).to(value.dtype).contiguous()
    return value

"""What only a pickle's own code can read: it runs in the box, and its tensors and plain data come back."""

import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..messages import one_line
from ..sandbox import results, run
from .checkpoint import CheckpointError

_SCRIPT = Path(__file__).with_name("unpickle_script.py")
_MEMORY, _OF_FILE = 4 * 10**9, 6  # bytes of memory: these, and so many times the file
_OF_TEXT = 30  # bytes of JSON for each of the file: a pickle names a text once, and refers to it in two bytes
_SECONDS = 3600.0


def unpickle(path: Path, advice: str) -> tuple[Any, Callable[[Any], Any]]:
    """The nested objects of a file of `torch.save` or `pickle.dump`, unpickled in the box.

    The code that it names is imported from the environment's packages, the current folder and `PYTHONPATH`.

    Args:
        path: the file.
        advice: the last sentence of the error, on how to save the file.

    Returns:
        The objects: modules as state dicts, and `repr`s of what is no plain data; and a function that keeps the files
        with the tensors as long as the object that it is called with.

    Raises:
        CheckpointError: the code fails, does not end, or leaves something else than tensors and plain data.
    """
    scratch = Path(tempfile.mkdtemp(prefix="mymodels-unpickled-")).resolve()
    try:
        node = _unpickle(path, scratch, path.stat().st_size, advice)
    except BaseException:
        results.delete(scratch)
        raise

    def keep(owner: Any) -> Any:
        weakref.finalize(owner, results.delete, scratch)
        return owner

    return node, keep


def _unpickle(path: Path, scratch: Path, size: int, advice: str) -> Any:
    elsewhere = [os.getcwd(), *filter(os.path.isabs, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    done = run(
        [_SCRIPT, path.absolute(), scratch, *elsewhere],
        readable=[path],
        code=elsewhere,
        scratch=scratch,
        memory=_MEMORY + _OF_FILE * size,
        scratch_size=10**9 + 2 * _OF_FILE * size,
        seconds=_SECONDS,
    )
    if done.returncode:
        lines = [line for line in done.stderr.decode("utf-8", errors="replace").splitlines() if line.strip()]
        reason = done.why or (lines or [f"exit code {done.returncode}"])[-1].strip()
        raise CheckpointError(f"{path}: unpickling it failed ({one_line(reason, 300)}). {advice}.")
    try:
        text, items = min(10**9, 10**7 + _OF_TEXT * size), results.MOST_ITEMS + size
        objects = results.read_json(scratch / "objects.json", text, items)
        tensors = results.read_tensors(scratch / "tensors.safetensors")
        return _plain(objects, tensors)
    except (results.UntrustedResult, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its code tampered with what was read ({one_line(error, 200)})") from None


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("a list stands where a value should")
        return value
    ((kind, content),) = value.items()
    if kind == "mapping":
        return {_key(key): _plain(item, tensors) for key, item in content}
    if kind == "list":
        return [_plain(item, tensors) for item in content]
    if kind == "float":
        return float(content)
    if kind == "array":
        return tensors[content].numpy()
    if kind == "tensor":
        return tensors[content]
    raise ValueError(f"{kind!r} is no kind of value")


def _key(key: Any) -> str | int:
    if not isinstance(key, (str, int)):
        raise ValueError("a key is neither a text nor a number")
    return key

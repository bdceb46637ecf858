"""Mutated files: refused with a `CheckpointError`, or opened as what they hold; and every change is found."""

import copy
import json
import os
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mymodels.checkpoints import Checkpoint, CheckpointError, check_checkpoint, open_checkpoint, save_checkpoint
from mymodels.checkpoints.safetensors_files import open_safetensors

INDEX, MANIFEST = "model.safetensors.index.json", "manifest.json"
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E5M2": 1, "C64": 8}
NAMES = st.sampled_from(["a", "b", "c.weight", "pt", "format", "", "__metadata__", "ä", "a\nb", "../a", "😀"])
NUMBERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**31, 2**32, 2**53, 2**62, 2**63, 2**64 - 1, 2**64, 2**70, 10**30])
)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(allow_nan=False), NAMES, st.sampled_from(list(SIZES))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)

# --- what mutates ----------------------------------------------------------------------------------------------------


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a JSON value but the outermost."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutate_json(data: st.DataObject, value: Any, junk: st.SearchStrategy = JUNK) -> Any:
    """One value somewhere replaced, taken out, renamed, moved a little, or exchanged for one of elsewhere."""
    value = copy.deepcopy(value)
    found = list(places(value))
    if not found:
        return data.draw(junk)
    *above, key = data.draw(st.sampled_from(found))
    parent = value
    for step in above:
        parent = parent[step]
    how = data.draw(st.sampled_from(["replace", "remove", "rename", "nudge", "copy"]))
    if how == "remove":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[data.draw(NAMES)] = parent.pop(key)
    elif how == "nudge" and type(parent[key]) is int:
        parent[key] += data.draw(st.sampled_from([-8, -4, -1, 1, 4, 8]))
    elif how == "copy":
        other: Any = value
        for step in data.draw(st.sampled_from(list(places(value)) or [()])):
            other = other[step]
        parent[key] = copy.deepcopy(other)
    else:
        parent[key] = data.draw(junk)
    return value


def mutate_bytes(data: st.DataObject, content: bytes) -> bytes:
    """A bit flipped, a byte set, bytes put in or taken out, the end cut off, or something copied within."""
    at = data.draw(st.integers(0, max(len(content) - 1, 0)))
    how = data.draw(st.sampled_from(["flip", "set", "insert", "remove", "cut", "copy"]))
    if how in ("flip", "set") and content:
        byte = content[at] ^ 1 << data.draw(st.integers(0, 7)) if how == "flip" else data.draw(st.integers(0, 255))
        return content[:at] + bytes([byte]) + content[at + 1 :]
    if how == "insert" or not content:
        return content[:at] + data.draw(st.binary(min_size=1, max_size=4)) + content[at:]
    if how == "remove":
        return content[:at] + content[at + data.draw(st.integers(1, 4)) :]
    if how == "cut":
        return content[:at]
    end = at + data.draw(st.integers(1, 60))
    return content[:end] + content[at:]


def values(checkpoint: Any) -> dict[str, Any]:
    """Name → shape, dtype and bytes, or None where a tensor cannot be read."""
    result: dict[str, Any] = {}
    for name in checkpoint:
        try:
            tensor = checkpoint[name]
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            result[name] = tuple(tensor.shape), tensor.dtype, data
        except Exception as error:
            assert not isinstance(checkpoint, Checkpoint) or isinstance(error, CheckpointError), repr(error)
            result[name] = None
    return result


class Library:
    """A file as the safetensors library reads it."""

    def __init__(self, file: Any):
        self.file = file

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name)


def opened(path: Path, opener: Callable[[Path], Checkpoint] = open_checkpoint) -> Checkpoint | None:
    """The checkpoint, or None if it is refused in one sentence that names a file of it."""
    try:
        return opener(path)
    except CheckpointError as error:
        text = str(error)
        assert "\n" not in text and str(path.parent) in text, text
        return None


def checked(path: Path, *, full: bool) -> bool:
    """Whether `check_checkpoint` finds something; never an exception, each `Problem` in one sentence."""
    problems = check_checkpoint(path, full=full)
    assert all("\n" not in problem.message and problem.file for problem in problems), problems
    return bool(problems)


# --- what must hold --------------------------------------------------------------------------------------------------


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.sampled_from(["a", "b", "c.weight", "ä", "d"]), min_size=1, max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(list(SIZES))), draw(st.lists(st.integers(0, 3), max_size=3))
        begin, end = end, end + SIZES[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(NAMES, NAMES, max_size=3))
    return header, bytes(i % 2 for i in range(end))


def fuzz_header(data: st.DataObject, folder: Path) -> None:
    """Accepted is only what the safetensors library accepts, and with the same content."""
    path = folder / "model.safetensors"
    header, content = data.draw(headers())
    changes = data.draw(st.integers(0, 3))
    for _ in range(changes):
        header = mutate_json(data, header)
        if not isinstance(header, dict):
            break
    text = json.dumps(header, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass")
    text += b" " * data.draw(st.integers(0, 9))
    raw = struct.pack("<Q", len(text)) + text + content
    spoilt = data.draw(st.integers(0, 2)) if changes != 1 else 0
    for _ in range(spoilt):
        raw = mutate_bytes(data, raw)
    path.write_bytes(raw)
    ours = opened(path, open_safetensors)
    assert ours is not None or changes or spoilt, "a valid file is refused"
    if ours is not None:
        with safe_open(path, framework="pt") as file:
            theirs = values(Library(file))
        assert sorted(set(ours) - set(ours.aliases)) == sorted(theirs)
        assert {name: value for name, value in values(ours).items() if name in theirs} == theirs


def fuzz_index(data: st.DataObject, folder: Path) -> None:
    """An index is refused, or opened as what the shards hold; if tensors are lost, the check tells."""
    target, saved = fresh(folder, "sharded")
    (target / MANIFEST).unlink()
    expected = values(saved)
    files = st.sampled_from(
        [*(path.name for path in target.iterdir()), "../model/x", "/etc/passwd", "x" * 300, "a\nb", ".", "", "a.**"]
    )
    index = json.loads((target / INDEX).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        index = mutate_json(data, index, files | JUNK)
    text = json.dumps(index).encode()
    if data.draw(st.integers(0, 3)) == 0:
        text = mutate_bytes(data, text)
    (target / INDEX).write_bytes(text)
    result = opened(target)
    found = checked(target, full=False)
    assert result is not None or found
    if result is not None:
        assert values(result) == {name: expected[name] for name in result}
        assert found or set(result) == set(expected)


def fuzz_manifest(data: st.DataObject, folder: Path) -> None:
    """A manifest that does not describe the folder is a `Problem`, and one that is not a manifest too."""
    target, _ = fresh(folder, "sharded")
    path = target / MANIFEST
    manifest = json.loads(path.read_text())
    described = json.dumps(manifest["files"], sort_keys=True)
    files = st.sampled_from(["../x", "/etc/passwd", "x" * 300, "a\nb", ".", "", INDEX, "0" * 64])
    for _ in range(data.draw(st.integers(1, 3))):
        manifest = mutate_json(data, manifest, files | JUNK)
    text = json.dumps(manifest).encode()
    if data.draw(st.integers(0, 3)) == 0:
        text = mutate_bytes(data, text)
    path.write_bytes(text)
    checked(target, full=False)
    assert checked(target, full=True) or means(text) == described


def means(manifest: bytes) -> str:
    return json.dumps(json.loads(manifest)["files"], sort_keys=True)


def fuzz_folder(data: st.DataObject, folder: Path) -> None:
    """Any change to any file of a checkpoint with a manifest is found, unless it means nothing."""
    target, _ = fresh(folder, data.draw(st.sampled_from(["sharded", "bin", "sharded bin"])))
    path = data.draw(st.sampled_from(sorted(target.iterdir())))
    before = path.read_bytes()
    after = mutate_bytes(data, before)
    assume(after != before)
    path.write_bytes(after)
    found = checked(target, full=True)
    assert found or (path.name == MANIFEST and means(after) == means(before))


MAGICS = [
    b"PK\3\4",
    b"PK\5\6",
    b"GGUF\3\0\0\0",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19",
    b"\x93NUMPY",
    b"\x0a\x02",
    b"{",
]
SUFFIXES = ["safetensors", "bin", "pt", "npz", "index.json", "gguf", "onnx", "dat"]


def fuzz_any_file(data: st.DataObject, folder: Path) -> None:
    """Whatever a file is, it is opened and read, or refused with a `CheckpointError`."""
    path = folder / f"model.{data.draw(st.sampled_from(SUFFIXES))}"
    if data.draw(st.booleans()):
        content = data.draw(st.sampled_from([b"", *MAGICS])) + data.draw(st.binary(max_size=80))
        if data.draw(st.integers(0, 4)) == 0:
            content += b"PK\5\6" + data.draw(st.binary(min_size=18, max_size=18))
    else:
        content = data.draw(st.sampled_from(samples(folder)))
        for _ in range(data.draw(st.integers(1, 3))):
            content = mutate_bytes(data, content)
    path.write_bytes(content)
    result = opened(path)
    if result is not None:
        values(result)
    checked(path, full=True)
    path.unlink()


# --- how it is run ---------------------------------------------------------------------------------------------------


def state_dict() -> dict[str, torch.Tensor]:
    return {name: torch.arange(6.0).reshape(2, 3) + i for i, name in enumerate(["a", "b", "c.weight", "d"])}


def fresh(folder: Path, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint folder that is whole, and what is in it."""
    model, target = folder / f"saved-{kind}", folder / "model"
    if not model.exists():
        size, format = (48 if "sharded" in kind else "1GB"), ("bin" if "bin" in kind else "safetensors")
        save_checkpoint(state_dict(), model, max_shard_size=size, format=format)
        (model / "config.json").write_text("{}\n")
        save_checkpoint(state_dict(), model, max_shard_size=size, format=format)
        assert check_checkpoint(model, full=True) == []
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(model, target)
    return target, state_dict()


def samples(folder: Path) -> list[bytes]:
    """Small files in several formats."""
    place = folder / "samples"
    if not place.exists():
        place.mkdir()
        torch.save(state_dict(), place / "zip.pt")
        torch.save({"state_dict": state_dict(), "step": 3}, place / "old.pt", _use_new_zipfile_serialization=False)
        np.savez(place / "numpy.npz", **{name: tensor.numpy() for name, tensor in state_dict().items()})
        save_checkpoint(state_dict(), place / "safetensors")
        shutil.copy(place / "safetensors" / "model.safetensors", place / "model.safetensors")
    return [path.read_bytes() for path in sorted(place.iterdir()) if path.is_file()]


def hang(*_: Any) -> None:
    pytest.fail("one example took more than 30 seconds")


FUZZES = [fuzz_header, fuzz_index, fuzz_manifest, fuzz_folder, fuzz_any_file]


@pytest.mark.parametrize("examples", [150, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fuzz", FUZZES, ids=lambda fuzz: fuzz.__name__)
def test_fuzz(tmp_path: Path, fuzz: Callable[[st.DataObject, Path], None], examples: int) -> None:
    (tmp_path / "fuzz").mkdir()

    def run(data: st.DataObject) -> None:
        signal.alarm(30)
        try:
            fuzz(data, tmp_path / "fuzz")
        finally:
            signal.alarm(0)

    run.__qualname__ = fuzz.__name__
    before, handler = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, hang)
    profile = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize="FUZZ_RANDOM" not in os.environ,  # the same cases each time, unless one goes looking
        suppress_health_check=list(HealthCheck),
    )
    try:
        profile(given(st.data())(run))()
    finally:
        signal.signal(signal.SIGALRM, handler)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # in KB
    assert grown < 500_000, f"memory grew by {grown // 1000} MB"

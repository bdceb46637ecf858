"""Whatever is wrong with a checkpoint is said in one sentence that names the file and the tensor."""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mymodels.checkpoints import CheckpointError, check_checkpoint, open_checkpoint, save_checkpoint, write_manifest
from mymodels.checkpoints.safetensors_files import Problem, open_safetensors

INDEX, MANIFEST = "model.safetensors.index.json", "manifest.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.arange(16.0) + i for i, name in enumerate("abcd")}  # two to a shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tensors(), tmp_path / "model", max_shard_size=128)


def without_manifest(folder: Path) -> Path:
    (folder / MANIFEST).unlink()
    return folder


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_raw(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def is_reported(text: str, *names: str) -> None:
    assert "\n" not in text and len(text) < 7000, text
    assert all(name[:60] in text or repr(name)[1:60] in text for name in names), (names, text)


def check_finds(folder: Path, file: str, tensor: str = "", *, full: bool = False) -> list[Problem]:
    """Some `Problem` is about this file and tensor, and each is one sentence that names its own."""
    problems = check_checkpoint(folder, full=full)
    for problem in problems:
        is_reported(problem.message, problem.file, problem.tensor)
    about = [p for p in problems if p.file == file or file in p.message]
    assert [p for p in about if not tensor or p.tensor == tensor or repr(tensor) in p.message], (file, tensor, problems)
    return problems


def refused(path: Path, *names: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    is_reported(str(raised.value), *names)


def test_a_complete_checkpoint_has_no_problems(folder: Path) -> None:
    assert check_checkpoint(folder) == check_checkpoint(folder, full=True) == []
    assert check_checkpoint(without_manifest(folder), full=True) == []


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 60, -1])
@pytest.mark.parametrize("manifest", [True, False])
def test_truncated_shard(folder: Path, keep: int, manifest: bool) -> None:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:keep])
    check_finds(folder if manifest else without_manifest(folder), SECOND)
    refused(folder, SECOND)


def test_flipped_bytes(folder: Path) -> None:
    size = (folder / FIRST).stat().st_size
    flip(folder / FIRST, size - 100)  # in the data
    assert check_checkpoint(folder) == []
    check_finds(folder, FIRST, full=True)
    flip(folder / FIRST, size - 100)
    assert check_checkpoint(folder, full=True) == []
    start = (folder / FIRST).read_bytes().index(b'"a":')
    flip(folder / FIRST, start + 1)  # renames the tensor to a neighbour's name
    check_finds(folder, FIRST, "a")
    check_finds(without_manifest(folder), FIRST, "a")
    refused(folder, FIRST)


def test_missing_and_extra_shards(folder: Path) -> None:
    without_manifest(folder)
    save_file({"e": torch.ones(2)}, folder / "model-00003-of-00003.safetensors")
    check_finds(folder, "model-00003-of-00003.safetensors")
    (folder / SECOND).unlink()
    check_finds(folder, SECOND)
    refused(folder, SECOND)


def test_shards_without_their_index(folder: Path) -> None:
    (without_manifest(folder) / INDEX).unlink()
    refused(folder, FIRST)
    check_finds(folder, FIRST)


def test_a_tensor_the_index_does_not_name(folder: Path) -> None:
    without_manifest(folder)
    edit(folder / INDEX, lambda index: index["weight_map"].pop("b"))
    check_finds(folder, FIRST, "b")
    refused(folder, FIRST, "'b'")


def test_the_index_names_an_absent_tensor(folder: Path) -> None:
    without_manifest(folder)
    edit(folder / INDEX, lambda index: index["weight_map"].update(nowhere=SECOND))
    check_finds(folder, SECOND, "nowhere")
    refused(folder, SECOND, "'nowhere'")


def test_the_index_names_itself(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], index.name)
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"is an index, and model\.safetensors\.index\.json names it as a shard"):
        open_checkpoint(folder)


def test_the_index_names_the_wrong_shard(folder: Path) -> None:
    without_manifest(folder)
    edit(folder / INDEX, lambda index: index["weight_map"].update(a=SECOND))
    check_finds(folder, SECOND, "a")
    refused(folder, SECOND, "'a'")


def test_the_same_tensor_in_two_shards(folder: Path) -> None:
    without_manifest(folder)
    second = {"a": torch.zeros(16), "c": tensors()["c"], "d": tensors()["d"]}
    save_file(second, folder / SECOND)
    check_finds(folder, SECOND, "a")
    refused(folder, FIRST, "'a'")


# --- headers ---------------------------------------------------------------------------------------------------------

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HUGE = 2**62

HEADERS: dict[str, tuple[Any, bytes, str]] = {  # header, data, the tensor that is named
    "overlap": ({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12), "b"),
    "same place": ({"a": F32, "b": F32}, bytes(8), "b"),
    "gap": ({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20), "b"),
    "gap at the start": ({"a": F32 | {"data_offsets": [4, 12]}}, bytes(12), "a"),
    "too little data": ({"a": F32}, bytes(7), ""),
    "too much data": ({"a": F32}, bytes(9), ""),
    "out of range": ({"a": F32 | {"data_offsets": [0, 800], "shape": [200]}}, bytes(8), ""),
    "backwards": ({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8), "a"),
    "offsets of 2**70": ({"a": F32 | {"data_offsets": [2**70, 2**70 + 8]}}, bytes(8), "a"),
    "negative offsets": ({"a": F32 | {"data_offsets": [-8, 0]}}, bytes(8), "a"),
    "float offsets": ({"a": F32 | {"data_offsets": [0.0, 8.0]}}, bytes(8), "a"),
    "three offsets": ({"a": F32 | {"data_offsets": [0, 8, 8]}}, bytes(8), "a"),
    "unknown dtype": ({"a": F32 | {"dtype": "F31"}}, bytes(8), "a"),
    "lower-case dtype": ({"a": F32 | {"dtype": "f32"}}, bytes(8), "a"),
    "dtype no text": ({"a": F32 | {"dtype": ["F32"]}}, bytes(8), "a"),
    "wrong dtype": ({"a": F32 | {"dtype": "F64"}}, bytes(8), "a"),
    "negative shape": ({"a": F32 | {"shape": [-1, -2]}}, bytes(8), "a"),
    "float shape": ({"a": F32 | {"shape": [2.0]}}, bytes(8), "a"),
    "bool shape": ({"a": F32 | {"shape": [True, 2]}}, bytes(8), "a"),
    "text shape": ({"a": F32 | {"shape": "2"}}, bytes(8), "a"),
    "huge shape": ({"a": F32 | {"shape": [HUGE]}}, bytes(8), "a"),
    "huger shape": ({"a": F32 | {"shape": [HUGE] * 9}}, bytes(8), "a"),
    "very long shape": ({"a": F32 | {"shape": [HUGE] * 300}}, bytes(8), "a"),
    "size that wraps to 0": ({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}, b"", "a"),
    "huge but empty": ({"a": {"dtype": "F32", "shape": [HUGE, HUGE, 0], "data_offsets": [0, 0]}}, b"", ""),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "a"),
    "extra field": ({"a": F32 | {"strides": [1]}}, bytes(8), "a"),
    "entry no object": ({"a": [F32]}, bytes(8), "a"),
    "duplicate name": (b'{"a":%(x)s,"a":%(x)s}' % {b"x": json.dumps(F32).encode()}, bytes(8), "a"),
    "duplicate field": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "dtype"),
    "metadata no texts": ({"__metadata__": {"step": 3}, "a": F32}, bytes(8), ""),
    "metadata no object": ({"__metadata__": [], "a": F32}, bytes(8), ""),
    "list": ([F32], bytes(8), ""),
    "not JSON": (b'{"a":', b"", ""),
    "not UTF-8": (b'{"\xff":{}}', b"", ""),
    "NaN": (b'{"a":NaN}', b"", ""),
    "lone surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), ""),
    "deep": (b'{"a":' + b"[" * 100_000, b"", ""),
    "deep and closed": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", ""),
    "number of 5000 digits": (
        b'{"a":{"dtype":"F32","shape":[' + b"1" * 5000 + b'],"data_offsets":[0,8]}}',
        bytes(8),
        "",
    ),
    "name of two lines": ({"a\nb": F32 | {"dtype": "F31"}}, bytes(8), "a\\nb"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers(tmp_path: Path, kind: str) -> None:
    header, data, tensor = HEADERS[kind]
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as raised:
        open_safetensors(path)
    is_reported(str(raised.value), path.name, tensor)
    refused(path, path.name, tensor)
    check_finds(tmp_path, path.name)


@pytest.mark.parametrize("claim", [9, 2**20, 2**60, 2**64 - 1])
def test_a_header_that_claims_more_than_there_is(tmp_path: Path, claim: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", claim) + b"{}      "[:8])
    refused(path, path.name, f"{claim:,}")
    check_finds(tmp_path, path.name)


def test_a_very_long_shape_is_not_all_shown(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"a": F32 | {"shape": [HUGE] * 6_000}}, bytes(8))
    with pytest.raises(CheckpointError) as raised:
        open_safetensors(path)
    is_reported(str(raised.value)[:1000], path.name, "'a'")
    assert len(str(raised.value)) < 2000, "the whole shape is in the message"


@pytest.mark.parametrize("data", [b"", b"\0", bytes(8), bytes(1000), b"[" * 100_000, b'{"a":' * 50_000])
@pytest.mark.parametrize(
    "name", ["model.safetensors", INDEX, "pytorch_model.bin", "model.pt", "model.npz", "model.gguf"]
)
def test_files_of_nothing(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, name)
    check_finds(tmp_path, name)


@pytest.mark.parametrize("length", [123, 0x4B50, 0x7B20, 0x7B0A])
def test_a_length_that_looks_like_another_format(tmp_path: Path, length: int) -> None:
    """The first bytes of a safetensors file are its header's length: `{`, `PK` and ` {` are lengths too."""
    header = json.dumps({"a": F32}).encode()
    path = write_raw(tmp_path / "model.safetensors", header.ljust(length), struct.pack("<2f", 1, 2))
    assert open_safetensors(path)["a"].tolist() == [1, 2]
    assert open_checkpoint(path)["a"].tolist() == [1, 2]
    assert check_checkpoint(tmp_path, full=True) == []


@pytest.mark.parametrize("name", ["pt", "format", "__metadata__", "a/b", "", "ä\n", "."])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_odd_names_come_back_or_are_refused(tmp_path: Path, name: str, format: str) -> None:
    state_dict = {name: torch.ones(3), "other": torch.zeros(2)}
    try:
        save_checkpoint(state_dict, tmp_path / "model", format=format)
    except CheckpointError as error:
        is_reported(str(error), repr(name))
        assert name in ("__metadata__", ""), error
        return
    opened = open_checkpoint(tmp_path / "model")
    assert sorted(opened) == sorted(state_dict) and all(torch.equal(opened[n], state_dict[n]) for n in state_dict)


# --- the index -------------------------------------------------------------------------------------------------------

ENTRIES: dict[str, Any] = {
    "climbs": "../outside.safetensors",
    "climbs inside": f"sub/../../{FIRST}",
    "absolute": "/etc/passwd",
    "a link that leads out": "link.safetensors",
    "a link to itself": "loop.safetensors",
    "a Windows path": "..\\outside.safetensors",
    "empty": "",
    "the folder": ".",
    "a null byte": "a\0b",
    "two lines": "a\nb.safetensors",
    "stars": "a.**",
    "a very long name": "x" * 5000,
    "the index itself": INDEX,
    "a number": 3,
    "null": None,
    "a list": [FIRST],
    "an object": {"file": FIRST},
    "true": True,
}


@pytest.mark.parametrize("all_of_them", [True, False])
@pytest.mark.parametrize("kind", ENTRIES)
def test_index_entries(folder: Path, kind: str, all_of_them: bool) -> None:
    without_manifest(folder)
    save_file({"a": torch.ones(16)}, folder.parent / "outside.safetensors")
    (folder / "link.safetensors").symlink_to("../outside.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    changed = dict.fromkeys("abcd" if all_of_them else "a", ENTRIES[kind])
    edit(folder / INDEX, lambda index: index["weight_map"].update(changed))
    refused(folder, INDEX)
    check_finds(folder, INDEX)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        "null",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": ["a"]}',
        '{"weight_map": "abc"}',
        '{"weight_map": 3}',
        '{"weight_map": {"a": "x", "a": "x"}}',
        '{"weight_map": {"a": "x"}, "weight_map": {}}',
        '{"weight_map": {"\\ud800": "x"}}',
        '{"weight_map": {"a": "\\ud800"}}',
        '{"weight_map": {"a": NaN}}',
        '{"weight_map": ' + "[" * 100_000,
        '{"weight_map": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}",
        '{"weight_map": {"a": ' + "1" * 5000 + "}}",
    ],
    ids=range(17),
)
def test_index_files(folder: Path, text: str) -> None:
    (without_manifest(folder) / INDEX).write_text(text)
    refused(folder, INDEX)
    check_finds(folder, INDEX)


@pytest.mark.parametrize(
    "total", [0, 255, 256.5, -256, "256", "256\n", [256], {}, True, 1e300, 10**4000], ids=range(11)
)
def test_wrong_total_size(folder: Path, total: Any) -> None:
    without_manifest(folder)
    edit(folder / INDEX, lambda index: index["metadata"].update(total_size=total))
    check_finds(folder, INDEX)


# --- the manifest ----------------------------------------------------------------------------------------------------

ENTRY = {"sha256": "0" * 64, "size": 1}
MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str, bool]] = {  # change, file that is named, needs full
    "wrong size": (lambda files: files[FIRST].update(size=files[FIRST]["size"] + 1), FIRST, False),
    "wrong hash": (lambda files: files[FIRST].update(sha256="0" * 64), FIRST, True),
    "short hash": (lambda files: files[FIRST].update(sha256="0"), MANIFEST, False),
    "hash no text": (lambda files: files[FIRST].update(sha256=[0] * 64), MANIFEST, False),
    "float size": (lambda files: files[FIRST].update(size=float(files[FIRST]["size"])), MANIFEST, False),
    "negative size": (lambda files: files[FIRST].update(size=-1), MANIFEST, False),
    "huge size": (lambda files: files[FIRST].update(size=10**4000), FIRST, False),
    "no size": (lambda files: files[FIRST].pop("size"), MANIFEST, False),
    "entry no object": (lambda files: files.update({FIRST: 3}), MANIFEST, False),
    "climbs": (lambda files: files.update({"../outside": ENTRY}), MANIFEST, False),
    "absolute": (lambda files: files.update({"/etc/passwd": ENTRY}), MANIFEST, False),
    "leads out": (lambda files: files.update({"link": ENTRY}), MANIFEST, False),
    "leads to itself": (lambda files: files.update({"loop": ENTRY}), MANIFEST, False),
    "empty name": (lambda files: files.update({"": ENTRY}), MANIFEST, False),
    "null byte": (lambda files: files.update({"a\0": ENTRY}), MANIFEST, False),
    "two lines": (lambda files: files.update({"a\nb": ENTRY}), MANIFEST, False),
    "very long name": (lambda files: files.update({"x" * 5000: ENTRY}), MANIFEST, False),
    "file as folder": (lambda files: files.update({f"{FIRST}/x": ENTRY}), f"{FIRST}/x", False),
    "folder": (lambda files: files.update({"sub": ENTRY}), "sub", False),
    "missing file": (lambda files: files.update(gone=ENTRY), "gone", False),
    "unlisted file": (lambda files: files.pop(SECOND), SECOND, False),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifest_entries(folder: Path, kind: str) -> None:
    change, file, full = MANIFESTS[kind]
    (folder.parent / "outside").write_text("x")
    (folder / "sub").mkdir()
    if kind == "leads out":
        (folder / "link").symlink_to("../outside")
    if kind == "leads to itself":
        (folder / "loop").symlink_to("loop")
    edit(folder / MANIFEST, lambda manifest: change(manifest["files"]))
    assert not full or check_checkpoint(folder) == []
    check_finds(folder, file, full=full)
    check_finds(folder, file, full=True)


def test_new_and_lost_files(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "new.txt").write_text("new")
    check_finds(folder, "sub/new.txt")
    write_manifest(folder)
    assert check_checkpoint(folder, full=True) == []
    (folder / "sub" / "new.txt").write_text("nEw")
    assert check_checkpoint(folder) == []
    check_finds(folder, "sub/new.txt", full=True)
    (folder / "sub" / "new.txt").unlink()
    check_finds(folder, "sub/new.txt")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {}}',
        '{"files": {"a": {"size": 1}, "a": {}}}',
        '{"files": {}, "files": {}}',
        '{"files": {"a": {"size": 1, "size": 1, "sha256": ""}}}',
        '{"files": {"\\ud800": {}}}',
        '{"files": NaN}',
        '{"files": ' + "[" * 100_000,
        '{"files": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"files": ' + "1" * 5000 + "}",
    ],
    ids=range(13),
)
def test_manifest_files(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    check_finds(folder, MANIFEST)


# --- the data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "bfloat16", "complex64", "float8_e5m2", "float8_e4m3fn"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, format: str, dtype: str, value: float) -> None:
    bad = torch.ones(5).to(getattr(torch, dtype))
    assert check_checkpoint(save_checkpoint({"good": bad}, tmp_path / "good", format=format), full=True) == []
    bad[3] = value
    folder = save_checkpoint({"good": torch.ones(3), "bad": bad}, tmp_path / "bad", format=format)
    assert check_checkpoint(folder) == []
    if dtype == "float8_e4m3fn" and value == value:
        return  # it has no infinity
    file = "model.safetensors" if format == "safetensors" else "pytorch_model.bin"
    problems = check_finds(folder, file, "bad", full=True)
    assert len(problems) == 1 and (" 1 NaN" if value != value else " 1 infinite") in problems[0].message


def test_the_data_is_read_though_another_file_changed(tmp_path: Path) -> None:
    weights = {"good": torch.ones(9), "bad": torch.full((9,), float("nan"))}
    folder = save_checkpoint(weights, tmp_path / "model", max_shard_size=40)
    (folder / "README.md").write_text("new")
    assert {problem.file for problem in check_checkpoint(folder, full=True)} == {
        "README.md",
        "model-00002-of-00002.safetensors",
    }


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_a_flipped_byte_in_a_zip_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save({"a": torch.full((64,), 1.5), "b": torch.arange(64)}, path)
    assert check_checkpoint(tmp_path, full=True) == check_checkpoint(path, full=True) == []
    flip(path, path.read_bytes().index(struct.pack("<f", 1.5) * 8) + 40)
    assert check_checkpoint(tmp_path) == []
    check_finds(tmp_path, name, full=True)
    check_finds(path, name, full=True)


@pytest.mark.parametrize("fields", ["flags", "method", "crc", "size", "name", "offset"])
@pytest.mark.parametrize("record", ["local", "central"])
def test_a_damaged_table_of_a_zip_file(tmp_path: Path, fields: str, record: str) -> None:
    """Wherever a record of the zip file is damaged, it is a `Problem` or without effect, never another error."""
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(4)}, path)
    data = bytearray(path.read_bytes())
    local = {"flags": 6, "method": 8, "crc": 14, "size": 18, "name": 30, "offset": 26}
    central = {"flags": 8, "method": 10, "crc": 16, "size": 20, "name": 46, "offset": 42}
    starts = [match.start() for match in re.finditer(b"PK\3\4" if record == "local" else b"PK\1\2", data)]
    for start in starts:
        for bit in (1, 0x80):
            damaged = bytearray(data)
            damaged[start + (local if record == "local" else central)[fields]] ^= bit
            path.write_bytes(damaged)
            for problem in check_checkpoint(path, full=True):
                is_reported(problem.message, path.name)


@pytest.mark.parametrize(
    "data",
    [
        b"PK\3\4" + bytes(30),
        b"PK\5\6" + bytes(18),
        b"PK" + bytes(100) + b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 3, 3, 50, 60, 0),
        b"PK" + bytes(100) + b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 3, 3, 2**31, 2**31, 0),
        b"\x0a" + b"\xff" * 9 + b"\x01",  # protobuf: a field of 2**64 bytes, of 2**70, of 2**63
        b"\x0a" + b"\xff" * 9 + b"\x7f" + b"x" * 9,
        b"\x0a" + b"\xff" * 8 + b"\x7f" + b"x" * 9,
        b"GGUF" + b"\xff" * 60,
        b"GGUF\3\0\0\0" + b"\xff" * 60,
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" + b"." * 40,
        b"\x80\x02}.",
    ],
    ids=range(11),
)
@pytest.mark.parametrize("name", ["model.bin", "model.onnx", "model"])
def test_other_formats(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, name)
    for problem in check_checkpoint(tmp_path / name, full=True):
        is_reported(problem.message, name)
    assert check_checkpoint(tmp_path / name)


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_checkpoint(tmp_path / "nowhere")
    refused(tmp_path, os.fspath(tmp_path))
    check_finds(tmp_path, tmp_path.name)

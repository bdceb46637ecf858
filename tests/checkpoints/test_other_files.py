"""What is not a checkpoint is said in one sentence; the Hub's cache is read, links out of a folder are not."""

import gzip
import io
import pickle
import random
import struct
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from states import (
    LEGACY_DTYPES,
    SAFETENSORS_DTYPES,
    assert_reads,
    one_sentence,
    sharded_safetensors,
    source,
    state_dict,
)

from mymodels.checkpoints import CheckpointError, open_checkpoint


def saved_bytes(**options) -> bytes:
    torch.save(source(LEGACY_DTYPES), buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def numpy_bytes() -> bytes:
    np.savez(buffer := io.BytesIO(), a=np.arange(50), b=np.arange(60))
    return buffer.getvalue()


WRONG = {
    "empty.bin": lambda: b"",
    "pointer.safetensors": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "page.bin": lambda: b"<!DOCTYPE html>\n<html><body>Not found</body></html>",
    "lower.pt": lambda: b"\n<html lang=en><head></head></html>",
    "keras.h5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(600),
    "packed.pt": lambda: gzip.compress(saved_bytes()),
    "cut.pt": lambda: saved_bytes()[:-200],
    "half.pt": lambda: saved_bytes()[: len(saved_bytes()) // 2],
    "legacy_cut.pt": lambda: saved_bytes(_use_new_zipfile_serialization=False)[:-20],
    "legacy_head.pt": lambda: saved_bytes(_use_new_zipfile_serialization=False)[:60],
    "cut.safetensors": lambda: safetensors.torch.save(source(SAFETENSORS_DTYPES))[:-5],
    "head.safetensors": lambda: safetensors.torch.save(source(SAFETENSORS_DTYPES))[:40],
    "seven.safetensors": lambda: b"\x10\0\0\0\0\0\0",
    "random.bin": lambda: random.Random(3).randbytes(5000),
    "random.safetensors": lambda: random.Random(4).randbytes(5000),
    "random.onnx": lambda: random.Random(5).randbytes(5000),
    "zeros.bin": lambda: bytes(5000),
    "text.txt": lambda: b"These are not the weights you are looking for.\n" * 20,
    "bare.pkl": lambda: pickle.dumps({"w": [1.0, 2.0]}),
    "old.pkl": lambda: pickle.dumps({"w": [1.0, 2.0]}, protocol=0),
    "config.json": lambda: b'{"model_type": "gpt2", "n_embd": 32}',
    "list.json": lambda: b"[1, 2]",
    "cut.json": lambda: b'{"weight_map": {"w": "a.saf',
    "map.json": lambda: b'{"weight_map": []}',
    "cut.npz": lambda: numpy_bytes()[:-100],
    "half.npz": lambda: numpy_bytes()[:900],
    "no_tensors.pt": lambda: (torch.save({"epoch": 3}, buffer := io.BytesIO()), buffer.getvalue())[1],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRONG[name]())
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    one_sentence(caught.value, str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("empty.bin", "empty"),
        ("pointer.safetensors", "git lfs pull"),
        ("page.bin", "web page"),
        ("packed.pt", "unpack"),
        ("cut.pt", "truncated"),
        ("bare.pkl", "bare pickle"),
        ("config.json", "weight_map"),
    ],
)
def test_wrong_file_says_what_it_is(name: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRONG[name]())
    with pytest.raises(CheckpointError, match=hint):
        open_checkpoint(tmp_path / name)


def test_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="a zip archive of another kind"):
        open_checkpoint(tmp_path / "model.pt")


def test_nothing_there(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    for path in (tmp_path / "missing", tmp_path / "missing.pt", "missing.safetensors"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            open_checkpoint(path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nobody/nothing") as caught:
        open_checkpoint("nobody/nothing")
    one_sentence(caught.value, "nobody/nothing")


def test_folder_that_is_not_clear(tmp_path: Path) -> None:
    sharded_safetensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"shards .* but not their index"):
        open_checkpoint(tmp_path)
    torch.save(state_dict(), tmp_path / "a.pt")
    (inner := tmp_path / "run" / "best").mkdir(parents=True)
    torch.save(state_dict(), inner / "a.pt")
    torch.save(state_dict(), inner / "b.pt")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(a.pt, b.pt\): name the file"):
        open_checkpoint(inner)
    with pytest.raises(CheckpointError, match=f"did you mean {inner}"):
        open_checkpoint(tmp_path / "run")


def hub_cache(cache: Path, name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A repo in the layout of `huggingface_hub`'s cache: a snapshot of links to blobs."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(sha := "0123456789abcdef0123456789abcdef01234567")
    (blobs := repo / "blobs").mkdir()
    (snapshot := repo / "snapshots" / sha).mkdir(parents=True)
    (staging := cache / "staging").mkdir()
    _, tensors = sharded_safetensors(staging)
    for i, file in enumerate(sorted(staging.iterdir())):
        file.rename(blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:064x}")
    return snapshot, tensors


def test_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    snapshot, tensors = hub_cache(tmp_path, "x")
    assert_reads(open_checkpoint(snapshot), tensors)
    assert_reads(open_checkpoint(snapshot / "model.safetensors.index.json"), tensors)


@pytest.mark.parametrize("name", ["someone/tiny", "tiny"])
def test_repo_id_offline(name: str, tmp_path: Path, monkeypatch) -> None:
    _, tensors = hub_cache(tmp_path / "hub", name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert_reads(open_checkpoint(name), tensors)
    assert_reads(open_checkpoint(name, revision="main"), tensors)
    with pytest.raises(FileNotFoundError, match=name):
        open_checkpoint(name, revision="other")


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    snapshot, _ = hub_cache(tmp_path, "x")
    shard = next(snapshot.glob("*.safetensors"))
    (tmp_path / "secret").write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{shard.name}.*leads out of the folder"):
        open_checkpoint(snapshot)


def test_zip_over_several_disks(tmp_path: Path) -> None:
    """zipfile itself raises when asked whether this is a zip file."""
    locator = b"PK\x06\x07" + struct.pack("<LQL", 1, 0, 9)
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 0, 0, 0, 0, 0)
    for head in (b"PK\x03\x04", b"\x80\x02"):
        (tmp_path / "model.pt").write_bytes(head + bytes(60) + locator + end)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path / "model.pt")
        one_sentence(caught.value, "model.pt")


def test_a_revision_of_what_lies_here_is_refused(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "model.pt")
    for path in (tmp_path, tmp_path / "model.pt"):
        with pytest.raises(CheckpointError, match="--revision v1") as caught:
            open_checkpoint(path, revision="v1")
        one_sentence(caught.value, str(path))

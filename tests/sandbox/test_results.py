"""Poisoned results: what hostile code may leave in its scratch folder, to be read by the process that started it.

Each is harmful to a plain reader, which the test shows, and refused by `mymodels.sandbox.results`.
"""

import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mymodels import sandbox
from mymodels.sandbox import results

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the box needs a Unix")
SECRET = "canary: a secret"


class Ran:
    """Unpickled, it makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def opens_at_once(path: Path) -> bool:
    """Whether another process reads 10 MB of a file, or all of it, within a second."""
    code = "import sys; open(sys.argv[1], 'rb').read(10_000_000)"
    try:
        return (
            subprocess.run([sys.executable, "-ISc", code, path], timeout=1, stderr=subprocess.DEVNULL).returncode == 0
        )
    except subprocess.TimeoutExpired:
        return False


# ---- files that are something else


def make_link(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def make_link_to_device(path: Path, secret: Path) -> None:
    path.symlink_to("/dev/zero")


def make_fifo(path: Path, secret: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path, secret: Path) -> None:
    path.mkdir()


def make_socket(path: Path, secret: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # its whole path may be too long
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def make_dangling_link(path: Path, secret: Path) -> None:
    path.symlink_to(path.parent / "nothing")


def make_loop(path: Path, secret: Path) -> None:
    path.symlink_to(path)


def make_terabyte(path: Path, secret: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize(
    "make",
    [make_link, make_link_to_device, make_fifo, make_folder, make_socket, make_dangling_link, make_loop, make_terabyte],
)
def test_a_result_that_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path, Path], None]) -> None:
    secret, path, copy = tmp_path / "id_rsa", tmp_path / "result", tmp_path / "copy"
    secret.write_text(SECRET)
    make(path, secret)
    if make is make_link:
        assert path.read_text() == SECRET
    elif make in (make_link_to_device, make_terabyte):
        with path.open("rb") as file:
            assert file.read(10_000_000) == bytes(10_000_000)  # and so on
    else:
        assert not opens_at_once(path)
    began = time.monotonic()
    for read in (results.read_text, results.read_json, results.read_tensors):
        with pytest.raises(results.UntrustedResult, match="result"):
            read(path)
    if make is not make_terabyte:
        with pytest.raises(results.UntrustedResult, match="result"):
            results.copy_file(path, copy)
        assert not copy.exists()
    assert time.monotonic() - began < 1


# ---- content


def test_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_bytes(pickle.dumps(Ran(tmp_path / "ran")))
    with path.open("rb") as file:
        pickle.load(file)
    assert (tmp_path / "ran").is_dir()
    (tmp_path / "ran").rmdir()
    for name, write in (
        ("pickle", lambda: path.write_bytes(pickle.dumps(Ran(tmp_path / "ran")))),
        ("torch", lambda: torch.save({"a": Ran(tmp_path / "ran")}, path)),
    ):
        write()
        for read in (results.read_json, results.read_tensors):
            with pytest.raises(results.UntrustedResult):
                read(path)
        assert not (tmp_path / "ran").exists(), name


@pytest.mark.parametrize(
    "text",
    ["NaN", '{"loss": Infinity}', "[-Infinity]", "1e999", "-1e999", "9" * 100_000, "[" * 100_000, '{"a":' * 60 + "1" + "}" * 60,
     "[" * 60 + "]" * 60, "", "{", '{"a": 1} {"a": 2}', "\ufeff{}", "{'a': 1}", '{"passed": false, "passed": true}',
     '{"a": [{"b": 1, "b": 2}]}', '"a\x00b"'],
    ids=lambda text: text[:20].encode("unicode_escape").decode(),
)  # fmt: skip
def test_json_beyond_the_standard_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "result").write_text(text)
    with pytest.raises(results.UntrustedResult):
        results.read_json(tmp_path / "result")


def test_healthy_json_is_read(tmp_path: Path) -> None:
    value = {
        "a": [1, 2.5, -1e300, "é", None, True, {"b": {}}],
        "deep": [[[[["x"]]]]],
        "passed": False,
        "many": [*range(300_000)],
    }
    (tmp_path / "result").write_text(json.dumps(value))
    assert results.read_json(tmp_path / "result") == value


def test_json_takes_no_memory_out_of_proportion(tmp_path: Path) -> None:
    """Lists of empty lists take thirty times their text."""
    path = tmp_path / "result"
    path.write_text("[" + "[]," * 5_000_000 + "[]]")
    tracemalloc.start()
    try:
        with pytest.raises(results.UntrustedResult, match="result"):
            results.read_json(path)
        assert tracemalloc.get_traced_memory()[1] < 120_000_000  # bytes; the lists would take 320 MB
    finally:
        tracemalloc.stop()


def header(tensors: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = (tensors if isinstance(tensors, str) else json.dumps(tensors)).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    {
        "header longer than the file": header({}, size=10**6),
        "header of exabytes": header({}, size=2**63),
        "header of the largest number": header({}, size=2**64 - 1),
        "data beyond the end": header({"a": tensor([100], 0, 400)}, bytes(8)),
        "a shape of terabytes": header({"a": tensor([2**40], 0, 2**42)}, bytes(8)),
        "a shape that overflows": header({"a": tensor([2**32, 2**32], 0, 0)}),
        "less data than the shape": header({"a": tensor([100], 0, 8)}, bytes(8)),
        "tensors that overlap": header({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
        "a hole": header({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)),
        "an end before the begin": header({"a": tensor([1], 4, 0)}, bytes(4)),
        "negative numbers": header({"a": tensor([-1], -4, 0)}, bytes(4)),
        "a dtype that is none": header({"a": tensor([1], 0, 4, "F99")}, bytes(4)),
        "no JSON": header("{{{{"),
        "nested": header("[" * 10_000),
        "a list": header([]),
        "empty": b"",
        "seven bytes": bytes(7),
    }.items(),
    ids=lambda item: item[0],
)
def test_lying_safetensors_are_refused(tmp_path: Path, content: tuple[str, bytes]) -> None:
    (tmp_path / "result").write_bytes(content[1])
    with pytest.raises(results.UntrustedResult, match="result"):
        results.read_tensors(tmp_path / "result")


def test_messages_of_hostile_names_have_no_control_characters(tmp_path: Path) -> None:
    """They would be commands to the terminal."""
    hostile = "\x1b]0;title\x07\x1b[2J"
    (tmp_path / "result").write_bytes(header({hostile: tensor([1], 4, 0, hostile)}, bytes(4)))
    with pytest.raises(results.UntrustedResult) as caught:
        results.read_tensors(tmp_path / "result")
    assert str(caught.value).isprintable()


# ---- races


@pytest.mark.parametrize("read", ["read_text", "read_tensors", "copy_file"])
def test_a_file_swapped_for_a_link_while_it_is_read(tmp_path: Path, read: str) -> None:
    """The process is over when its results are read; this is a second wall."""
    secret, path = tmp_path / "secret", tmp_path / "result"
    plain, link = tmp_path / "plain", tmp_path / "link"
    save_file({"secret": torch.ones(1)}, secret)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            save_file({"own": torch.zeros(1)}, plain)
            os.replace(plain, path)
            link.symlink_to(secret)
            os.replace(link, path)

    thread = threading.Thread(target=swap)
    thread.start()
    seen = {"own": 0, "secret": 0, "refused": 0}
    fooled = 0
    end = time.monotonic() + 1.0
    try:
        while time.monotonic() < end:
            if not fooled and path.exists() and path.is_file():
                fooled += b"secret" in path.read_bytes()
            try:
                if read == "read_tensors":
                    text = " ".join(results.read_tensors(path))
                elif read == "copy_file":
                    results.copy_file(path, tmp_path / "copy")
                    text = (tmp_path / "copy").read_text("latin-1")
                else:
                    text = results.read_text(path)
            except results.UntrustedResult:
                seen["refused"] += 1
            else:
                seen["secret" if "secret" in text else "own"] += 1
    finally:
        stop.set()
        thread.join()
    assert fooled, "the control: a plain reader was never fooled"
    assert not seen["secret"], seen
    assert seen["own"] and seen["refused"], seen


# ---- deleting


def deep(folder: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(folder)
        for _ in range(1100):  # deeper than Python's recursion, and than a path is long
            os.mkdir("folder")
            os.chdir("folder")
        Path("file").write_text("x")
    finally:
        os.chdir(here)


def locked(folder: Path) -> None:
    (folder / "a/b/c").mkdir(parents=True)
    (folder / "a/b/c/file").write_text("x")
    for path in (folder / "a/b/c", folder / "a/b", folder / "a", folder):
        path.chmod(0)


def odd_names(folder: Path) -> None:
    for name in (b"\xff\xfe", b"-rf", b"new\nline", b"\x1b[2J", b" ", b"x" * 255):
        with open(os.path.join(os.fsencode(folder), name), "wb"):
            pass


def links_out(folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent / "kept")
    (folder / "inner").mkdir()
    (folder / "inner/link").symlink_to("../../kept")
    (folder / "root").symlink_to("/")


@pytest.mark.parametrize("leave", [deep, locked, odd_names, links_out])
def test_a_scratch_folder_is_deleted_whatever_is_in_it(tmp_path: Path, leave: Callable[[Path], None]) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text(SECRET)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    leave(scratch)
    mode = (tmp_path / "kept").stat().st_mode
    results.delete(scratch)
    assert not scratch.exists()
    assert (tmp_path / "kept/file").read_text() == SECRET
    assert (tmp_path / "kept").stat().st_mode == mode


def test_what_the_box_prints_is_kept_as_bytes_and_bounded(tmp_path: Path) -> None:
    code = "import sys; sys.stdout.buffer.write(b'\\xff\\x1b[2J' * 1_000_000)"
    ended = sandbox.run(["-c", code], scratch=tmp_path, seconds=60)
    assert ended.returncode == 0 and 0 < len(ended.stdout) <= 1_000_000
    assert isinstance(io.BytesIO(ended.stdout).read(), bytes)

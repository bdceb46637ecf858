"""Hostile answers to a process that has a model in the box: raw bytes where messages should be, folders that change."""

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mymodels.hub import isolated_model
from mymodels.hub.isolated import exchange
from mymodels.sandbox import results

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the box needs Linux")
LIMIT = 10_000_000  # bytes of tensors in a message


class Hostile:
    """The other end of a channel, which writes what it likes."""

    def __init__(self) -> None:
        incoming, self.pipe = os.pipe()
        self.asked, outgoing = os.pipe()
        self.memory, self._requests = exchange.shared_memory("answers"), exchange.shared_memory("requests")
        self.channel = exchange.Channel(incoming, outgoing, self.memory, self._requests, largest=LIMIT)
        self._writers: list[threading.Thread] = []

    def close(self) -> None:
        os.close(self.channel.incoming)  # which ends those who still write
        for writer in self._writers:
            writer.join()
        for descriptor in (self.pipe, self.asked, self.channel.outgoing, self.memory, self._requests):
            os.close(descriptor)

    def write(self, value: Any) -> None:
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.raw(struct.pack("<Q", len(text)) + text)

    def raw(self, data: bytes) -> None:
        def write() -> None:
            left = data
            while left:
                left = left[os.write(self.pipe, left[:65536]) :]

        self.start(write)

    def start(self, write: Callable[[], None]) -> None:
        """Let a thread write to the pipe, until nobody reads it."""

        def until_closed() -> None:
            with contextlib.suppress(BrokenPipeError):
                write()

        self._writers.append(threading.Thread(target=until_closed, daemon=True))
        self._writers[-1].start()


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    with contextlib.closing(Hostile()) as other:
        yield other


def tensor(offset: Any, shape: Any, dtype: Any = "uint8") -> dict:
    return {"tensor": [offset, shape, dtype]}


@pytest.mark.parametrize(
    "value",
    [
        tensor(0, [LIMIT + 1]),
        tensor(0, [2**40]),
        tensor(0, [2**31, 2**31, 2**31]),
        tensor(0, [-1]),
        tensor(-8, [1]),
        tensor(2**62, [1]),
        tensor(0.5, [1]),
        tensor(0, [True, 4]),
        tensor(0, ["4"]),
        tensor(0, {"a": 1}),
        tensor(0, [1] * 65),
        tensor(0, [1], "object"),
        tensor(0, [1], ["uint8"]),
        tensor(2, [1], "float16 "),
        {"list": [tensor(0, [LIMIT // 2 + 1])] * 2},
        {"list": [tensor(0, [LIMIT])] * 20_000},
        {"mapping": [["a", tensor(0, [LIMIT // 2 + 1])], ["b", {"tuple": [tensor(0, [LIMIT // 2 + 1])]}]]},
        {"tensor": []},
        {"tensor": None},
        {"pickle": "gASV"},
        {"list": 5},
        {"mapping": [[["a"], 1]]},
        {"mapping": [["a"]]},
        {"mapping": [["a", 1], ["a", 2]]},
        {"handle": "9" * 5000},
        {"float": [1]},
        {"dtype": "load"},
        {},
        {"list": [], "tuple": []},
        [1, 2],
        b"NaN",
        b"9" * 100_000,
        b"[" * 100_000,
        b'{"list":[' * 5000,
        b"\xff\xfe",
        b"",
        b'{"list": [1]}garbage',
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_messages_are_refused(hostile: Hostile, value: Any) -> None:
    os.ftruncate(hostile.memory, LIMIT)
    hostile.write(value)
    with pytest.raises(exchange.InvalidMessage):
        hostile.channel.receive(60)


def test_sound_messages_are_read(hostile: Hostile) -> None:
    """The same forms, within the bounds."""
    os.ftruncate(hostile.memory, LIMIT)
    hostile.write(
        {"list": [tensor(0, [LIMIT // 2]), {"mapping": [["a", tensor(8, [2, 2], "float32")]]}, tensor(0, [0])]}
    )
    big, mapping, empty = hostile.channel.receive(5)
    assert big.shape == (LIMIT // 2,) and torch.equal(mapping["a"], torch.zeros(2, 2)) and empty.shape == (0,)


def test_a_message_of_exabytes_is_refused_before_it_is_read(hostile: Hostile) -> None:
    for size in (2**63, 2**64 - 1, exchange.LARGEST_MESSAGE + 1):
        hostile.raw(struct.pack("<Q", size))
        with pytest.raises(exchange.InvalidMessage, match="bytes"):
            hostile.channel.receive(5)


def test_a_message_that_comes_in_drops_ends_on_time(hostile: Hostile) -> None:
    def drip() -> None:
        os.write(hostile.pipe, struct.pack("<Q", 1000))
        for _ in range(50):
            os.write(hostile.pipe, b" ")
            time.sleep(0.1)

    hostile.start(drip)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        hostile.channel.receive(0.5)
    assert time.monotonic() - began < 2


def test_a_tensor_is_a_copy_that_cannot_change_later(hostile: Hostile) -> None:
    os.ftruncate(hostile.memory, LIMIT)
    hostile.write(tensor(0, [4]))
    received = hostile.channel.receive(5)
    os.pwrite(hostile.memory, b"\1\2\3\4", 0)
    assert received.tolist() == [0, 0, 0, 0]


def test_shared_memory_cannot_be_made_smaller(hostile: Hostile) -> None:
    """A reader of what is gone would die of SIGBUS."""
    os.ftruncate(hostile.memory, LIMIT)
    with pytest.raises(PermissionError):
        os.ftruncate(hostile.memory, 0)


def test_names_of_a_config_hide_no_method() -> None:
    values = {"model_type": "x", "to_dict": 1, "__class__": "x", "save_pretrained": 2, "hidden_size": 4, "a b": 1}
    config = isolated_model._config(values, {"to_json_file": "hidden_size", "__init__": "a", "width": "hidden_size"})
    assert callable(config.to_dict) and callable(config.save_pretrained) and callable(config.to_json_file)
    assert config.width == config.hidden_size == 4 and config.to_dict()["hidden_size"] == 4


# ---- copying a folder that hostile code is still writing


SWAP = """
import os, sys
while True:
    for name in "abc":
        os.rename(f"saved/{name}", f"folder-{name}")
        os.rename(f"link-{name}", f"saved/{name}")
        os.rename(f"saved/{name}", f"link-{name}")
        os.rename(f"folder-{name}", f"saved/{name}")
"""


def test_a_folder_swapped_for_a_link_while_it_is_copied(tmp_path: Path) -> None:
    """`save_pretrained` copies while the code that wrote the folder goes on."""
    secret, saved = tmp_path / "secret", tmp_path / "saved"
    secret.mkdir()
    (secret / "file").write_text("canary")
    for name in "abc":
        (saved / name).mkdir(parents=True)
        (saved / name / "file").write_text("own")
        (tmp_path / f"link-{name}").symlink_to(secret)

    def copy_by_path(target: Path) -> None:
        """With a look at each folder before."""
        target.mkdir()
        for name in "abc":
            with contextlib.suppress(OSError):
                if not (saved / name).is_symlink():
                    (target / name).write_bytes((saved / name / "file").read_bytes())

    def copy(target: Path) -> None:
        target.mkdir()
        with contextlib.suppress(results.UntrustedResult):
            results.copy_folder(saved, target, 10**6)

    swapping = subprocess.Popen([sys.executable, "-ISc", SWAP], cwd=tmp_path)
    found: dict[str, list[bytes]] = {"copy_by_path": [], "copy": []}
    end = time.monotonic() + 6
    try:
        while time.monotonic() < end and (b"canary" not in found["copy_by_path"] or len(found["copy"]) < 20):
            for work in (copy_by_path, copy):
                target = tmp_path / f"{work.__name__}-{len(found['copy_by_path'])}-{time.monotonic_ns()}"
                work(target)
                found[work.__name__] += [file.read_bytes() for file in target.rglob("*") if file.is_file()]
    finally:
        swapping.kill()
        swapping.wait()
    assert b"canary" in found["copy_by_path"], "the control: copying by path was never fooled"
    assert set(found["copy"]) == {b"own"}


def test_a_folder_is_copied_with_bounds(tmp_path: Path) -> None:
    saved, target = tmp_path / "saved", tmp_path / "target"
    (saved / "code").mkdir(parents=True)
    (saved / "config.json").write_text("{}")
    (saved / "code" / "model.py").write_text("x = 1")
    (saved / "code" / "model.py").chmod(0o4777)
    target.mkdir()
    results.copy_folder(saved, target, 1000)
    assert (target / "code" / "model.py").read_text() == "x = 1" and (target / "config.json").read_text() == "{}"
    assert not (target / "code" / "model.py").stat().st_mode & 0o7111
    for number in range(8):  # sparse: they take no space there
        with (saved / f"{number}").open("wb") as file:
            file.truncate(2**30)
    (tmp_path / "other").mkdir()
    with pytest.raises(results.UntrustedResult, match="1000 bytes"):
        results.copy_folder(saved, tmp_path / "other", 1000)


@pytest.mark.parametrize("kind", ["link", "linked folder", "fifo", "deep"])
def test_a_folder_with_something_else_is_not_copied(tmp_path: Path, kind: str) -> None:
    saved, target = tmp_path / "saved", tmp_path / "target"
    saved.mkdir()
    target.mkdir()
    if kind == "fifo":
        os.mkfifo(saved / "x")
    elif kind == "deep":
        (saved / "/".join(["d"] * 60)).mkdir(parents=True)
    else:
        (saved / "x").symlink_to("/etc/passwd" if kind == "link" else "/etc")
    with pytest.raises(results.UntrustedResult):
        results.copy_folder(saved, target, 10**6)

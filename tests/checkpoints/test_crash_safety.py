"""Saving survives SIGKILL at any moment, full disks, read-only folders and other writers: old or new, never between."""

import contextlib
import ctypes
import errno
import gc
import itertools
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tqdm import tqdm

from mymodels.checkpoints import CheckpointError, check_checkpoint, open_checkpoint, save_checkpoint, save_torch_file
from mymodels.checkpoints import atomic_write as replacing_module
from mymodels.checkpoints.atomic_write import repair, replace_file, replace_folder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

CONFIG = '{"model_type": "none"}\n'
Content = dict[str, bytes]


def tensors(value: int, *, width: int = 1024, count: int = 4) -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.full((4, width), float(value * 100 + i)) for i in range(count)}


def content(state_dict: Any) -> Content:
    return {name: state_dict[name].contiguous().numpy().tobytes() for name in sorted(state_dict)}


def litter(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if ".saving-" in name]


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder with its mode and bytes, and every folder with its mode."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


def one_sentence(error: BaseException, *names: object) -> None:
    text = str(error)
    assert "\n" not in text and 20 < len(text) < 600, text
    assert all(str(name) in text for name in names), text


# --- processes -------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """The child did not come to its end; the argument is the signal."""


class Child(NamedTuple):
    pid: int
    pipe: int

    def result(self) -> Any:
        """What the child's work returned; raises what it raised, or `Killed`."""
        with open(self.pipe, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            raise Killed(os.WTERMSIG(status))
        value, error = pickle.loads(data)
        if error is not None:
            raise error
        return value


def fork(work: Callable[[], Any]) -> Child:
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        return Child(pid, reading)
    gc.disable()  # it would touch, and so copy, all of the parent's memory
    tqdm.set_lock(threading.RLock())  # its own is shared between processes: killed while it holds that, all would wait
    value = error = None
    try:
        value = work()
    except BaseException as raised:
        error = raised
    with open(writing, "wb") as pipe:
        pickle.dump((value, error), pipe)
    os._exit(0)


def die_at(step: int, work: Callable[[], Any], *, exchange: bool = True) -> Callable[[], Any]:
    """`work` that kills its own process at the `step`-th thing it asks of the file system; for use in a child."""

    def dying() -> Any:
        steps = itertools.count(1)

        def tick(*_: Any) -> None:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        def stepped(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*arguments: Any) -> Any:
                tick()
                value = function(*arguments)
                tick()
                return value

            return wrapper

        def hook(event: str, _: tuple) -> None:
            if event == "open" or event.startswith(("os.", "shutil.", "tempfile.", "fcntl.")):
                tick()

        os.fsync = stepped(os.fsync)
        replacing_module._exchange = stepped(replacing_module._exchange) if exchange else lambda a, b: False
        sys.addaudithook(hook)
        work()

    return dying


def deaths(work: Callable[[], Any], *, exchange: bool = True) -> Iterator[bool]:
    """Do `work` in a child that dies at its first step, then its second, …; True as long as it died."""
    for step in itertools.count(1):
        assert step < 2000, "the work never completes"
        try:
            fork(die_at(step, work, exchange=exchange)).result()
        except Killed as killed:
            assert killed.args == (signal.SIGKILL,)
            yield True
        else:
            yield False
            return


def die_before_coming(target: Path, work: Callable[[], Any]) -> Callable[[], Any]:
    """`work` without an exchange, killed between its two renames: when `target` has gone and the new one has not come."""

    def dying() -> Any:
        def hook(event: str, arguments: tuple) -> None:
            if event == "os.rename" and os.fspath(arguments[1]) == str(target):
                os.kill(os.getpid(), signal.SIGKILL)

        replacing_module._exchange = lambda a, b: False
        sys.addaudithook(hook)
        work()

    return dying


# --- killed at every step --------------------------------------------------------------------------------------------


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk, which a killed process does not need; that it is waited for has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize(("exchange", "format"), [(True, "safetensors"), (True, "bin"), (False, "safetensors")])
def test_killed_at_every_step_of_an_overwriting_save(tmp_path: Path, exchange: bool, format: str) -> None:
    """Without an exchange the target may be away between the two renames; the next save and `repair` bring it back."""
    target, old, new = tmp_path / "here" / "model", tensors(1, count=2), tensors(2, count=2)
    save_checkpoint(old, target, max_shard_size=20_000)
    (target / "config.json").write_text(CONFIG)
    seen, littered, away = [], 0, 0
    for died in deaths(lambda: save_checkpoint(new, target, max_shard_size=20_000, format=format), exchange=exchange):
        littered += died and bool(litter(target.parent))
        if not exchange and not target.exists():
            away += 1
            other = shutil.copytree(target.parent, tmp_path / f"copy-{away}") / "model"
            repair(other)
            assert os.listdir(other.parent) == ["model"]
            assert content(open_checkpoint(other)) == content(old) and (other / "config.json").read_text() == CONFIG
        else:
            found = content(open_checkpoint(target))
            assert found in (content(old), content(new))
            seen.append(found == content(new))
            assert (target / "config.json").read_text() == CONFIG
            assert not seen[-1] or check_checkpoint(target, full=True) == []
        save_checkpoint(old, target, max_shard_size=20_000)
        assert os.listdir(target.parent) == ["model"]
        assert content(open_checkpoint(target)) == content(old) and (target / "config.json").read_text() == CONFIG
    assert check_checkpoint(target, full=True) == []
    assert seen == sorted(seen) and seen[-1], "once the new checkpoint is there, it stays"
    assert not seen[0] and sum(seen) > 2 and len(seen) > 40
    assert littered > 0.6 * len(seen), "most kills come while it writes"
    assert exchange or away > 0


@pytest.mark.usefixtures("quick_disk")
def test_killed_at_every_step_of_a_first_save(tmp_path: Path) -> None:
    target, new = tmp_path / "a" / "model", tensors(2, count=2)
    seen = []
    for _ in deaths(lambda: save_checkpoint(new, target, max_shard_size=20_000)):
        seen.append(target.exists())
        if target.exists():
            assert content(open_checkpoint(target)) == content(new) and check_checkpoint(target, full=True) == []
            save_checkpoint(new, target, max_shard_size=20_000)
            assert os.listdir(target.parent) == ["model"]
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
    assert seen == sorted(seen) and seen.count(False) > 30 and seen[-1]


@pytest.mark.usefixtures("quick_disk")
def test_killed_at_every_step_of_saving_one_file(tmp_path: Path) -> None:
    target, old, new = tmp_path / "model.pt", tensors(1), tensors(2)
    save_torch_file(old, target)
    seen = []
    for _ in deaths(lambda: save_torch_file(new, target)):
        seen.append(content(torch.load(target)) == content(new))
        assert seen[-1] or content(torch.load(target)) == content(old)
        save_torch_file(old, target)
        assert os.listdir(tmp_path) == ["model.pt"]
    assert seen == sorted(seen) and not seen[0] and seen[-1] and len(seen) > 10


@pytest.mark.parametrize("points", [20, pytest.param(120, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, points: int) -> None:
    target = tmp_path / "model"
    old, new = (tensors(value, width=32_768, count=12) for value in (1, 2))  # 6 MB

    def save(state_dict: dict[str, torch.Tensor]) -> None:
        save_checkpoint(state_dict, target, max_shard_size="1MB")

    save(old)
    (target / "config.json").write_text(CONFIG)

    def timed() -> float:
        start = time.perf_counter()
        save(old)
        return time.perf_counter() - start

    usual = sorted(fork(timed).result() for _ in range(7))[2]
    generator, writing, finished = random.Random(0), 0, 0
    for point in range(points):
        started, start = os.pipe()
        child = fork(lambda start=start: (os.write(start, b"x"), save(new)))
        os.read(started, 1)
        time.sleep(usual * (point + generator.random()) / points)
        os.kill(child.pid, signal.SIGKILL)
        with contextlib.suppress(Killed):
            child.result()
        os.close(started)
        os.close(start)
        writing += bool(litter(tmp_path))
        found = content(open_checkpoint(target))
        assert found in (content(old), content(new))
        finished += found == content(new)
        assert check_checkpoint(target, full=True) == [] or found == content(old)
        assert (target / "config.json").read_text() == CONFIG
        save(old)
        assert os.listdir(tmp_path) == ["model"]
        assert check_checkpoint(target, full=True) == []
    assert writing > 0.1 * points, f"of {points} kills only {writing} came while it wrote"
    assert finished < 0.9 * points


@pytest.mark.parametrize("exchange", [True, False])
def test_all_is_on_the_disk_before_it_changes_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """A power cut keeps only what was flushed: every file and folder before the exchange, the parent after it."""
    target, flushed, seen = tmp_path / "model", [], []
    save_checkpoint(tensors(1), target)
    fsync, swap = os.fsync, replacing_module._swap

    def recording_fsync(handle: int) -> None:
        flushed.append(os.fstat(handle).st_ino)
        fsync(handle)

    def recording_swap(new: Path, *others: Path) -> None:
        seen.append(({path.lstat().st_ino for path in [new, *new.rglob("*")]}, set(flushed)))
        flushed.clear()
        swap(new, *others)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(replacing_module, "_swap", recording_swap)
    if not exchange:
        monkeypatch.setattr(replacing_module, "_exchange", lambda a, b: False)
    (target / "notes").mkdir()
    (target / "notes" / "a.txt").write_text("a")
    save_checkpoint(tensors(2), target, max_shard_size=20_000)
    [(needed, before)] = seen
    assert len(needed) >= 7 and needed <= before
    assert tmp_path.stat().st_ino in flushed


# --- full disks ------------------------------------------------------------------------------------------------------


def with_file_limit(limit: int, work: Callable[[], Any]) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        work()

    fork(limited).result()


def limits(sizes: list[int]) -> list[int]:
    spread = [max(sizes) * i // 12 for i in range(12)]
    return sorted({limit for size in sizes for limit in (size - 1, size // 2)} | {0, 1, 8, 100, *spread})


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("shard_size", [20_000, 1_000_000])
def test_files_that_cannot_grow(tmp_path: Path, format: str, shard_size: int) -> None:
    target, new = tmp_path / "model", tensors(2)
    save_checkpoint(new, target, max_shard_size=shard_size, format=format)
    sizes = [path.stat().st_size for path in target.iterdir()]
    save_checkpoint(tensors(1), target, format=format)
    (target / "config.json").write_text(CONFIG)
    before = tree(target)
    for limit in limits(sizes):
        with pytest.raises(OSError) as raised:
            with_file_limit(limit, lambda: save_checkpoint(new, target, max_shard_size=shard_size, format=format))
        assert raised.value.errno == errno.EFBIG, limit
        one_sentence(raised.value, target)
        assert tree(target) == before and os.listdir(tmp_path) == ["model"], limit
    with_file_limit(max(sizes) + 4096, lambda: save_checkpoint(new, target, max_shard_size=shard_size, format=format))
    assert content(open_checkpoint(target)) == content(new)


def test_one_file_that_cannot_grow(tmp_path: Path) -> None:
    target = tmp_path / "model.pt"
    save_torch_file(tensors(1), target)
    before, size = target.read_bytes(), target.stat().st_size
    for limit in [*range(0, size, max(1, size // 60)), size - 1]:
        with pytest.raises(OSError) as raised:
            with_file_limit(limit, lambda: save_torch_file(tensors(2), target))
        assert raised.value.errno == errno.EFBIG, limit
        one_sentence(raised.value, target)
        assert target.read_bytes() == before and os.listdir(tmp_path) == ["model.pt"], limit
    with_file_limit(size, lambda: save_torch_file(tensors(2), target))
    assert content(torch.load(target)) == content(tensors(2))


def mount(place: Path, flags: int, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def in_a_small_disk(place: Path, work: Callable[[], Any]) -> Any:
    """`work` in a child that sees a tmpfs at `place`; skips the test where mounting is not permitted."""

    def mounted() -> Any:
        new_mounts, new_user, private = 0x20000, 0x10000000, 0x44000  # CLONE_NEWNS, CLONE_NEWUSER, MS_REC | MS_PRIVATE
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            user, group = os.getuid(), os.getgid()
            if libc.unshare(new_mounts):  # not root
                if libc.unshare(new_mounts | new_user):
                    raise OSError(ctypes.get_errno(), "unshare")
                for name, text in (
                    ("setgroups", "deny"),
                    ("uid_map", f"{user} {user} 1"),
                    ("gid_map", f"{group} {group} 1"),
                ):
                    Path("/proc/self", name).write_text(text)
            libc.mount(None, b"/", None, private, None)
            mount(place, 0, "size=64m")
        except OSError as error:
            return error
        return work()

    if not sys.platform.startswith("linux"):
        pytest.skip("mounts a tmpfs")
    result = fork(mounted).result()
    if isinstance(result, OSError):
        pytest.skip(f"a small file system cannot be mounted here: {result}")
    return result


@pytest.mark.parametrize("kind", ["safetensors", "bin", "file"])
@pytest.mark.parametrize("full_of", ["bytes", "inodes"])
def test_full_disk(tmp_path: Path, kind: str, full_of: str) -> None:
    target = tmp_path / ("model.pt" if kind == "file" else "model")

    def save(value: int) -> None:
        if kind == "file":
            save_torch_file(tensors(value), target)
        else:
            save_checkpoint(tensors(value), target, max_shard_size=20_000, format=kind)

    def fill() -> list[tuple[int, Exception | None, bool, list[str]]]:
        outcomes = []
        save(1)
        before = tree(tmp_path)
        stat = os.statvfs(tmp_path)
        for room in range(200):
            used = (stat.f_files - stat.f_ffree) if full_of == "inodes" else (stat.f_blocks - stat.f_bfree)
            remount = 32  # MS_REMOUNT
            mount(tmp_path, remount, f"{'nr_inodes' if full_of == 'inodes' else 'nr_blocks'}={used + room}")
            try:
                save(2)
            except Exception as error:
                outcomes.append((room, error, tree(tmp_path) == before, litter(tmp_path)))
            else:
                new = content(open_checkpoint(target)) == content(tensors(2))
                outcomes.append((room, None, new, litter(tmp_path)))
                return outcomes
        return outcomes

    *failures, success = in_a_small_disk(tmp_path, fill)
    assert len(failures) >= 3 and success[1] is None
    for room, error, right, left in [*failures, success]:
        assert right and not left, (room, error, right, left)
        if error is not None:
            assert isinstance(error, OSError) and error.errno == errno.ENOSPC, (room, error)
            one_sentence(error, target)


# --- read-only -------------------------------------------------------------------------------------------------------


def obeying_modes(work: Callable[[], Any]) -> Any:
    """`work` in a child that may write where the modes of files and folders say so; root, as such, may everywhere."""

    def without_override() -> Any:
        if os.geteuid() == 0:
            libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, itself
            held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
            assert libc.capget(header, held) == 0
            held[0], held[1] = (bits & ~2 for bits in held[:2])  # CAP_DAC_OVERRIDE; that of reading stays
            assert libc.capset(header, held) == 0, os.strerror(ctypes.get_errno())
        return work()

    return fork(without_override).result()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder whose folders can be removed at the end, whatever modes they got."""
    yield tmp_path
    for folder, _, _ in os.walk(tmp_path):
        os.chmod(folder, 0o700)


@pytest.mark.parametrize("parent_mode", [0o555, 0o777])
def test_read_only_folder(place: Path, parent_mode: int) -> None:
    parent = place / "parent"
    target = parent / "model"
    obeying_modes(lambda: (parent.mkdir(), save_checkpoint(tensors(1), target), save_torch_file(1, parent / "one.pt")))
    target.chmod(0o555)
    parent.chmod(parent_mode)
    before = tree(parent)
    saves = [(target, lambda: save_checkpoint(tensors(2), target))]
    if parent_mode == 0o555:
        new = parent / "new"
        saves += [
            (new, lambda: save_checkpoint(tensors(2), new)),
            (new / "deeper", lambda: save_checkpoint(tensors(2), new / "deeper")),
            (parent / "one.pt", lambda: save_torch_file(2, parent / "one.pt")),
        ]
    for path, save in saves:
        with pytest.raises(PermissionError) as raised:
            obeying_modes(save)
        one_sentence(raised.value, path)
        assert tree(parent) == before


def test_read_only_folder_inside_leaves_no_litter(place: Path) -> None:
    target = place / "model"

    def save_twice() -> None:
        save_checkpoint(tensors(1), target)
        (target / "notes").mkdir()
        (target / "notes" / "a.txt").write_text("a")
        (target / "notes").chmod(0o555)
        save_checkpoint(tensors(2), target)

    obeying_modes(save_twice)
    assert (target / "notes" / "a.txt").read_text() == "a" and (target / "notes").stat().st_mode & 0o777 == 0o555
    assert content(open_checkpoint(target)) == content(tensors(2))
    assert os.listdir(place) == ["model"]


# --- several writers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False])
def test_two_writers_and_a_reader(tmp_path: Path, exchange: bool) -> None:
    """Each save fills every tensor with one number of its own, so a mixture of any two saves shows."""
    target, seconds = tmp_path / "model", 1.5
    names = [f"layer.{i}" for i in range(6)]

    def save(value: int) -> None:
        state_dict = {name: torch.full((64,), value, dtype=torch.int32) for name in names}
        save_checkpoint(state_dict, target, max_shard_size=256)

    def write(first: int) -> list[str]:
        if not exchange:
            replacing_module._exchange = lambda a, b: False
        failures, end = [], time.monotonic() + seconds
        for value in itertools.count(first):
            try:
                save(value)
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")
            if time.monotonic() > end:
                return [*failures, str(value)]
        raise AssertionError

    def read() -> tuple[list[list[int]], list[str]]:
        values, failures, end = [], [], time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                checkpoint = open_checkpoint(target)
                found = {name: checkpoint[name] for name in checkpoint}
                assert sorted(found) == names
                values.append(sorted({number for tensor in found.values() for number in tensor.tolist()}))
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")
        return values, failures

    save(0)
    (target / "config.json").write_text(CONFIG)
    (target / "notes").mkdir()
    (target / "notes" / "a.txt").write_text("a")
    reader, *writers = [fork(read), fork(lambda: write(1_000_000)), fork(lambda: write(2_000_000))]
    values, unread = reader.result()
    unwritten, last = [], []
    for writer in writers:
        *failures, value = writer.result()
        unwritten += failures
        last.append(int(value))
    mixed = [value for value in values if len(value) > 1]
    counts = f"{len(mixed)} mixed and {len(unread)} failed of {len(values) + len(unread)} reads"
    failed = {"mixed reads": mixed[:3], "failed saves": unwritten[:3], "failed reads": unread[:3] if exchange else []}
    assert not any(failed.values()), (
        f"{counts}, {len(unwritten)} failed of some {sum(last) % 1_000_000} saves: {failed}"
    )
    assert len(values) > 10 and {value // 1_000_000 for (value,) in values} >= {1, 2}
    assert min(value % 1_000_000 for value in last) > 5
    assert check_checkpoint(target, full=True) == [] and os.listdir(tmp_path) == ["model"]
    assert set(open_checkpoint(target)[names[0]].tolist()) <= set(last)
    assert (target / "config.json").read_text() == CONFIG and (target / "notes" / "a.txt").read_text() == "a"


def test_late_files_wait_for_a_writer_between_its_two_renames(tmp_path: Path) -> None:
    former, target = tmp_path / "old", tmp_path / "model"
    (former / "notes").mkdir(parents=True)
    (former / "late.txt").write_text("late")
    (tmp_path / "new" / "notes").mkdir(parents=True)  # the other writer has kept these itself
    ours = threading.Timer(0.2, lambda: (tmp_path / "new").rename(target))
    ours.start()
    replacing_module._move_files_added_meanwhile(former, target, lambda name: True)
    ours.join()
    assert sorted(os.listdir(target)) == ["late.txt", "notes"] and os.listdir(former) == ["notes"]


def test_a_live_writer_is_left_alone(tmp_path: Path) -> None:
    """A second save finishes while a first one is under way, which then wins."""
    target = tmp_path / "model"
    with replace_folder(target) as folder:
        (folder / "a").write_text("first")
        save_checkpoint(tensors(1), target)
        repair(target)
        assert (folder / "a").read_text() == "first" and (target / "model.safetensors").exists()
    assert os.listdir(target) == ["a"] and os.listdir(tmp_path) == ["model"]


@pytest.mark.usefixtures("quick_disk")
def test_a_neighbour_with_a_similar_name_is_left_alone(tmp_path: Path) -> None:
    """Repairing `model` does not touch what a killed writer of `model.saving-2` or of `model*` left."""
    for name in ("model.saving-2", "model[1]", "model*"):
        target = tmp_path / name
        save_checkpoint(tensors(1), target)
        with pytest.raises(Killed):
            fork(die_before_coming(target, lambda target=target: save_checkpoint(tensors(2), target))).result()
        assert not target.exists() and litter(tmp_path)
        save_checkpoint(tensors(3), tmp_path / "model")
        assert content(open_checkpoint(tmp_path / "model")) == content(tensors(3))
        repair(target)
        assert content(open_checkpoint(target)) == content(tensors(1)), name


# --- places ----------------------------------------------------------------------------------------------------------


def test_a_target_of_the_wrong_kind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError) as raised:
        save_checkpoint(tensors(1), tmp_path / "file")
    one_sentence(raised.value, tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as raised_too:
        save_torch_file(1, tmp_path / "folder")
    one_sentence(raised_too.value, tmp_path / "folder")
    with pytest.raises(OSError) as below:
        save_checkpoint(tensors(1), tmp_path / "file" / "model")
    one_sentence(below.value, tmp_path / "file" / "model")
    assert (tmp_path / "file").read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    save_checkpoint(tensors(1), real)
    link.symlink_to(real)
    save_checkpoint(tensors(2), link)
    assert link.is_symlink() and content(open_checkpoint(real)) == content(tensors(2))
    file, to_file = tmp_path / "disk" / "real.pt", tmp_path / "link.pt"
    save_torch_file(1, file)
    to_file.symlink_to(file)
    save_torch_file(2, to_file)
    assert to_file.is_symlink() and torch.load(file) == 2
    assert sorted(os.listdir(tmp_path)) == ["disk", "link", "link.pt"]
    assert sorted(os.listdir(tmp_path / "disk")) == ["real", "real.pt"]


@pytest.mark.parametrize("inner", [".", "notes"])
def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str) -> None:
    target = tmp_path / "model"
    save_checkpoint(tensors(1), target)
    (target / "notes").mkdir()
    before = tree(target)
    monkeypatch.chdir(target / inner)
    with pytest.raises(OSError) as raised:
        save_checkpoint(tensors(2), target)
    assert raised.value.errno == errno.EBUSY
    one_sentence(raised.value, target)
    assert tree(target) == before and os.listdir(tmp_path) == ["model"]


def test_overwrite_false(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with replace_folder(target, overwrite=False) as folder:
        (folder / "a").write_text("a")
    with pytest.raises(FileExistsError) as raised, replace_folder(target, overwrite=False) as folder:
        raise AssertionError("it was let in")
    one_sentence(raised.value, target)
    assert (target / "a").read_text() == "a" and os.listdir(tmp_path) == ["model"]


def test_an_exception_leaves_all_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save_checkpoint(tensors(1), target)
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError), replace_folder(target) as folder:
        (folder / "model.safetensors").write_text("half")
        raise ZeroDivisionError
    with pytest.raises(CheckpointError):
        save_checkpoint({"a": torch.ones(2), "b": "text"}, target)  # type: ignore[dict-item]
    with pytest.raises(KeyboardInterrupt), replace_file(target / "config.json") as file:
        file.write_text("half")
        raise KeyboardInterrupt
    assert tree(tmp_path) == before


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_kept_files_survive_on_their_own(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save_checkpoint(tensors(1), target)
    (target / "config.json").write_text(CONFIG)
    (target / "notes" / "deep").mkdir(parents=True)
    (target / "notes" / "deep" / "a.txt").write_text("a")
    (target / "notes" / "script.sh").write_text("run")
    (target / "notes" / "script.sh").chmod(0o750)
    (target / "notes" / "deep").chmod(0o700)
    (target / "to_file").symlink_to("config.json")
    (target / "to_folder").symlink_to("notes")
    before = {name: value for name, value in tree(target).items() if name not in ("model.safetensors", "manifest.json")}
    with open(target / "config.json", "r+") as opened:
        save_checkpoint(tensors(2), target)
        after = tree(target)
        assert {name: after[name] for name in before} == before
        assert os.readlink(target / "to_file") == "config.json" and os.readlink(target / "to_folder") == "notes"
        assert (target / "config.json").stat().st_nlink == 1, "only the new folder holds it"
        assert opened.read() == CONFIG
    assert check_checkpoint(target, full=True) == [] and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("leads_to", ["../shared.json", "nowhere.json", "{}/shared.json"])
def test_kept_links_that_lead_elsewhere(tmp_path: Path, leads_to: str) -> None:
    """A link lies one folder deeper while its checkpoint is written, and may lead nowhere even before."""
    target = tmp_path / "model"
    (tmp_path / "shared.json").write_text(CONFIG)
    save_checkpoint(tensors(1), target)
    (target / "link.json").symlink_to(leads_to.format(tmp_path))
    save_checkpoint(tensors(2), target)
    assert os.readlink(target / "link.json") == leads_to.format(tmp_path)
    assert content(open_checkpoint(target)) == content(tensors(2))
    assert sorted(os.listdir(tmp_path)) == ["model", "shared.json"]


def test_a_failed_save_does_not_change_kept_files(tmp_path: Path) -> None:
    """Until the exchange the new folder shares its kept files with the old: writing one must not reach the old."""
    target = tmp_path / "model"
    save_checkpoint(tensors(1), target)
    (target / "config.json").write_text(CONFIG)

    def finish(folder: Path) -> None:
        assert (folder / "config.json").read_text() == CONFIG
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replace_folder(target, keep=lambda _: True, finish=finish):
        pass
    assert (target / "config.json").read_text() == CONFIG
    with replace_folder(target, keep=lambda _: True) as folder:
        (folder / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"


def test_stale_weights_go(tmp_path: Path) -> None:
    target = tmp_path / "model"
    (target / "onnx").mkdir(parents=True)
    (target / "onnx" / "model.onnx").write_text("other")
    for shard_size, format in [
        (20_000, "safetensors"),
        (20_000, "bin"),
        (40_000, "bin"),
        (10**9, "bin"),
        (10**9, "safetensors"),
    ]:
        save_checkpoint(tensors(shard_size % 97), target, max_shard_size=shard_size, format=format)
        assert content(open_checkpoint(target)) == content(tensors(shard_size % 97))
        assert check_checkpoint(target, full=True) == []
        assert {path.suffix for path in target.iterdir()} <= {".json", "", f".{format}"}
    assert sorted(os.listdir(target)) == ["manifest.json", "model.safetensors", "onnx"]


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755, 0o2775])
def test_modes_are_kept(tmp_path: Path, mode: int) -> None:
    target, file = tmp_path / "model", tmp_path / "model.pt"
    save_checkpoint(tensors(1), target)
    save_torch_file(1, file)
    target.chmod(mode)
    file.chmod(mode & 0o666)
    save_checkpoint(tensors(2), target)
    save_torch_file(2, file)
    assert target.stat().st_mode & 0o7777 == mode
    assert file.stat().st_mode & 0o7777 == mode & 0o666


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_new_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path, format: str) -> None:
    before = os.umask(0o027)
    try:
        save_checkpoint(tensors(1), tmp_path / "model", max_shard_size=20_000, format=format)
        save_torch_file(1, tmp_path / "model.pt")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in [*(tmp_path / "model").iterdir(), tmp_path / "model.pt"]} == {0o640}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750

"""Weights are read from pickles of every protocol and whatever lies beside them; none of their code is run."""

import collections
import dataclasses
import datetime
import functools
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_python
from pickled_enums import Colour, Half, Level
from states import one_sentence

from mymodels.checkpoints import CheckpointError, open_checkpoint
from mymodels.checkpoints.inspecting import inspect_checkpoint


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    name: str = "x"

    @dataclasses.dataclass
    class Inner:
        depth: int = 2


class Slotted:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 3


class Runs:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return one_sentence(caught.value, path.name)


WEIGHTS = {"a.w": torch.randn(3, 4), "a.b": torch.randn(4).bfloat16(), "n": torch.arange(3)}


def beside() -> dict:
    lists = collections.defaultdict(list)
    lists["a"].append(1)
    return {
        "cfg": Settings(),
        "inner": Settings.Inner(),
        "colour": Colour.RED,
        "level": Level.LOW,
        "half": Half.HALF,
        "lists": lists,
        "when": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
        "queue": collections.deque([1, 2], maxlen=5),
        "part": functools.partial(print, 1),
        "slots": Slotted(),
        "factory": collections.defaultdict(Settings),
        "bytes": b"abc",
        "array": bytearray(b"abc"),
        "numpy_state": np.random.get_state(),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol_and_what_lies_beside(protocol: int, zipped: bool, tmp_path: Path) -> None:
    saved = {"model": WEIGHTS} | beside()
    if protocol == 1:
        del saved["part"], saved["slots"]  # names print through __builtin__, or cannot be saved
    torch.save(saved, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_checkpoint(tmp_path / "x.pt")
    truth = torch.load(tmp_path / "x.pt", weights_only=False)["model"]
    assert list(opened) == list(truth) and all(torch.equal(opened[name], truth[name]) for name in truth)
    assert set(opened.extras) == set(saved) - {"model"}
    assert opened.extras["lists"] == saved["lists"] and opened.extras["when"] == saved["when"]
    assert opened.extras["queue"] == saved["queue"] and opened.extras["bytes"] == b"abc"
    shown = inspect_checkpoint(tmp_path / "x.pt")["extras"]
    assert "Settings(lr=0.1, name='x'), not unpickled" in shown["cfg"] and "Settings.Inner(depth=2)" in shown["inner"]
    assert "Colour('red')" in shown["colour"] or shown["colour"].endswith(".Colour.RED, not imported")  # Python 3.11.2


def test_a_class_beside_the_weights_is_named(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "kind": Settings}, tmp_path / "x.pt")
    assert inspect_checkpoint(tmp_path / "x.pt")["extras"]["kind"] == f"{Settings.__module__}.Settings, not imported"


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    arrays = {
        "weight": np.arange(6.0, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "turned": np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays, protocol=protocol))
    paths = [tmp_path / "a.pkl"]
    if protocol > 1:
        paths.append(tmp_path / "a.pt")
        torch.save({"model": arrays}, paths[-1], pickle_protocol=protocol)
    for path in paths:
        opened = open_checkpoint(path)
        assert set(opened) == set(arrays)
        assert all(np.array_equal(opened[name].numpy(), array) for name, array in arrays.items())


def test_a_generator_of_numpy_beside(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "rng": np.random.default_rng(1)}, tmp_path / "x.pt")
    opened = open_checkpoint(tmp_path / "x.pt")
    assert set(opened) == set(WEIGHTS) and "PCG64" in repr(opened.extras["rng"])


def test_protocol_0_is_named(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "x.pt", pickle_protocol=0)
    torch.save(WEIGHTS, tmp_path / "y.pt", pickle_protocol=0, _use_new_zipfile_serialization=False)
    for name in ("x.pt", "y.pt"):
        assert "protocol 0" in refusal(tmp_path / name)


def test_code_is_refused_in_every_protocol(tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    calls = [
        (os.system, f"touch {mark}"),
        (eval, f"open({str(mark)!r}, 'w')"),
        (subprocess.call, ["touch", str(mark)]),
        (getattr, "x", "join"),
    ]
    for number, call in enumerate(calls):
        for protocol in (2, 4):
            torch.save({"m": WEIGHTS, "x": Runs(*call)}, path := tmp_path / f"{number}.pt", pickle_protocol=protocol)
            with pytest.raises(CheckpointError):
                open_checkpoint(path)
            (tmp_path / "bare.pkl").write_bytes(pickle.dumps({"m": WEIGHTS["n"].numpy(), "x": Runs(*call)}, protocol))
            with pytest.raises(CheckpointError):
                open_checkpoint(tmp_path / "bare.pkl")
    assert not mark.exists()


def test_a_class_that_is_named_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("open('it_ran', 'w')\nclass Config:\n    pass\n")
    script = "import loud, torch; torch.save({'w.a': torch.ones(2), 'c': loud.Config()}, 'x.pt'); import os; os.remove('it_ran')"
    warm_python.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    script = "from mymodels.checkpoints import open_checkpoint as o; print(o('x.pt').extras['c'])"
    run = warm_python.run([sys.executable, "-c", script], cwd=tmp_path)
    assert "loud.Config" in run.stdout and not (tmp_path / "it_ran").exists()


def test_tensors_within_an_object_are_not_left_out_silently(tmp_path: Path) -> None:
    """Where its class alone says what they mean, the file is refused."""
    torch.save({"model": functools.partial(print, WEIGHTS["a.w"]), "ema": WEIGHTS}, tmp_path / "x.pt")
    assert "functools.partial" in refusal(tmp_path / "x.pt") and "--allow-pickle" in refusal(tmp_path / "x.pt")
    assert set(open_checkpoint(tmp_path / "x.pt", allow_pickle=True)) == set(WEIGHTS)


def test_arrays_are_weights(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = {"a.w": np.random.randn(2, 3).astype("f4"), "a.b": np.arange(3), "h": np.ones(2, ml_dtypes.bfloat16)}
    torch.save(arrays, tmp_path / "x.pt")
    torch.save({"model": arrays, "epoch": 1, "train_losses": np.zeros(7)}, tmp_path / "y.pt")
    (tmp_path / "z.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}))
    (tmp_path / "old.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol=0))
    torch.save({"model": arrays}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("x.pt", "y.pt", "z.pkl", "old.pkl", "legacy.pt"):
        opened = open_checkpoint(tmp_path / name)
        assert list(opened) == list(arrays)
        assert opened["h"].dtype == torch.bfloat16
        assert all(np.array_equal(opened[key].float().numpy(), arrays[key].astype("f4")) for key in arrays), name
    np.savez(tmp_path / "n.npz", **arrays)
    opened = open_checkpoint(tmp_path / "n.npz")
    assert opened["h"].dtype == torch.bfloat16 and torch.equal(opened["h"], torch.ones(2).bfloat16())


def test_a_bare_pickle_of_tensors(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(WEIGHTS))
    opened = open_checkpoint(tmp_path / "x.pkl")
    assert all(torch.equal(opened[name], WEIGHTS[name]) for name in WEIGHTS)


def test_allowed_pickle_with_enums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent  # where the enums' code is
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{here.parent}")
    saved = {
        "model": {**WEIGHTS, "x": torch.nn.Linear(2, 2)},
        "e": [Colour.RED, Level.LOW, Half.HALF, True],
        Colour.RED: 1,
        "needs": functools.partial(print, WEIGHTS["a.w"]),  # what only its code can read
    }
    torch.save(saved, tmp_path / "x.pt")
    extras = open_checkpoint(tmp_path / "x.pt", allow_pickle=True).extras
    assert extras["e"] == ["red", 1, 0.5, True] and extras["red"] == 1


def test_a_bare_optimizer_is_no_model(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    for zipped in (True, False):
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt", _use_new_zipfile_serialization=zipped)
        opened = open_checkpoint(tmp_path / "optimizer.pt")
        assert list(opened.sections) == [""] and "optimizer" in opened.format
        assert torch.equal(opened["state.0.exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_fresh_optimizer_is_named(tmp_path: Path) -> None:
    """Its file has no tensors before the first step, and always for plain SGD."""
    state = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), 0.1).state_dict()
    for saved in (state, {"optimizer": state, "epoch": 0}):
        torch.save(saved, tmp_path / "optimizer.pt")
        message = refusal(tmp_path / "optimizer.pt")
        assert "an optimizer's state" in message and "dict" not in message


def test_a_pickle_cannot_ask_for_memory(tmp_path: Path) -> None:
    for call in ((bytearray, 10**15), (bytes, 10**15), (list, range(10**15))):
        torch.save({"m": WEIGHTS, "x": Runs(*call)}, tmp_path / "x.pt", pickle_protocol=4)
        try:
            opened = open_checkpoint(tmp_path / "x.pt")
        except CheckpointError as error:
            one_sentence(error, "x.pt")
        else:
            assert set(opened) == set(WEIGHTS)

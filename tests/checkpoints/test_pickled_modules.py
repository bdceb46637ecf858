"""Modules pickled whole are read without their code; the truth is their own state dict, saved by the process that made them."""

import io
import os
import pickle
import pickletools
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from states import assert_reads, one_sentence
from torch import nn

from mymodels import load_checkpoint_and_dispatch
from mymodels.checkpoints import CheckpointError, open_checkpoint
from mymodels.checkpoints.converting import convert_checkpoint
from mymodels.checkpoints.inspecting import inspect_checkpoint
from mymodels.training.importing import import_checkpoint

SCRIPT = Path(__file__).with_name("pickled_modules_script.py")
CASES = {
    "bare": [""],
    "half": [""],
    "named": ["model"],
    "parallel": [""],
    "training": ["model", "ema.shadow"],
    "average": [""],
    "compiled": [""],
    "two": ["g", "d"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pickled")
    warm_python.run([sys.executable, SCRIPT, made], check=True)
    (made / "ran.txt").unlink(missing_ok=True)  # copies were made there
    return made


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "truth")


@pytest.mark.parametrize("ending", [".pt", "-legacy.pt", "-2.pkl", "-5.pkl"])
@pytest.mark.parametrize("case", CASES)
def test_reads_what_the_module_has(case: str, ending: str, folder: Path, truth: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_checkpoint(folder / f"{case}{ending}")
    assert list(opened.sections) == CASES[case] == list(truth[case])
    for section, state in truth[case].items():
        part = opened.section(section)
        assert_reads(part, state)
        assert list(part) == list(state)
    assert "pickled modules" in opened.format and not (folder / "ran.txt").exists()


def test_shared_parameters_are_ties(folder: Path) -> None:
    assert open_checkpoint(folder / "bare.pt").aliases == {"head.weight": "embed.weight"}


def test_inspect_and_convert(folder: Path, truth: dict[str, Any], tmp_path: Path) -> None:
    shown = inspect_checkpoint(folder / "training.pt")
    assert (
        "Net" in shown["format"]
        and shown["extras"]["epoch"] == "3"
        and "logging.getLogger" in shown["extras"]["logger"]
    )
    assert shown["extras"]["opt"].startswith("optimizer: state of")
    convert_checkpoint(folder / "parallel.pt", tmp_path / "out")
    assert_reads(open_checkpoint(tmp_path / "out"), truth["parallel"][""])
    model = load_checkpoint_and_dispatch(nn.Linear(3, 2), folder / "compiled.pt")
    assert torch.equal(model.weight, truth["compiled"][""]["_orig_mod.weight"])


def test_training_goes_on_from_pickled_objects(folder: Path, truth: dict[str, Any]) -> None:
    """Optimizer and scheduler that were pickled as objects give their states too."""
    sys.path.insert(0, str(SCRIPT.parent))
    from pickled_modules_script import Net

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    rest = import_checkpoint(folder / "training.pt", model, optimizer, scheduler, section="model")
    assert rest["epoch"] == 3
    for name, tensor in truth["training"]["model"].items():
        assert torch.equal(model.state_dict()[name], tensor), name
    found, expected = optimizer.state_dict(), truth["optimizer"]
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    assert all(torch.equal(found["state"][i]["exp_avg"], state["exp_avg"]) for i, state in expected["state"].items())
    assert scheduler.state_dict() == torch.load(folder / "scheduler", weights_only=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inner.pt", ("OwnPickle", "--allow-pickle")),
        ("renames.pt", ("hook", "rename", "--allow-pickle")),
        ("lazy.pt", ("UninitializedParameter", "is not a tensor")),
        ("packed.pt", ("quantized", "before quantising it")),
        ("loop.pt", ("holds itself",)),
    ],
)
def test_what_only_the_code_knows_is_refused(name: str, words: tuple[str, ...], folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder / name)
    message = one_sentence(caught.value, name)
    assert all(word in message for word in words), message


def test_an_object_with_a_pickle_of_its_own_shows_what_it_holds(folder: Path) -> None:
    """It is not called a module, and its tensor not by the parameter's name."""
    opened = open_checkpoint(folder / "own.pt")
    assert list(opened) == ["packed"] and "pickled modules" not in opened.format


class Runs:
    """Its pickle makes a file when it is opened."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("zipped", [True, False])
def test_code_within_a_module_does_not_run(zipped: bool, tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    for call in ((os.system, f"touch {mark}"), (eval, f"open({str(mark)!r}, 'w')"), (exec, "1"), (os.mkdir, str(mark))):
        module = nn.Linear(2, 2)
        module.attribute = Runs(*call)
        torch.save(module, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path / "m.pt")
        one_sentence(caught.value, "m.pt")
    assert not mark.exists()


CANARY = """
import pathlib
pathlib.Path(__file__).with_name("it_ran").touch()
class Net:
    def __init__(self, *args): pathlib.Path(__file__).with_name("it_ran").touch()
    def __reduce__(self): return Net, ()
    def __setstate__(self, state): pathlib.Path(__file__).with_name("it_ran").touch()
def call(*args): pathlib.Path(__file__).with_name("it_ran").touch()
"""
GLOBALS = st.sampled_from(
    """
    canary Net
    canary call
    os system
    builtins eval
    builtins getattr
    torch._utils _rebuild_tensor_v2
    torch._utils _rebuild_parameter
    collections OrderedDict
    torch Size
    builtins dict
    builtins bytearray
    torch.nn.modules.linear Linear
    torch._tensor _rebuild_from_type_v2
    numpy.core.multiarray _reconstruct
    copyreg _reconstructor
    torch FloatStorage
    torch.storage _load_from_bytes
    functools partial
    torch.serialization load
    torch.hub load
    builtins __import__
    types FunctionType
    """.strip().splitlines()
)


def opcodes(data: st.DataObject) -> bytes:
    """A pickle of random operations on what is likely to be on the stack."""
    text = b"\x80\x04"
    for _ in range(data.draw(st.integers(1, 14))):
        kind = data.draw(
            st.sampled_from(["global", "text", "number", "dict", "tuple", "reduce", "newobj", "build", "memo"])
        )
        if kind == "global":
            module, name = data.draw(GLOBALS).split()
            text += b"c" + f"{module}\n{name}\n".encode()
        elif kind == "text":
            word = data.draw(
                st.sampled_from(["touch it_ran", "__class__", "_modules", "_parameters", "weight", "append"])
            )
            text += b"\x8c" + bytes([len(word)]) + word.encode()
        elif kind == "number":
            text += b"K" + bytes([data.draw(st.integers(0, 255))])
        else:
            text += {
                "dict": b"}",
                "tuple": data.draw(st.sampled_from([b")", b"\x85", b"\x86", b"\x87"])),
                "reduce": b"R",
                "newobj": b"\x81",
                "build": b"b",
                "memo": data.draw(
                    st.sampled_from([b"\x94", b"h\0", b"s", b"Q", b"0", b"2", b"a", b"u", b"(", b"\x93"])
                ),
            }[kind]
    return text + b"."


def mutated(data: st.DataObject, content: bytes) -> bytes:
    """A module's pickle with operations exchanged, dropped or put in, or a name replaced."""
    found = list(pickletools.genops(content))
    at = data.draw(st.integers(1, len(found) - 2))
    begin, end = found[at][2], found[at + 1][2]
    how = data.draw(st.sampled_from(["drop", "random", "byte", "swap"]))
    if how == "drop":
        return content[:begin] + content[end:]
    if how == "random":
        return content[:begin] + opcodes(data)[2:-1] + content[begin:]
    if how == "byte":
        return content[:begin] + bytes([data.draw(st.integers(0, 255))]) + content[begin + 1 :]
    return content.replace(b"Linear", b"system").replace(
        b"torch.nn.modules.linear", data.draw(st.sampled_from([b"os", b"canary"]))
    )


@pytest.mark.parametrize("examples", [100, pytest.param(1200, marks=pytest.mark.slow)])
def test_no_pickle_runs_anything(examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any pickle is refused in one sentence or read; no class is imported and nothing of its choice is called."""
    (tmp_path / "canary.py").write_text(CANARY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.save(module := nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (table,) = [name for name in parts if name.endswith("/data.pkl")]
    plain = pickle.dumps(module, 4)

    def refuse(event: str, arguments: tuple) -> None:
        if active and event in ("os.system", "subprocess.Popen", "exec", "os.exec"):
            if event == "exec" and not str(arguments[0].co_filename).startswith(str(tmp_path)):
                return  # torch and Python import their own modules when they are first needed
            happened.append((event, arguments))

    happened: list[Any] = []
    active = True
    sys.addaudithook(refuse)

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(["zip", "bare", "random"]))
        path = tmp_path / "x.pt"
        if source == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in parts.items():
                    archive.writestr(name, mutated(data, content) if name == table else content)
        else:
            path.write_bytes(opcodes(data) if source == "random" else mutated(data, plain))
        try:
            opened = open_checkpoint(path)
            for name in opened:
                opened[name]
            repr(opened.extras)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(path) in str(error), str(error)

    try:
        run()
    finally:
        active = False
    assert not happened and "canary" not in sys.modules and not (tmp_path / "it_ran").exists()

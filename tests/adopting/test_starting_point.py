"""`mymodels new`: its tests pass untouched; a wrong name or a folder with something in it is refused."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mymodels.adopting.starting_point import _SIZES, write_starting_point
from mymodels.checkpoints import CheckpointError

BASES = ("gpt2", "bert", "blank")


@pytest.mark.parametrize("base", BASES)
def test_the_files(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"Whale{base.capitalize()}"
    folder = write_starting_point(name, base, tmp_path / "whale")
    lower, old = name.lower(), {"gpt2": "MyGPT2", "bert": "MyBert"}.get(base, "MyGPT2")
    names = ["README.md", f"configuration_{lower}.py", f"modeling_{lower}.py", f"test_{lower}.py"]
    assert sorted(path.name for path in folder.iterdir()) == names
    monkeypatch.syspath_prepend(folder)
    modeling = importlib.import_module(f"modeling_{lower}")
    for path in folder.glob("*.*"):
        text = path.read_text().replace(f"A copy of {old}", "")
        own = {word for word in re.findall(rf"\w*{old}\w*", text) if hasattr(modeling, word)}
        assert all(getattr(modeling, word).__module__.startswith("mymodels.models.") for word in own)
        assert not re.search(rf"\b(?!{'|'.join(own) or '_'})\w*({old}|{old.lower()})\w*", text)
    config = importlib.import_module(f"configuration_{lower}")
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small = getattr(config, f"{name}Config")(**sizes)
    for cls in [getattr(modeling, key) for key in vars(modeling) if re.match(f"{name}(For|Model$)", key)]:
        assert cls(small).config.model_type == lower


@pytest.mark.parametrize(("name", "base"), [("Amygpt2", "gpt2"), ("Smybert", "bert"), ("MyGPT2Moe", "gpt2")])
def test_a_name_that_contains_that_of_the_base(name: str, base: str, tmp_path: Path) -> None:
    folder = write_starting_point(name, base, tmp_path / "new")
    for file in folder.glob("[cm]*.py"):
        classes = re.findall(r"^class (\w+)", file.read_text(), re.MULTILINE)
        assert classes and all(re.match(rf"{name}[A-Z]", found) for found in classes)
        assert f'model_type = "{name.lower()}"' in file.read_text() or file.name.startswith("modeling")


@pytest.mark.parametrize("name", ["GPTNeoX", "Qwen2Moe", "Auto", "PreTrained", "Generation"])
@pytest.mark.parametrize("base", BASES)
def test_the_classes_are_none_of_transformers(name: str, base: str, tmp_path: Path) -> None:
    """Their model types differ from the name in lower case, or they have none."""
    with pytest.raises(CheckpointError, match=rf"{name}: transformers has a class {name}\w+ already: choose another"):
        write_starting_point(name, base, tmp_path / "new")
    assert not (tmp_path / "new").exists()


SAVE = """
from configuration_whale import WhaleConfig
from modeling_whale import {cls}
{cls}(WhaleConfig({sizes})).save_pretrained("saved")
"""
LOAD = """
import sys
sys.modules["mymodels"] = None
from transformers import {auto}
print(type({auto}.from_pretrained("saved", trust_remote_code=True)).__name__)
"""


@pytest.mark.parametrize(("base", "head"), [("gpt2", "ForCausalLM"), ("bert", "ForMaskedLM"), ("blank", "ForCausalLM")])
def test_what_save_pretrained_writes_loads_elsewhere(base: str, head: str, tmp_path: Path) -> None:
    folder = write_starting_point("Whale", base, tmp_path / "whale")
    values = {"cls": f"Whale{head}", "auto": f"AutoModel{head}", "sizes": _SIZES[base]}
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": root}
    for script in (SAVE, LOAD):
        command = [sys.executable, "-c", script.format(**values)]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        assert ended.returncode == 0, ended.stderr[-2000:]
        # the second has only what was saved
        for file in folder.glob("*.py"):
            file.unlink()
    assert ended.stdout == f"Whale{head}\n"


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_its_tests_pass_untouched(base: str, tmp_path: Path) -> None:
    """In a process of its own; the clean process and the export, the slow ones, for the blank one's head only."""
    folder = write_starting_point("Whale", base, tmp_path / "whale")
    chosen = "not clean_process and not export" if base != "blank" else "not TestWhaleModel"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        chosen,
        ".",
    ]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout[-3000:]
    assert " passed" in told.stdout and "failed" not in told.stdout


def test_what_is_refused(tmp_path: Path) -> None:
    for name, says in (("whale", "is not a class name"), ("My-Whale", "is not a class name"), ("Bert", "is taken")):
        with pytest.raises(CheckpointError, match=says):
            write_starting_point(name, "gpt2", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not a base"):
        write_starting_point("Whale", "gpt3", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_starting_point("Whale", "gpt2", tmp_path / "full")
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "mine.txt").read_text() == "kept"

"""What `verify` does before its clean process runs: nothing that takes long, and the rest while that one imports torch."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mymodels.hub.clean_process as cleaning
from mymodels.checkpoints import opening
from mymodels.checkpoints.kinds import OPENED
from mymodels.hub.isolated import stages
from mymodels.hub.static import settings
from mymodels.sandbox import available

ROOT = Path(__file__).parents[3]
START = """
import sys
import mymodels_command
mymodels_command.started = True  # as the installed script does
from mymodels import cli
from mymodels.hub import verifying
def started(*_, **options):
    print(sorted({"torch", "transformers", "numpy", "huggingface_hub"} & set(sys.modules)), options["golden"].name)
    raise SystemExit(7)
verifying.clean_process = started
cli.main(["verify", sys.argv[1], "--quick"])
"""


@pytest.mark.parametrize("name", ["mygpt2", "mybert"])
def test_the_clean_process_is_started_before_torch_is_imported(name: str) -> None:
    command = [sys.executable, "-c", START, str(ROOT / "hub_repo" / name)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (7, "[] golden.safetensors\n"), ended.stderr


def run_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, meanwhile):
    """A clean process that runs `script` in place of its own, on an empty folder of a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    file = tmp_path / "code" / "run.py"
    file.parent.mkdir()
    file.write_text(script)
    monkeypatch.setattr("mymodels.hub.clean_process.SCRIPT", file)
    return cleaning.clean_process(folder, [], meanwhile=meanwhile)


WAIT = """
import json, sys, time
from pathlib import Path
job = json.loads(Path(sys.argv[1]).read_text())
Path("here").touch()
while not Path("go").exists():
    time.sleep(0.01)
Path(job["events"]).write_text('{"waited": true}\\n')
"""


@pytest.mark.usefixtures("real_start")
def test_it_runs_while_the_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other: the process for a file that `meanwhile` writes, and that for a file of the process."""
    made: list[Path] = []
    real = cleaning._run

    def run(started, control, *rest):
        made.append(control / "scratch")
        return real(started, control, *rest)

    def meanwhile() -> None:
        while not (made[0] / "here").exists():
            time.sleep(0.01)
        (made[0] / "go").touch()

    monkeypatch.setattr("mymodels.hub.clean_process._run", run)
    with run_script(tmp_path, monkeypatch, WAIT, meanwhile) as run_:
        assert run_.events == [{"waited": True}] and not run_.failure


@pytest.mark.usefixtures("real_start")
def test_an_error_meanwhile_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[subprocess.Popen] = []
    real = subprocess.Popen

    def kept(*args, **options):
        processes.append(real(*args, **options))
        return processes[-1]

    def meanwhile() -> None:
        assert processes[-1].poll() is None
        raise KeyboardInterrupt

    available()  # asks the kernel in a process of its own, once
    monkeypatch.setattr("mymodels.hub.clean_process.subprocess.Popen", kept)
    with pytest.raises(KeyboardInterrupt), run_script(tmp_path, monkeypatch, WAIT, meanwhile):
        pytest.fail("it went on")
    assert len(processes) == 1 and processes[0].poll() is not None


def test_the_kinds_that_a_folder_may_hold_are_those_that_are_opened() -> None:
    assert set(OPENED) == {"PyTorch", "pickle", *opening._OPENERS}


def test_the_defaults_of_our_models_are_known_though_the_command_registers_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered: list[bool] = []
    monkeypatch.setattr("mymodels._register_all", lambda: registered.append(True))

    class Folder:
        config = {"model_type": "mygpt2"}

    defaults = settings._library_defaults(Folder())  # type: ignore[arg-type]
    assert registered == [True] and defaults["hidden_size"] == 768


def test_what_every_stage_needs_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping

    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", None)
    stages.prepare_loading()
    made = conversion_mapping._checkpoint_conversion_mapping_cache
    assert made
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    assert conversion_mapping._checkpoint_conversion_mapping_cache is made


PREPARED = """
import gc, importlib, sys
collected = []
gc.callbacks.append(lambda phase, about: collected.append(about["generation"]))
sys.path.insert(0, sys.argv[2])  # without the package around it, which imports torch
stages = importlib.import_module("isolated.stages")
class Events:
    def write(self, **event):
        pass
stages.import_libraries(Events())
assert 2 not in collected
assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()
known = set(sys.modules)
from transformers import AutoModel, AutoTokenizer
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(sorted(name for name in set(sys.modules) - known if name.startswith(("transformers.", "torch."))))
"""


@pytest.mark.parametrize("name", ["mygpt2", "mybert"])
def test_a_stage_has_the_libraries_it_loads_a_folder_with(name: str) -> None:
    """What is imported in a stage is imported again in the next."""
    command = [sys.executable, "-c", PREPARED, str(ROOT / "hub_repo" / name), str(ROOT / "mymodels" / "hub")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr


COMMAND = """
import atexit, gc, sys
atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 100_000))
counted = []
gc.callbacks.append(lambda phase, about: counted.append(about["generation"]))
import mymodels_command
code = mymodels_command.main()
assert 2 not in counted
sys.exit(code)
"""


@pytest.mark.parametrize("verb", [["verify", "--no-exec"], ["inspect"]], ids=lambda verb: verb[0])
def test_the_command_collects_no_garbage_where_there_is_none(verb: list[str]) -> None:
    """Neither while it imports and reads code, nor at exit, where Python would look at each object of torch."""
    command = [sys.executable, "-c", COMMAND, *verb, str(ROOT / "hub_repo" / "mybert")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == "True True", ended.stderr
    assert "AssertionError" not in ended.stderr

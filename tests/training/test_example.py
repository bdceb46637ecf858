"""What the README starts: the example by `accelerate launch`, with the configurations that ship with the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mymodels

CONFIGS = Path(mymodels.__file__).parent / "training" / "accelerate_configs"


def test_what_goes_wrong_is_one_sentence(tmp_path, monkeypatch, capfd) -> None:
    from mymodels.training.example import main

    for more, message in (
        (["--resume_from_checkpoint"], "no folder .*run to resume from: start without"),
        ([], None),
        ([], "run holds checkpoint-1 of an earlier run: pass resume_from_checkpoint=True"),
    ):
        monkeypatch.setattr(sys, "argv", ["example", "--output_dir", str(tmp_path / "run"), "--max_steps", "1", *more])
        if message is None:
            main()
        else:
            with pytest.raises(SystemExit, match=message):
                main()
    assert "eos_token_id" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_two_processes_resume(config, tmp_path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    example = ["-m", "mymodels.training.example", "--output_dir", str(tmp_path), "--save_steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parents[2])}
    for steps in (["--max_steps", "2"], ["--max_steps", "4", "--resume_from_checkpoint"]):
        run = subprocess.run([*launch, *example, *steps], capture_output=True, text=True, env=environment, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.count(f"{steps[1]} steps, loss ") == 1
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["num_processes"] == 2

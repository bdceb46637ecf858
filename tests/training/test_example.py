"""What the README starts: the example by `accelerate launch`, with the configurations that ship with the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import DeepSpeedPlugin
from accelerate.utils import DistributedType

import mymodels

CONFIGS = Path(mymodels.__file__).parent / "training" / "accelerate_configs"
DISTRIBUTED = {
    "ddp.yaml": DistributedType.MULTI_GPU,
    "fsdp2.yaml": DistributedType.FSDP,
    "deepspeed_zero3.yaml": DistributedType.DEEPSPEED,
}


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


def test_deepspeed_is_refused_by_the_loop(tmp_path, monkeypatch) -> None:
    from mymodels.training.example import main

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(sys, "argv", ["example", "--output_dir", str(tmp_path / "run"), "--max_steps", "1"])
    with pytest.raises(SystemExit, match=r"does not run under DeepSpeed: launch it with .*fsdp2\.yaml"):
        main()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_accelerate_reads_the_configurations(config, monkeypatch) -> None:
    from accelerate.commands import launch

    arguments = launch.launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), "train.py"])
    arguments, defaults, _ = launch._validate_launch_command(arguments)
    assert arguments.num_processes == 2 and defaults.distributed_type == DISTRIBUTED[config]
    if config == "deepspeed_zero3.yaml":
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as `launch_command`
        _, environment = launch.prepare_deepspeed_cmd_env(arguments)
        for name, value in environment.items():
            if name.startswith("ACCELERATE_"):
                monkeypatch.setenv(name, value)
        built = DeepSpeedPlugin().deepspeed_config
        assert built["zero_optimization"]["stage"] == 3
        assert built["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_two_processes_resume(config, tmp_path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    example = ["-m", "mymodels.training.example", "--output_dir", str(tmp_path), "--save_steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parents[2])}
    for steps in (["--max_steps", "2"], ["--max_steps", "4", "--resume_from_checkpoint"]):
        run = subprocess.run([*launch, *example, *steps], capture_output=True, text=True, env=environment, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.count(f"{steps[1]} steps, loss ") == 1
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["num_processes"] == 2

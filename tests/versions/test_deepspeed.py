"""DeepSpeed's ZeRO-3 by the configuration that ships, two processes on the CPU; installed beside, as the releases are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mymodels
from mymodels import open_checkpoint
from mymodels.checkpoints.atomic_write import replace_folder

ROOT = Path(__file__).parents[2]
PACKAGES = ["deepspeed==0.19.8", "hjson==3.1.0", "einops==0.8.2", "py-cpuinfo==9.0.0", "msgpack==1.2.4"]
CONFIG = Path(mymodels.__file__).parent / "training" / "accelerate_configs" / "deepspeed_zero3.yaml"
pytestmark = pytest.mark.versions


@pytest.fixture(scope="module")
def deepspeed() -> Path:
    folder = Path(os.environ.get("MYMODELS_CACHE") or ROOT / ".cache") / "deepspeed"
    if not folder.is_dir():
        with replace_folder(folder) as new:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", new, *PACKAGES]
            subprocess.run(pip, check=True)
    return folder


def test_zero_3_trains_and_goes_on_like_one_process(deepspeed: Path, tmp_path: Path) -> None:
    python_path = os.pathsep.join(map(str, (deepspeed, ROOT, ROOT / "tests", ROOT / "tests" / "training")))
    environment = os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "accelerate.commands.launch", "--config_file", CONFIG]
    script = Path(__file__).with_name("zero3_run.py")

    def run(folder: str, steps: int, size: int, *launcher) -> torch.Tensor:
        command = [sys.executable, *launcher, script, tmp_path / folder, str(steps), str(size), tmp_path / "losses.pt"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.tensor(torch.load(tmp_path / "losses.pt"))

    expected = run("one", 8, 4)
    run("two", 4, 2, *launch)
    resumed = run("two", 8, 2, *launch)  # from the checkpoint of step 4
    torch.testing.assert_close(resumed, expected, rtol=0, atol=1e-5)
    one, two = (open_checkpoint(tmp_path / folder / "checkpoint-8") for folder in ("one", "two"))
    assert one.info == two.info
    for name in [name for name in one if not name.endswith("k_proj.bias")]:  # its gradient is rounding around 0
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (2, 3), (3, 2), (3, 3)])
def test_zero_folders_are_put_together_as_deepspeed_does(
    stage: int, ranks: int, deepspeed: Path, tmp_path: Path
) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "checkpoints"))
    from zero_folders import write_zero

    write_zero(tmp_path, stage, ranks)
    script = (
        "import sys, torch; from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as read;"
        "torch.save({name: value.clone() for name, value in read(sys.argv[1]).items()}, sys.argv[2])"
    )
    environment = os.environ | {"PYTHONPATH": str(deepspeed), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, tmp_path, tmp_path / "truth.bin"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    truth, opened = torch.load(tmp_path / "truth.bin"), open_checkpoint(tmp_path)
    assert set(opened) == set(truth)
    for name, tensor in truth.items():
        assert opened[name].dtype == tensor.dtype and torch.equal(opened[name], tensor), name

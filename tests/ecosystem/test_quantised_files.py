"""What torchao and bitsandbytes save is recognised as quantised, whether their packages are imported or not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mymodels.checkpoints import CheckpointError, open_checkpoint, save_checkpoint
from mymodels.checkpoints.quantised import quantisation

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]


def test_torchao(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    torch.save(model.state_dict(), tmp_path / "q.pt")
    with pytest.raises(CheckpointError, match=r"'0\.weight' is a torchao\."):
        open_checkpoint(tmp_path / "q.pt")
    with pytest.raises(CheckpointError, match=r"'0\.weight' is a torchao\."):
        save_checkpoint(model, tmp_path / "out")
    script = "import sys; sys.modules['torchao'] = None; from mymodels.checkpoints import open_checkpoint as o; o(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "q.pt"], capture_output=True, text=True)
    assert "'0.weight' is a torchao." in run.stderr.splitlines()[-1]


@pytest.mark.parametrize(("kind", "phrase"), [("nf4", "bitsandbytes NF4 (4 bit)"), ("fp4", "bitsandbytes FP4 (4 bit)")])
def test_bitsandbytes(kind: str, phrase: str, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type=kind)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    state = nn.ModuleDict({"fc": layer.to("cpu")}).state_dict()
    torch.save(state, tmp_path / "q.pt")
    assert quantisation(open_checkpoint(tmp_path / "q.pt")) == phrase

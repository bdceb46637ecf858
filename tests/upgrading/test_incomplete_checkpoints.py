"""A checkpoint that lacks parameters, loaded by every release: what the rule gives a value has one, and what was loaded is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from batch import place_of
from incomplete_folders import INIT, KEYS, repaired, write
from load_incomplete import load, values_of

from mymodels.hub.releases import resolve

EVERYTHING = """
class Scale(nn.Module):
    def __init__(self, dim, init_values=1e-5):
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim))


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.kept = nn.Parameter(torch.zeros(4))
        self.bias = nn.Parameter(torch.zeros(4))
        self.decoder = nn.Linear(4, 4)
        self.decoder.bias = self.bias
        self.logit_scale = nn.Parameter(torch.ones([]) * np.log(1 / 0.07))
        self.scales = nn.ModuleList([Scale(4, config.scale) for _ in range(2)])
"""
LOADED = {"head.kept": (4,), "head.dense.weight": (4, 4), "head.dense.bias": (4,), "head.decoder.weight": (4, 4)}
EMPTY = {
    "norm.weight": 1.0,
    "norm.bias": 0.0,
    "bias": 0.0,
    "logit_scale": 2.6592600,
    "scales.0.gamma": 0.25,
    "scales.1.gamma": 0.25,
}


def everything(path: Path) -> Path:
    """A folder whose checkpoint has some parameters of its classes and lacks others."""
    model = "self.queries = nn.Parameter(0.5 * torch.randn(64, 64))"
    init = INIT + "        if isinstance(module, nn.Linear):\n            nn.init.zeros_(module.bias)\n"
    return write(path, classes=EVERYTHING, model=model, init=init, keys=KEYS | LOADED)


def assert_filled(values: dict[str, list[float]]) -> None:
    """Each parameter: NaN, mean, standard deviation."""
    for name in KEYS | LOADED:
        assert values[name] == [0, 3.0, 0.0], name
    for name, mean in EMPTY.items():
        assert values[f"head.{name}"] == [0, pytest.approx(mean, abs=1e-6), pytest.approx(0.0, abs=1e-6)], name
    count, mean, std = values["toy.queries"]
    assert count == 0 and abs(mean) < 0.05 and 0.47 < std < 0.53


def loaded(folders: list[Path], place: Path | None, work: Path) -> list[dict[str, Any]]:
    """The values of the folders' parameters under one release, in a process of its own."""
    script = Path(__file__).with_name("load_incomplete.py")
    environment = os.environ | {"HF_MODULES_CACHE": str(work), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(place)} if place else {}
    command = [sys.executable, str(script), "AutoModelForMaskedLM", *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()[-len(folders) :]]


def test_the_installed_transformers_loads_them_filled(tmp_path: Path) -> None:
    before = values_of(load(everything(tmp_path / "before_toy"), "AutoModelForMaskedLM"))
    assert {name.removeprefix("head.") for name, (nan, _, _) in before.items() if nan} == {*EMPTY, "toy.queries"}
    folder = everything(tmp_path / "after_toy")
    repaired(folder)
    assert_filled(values_of(load(folder, "AutoModelForMaskedLM")))


@pytest.mark.versions
@pytest.mark.parametrize("release", ["4.56.2", "4.57.6", "5.0.0", "5.23.0"])
def test_every_release_loads_them_filled(release: str, tmp_path: Path) -> None:
    place = place_of(resolve([release])[0])
    folders = [everything(tmp_path / "before_toy"), everything(tmp_path / "after_toy")]
    repaired(folders[1])
    before, after = loaded(folders, place, tmp_path / "modules")
    assert before.pop("release") == after.pop("release") == release
    assert {name.removeprefix("head.") for name, (nan, _, _) in before.items() if nan} == {*EMPTY, "toy.queries"}
    assert_filled(after)

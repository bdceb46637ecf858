"""One process, two, or a model shared out between two: the same training, and each goes on from the other's checkpoint."""

import shutil

import pytest
import torch
from killable_runs import finish, start

from mymodels import open_checkpoint

LAYOUTS = {  # each with four examples a step, which 24 can be divided by: others are filled up for two processes
    "one": {"size": 2, "accumulation": 2},
    "two": {"size": 2, "accumulation": 1, "processes": 2},
    "shared": {"size": 2, "accumulation": 1, "processes": 2, "fsdp": True},
}


def train(layout: str, folder, max_steps: int, kind: str = "loop") -> list:
    options = {"dropout": 0.0, "count": 24, "lr_scheduler_type": "constant", "max_steps": max_steps}
    return finish(start(kind, folder, **options, **LAYOUTS[layout]), folder)["losses"]


@pytest.fixture(scope="module")
def runs_of_four(tmp_path_factory) -> dict:
    folders = {layout: tmp_path_factory.mktemp("runs") / layout for layout in LAYOUTS}
    return {layout: (folder, train(layout, folder, 4)) for layout, folder in folders.items()}


@pytest.mark.parametrize("layout", ["two", "shared"])
def test_it_is_the_same_training(layout, runs_of_four) -> None:
    (one, expected), (other, losses) = runs_of_four["one"], runs_of_four[layout]
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    a, b = open_checkpoint(one / "checkpoint-4"), open_checkpoint(other / "checkpoint-4")
    assert a.info == b.info
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("saved", "resumed"), [("two", "one"), ("shared", "one"), ("one", "two"), ("one", "shared")])
def test_another_number_of_processes_goes_on(saved, resumed, runs_of_four, expected, tmp_path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs_of_four[saved][0], folder)
    torch.testing.assert_close(train(resumed, folder, 8), expected, rtol=0, atol=1e-5)
    assert "dropout uses new random numbers" in folder.with_name("run.log").read_text()


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[float]:
    return train("one", tmp_path_factory.mktemp("runs") / "eight", 8)


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "resumed"), [("two", "one"), ("one", "two")])
def test_trainer_goes_on_with_another_number_of_processes(saved, resumed, tmp_path) -> None:
    expected = train("one", tmp_path / "eight", 8, "trainer")
    train(saved, tmp_path / "run", 4, "trainer")
    torch.testing.assert_close(train(resumed, tmp_path / "run", 8, "trainer"), expected, rtol=0, atol=1e-3)

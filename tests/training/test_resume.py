"""A run that is killed and resumed is the run that was not: bit for bit, wherever it is killed."""

import random
import time

import pytest
from killable_runs import assert_same, finish, kill, start, wait_for_death

VARIANTS = {
    "padded": {"batches": "padded"},
    "masked at random, no accumulation": {"batches": "masked", "accumulation": 1, "size": 4},
    "packed": {"batches": "packed"},
    "two processes": {"batches": "masked", "processes": 2, "size": 1},
}
_whole: dict = {}


def uninterrupted(kind: str, variant: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    if (kind, variant) not in _whole:
        folder = tmp_path_factory.mktemp("whole") / "run"
        _whole[kind, variant] = finish(start(kind, folder, **VARIANTS[variant]), folder)
    return _whole[kind, variant]


# each variant once in the fast suite
FAST = {
    ("loop", "padded"),
    ("loop", "two processes"),
    ("trainer", "masked at random, no accumulation"),
    ("trainer", "packed"),
}


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        pytest.param(kind, variant, marks=() if (kind, variant) in FAST else pytest.mark.slow)
        for kind in ("loop", "trainer")
        for variant in VARIANTS
    ],
)
def test_killed_twice_and_resumed(kind, variant, tmp_path, tmp_path_factory) -> None:
    whole = uninterrupted(kind, variant, tmp_path_factory)
    assert len(whole["losses"]) == 18
    out = tmp_path / "run"
    wait_for_death(start(kind, out, die=("step", 11), **VARIANTS[variant]))  # in the second epoch
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    wait_for_death(start(kind, out, die=("fsync", 5), **VARIANTS[variant]))  # while it writes the next checkpoint
    assert not (out / "checkpoint-12").exists()
    assert_same(finish(start(kind, out, **VARIANTS[variant]), out), whole)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-16", "checkpoint-18", "result.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["loop", "trainer"])
def test_killed_at_random_points(kind, variant, tmp_path, tmp_path_factory) -> None:
    whole = uninterrupted(kind, variant, tmp_path_factory)
    chance = random.Random(f"{kind} {variant}")
    for attempt in range(3):
        out = tmp_path / f"run{attempt}"
        for _ in range(4):
            at = chance.choice(["time", "fsync", "step"])
            if at == "time":
                processes = start(kind, out, **VARIANTS[variant])
                time.sleep(chance.uniform(0.2, 2.0))
                kill(processes)
            else:
                processes = start(kind, out, die=(at, chance.randint(1, 40)), **VARIANTS[variant])
                processes[0].join(120)
                kill(processes)
        assert_same(finish(start(kind, out, **VARIANTS[variant]), out), whole)

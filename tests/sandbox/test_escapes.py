"""Attempts to break out of the box, and their control: each succeeds without the box, and none within it.

`attempts/` holds them. The control says which of them count: one that this machine cannot do without the box either
(no IPv6, no Bluetooth, not root) shows nothing.
"""

import functools
import sys
from pathlib import Path

import pytest
from attempts import load
from making import Outcomes, boxed, make_all, plainly
from outside import outside

from mymodels import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the box needs Linux")
ATTEMPTS = load()
LEAST = 200  # attempts that count, on any Linux; fewer means that the control has lost its meaning


@pytest.fixture(scope="module", autouse=True)
def token() -> None:
    """A secret in this process's environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANARY_TOKEN", "canary")
        patch.setenv("HF_TOKEN", "canary")
        yield


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    with outside(tmp_path_factory.mktemp("control") / "world") as world:
        before = world.state()
        found = make_all(ATTEMPTS, world, plainly)
        assert world.state() != before, "the attempts have changed nothing outside: they did not run"
        return found


def test_without_the_box_every_attempt_succeeds(control: Outcomes) -> None:
    failed = {name: control.get(name) for name in ATTEMPTS if control.get(name, {}).get("outcome") != "succeeded"}
    wrong = {name: report for name, report in failed.items() if not report or report["outcome"] != "impossible"}
    assert not wrong
    assert len(ATTEMPTS) - len(failed) >= LEAST, failed


def escaped(place: Path, isolation: sandbox.Isolation) -> Outcomes:
    """The attempts that succeed, and those that were not made or have a mistake."""
    with outside(place / "world") as world:
        before = world.state()
        found = make_all(ATTEMPTS, world, functools.partial(boxed, isolation=isolation))
        after = world.state()
        changed = {
            path: (before.get(path), after.get(path)) for path in before | after if before.get(path) != after.get(path)
        }
        assert not changed, "something outside of the box has changed"
        assert not world.reached, "a server outside of the box was reached"
    return {
        name: found.get(name, {"outcome": "not made"})
        for name in ATTEMPTS
        if found.get(name, {}).get("outcome") not in ("stopped", "impossible")
    }


def test_in_the_box_every_attempt_is_stopped(tmp_path: Path, control: Outcomes) -> None:
    isolation = sandbox.available()
    if not isolation.confined:
        pytest.skip(str(isolation))
    assert not escaped(tmp_path, isolation)

"""Attempts to break out of the box, and their control: each succeeds without the box, and none within it.

`attempts/` holds them. The control says which attempts count: one that this machine cannot do without the box either
(no IPv6, no Bluetooth, not root) proves nothing.
"""

import sys

import pytest
from attempts import load
from outside import outside
from plain import in_parallel, jobs, run_plainly

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the box needs Linux")
ATTEMPTS = load()
LEAST = 200  # attempts that count, on any Linux; fewer means that the control has lost its meaning


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    place = tmp_path_factory.mktemp("control")
    with outside(place / "world") as world:
        before = world.state()
        found = in_parallel(lambda job: run_plainly(world, job, place), jobs(ATTEMPTS))
        assert world.state() != before, "the attempts have changed nothing outside: they did not run"
        return found


def test_without_the_box_every_attempt_succeeds(control: dict[str, dict]) -> None:
    failed = {name: control.get(name) for name in ATTEMPTS if control.get(name, {}).get("outcome") != "succeeded"}
    wrong = {name: report for name, report in failed.items() if not report or report["outcome"] != "impossible"}
    assert not wrong
    assert len(ATTEMPTS) - len(failed) >= LEAST, failed

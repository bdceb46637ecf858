"""Attempts to break out of the box, and their control: each succeeds without the box, and none within it.

`attempts/` holds them. The control says which of them count: one that this machine cannot do without the box either
(no IPv6, no Bluetooth, not root) shows nothing.
"""

import functools
import sys
from pathlib import Path

import pytest
from attempts import Attempt, load
from making import Outcomes, boxed, make_all, plainly
from outside import outside

from mymodels import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the box needs Linux")
ATTEMPTS = load()
NEED_NAMESPACES = {  # with Landlock and seccomp alone they find that a file exists whose path they know, and its size
    "see_file_by_stat",
    "see_file_by_statx",
    "see_file_by_access",
    "see_file_by_path_descriptor",
    "see_file_by_statfs",
    "see_file_by_error_codes",
    "see_file_by_loader",
    "see_folder_by_chdir",
    "see_link_target",
}
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


def escaped(attempts: dict[str, Attempt], place: Path, isolation: sandbox.Isolation) -> Outcomes:
    """The attempts that succeed in the box, and those that were not made or have a mistake."""
    with outside(place / "world") as world:
        before = world.state()
        found = make_all(attempts, world, functools.partial(boxed, isolation=isolation))
        after = world.state()
        assert after == before, "something outside of the box has changed"
        assert not world.reached, "a server outside of the box was reached"
    outcomes = {name: found.get(name, {"outcome": "not made"}) for name in attempts}
    return {name: report for name, report in outcomes.items() if report["outcome"] not in ("stopped", "impossible")}


def here(**layers: object) -> sandbox.Isolation:
    """What this machine has, but for layers that are left out."""
    isolation = sandbox.available()._replace(**layers)
    if not isolation.confined:
        pytest.skip(str(isolation))
    return isolation


def test_in_the_box_every_attempt_is_stopped(tmp_path: Path, control: Outcomes) -> None:
    isolation = here()
    expected = set() if isolation.namespaces else NEED_NAMESPACES
    assert escaped(ATTEMPTS, tmp_path, isolation).keys() == expected


SOME = {name: attempt for name, attempt in ATTEMPTS.items() if not attempt.alone}
REST = {name: attempt for name, attempt in ATTEMPTS.items() if attempt.alone}


@pytest.mark.parametrize("attempts", [SOME, pytest.param(REST, marks=pytest.mark.slow)], ids=["some", "rest"])
def test_without_namespaces_files_can_be_seen_and_no_more(tmp_path: Path, attempts: dict[str, Attempt]) -> None:
    """As in most containers: Landlock and seccomp alone."""
    found = escaped(attempts, tmp_path, here(namespaces=False))
    assert found.keys() == NEED_NAMESPACES & attempts.keys()


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6])
def test_with_the_landlock_of_older_kernels(tmp_path: Path, version: int) -> None:
    """Its rights are restricted as far as that version can; seccomp does what it cannot."""
    if sandbox.available().landlock < version:
        pytest.skip(f"this kernel has Landlock {sandbox.available().landlock}")
    assert escaped(SOME, tmp_path, here(namespaces=False, landlock=version)).keys() == NEED_NAMESPACES


@pytest.mark.slow
def test_without_landlock_namespaces_stop_every_attempt(tmp_path: Path) -> None:
    if not sandbox.available().namespaces:
        pytest.skip("this kernel gives no namespaces to this user")
    assert not escaped(ATTEMPTS, tmp_path, here(landlock=0))

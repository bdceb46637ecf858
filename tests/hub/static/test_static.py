"""Static checks: every fault is found and named, alone; healthy folders raise no alarm; nothing ever raises."""

import shutil
from pathlib import Path

import pytest
from edits import Fault
from faults_configs import CONFIGS
from faults_files import FILES
from faults_imports import IMPORTS
from faults_models import MODELS
from faults_trust import TRUST
from hub.repos import KINDS

from mymodels.hub.static import CHECKS, static_checks

FAULTS = FILES + CONFIGS + IMPORTS + MODELS + TRUST
OURS = ("mygpt2", "mybert")


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory):
    """The healthy folder of a kind, made once."""
    root, made = tmp_path_factory.mktemp("healthy"), {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = KINDS[kind](root / kind)
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_no_false_alarm(kind: str, healthy) -> None:
    checks = static_checks(healthy(kind))
    assert [check for check in checks if check.status == "failed"] == []
    assert kind not in OURS or {check.status for check in checks} == {"ok"}
    assert list(dict.fromkeys(check.name for check in checks)) == list(CHECKS)


def test_the_names_of_the_faults_are_different() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_fault(fault: Fault, healthy, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy(fault.base), tmp_path / "folder"))
    fault.edit(folder)
    checks = static_checks(folder, releases=fault.releases)
    alarms = [check for check in checks if check.status in ("failed", "warning")]
    found = [check for check in alarms if check.name == fault.check and check.status == fault.status]
    assert any(fault.where in check.where and fault.what in check.what for check in found), alarms
    assert {check.name for check in alarms} - set(fault.also) == {fault.check}, alarms
    failed = {fault.check} if fault.status == "failed" else set()
    assert {check.name for check in alarms if check.status == "failed"} == failed, alarms
    for check in alarms:
        assert check.what and check.remedy and "\n" not in check.what and str(folder) not in check.what, check

"""The shipped folders hold what they promise under old releases too: their recorded outputs above all."""

from pathlib import Path

import pytest
from versions.test_versions import CACHE

from mymodels.hub import verify

HUB = Path(__file__).parents[2] / "hub_repo"
pytestmark = pytest.mark.versions


@pytest.mark.parametrize("name", ["mygpt2", "mybert"])
def test_every_check_holds(name: str) -> None:
    found = verify(HUB / name, quick=True, releases="4.56,5.2", cache_dir=CACHE)
    assert not found.failed and not found.skipped
    golden = [release for release, check in found.rows if check.name == "golden" and check.status == "ok"]
    assert len(set(golden)) == 2

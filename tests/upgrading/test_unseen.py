"""Folders that were written before the rules had met them, under three releases: proven with every number the same."""

from pathlib import Path

import batch
import folders
import pytest

pytestmark = pytest.mark.versions


def test_the_unseen_folders_are_proven(tmp_path: Path) -> None:
    names = folders.names(folders.UNSEEN)
    assert len(names) >= 10
    results = batch.upgrade_all(names, tmp_path, "5.0,5.3,5.23", take_back=False)
    for name, (edited, proof) in results.items():
        assert proof is not None, (name, edited.refused)
        assert proof.holds and not proof.bad, (name, proof.bad)
        for release in proof.targets:
            equal = {row.item for row in proof.rows if row.release == release and row.status == "equal"}
            assert {"load", "outputs", "save and reload"} <= equal, (name, release, equal)

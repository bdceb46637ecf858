"""The miniature folders under their old release and, upgraded, under today's: one process for all folders of a release."""

from pathlib import Path

import batch
import folders
import pytest
from hub.dynamic.many import run_many

from mymodels.hub.static import static_checks
from mymodels.hub.static.repo_snapshot import parse_text
from mymodels.hub.upgrading.edit_engine import Edited, apply_rules
from mymodels.hub.upgrading.plan_releases import span_of, target_releases
from mymodels.hub.upgrading.proof import Proof
from mymodels.hub.upgrading.rules import all_rules
from mymodels.hub.upgrading.write_folder import write_copy

pytestmark = pytest.mark.versions

PROVEN_AT_LEAST = 22
MUST_BE_COMPARED = ("load", "outputs", "save and reload")


# what verify still names: the original has it under every release
ORIGINALS_OWN: dict[str, set[str]] = {}
FAILS_WHEN_RUN = {"florence": {"padding"}, "llada": {"training loss"}}
RESIZED = {"chatglm", "florence", "mpt", "nomic_bert", "progen"}  # that a rule has repaired
STAGES = ["outputs", "placement", "training"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Edited, Proof | None]]:
    return batch.upgrade_all(folders.names(), tmp_path_factory.mktemp("upgrading"))


def test_most_are_proven_and_the_others_refused_by_line(results: dict[str, tuple[Edited, Proof | None]]) -> None:
    proven = [name for name, (_, proof) in results.items() if proof is not None and proof.holds]
    for name, (edited, proof) in results.items():
        if name not in proven:
            reasons = [(edit.file, edit.line) for edit in edited.refused]
            reasons += [(row.item, row.where or row.what) for row in (proof.bad if proof else [])]
            assert reasons, f"{name} is neither proven nor refused"
    assert len(proven) >= PROVEN_AT_LEAST, sorted(set(results) - set(proven))


def test_what_is_proven_was_compared(results: dict[str, tuple[Edited, Proof | None]]) -> None:
    for name, (_, proof) in results.items():
        if proof is None or not proof.holds:
            continue
        assert proof.old is not None and proof.old.startswith("4.")
        for release in proof.targets:
            equal = {row.item for row in proof.rows if row.release == release and row.status == "equal"}
            assert set(MUST_BE_COMPARED) <= equal, (name, release, equal)


def test_a_second_run_changes_nothing(results: dict[str, tuple[Edited, Proof | None]], tmp_path: Path) -> None:
    targets, rules = target_releases(None), [rule for rule in all_rules() if not rule.option]
    for name, (edited, _) in results.items():
        if edited.refused:
            continue
        folder = batch.read(name, tmp_path, targets)
        for file, text in edited.texts.items():
            parsed = parse_text(file, text)
            assert not isinstance(parsed, str), parsed
            folder.code[file] = parsed
        folder.values["config.json"] = edited.config or folder.config
        again = apply_rules(folder, rules, releases=span_of(targets))
        assert not again.changes, (name, again.edits)


def test_the_static_checks_of_verify_hold(results: dict[str, tuple[Edited, Proof | None]], tmp_path: Path) -> None:
    for name, (edited, _) in results.items():
        folder = batch.read(name, tmp_path, target_releases(None))
        new = write_copy(folder, edited, tmp_path / f"new_{name}")
        checks = static_checks(new, releases=["4.56.2", "5.23.0"])
        failed = {check.name for check in checks if check.status == "failed"}
        assert failed == ORIGINALS_OWN.get(name, set()), (name, [c for c in checks if c.status == "failed"])


def test_the_checks_of_verify_that_run_the_code_hold(
    results: dict[str, tuple[Edited, Proof | None]], tmp_path: Path
) -> None:
    """Under the installed release, all folders in one process; the proof compared what golden outputs and reloading would."""
    written = {
        name: write_copy(batch.read(name, tmp_path, target_releases(None)), edited, tmp_path / f"run_{name}")
        for name, (edited, _) in results.items()
    }
    found = run_many(dict.fromkeys(written.values(), STAGES), tmp_path / "scratch")
    for name, new in written.items():
        wrong = [check for check in found[new] if check.status in ("failed", "skipped")]
        assert {check.name for check in wrong} <= FAILS_WHEN_RUN.get(name, set()), (name, wrong)
        must = {"load", "forward", "padding", "device map", "training loss" if name == "llada" else "backward"}
        assert must <= {check.name for check in found[new]}, name
        assert name not in RESIZED or "ok" in [check.status for check in found[new] if check.name == "resize"], name


def test_what_verify_reports_of_an_original_is_named(results: dict[str, tuple[Edited, Proof | None]]) -> None:
    properties = {name: proof.properties for name, (_, proof) in results.items() if proof is not None}
    named = {name: len(found) for name, found in properties.items() if found}
    assert named == {"qwen1": 1}, properties  # dynamic NTK
    assert "generation with the cache differs" in properties["qwen1"][0]

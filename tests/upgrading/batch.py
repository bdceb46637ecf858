"""Upgrade the miniature folders together: all the folders of a release in one process.

`python tests/upgrading/batch.py RELEASES [NAME …]` prints what became of each folder.
"""

import resource
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import folders

from mymodels.hub.releases import PinnedRelease, install
from mymodels.hub.static.api_availability import find_releases
from mymodels.hub.static.repo_snapshot import Folder, read_folder
from mymodels.hub.upgrading.edit_engine import Edited, apply_rules
from mymodels.hub.upgrading.plan_releases import span_of, target_releases
from mymodels.hub.upgrading.proof import Proof, prove_all
from mymodels.hub.upgrading.rules import all_rules
from mymodels.hub.upgrading.upgrade import case_of, sources_of

CACHE = Path(__file__).parents[2] / ".cache" / "transformers"


def place_of(release: PinnedRelease) -> Path | None:
    return None if release.transformers == version("transformers") else install(release, CACHE)


def read(name: str, work: Path, targets: list[PinnedRelease]) -> Folder:
    source = folders.make(name, work / "originals" / f"mini_{name}")
    return read_folder(source, find_releases(sources_of(targets, CACHE)))


def upgrade_all(
    names: list[str], work: Path, to: str | None = None, tell=None, take_back: bool = True
) -> dict[str, tuple[Edited, Proof | None]]:
    """What the rules make of each folder, and its proof; no proof of those that a rule refuses."""
    targets, rules = target_releases(to), [rule for rule in all_rules() if not rule.option]
    results: dict[str, tuple[Edited, Proof | None]] = {}
    cases = {}
    for name in names:
        folder = read(name, work, targets)
        edited = apply_rules(folder, rules, releases=span_of(targets))
        results[name] = (edited, None)
        if tell:
            tell(f"edited {name}")
        if not edited.refused:
            own = folder.config["transformers_version"]
            key = name.replace("_", "-")
            (work / key).mkdir(parents=True)
            given = folders.inputs(name)
            cases[key] = case_of(
                folder.path, folder, edited, rules, targets, work / key, from_release=own, inputs=given
            )
    for key, (proof, kept) in prove_all(
        cases, targets, place_of, tell=tell or (lambda text: None), take_back=take_back
    ).items():
        results[key.replace("-", "_")] = (kept, proof)
    return results


def main() -> None:
    to, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as work:
        for name, (edited, proof) in upgrade_all(
            names or folders.names(), Path(work), to, lambda text: print(text, file=sys.stderr, flush=True), False
        ).items():
            print(
                f"== {name}: {'refused' if edited.refused else 'PROVEN' if proof.holds else 'not proven'}", flush=True
            )
            print(f"   {', '.join(edited.rules)}")
            for edit in edited.refused:
                print(f"   refused {edit.file}:{edit.line} {edit.what}")
            if proof is None:
                continue
            for release, why in proof.tried.items():
                print(f"   original {release}: {why[:300]}")
            for rule, why in proof.undone.items():
                print(f"   undone {rule}: {why}")
            for what in proof.properties:
                print(f"   of the original: {what}")
            seen = set()
            for row in proof.bad + proof.not_compared:
                if (row.name, row.item, row.what) not in seen and row.what != "it does not load":
                    seen.add((row.name, row.item, row.what))
                    releases = " ".join(r.release for r in proof.rows if r[1:] == row[1:])
                    print(f"   {row.status} {row.name} {row.item} [{releases}] {row.where} {row.what[:300]}")
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"CPU: {own.ru_utime + own.ru_stime:.0f} s here, {others.ru_utime + others.ru_stime:.0f} s in the processes")


if __name__ == "__main__":
    main()

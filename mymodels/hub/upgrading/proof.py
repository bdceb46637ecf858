"""The proof: the original under its own old release, the upgraded code under each asked one, number by number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..releases import PinnedRelease
from .edit_engine import Edited
from .recording import Compared, Recorded, compare, properties_of, record

BAD = ("differs", "failed")


@dataclass
class Proof:
    """What was compared.

    Attributes:
        old: the release that the original ran under; None if it ran under none of those that were tried.
        imports_only: whether it ran only with its imports repaired.
        tried: old releases under which the original failed, or failed in part: release → the first error.
        targets: the releases that the result is for.
        rows: each item under each target.
        undone: rules that were taken back: name → what differed with them.
        properties: what the original does that `verify` reports, under its old release too.
    """

    old: str | None = None
    imports_only: bool = False
    tried: dict[str, str] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    rows: list[Compared] = field(default_factory=list)
    undone: dict[str, str] = field(default_factory=dict)
    properties: list[str] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether nothing differed or failed under any target; without an original that alone proves nothing."""
        return bool(self.rows) and not self.bad

    @property
    def holds(self) -> bool:
        """Whether the original ran, and all that it computes is the same under every target."""
        equal = {
            row.release for row in self.rows if row.status == "equal" and row.item in ("outputs", "tokens", "processed")
        }
        return self.old is not None and self.runs and equal == set(self.targets)

    @property
    def bad(self) -> list[Compared]:
        """The rows that differ or failed."""
        return [row for row in self.rows if row.status in BAD]

    @property
    def not_compared(self) -> list[Compared]:
        """The rows for which there was nothing to compare with."""
        return [row for row in self.rows if row.status == "not compared"]


@dataclass
class Case:
    """One folder to prove.

    Attributes:
        source: the original.
        edited: what the rules made of it.
        without: what the rules make of it if one of them, by name, is left out.
        write: writes edited code with the rest of the folder to a new place, and returns it.
        old: releases to try the original under, in order.
        imports_only: the original with nothing but its imports repaired, which changes no numbers; it stands in for the
            original if that runs nowhere. None if no import was repaired.
        inputs: a file of the caller's inputs, or None.
    """

    source: Path
    edited: Edited
    without: Callable[[str], Edited]
    write: Callable[[Edited], Path]
    old: Sequence[PinnedRelease]
    imports_only: Edited | None = None
    inputs: Path | None = None


class _Runs:
    """Records of folders under releases, one process for all the folders of a release."""

    def __init__(
        self, install: Callable[[PinnedRelease], Path | None], limits: Mapping[str, Any], tell: Callable[[str], None]
    ):
        self.install, self.limits, self.tell = install, limits, tell

    def record(
        self,
        folders: Mapping[str, Path],
        release: PinnedRelease,
        inputs: Mapping[str, Recorded] | None = None,
        own: Mapping[str, Path] | None = None,
    ) -> dict[str, Recorded]:
        named = release.transformers
        self.tell(f"transformers {named}, installing it, if it is not there")
        place = self.install(release)
        return record(
            folders,
            place,
            named,
            inputs=inputs,
            own_inputs=own,
            progress=lambda text: self.tell(f"transformers {named}, {text}"),
            **self.limits,
        )


def prove_all(
    cases: Mapping[str, Case],
    targets: Sequence[PinnedRelease],
    install: Callable[[PinnedRelease], Path | None],
    *,
    limits: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda text: None,
    take_back: bool = True,
) -> dict[str, tuple[Proof, Edited]]:
    """Compare originals with their upgraded code, all the folders of a release in one process.

    A rule with which something differs is taken back, if that one rule is at fault and the rest holds without it.

    Args:
        cases: by a key of letters, digits and dashes.
        targets: the releases that the results are for.
        install: gives the place of a release, None for the installed one; see `releases.install`.
        limits: `time_limit` for each folder, `memory_limit`; see `recording.record`.
        tell: called with what is being done.
        take_back: whether to look for a rule at fault.

    Returns:
        For each key the proof, and the code that it is for.

    Raises:
        RuntimeError: a target cannot be installed.
    """
    runs = _Runs(install, limits or {}, tell)
    names = [release.transformers for release in targets]
    proofs = {key: Proof(targets=names) for key in cases}
    originals = _run_originals(cases, {key: case.source for key, case in cases.items()}, proofs, runs)
    without = {key: case.imports_only for key, case in cases.items() if key not in originals and case.imports_only}
    repaired = {key: cases[key].write(edited) for key, edited in without.items() if edited is not None}
    for key, record_ in _run_originals({key: cases[key] for key in repaired}, repaired, proofs, runs).items():
        originals[key], proofs[key].imports_only = record_, True
    for key, original in originals.items():
        proofs[key].properties = properties_of(original)
    kept = {key: case.edited for key, case in cases.items()}
    folders = {key: case.write(case.edited) for key, case in cases.items()}
    for key, rows in _compare_all(folders, cases, originals, targets, runs).items():
        proofs[key].rows = rows
    if take_back:
        _take_back(cases, proofs, kept, originals, targets, runs)
    return {key: (proofs[key], kept[key]) for key in cases}


def _run_originals(
    cases: Mapping[str, Case], sources: Mapping[str, Path], proofs: Mapping[str, Proof], runs: _Runs
) -> dict[str, Recorded]:
    """The best record of each original: the first release under which nothing fails, or where the least does."""
    best: dict[str, tuple[int, Recorded]] = {}
    for turn in range(max((len(case.old) for case in cases.values()), default=0)):
        groups: dict[PinnedRelease, list[str]] = {}
        for key, case in cases.items():
            if turn < len(case.old) and (key not in best or best[key][0]):
                groups.setdefault(case.old[turn], []).append(key)
        for release, keys in groups.items():
            own = {key: file for key in keys if (file := cases[key].inputs) is not None}
            try:
                found = runs.record({key: sources[key] for key in keys}, release, own=own)
            except RuntimeError as error:  # pip has no build of an old dependency for this Python
                found = {key: Recorded(release.transformers, {}, {}, str(error)) for key in keys}
            for key, record_ in found.items():
                failed = sum(
                    item["status"] == "failed" for items in record_.classes.values() for item in items.values()
                )
                if record_.first_failure:
                    proofs[key].tried[release.transformers] = record_.first_failure
                if record_.ran and (key not in best or failed < best[key][0]):
                    best[key] = (failed, record_)
    for key, (_, record_) in best.items():
        proofs[key].old = record_.release
    return {key: record_ for key, (_, record_) in best.items()}


def _compare_all(
    folders: Mapping[str, Path],
    cases: Mapping[str, Case],
    originals: Mapping[str, Recorded],
    targets: Sequence[PinnedRelease],
    runs: _Runs,
) -> dict[str, list[Compared]]:
    """The rows of each folder under each target. Without an original, the targets are compared with the newest one."""
    rows: dict[str, list[Compared]] = {key: [] for key in folders}
    reference = dict(originals)
    for release in reversed(targets):
        own = {key: file for key in folders if (file := cases[key].inputs) is not None}
        known = {key: reference[key] for key in folders if key in reference}
        for key, record_ in runs.record(folders, release, inputs=known, own=own).items():
            if key not in reference and record_.ran:
                reference[key] = record_
            if key in reference:
                rows[key] = compare(reference[key], record_) + rows[key]
            else:
                why = record_.first_failure or "it gives no outputs"
                rows[key].insert(0, Compared(release.transformers, "", "load", "failed", why))
    return rows


def _take_back(
    cases: Mapping[str, Case],
    proofs: Mapping[str, Proof],
    kept: dict[str, Edited],
    originals: Mapping[str, Recorded],
    targets: Sequence[PinnedRelease],
    runs: _Runs,
) -> None:
    """Leave out the one rule at fault of each case that does not hold, where the others hold without it."""
    tried: dict[str, tuple[str, str, Edited]] = {}
    for key, case in cases.items():
        if key in originals and proofs[key].bad:
            for number, rule in enumerate(case.edited.rules):
                other = case.without(rule)
                if other.changes and not other.refused:
                    tried[f"{key}-without-{number}"] = (key, rule, other)
    for release in targets:
        now = {
            name: entry
            for name, entry in tried.items()
            if any(r.release == release.transformers for r in proofs[entry[0]].bad)
        }
        if not now:
            continue
        folders = {name: cases[key].write(other) for name, (key, _, other) in now.items()}
        inputs = {name: originals[key] for name, (key, _, _) in now.items()}
        for name, record_ in runs.record(folders, release, inputs=inputs).items():
            if any(row.status in BAD for row in compare(originals[tried[name][0]], record_)):
                del tried[name]
    if not tried:
        return
    folders = {name: cases[key].write(other) for name, (key, _, other) in tried.items()}
    of = {name: cases[key] for name, (key, _, _) in tried.items()}
    inputs = {name: originals[key] for name, (key, _, _) in tried.items()}
    for name, rows in _compare_all(folders, of, inputs, targets, runs).items():
        key, rule, other = tried[name]
        again = replace(proofs[key], rows=rows, undone={})
        if again.holds and not proofs[key].undone:
            first = proofs[key].bad[0]
            again.undone[rule] = f"with it {first.item} of {first.name} {first.what} under transformers {first.release}"
            proofs[key].rows, proofs[key].undone, kept[key] = rows, again.undone, other

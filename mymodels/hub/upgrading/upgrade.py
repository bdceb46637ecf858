"""`upgrade`: old custom code made to run on today's transformers, and proven unchanged."""

import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...checkpoints.checkpoint import CheckpointError
from ...checkpoints.opening import locate
from ..clean_process import TIME_LIMIT
from ..given_inputs import Inputs, write_inputs
from ..releases import PinnedRelease, default_cache_dir, install
from ..static.api_availability import find_releases
from ..static.repo_snapshot import Finding, Folder, read_folder
from .edit_engine import Edited, apply_rules
from .left_faults import masks_not_passed, parameters_without_value
from .lint_counts import lint_counts
from .pickled_weights import with_safetensors
from .plan_releases import old_releases, span_of, target_releases
from .proof import Case, Proof, prove_all
from .refusals import refusals
from .rule import Edit, Rule
from .rules import all_rules
from .unified_diff import diff_of
from .write_folder import GoldenSource, write_copy, write_upgraded


@dataclass
class Upgrade:
    """The result of `upgrade`.

    Attributes:
        path: what was upgraded.
        out: the folder that was written; None if none was.
        refused: why nothing was written: places in the original, each with file and line.
        edits: what the rules changed, with lines of the original files.
        undone: rules that were taken back, because the outputs differed with them: name → why.
        diff: unified diff of code and config.
        proof: the original's record compared with the upgraded code under each release; None if nothing was run.
        rules: name → rule, of the edits.
        left: faults of the original that no rule repairs, because numbers would change or are not known; each with its place.
        verify: what `verify` fails on in `out` under the newest release; empty if it passes, or nothing was written.
        golden: where the golden outputs in `out` come from: the original, or the upgraded code; "" if nothing was written.
        mlinter: what transformers-mlinter finds `before` and `after`, for information; empty if it is not installed.
    """

    path: str
    out: str | None = None
    refused: list[Finding] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    undone: dict[str, str] = field(default_factory=dict)
    diff: str = ""
    proof: Proof | None = None
    rules: dict[str, Rule] = field(default_factory=dict)
    left: list[Finding] = field(default_factory=list)
    verify: list[Finding] = field(default_factory=list)
    golden: str = ""
    mlinter: dict[str, int] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        """Whether any rule had something to change."""
        return bool(self.edits) or bool(self.refused)

    @property
    def proven(self) -> bool:
        """Whether the original ran under an old release and everything it computes is the same under every asked one."""
        return self.proof is not None and self.proof.holds


def upgrade(
    path: str | os.PathLike,
    out: str | os.PathLike | None = None,
    *,
    from_release: str | None = None,
    to: str | Iterable[str] | None = None,
    dry_run: bool = False,
    unproven: bool = False,
    attention_interface: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    inputs: Inputs | None = None,
    time_limit: float = TIME_LIMIT,
    memory_limit: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[str], None] | None = None,
) -> Upgrade:
    """Repair the custom code of a Hub folder for today's transformers, and prove that it computes the same.

    The code is read, never run, to find what breaks; each repair is a rule. Then the original runs under its own old
    release, and the repaired code under each release of `to`, both in clean processes as `verify` uses them. Outputs,
    loss, gradients, greedy tokens, saved and reloaded weights must be the same. The original is never changed.

    Args:
        path: a folder, or the id of a Hub repo.
        out: folder to write; it must be empty or not exist. None, with `dry_run`, writes nothing.
        from_release: the old release that the original runs under, such as `"4.46"`. Default: `transformers_version` of
            its config; if it does not run there, some others are tried.
        to: releases that the result must run under: a range (`"4.56-5.23"`), of which some are tried, or a list.
        dry_run: only read and edit in memory: nothing is run or written.
        unproven: write the result also where no old release runs the original, so that there is nothing to compare with.
        attention_interface: also put attention through transformers' interface, which serving engines need; it is taken
            back if outputs differ.
        revision: branch, tag or commit of a Hub repo.
        token: as in `huggingface_hub`.
        inputs: arguments of `forward` to run the model on, see `given_inputs.read_inputs`; default: generated.
        time_limit: seconds for each folder in a clean process.
        memory_limit: bytes for each process, 0 for no limit; default 4 GB and six times the weights.
        cache_dir: where releases are installed, see `releases.install`.
        progress: called with what is being done, in a few words.

    Returns:
        An `Upgrade`. What cannot be repaired, or differs, is reported in it and raises nothing; then nothing is written.

    Raises:
        FileNotFoundError: the folder or repo does not exist.
        FileExistsError: `out` is not empty.
        ValueError: a release is not known, or neither `out` nor `dry_run` is given.
        RuntimeError: a release cannot be installed.

    Examples:
        >>> result = upgrade("old-model", "new-model", from_release="4.46")
        >>> result.proven
        True
    """
    if out is None and not dry_run:
        raise ValueError("upgrade needs a folder to write, out= (--out), or dry_run=True (--dry-run)")
    targets = target_releases(to)
    if out is not None:
        _refuse_full(Path(out).expanduser())
    tell = progress or (lambda text: None)
    source = locate(path, revision=revision, token=token, everything=True)
    if not source.is_dir():
        raise NotADirectoryError(f"{source} is no folder: name the folder of a model")
    if out is not None and Path(os.path.realpath(Path(out).expanduser())).is_relative_to(os.path.realpath(source)):
        raise ValueError(f"{out} is inside {source}, which is never changed: choose another folder")
    tell("reading the files and the code")
    folder = read_folder(source, find_releases(sources_of(targets, cache_dir)))
    result = Upgrade(str(path))
    result.refused = refusals(folder)
    if not folder.files.get("config.json"):
        raise CheckpointError(f"{source} has no config.json: name the folder of a model")
    if result.refused:
        return result
    rules = [
        rule
        for rule in all_rules()
        if not rule.option or (rule.option == "attention_interface" and attention_interface)
    ]
    edited = apply_rules(folder, rules, releases=span_of(targets))
    _report(result, folder, edited, rules)
    result.left = masks_not_passed(folder) + parameters_without_value(folder)
    if result.refused or not edited.changes or dry_run or out is None:
        return result
    with tempfile.TemporaryDirectory(prefix="mymodels-upgrade-") as scratch:
        converted = Path(scratch, "safetensors")
        converted.mkdir()
        folder = with_safetensors(folder, converted)
        case = case_of(source, folder, edited, rules, targets, Path(scratch), from_release=from_release, inputs=inputs)
        limits: dict[str, Any] = {"time_limit": time_limit, "memory_limit": memory_limit}
        places = functools.partial(_install, cache_dir=cache_dir)
        proof, kept = prove_all({"folder": case}, targets, places, limits=limits, tell=tell)["folder"]
        result.proof = proof
        result.undone = proof.undone
        if kept is not edited:
            _report(result, folder, kept, rules)
        if proof.holds or (unproven and proof.old is None and proof.runs):
            original = _original(source, case, proof, places)
            write_upgraded(
                folder,
                kept,
                result,
                Path(out).expanduser(),
                original,
                inputs=inputs,
                limits=limits,
                cache_dir=cache_dir,
                tell=tell,
            )
            result.out = str(out)
    return result


def _original(
    source: Path, case: Case, proof: Proof, places: Callable[[PinnedRelease], Path | None]
) -> GoldenSource | None:
    """The original as the proof ran it, or None if it ran nowhere."""
    release = next((one for one in case.old if one.transformers == proof.old), None)
    if release is None:
        return None
    if proof.imports_only and case.imports_only is not None:
        named = f"the original, with its imports repaired, under transformers {proof.old}"
        return GoldenSource(case.write(case.imports_only), places(release), named)
    return GoldenSource(source, places(release), f"the original under transformers {proof.old}")


def case_of(
    source: Path,
    folder: Folder,
    edited: Edited,
    rules: Sequence[Rule],
    targets: Sequence[PinnedRelease],
    scratch: Path,
    *,
    from_release: str | None = None,
    inputs: Inputs | None = None,
) -> Case:
    """What `prove_all` needs of one folder.

    Args:
        source, folder: the original, and how the static checks see it.
        edited: what `rules` made of it.
        targets: the releases that the result is for.
        scratch: a temporary folder for edited copies; it must outlive the proof.
        from_release, inputs: as for `upgrade`.
    """
    count, span = itertools.count(), span_of(targets)
    imports = [rule for rule in rules if rule.name == "imports"]
    return Case(
        source,
        edited,
        without=lambda name: apply_rules(folder, [rule for rule in rules if rule.name != name], releases=span),
        write=lambda taken: write_copy(folder, taken, Path(scratch, str(next(count)), source.resolve().name)),
        old=old_releases(from_release, folder.config.get("transformers_version")),
        imports_only=apply_rules(folder, imports, releases=span) if "imports" in edited.rules else None,
        inputs=Path(write_inputs(inputs, scratch)) if inputs is not None else None,
    )


def _report(result: Upgrade, folder: Folder, edited: Edited, rules: Sequence[Rule]) -> None:
    result.edits = [edit for edit in edited.edits if not edit.refused]
    result.refused = [
        Finding("failed", edit.what, f"{edit.file}:{edit.line}" if edit.line else edit.file) for edit in edited.refused
    ]
    result.rules = {rule.name: rule for rule in rules if rule.name in edited.rules}
    result.diff = diff_of(folder, edited)
    result.mlinter = lint_counts(folder, edited)


def _refuse_full(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty: choose another folder, or remove it first")


def sources_of(targets: Sequence[PinnedRelease], cache_dir: str | os.PathLike | None) -> list[str]:
    """The oldest and the newest target as folders, if they are installed, so that their source is asked for names."""
    names = []
    for release in targets:
        place = Path(cache_dir or default_cache_dir()).absolute() / release.transformers
        if release.transformers == version("transformers"):
            place = Path(str(find_spec("transformers").origin)).parents[1]  # type: ignore[union-attr]
        ends = release in (targets[0], targets[-1])
        names.append(str(place) if ends and (place / "transformers").is_dir() else release.transformers)
    return names


def _install(release: PinnedRelease, cache_dir: str | os.PathLike | None) -> Path | None:
    """Where a release is installed; None for the one that is installed here."""
    return None if release.transformers == version("transformers") else install(release, cache_dir)

"""`verify`: check a Hub repo folder statically and by running it in clean processes, under several releases."""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoints.errors import CheckpointError
from ..checkpoints.locating import locate
from ..garbage import no_collection
from ..messages import one_line
from ..sandbox import available
from .checks import Check
from .clean_process import LONGEST, TIME_LIMIT, clean_process, describe_folder
from .engine_readiness import serving_checks
from .explain_errors import point_to_cause
from .golden import GOLDEN, read_golden, temporary_golden
from .releases import PinnedRelease, install, resolve
from .results_to_checks import DYNAMIC, checks_of_run

if TYPE_CHECKING:
    from .given_inputs import Inputs

_ALWAYS = ["outputs", "side effects", "other classes", "reload", "placement", "training"]
FULL = [*_ALWAYS, "workers", "parallel load", "facts", "export"]
QUICK = [*_ALWAYS, "facts"]


class Verification(NamedTuple):
    """The results of `verify`.

    Attributes:
        path: what was verified.
        static: the checks that execute no code.
        runs: transformers release → the checks in a clean process under it.
        serving: readiness for serving engines and tools; informational.
        isolation: what confined the folder's code, in a line, see `sandbox.available`; empty if none was run.
    """

    path: str
    static: list[Check]
    runs: dict[str, list[Check]]
    serving: list[Check]
    isolation: str = ""

    @property
    def rows(self) -> list[tuple[str, Check]]:
        """Every check with the transformers release it was run under; "" for static checks."""
        rows = [("", check) for check in self.static]
        rows += [(release, check) for release, checks in self.runs.items() for check in checks]
        return rows + [("", check) for check in self.serving]

    @property
    def failed(self) -> list[tuple[str, Check]]:
        """The rows that failed."""
        return [(release, check) for release, check in self.rows if check.status == "failed"]

    @property
    def skipped(self) -> list[tuple[str, Check]]:
        """The rows of applicable checks that were skipped.

        Not included: checks that the caller excluded (`execute`, `quick`, `training`), checks that do not apply
        (`"n/a"`), and readiness for serving.
        """
        rows = [("", check) for check in self.static]
        rows += [(release, check) for release, checks in self.runs.items() for check in checks]
        return [(release, check) for release, check in rows if check.status == "skipped"]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; checks may have been skipped, see `complete`."""
        return not self.failed

    @property
    def complete(self) -> bool:
        """Whether nothing failed and nothing was skipped."""
        return not self.failed and not self.skipped

    def to_dict(self) -> dict[str, Any]:
        """All results as plain data, for JSON."""
        return {
            "path": self.path,
            "passed": self.passed,
            "complete": self.complete,
            "isolation": self.isolation,
            "skipped": [{"release": release, **check._asdict()} for release, check in self.skipped],
            "static": [check._asdict() for check in self.static],
            "runs": {release: [check._asdict() for check in checks] for release, checks in self.runs.items()},
            "serving": [check._asdict() for check in self.serving],
        }


def verify(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    releases: str | Iterable[str] = (),
    execute: bool = True,
    quick: bool = False,
    training: bool = True,
    time_limit: float = TIME_LIMIT,
    memory_limit: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    inputs: "Inputs | None" = None,
    require_isolation: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Check a Hub repo folder, with custom code or without: statically, then by running it in clean processes.

    Such a process has no mymodels, no network, an empty Hugging Face cache, limits of time and memory, and a copy of
    the folder. The kernel confines it where it can (`Verification.isolation` says by what); where it cannot, read the
    static checks first for a folder that you do not trust (`execute=False`).

    Args:
        path: a folder, or the id of a Hub repo.
        revision: branch, tag or commit of a Hub repo.
        token: as in `huggingface_hub`.
        releases: transformers releases to run under, see `releases.resolve`. Releases other than the installed one are
            installed on first use into `cache_dir`. Default: the installed release.
        execute: if false, none of the folder's code runs.
        quick: skip the slowest stages: worker processes, parallel loading, export.
        training: if false, skip the training stage: loss, gradients, checkpointing, optimizer step, resizing.
        time_limit: seconds for each stage of a clean process.
        memory_limit: bytes for each process, 0 for no limit; default 4 GB and six times the weights.
        cache_dir: where releases are installed, see `releases.install`.
        inputs: arguments of `forward` to run the model on, for models whose inputs cannot be generated; a file or a
            mapping, see `given_inputs.read_inputs`. Golden outputs are compared on the inputs they were recorded with.
        require_isolation: raise where the kernel cannot confine the code, and run none of it.
        progress: called with what is being done, in a few words, whenever that changes.

    Returns:
        A `Verification`. Faults of the folder are reported in it and raise nothing.

    Raises:
        FileNotFoundError: the folder or repo does not exist.
        ValueError: a release is not supported, or `inputs` cannot be read or are not what `forward` takes.
        RuntimeError: a release cannot be installed; or isolation is required, and this machine has none.

    Examples:
        >>> verification = verify("hub_repo/mygpt2", releases="4.57,5.0,latest")
        >>> verification.passed
        True
    """
    wanted: Sequence[PinnedRelease | None] = resolve(releases) if releases else [None]
    folder = locate(path, revision=revision, token=token, everything=True)
    tell = progress or (lambda text: None)
    commit = f" at commit {folder.name}" if folder.parent.name == "snapshots" else ""
    numbers = [release.transformers for release in wanted if release] or None
    # called once: while the first clean process imports its libraries, or where none is started
    check_files = functools.cache(lambda: static_checks(folder, releases=numbers))
    result = Verification(f"{path}{commit}", [], {}, [])

    def without_running(*checks: Check) -> Verification:
        tell("reading the files and the code")
        return result._replace(static=check_files(), runs={"installed": list(checks)} if checks else {})

    if not execute or not folder.is_dir():
        return without_running()
    if require_isolation:
        available().require()
    if is_adapter(folder):
        what = "the folder holds only an adapter, without a model to run, so only static checks were made"
        return without_running(Check("load", "skipped", what, "adapter_config.json"))
    try:
        about = describe_folder(folder)
    except (CheckpointError, OSError) as error:
        return without_running(Check("load", "failed", str(error), "config.json", DYNAMIC["load"]))
    result = result._replace(isolation=str(available()))
    main, stages = about["classes"][0], QUICK if quick else FULL
    stages = [stage for stage in stages if training or stage != "training"]
    limits: dict[str, Any] = {"time_limit": time_limit, "memory_limit": memory_limit}
    with contextlib.ExitStack() as stack:
        if inputs is not None:
            from .given_inputs import write_inputs  # imports torch

            own = stack.enter_context(tempfile.TemporaryDirectory(prefix="mymodels-inputs-"))
            limits["inputs"] = write_inputs(inputs, Path(own))
        tell("starting a clean process")
        golden, problem = _golden(folder, stack, limits, several_releases=len(wanted) > 1)
        for release in wanted:
            other = release if release and release.transformers != version("transformers") else None
            under = f"transformers {release.transformers}, " if release and len(wanted) > 1 else ""
            if other:
                tell(f"{under}installing it, if it is not there")
            place = install(other, cache_dir) if other else None
            if progress is not None:
                limits["progress"] = lambda name, under=under: tell(f"{under}{name}")

            def meanwhile(golden: Path | None = golden) -> None:
                tell("reading the files and the code")
                check_files()
                _check_golden(golden)

            how: dict[str, Any] = {"release": place, "worker_methods": ["fork", "spawn"], **limits}
            with contextlib.ExitStack() as started:
                try:
                    run = started.enter_context(
                        clean_process(folder, stages, golden=golden, meanwhile=meanwhile, **how)
                    )
                except _DamagedGolden as error:  # rare, so it was not worth waiting for
                    golden, problem = None, Check("golden", "failed", str(error), GOLDEN, DYNAMIC["golden"])
                    run = started.enter_context(clean_process(folder, stages, **how))
                if inputs is not None and (wrong := run.one("wrong_inputs")):
                    raise ValueError(one_line(wrong, LONGEST))
                result = result._replace(static=check_files())
                versions = run.one("versions")
                installed = versions.get("transformers") if isinstance(versions, dict) else None
                checks = checks_of_run(run, folder, main)
                if problem:
                    checks = sorted([*checks, problem], key=lambda check: list(DYNAMIC).index(check.name))
                named = release.transformers if release else str(installed or "installed")
                result.runs[named] = point_to_cause(checks, result.static)
                how = {"classes": about["classes"], "custom_code": bool(about["auto_map"])}
                serving = serving_checks(run.one("facts"), export=run.one("export"), **how)
                result.serving[:] = [
                    check._replace(what=one_line(check.what, LONGEST)) for check in serving
                ]  # of the newest
    return result


def static_checks(folder: Path, *, releases: Sequence[str] | None) -> list[Check]:
    """As `static.static_checks`, imported when it is called, because it imports torch."""
    with no_collection():
        from .static import static_checks

        return static_checks(folder, releases=releases)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds only an adapter, without a model to run."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


class _DamagedGolden(Exception):
    """The golden file of the folder cannot be read; the message says why."""


def _check_golden(golden: Path | None) -> None:
    try:
        if golden is not None:
            read_golden(golden)
    except (CheckpointError, OSError) as error:
        raise _DamagedGolden(str(error)) from None


def _golden(
    folder: Path, stack: contextlib.ExitStack, limits: dict[str, Any], *, several_releases: bool
) -> tuple[Path | None, Check | None]:
    """The golden file to compare with, which may be damaged, and a check if it is missing.

    Without a golden file, and with several releases, one is recorded under the installed release.
    """
    if (folder / GOLDEN).is_file():
        return folder / GOLDEN, None
    if several_releases:
        with contextlib.suppress(CheckpointError):  # the checks of the runs report why it does not run
            return stack.enter_context(temporary_golden(folder, **limits)), None
    return None, Check("golden", "n/a", f"the folder has no {GOLDEN}, `mymodels verify --record` makes one")

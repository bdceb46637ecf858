"""Static checks of a Hub folder: files, configs, code as syntax trees. Nothing is imported, unpickled or run."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from ...messages import first_line, printable
from ..checks import Check
from . import (
    attention,
    auto_classes,
    code_imports,
    config_files,
    devices,
    folder_files,
    generation,
    init_code,
    labels,
    model_code,
    requirements,
    secrets,
    side_effects,
    tokenizer_files,
    trust,
)
from .folder import Finding, Folder, read_folder
from .releases import find_releases

MAX_FINDINGS = 20  # of one check: a hostile folder must not drown the table

CHECKS: dict[str, Callable[[Folder], Iterator[Finding]]] = {
    name: check
    for module in (
        *(folder_files, requirements, secrets, config_files, tokenizer_files, generation, labels, auto_classes),
        *(code_imports, model_code, init_code, attention, devices, trust, side_effects),
    )
    for name, check in module.CHECKS.items()
}


def static_checks(folder: Path, *, releases: Sequence[str] | None = None) -> list[Check]:
    """Everything that can be told about a Hub folder without executing anything of it.

    A thing that breaks under some transformers releases only is `failed` if one of `releases` is among them, and a
    `warning` if it is another supported release.

    Args:
        folder: any model folder, with custom code or without; it may be hostile.
        releases: version numbers (`"4.57.6"`), or folders that a release is installed in, whose source is then asked
            which names it has. Default: the transformers that is installed here.

    Returns:
        The outcomes in the order of `CHECKS`, every check at least once, at most `MAX_FINDINGS` times.

    Raises:
        NotADirectoryError: `folder` is none.
        ValueError: one of `releases` is neither a version nor a folder with transformers in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder: name the folder of a model")
    content = read_folder(folder, find_releases(releases))
    found = [(name, finding) for name, check in CHECKS.items() for finding in _outcomes(check, content)]
    return [Check(name, *map(printable, finding)) for name, finding in found]


def _outcomes(check: Callable[[Folder], Iterator[Finding]], content: Folder) -> list[Finding]:
    """What a check finds, failures first, each once, not too much; `ok` if that is nothing."""
    found: dict[Finding, None] = {}
    try:
        for finding in islice(check(content), 50 * MAX_FINDINGS):
            found[finding] = None
    except Exception as error:  # whatever a hostile folder provokes is a finding, not a crash
        kind, reason = type(error).__name__, first_line(error)
        what = f"this check could not be finished: {kind if reason == kind else f'{kind} {reason}'}"
        found[Finding("failed", what, "", "look at the folder by hand, and report this")] = None
    ordered = sorted(found, key=lambda finding: finding.status != "failed")
    if len(ordered) > MAX_FINDINGS:
        what = f"{len(ordered) - MAX_FINDINGS} more of this kind are not listed"
        ordered[MAX_FINDINGS:] = [Finding(ordered[MAX_FINDINGS].status, what, "", "mend those above first")]
    return ordered or [Finding("ok", "")]

"""Static checks of a Hub folder: files, configs, code as syntax trees. Nothing is imported, unpickled or run."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from ...messages import first_line, printable
from ..checks import Check
from . import (
    check_attention,
    check_auto_classes,
    check_class_attributes,
    check_config,
    check_devices,
    check_dynamic_code,
    check_files,
    check_generation,
    check_ids,
    check_imports,
    check_init,
    check_labels,
    check_model,
    check_parameters,
    check_processors,
    check_requirements,
    check_secrets,
    check_side_effects,
    check_sizes,
    check_templates,
    check_tokenizer,
    check_trust,
)
from .api_availability import find_releases
from .repo_snapshot import Finding, Folder, read_folder

MAX_FINDINGS = 20  # per check, so that a hostile folder cannot flood the table

CHECKS: dict[str, Callable[[Folder], Iterator[Finding]]] = {
    name: check
    for module in (
        *(
            check_files,
            check_requirements,
            check_secrets,
            check_config,
            check_tokenizer,
            check_ids,
            check_templates,
            check_generation,
            check_labels,
            check_processors,
            check_auto_classes,
            check_sizes,
        ),
        *(
            check_imports,
            check_model,
            check_class_attributes,
            check_init,
            check_parameters,
            check_attention,
            check_devices,
            check_trust,
            check_dynamic_code,
            check_side_effects,
        ),
    )
    for name, check in module.CHECKS.items()
}


def static_checks(folder: Path, *, releases: Sequence[str] | None = None) -> list[Check]:
    """Check a Hub folder without executing anything in it.

    A fault under some transformers releases only is `failed` if one of `releases` is among these, and a `warning` if
    only other supported releases are.

    Args:
        folder: any model folder, with custom code or without; it may be hostile.
        releases: version numbers (`"4.57.6"`), or folders with a release installed, whose source then shows which
            names it has. Default: the installed transformers.

    Returns:
        The outcomes in the order of `CHECKS`, every check at least once, at most `MAX_FINDINGS` times.

    Raises:
        NotADirectoryError: `folder` is not a folder.
        ValueError: one of `releases` is neither a version nor a folder with transformers in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder: name the folder of a model")
    content = read_folder(folder, find_releases(releases))
    found = [(name, finding) for name, check in CHECKS.items() for finding in _outcomes(check, content)]
    return [Check(name, *map(printable, finding)) for name, finding in found]


def _outcomes(check: Callable[[Folder], Iterator[Finding]], content: Folder) -> list[Finding]:
    """The findings of a check: failures first, no duplicates, at most `MAX_FINDINGS`; `ok` if there are none."""
    found: dict[Finding, None] = {}
    try:
        for finding in islice(check(content), 50 * MAX_FINDINGS):
            found[finding] = None
    except Exception as error:  # an error that a hostile folder causes is a finding, not a crash
        kind, reason = type(error).__name__, first_line(error)
        what = f"this check could not be finished: {kind if reason == kind else f'{kind} {reason}'}"
        found[Finding("failed", what, "", "look at the folder by hand, and report this")] = None
    ordered = sorted(found, key=lambda finding: finding.status != "failed")
    if len(ordered) > MAX_FINDINGS:
        what = f"{len(ordered) - MAX_FINDINGS} more of this kind are not listed"
        ordered[MAX_FINDINGS:] = [Finding(ordered[MAX_FINDINGS].status, what, "", "fix those above first")]
    return ordered or [Finding("ok", "")]

"""An assertion for model authors' tests: `check_repo(folder)` raises with the failures of `mymodels verify`."""

import os
from typing import Any

from .verifying import Verification, verify


def check_repo(path: str | os.PathLike, *, allow_skipped: bool = False, **how: Any) -> Verification:
    """Assert that a Hub repo folder passes verification.

    Args:
        path: as in `mymodels.hub.verify`.
        allow_skipped: accept skipped checks, such as those of a model whose inputs cannot be generated.
        how: further arguments of `verify`, such as `releases="4.57,latest"` or `quick=True`.

    Returns:
        The result of `verify`, if nothing failed.

    Raises:
        AssertionError: a check failed or was skipped; one line for each, with the problem, the place and the remedy.

    Examples:
        >>> def test_my_model():
        ...     check_repo("exported/my-model", quick=True)
    """
    __tracebackhide__ = True
    verification = verify(path, **how)
    if verification.failed:
        raise AssertionError("\n".join([f"{path} fails verification:", *failures(verification)]))
    if verification.skipped and not allow_skipped:
        lines = [f"{check.name} was skipped: {check.what}" for _, check in verification.skipped]
        raise AssertionError(
            "\n".join([f"{path} was not verified completely (allow_skipped=True accepts this):", *lines])
        )
    return verification


def failures(verification: Verification) -> list[str]:
    """One line for each failed check."""
    lines = []
    for release, check in verification.failed:
        under = f" [transformers {release}]" if release else ""
        where = f" ({check.where})" if check.where else ""
        remedy = f"; {check.remedy}" if check.remedy else ""
        lines.append(f"{check.name}{under}: {check.what}{where}{remedy}")
    return lines

"""For the tests of model authors: `check_repo(folder)` fails with the lines of `mymodels verify` that failed."""

import os
from typing import Any

from .verifying import Verification, verify


def check_repo(path: str | os.PathLike, *, allow_skipped: bool = False, **how: Any) -> Verification:
    """Assert that a Hub repo folder holds what it promises.

    Args:
        path: as in `mymodels.hub.verify`.
        allow_skipped: whether checks may have been left out, such as those of a model whose inputs cannot be made up.
        how: its other arguments, such as `releases="4.57,latest"` or `quick=True`.

    Returns:
        What `verify` found, if nothing failed.

    Raises:
        AssertionError: a check failed, or was left out; one line for each, what is wrong, where, and how to mend it.

    Examples:
        >>> def test_my_model():
        ...     check_repo("exported/my-model", quick=True)
    """
    __tracebackhide__ = True
    verification = verify(path, **how)
    if verification.failed:
        raise AssertionError("\n".join([f"{path} does not hold what it promises:", *failures(verification)]))
    if verification.skipped and not allow_skipped:
        lines = [f"{check.name} was left out: {check.what}" for _, check in verification.skipped]
        raise AssertionError("\n".join([f"{path} was not looked at completely (allow_skipped=True):", *lines]))
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

"""`CheckpointError`, and how an exception of a reader becomes one; imports neither torch nor transformers."""

import os

from ..messages import first_line


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message says what is wrong, where, and what to do."""


def unreadable(path: str | os.PathLike, what: str, error: BaseException) -> CheckpointError:
    """A one-sentence error for an exception from inside a reader."""
    reason = first_line(error).rstrip(". ")
    if "Cannot allocate memory" in reason:
        return CheckpointError(
            f"{path}: {what} needs more memory than is available ({reason}): split it into smaller shards"
        )
    return CheckpointError(
        f"{path}: {what} cannot be read ({reason}); the file is damaged or incomplete: copy or download it again"
    )

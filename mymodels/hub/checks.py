"""What every check of a Hub repo folder returns."""

from typing import NamedTuple

STATUSES = ("ok", "failed", "warning", "skipped", "n/a")


class Check(NamedTuple):
    """The outcome of one check.

    Attributes:
        name: which check, stable and short, such as `"auto_map"` or `"cached generation"`; several outcomes may share it.
        status: `"ok"`, `"failed"`, `"warning"` (a reader should see it, but it is no fault), `"skipped"` (left out
            though it should have been looked at) or `"n/a"` (the folder has nothing that the check is about, such as
            generation for an encoder, or files beside the needed ones).
        what: one clear sentence on what is wrong; for `"skipped"` and `"n/a"` why; for `"ok"` what was found, or nothing.
        where: file, line, tensor or key it is about, such as `"modeling_x.py:42"`.
        remedy: what to do about it.
    """

    name: str
    status: str
    what: str = ""
    where: str = ""
    remedy: str = ""

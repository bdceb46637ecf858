"""What every check of a Hub repo folder returns."""

from typing import NamedTuple

STATUSES = ("ok", "failed", "warning", "skipped")


class Check(NamedTuple):
    """The outcome of one check.

    Attributes:
        name: which check, stable and short, such as `"auto_map"` or `"cached generation"`; several outcomes may share it.
        status: `"ok"`, `"failed"`, `"warning"` (a reader should see it, but it is no fault) or `"skipped"`.
        what: one clear sentence on what is wrong; for `"skipped"` why; for `"ok"` what was found, or nothing.
        where: file, line, tensor or key it is about, such as `"modeling_x.py:42"`.
        remedy: what to do about it.
    """

    name: str
    status: str
    what: str = ""
    where: str = ""
    remedy: str = ""

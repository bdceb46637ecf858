"""The result of a check of a Hub repo folder."""

from typing import NamedTuple

STATUSES = ("ok", "failed", "warning", "skipped", "n/a")


class Check(NamedTuple):
    """The outcome of one check.

    Attributes:
        name: a short, stable name, such as `"auto_map"` or `"cached generation"`; several outcomes may share it.
        status: `"ok"`, `"failed"`, `"warning"` (worth reading, but no fault), `"skipped"` (applicable, but not
            checked) or `"n/a"` (not applicable to this folder, such as generation for an encoder).
        what: one sentence on what is wrong; for `"skipped"` and `"n/a"` the reason; for `"ok"` what was found, or "".
        where: the file, line, tensor or key concerned, such as `"modeling_x.py:42"`.
        remedy: how to fix it.
    """

    name: str
    status: str
    what: str = ""
    where: str = ""
    remedy: str = ""

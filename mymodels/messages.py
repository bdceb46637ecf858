"""Text for messages: without control characters, short, on one line.

Names and the messages of other libraries may come from untrusted files and servers.
"""

from typing import Any


def printable(text: Any) -> str:
    """`text` with control characters, which a terminal would execute, escaped as in Python source."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def shorten(text: str, width: int) -> str:
    """`text`, or its first `width - 1` characters and "…"."""
    return text if len(text) <= width else text[: width - 1] + "…"


def one_line(text: Any, width: int) -> str:
    """`text` on one printable line of at most `width` characters: each run of white space becomes one blank."""
    return shorten(printable(" ".join(str(text).split())), width)


def first_line(error: BaseException, width: int = 300) -> str:
    """The first non-empty line of an error's text; the name of its type if there is none."""
    lines = (line.strip() for line in str(error).splitlines())
    return one_line(next(filter(None, lines), type(error).__name__), width)

"""Text for people: made safe for a terminal, short, on one line.

Names, and what other libraries say, may come from files and servers of strangers.
"""

from typing import Any


def printable(text: Any) -> str:
    """`text` with control characters, which could steer a terminal, written out as in Python's source."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def shorten(text: str, width: int) -> str:
    """`text`, or its first `width - 1` characters and "…"."""
    return text if len(text) <= width else text[: width - 1] + "…"


def one_line(text: Any, width: int) -> str:
    """`text` on one printable line of at most `width` characters: line breaks and other space become one blank each."""
    return shorten(printable(" ".join(str(text).split())), width)


def first_line(error: BaseException, width: int = 300) -> str:
    """The first line of an error's text that is not empty; the error's type if it has none."""
    lines = (line.strip() for line in str(error).splitlines())
    return one_line(next(filter(None, lines), type(error).__name__), width)

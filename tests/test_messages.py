"""What stands between strangers' text and a terminal."""

import pytest

from mymodels.messages import first_line, one_line, printable, shorten


def test_nothing_that_steers_a_terminal_passes() -> None:
    text = "\x1b[31mred\x07\r\n\t\x9b2J\u2028\u202e\ud800 plain … ü 模型"
    for safe in (printable(text), one_line(text, 200), first_line(ValueError(text))):
        assert safe.isprintable() and "\\x1b[31mred" in safe
    assert printable(text).endswith(" plain … ü 模型") and printable(printable(text)) == printable(text)


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 500])
def test_a_long_text_is_cut_to_its_width(length: int) -> None:
    short = shorten("x" * length, 10)
    assert short == "x" * length if length <= 10 else short == "x" * 9 + "…"


def test_lines_become_one() -> None:
    assert one_line(" a\n\n  b\tc ", 80) == "a b c" and one_line("a b c", 3) == "a …"
    assert first_line(ValueError("\n\n  first \nsecond")) == "first"
    assert first_line(KeyError()) == "KeyError" and first_line(RuntimeError("\n ")) == "RuntimeError"

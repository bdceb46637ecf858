"""Messages of `warm_start` with the names of command-line options in place of its arguments."""

import ast
import contextlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace

from ..checkpoints import CheckpointError
from .report import WarmStartReport

_OPTIONS = {
    name: f"--{name.replace('_', '-')}"
    for name in (
        "config", "head", "layers", "widen", "positions", "tokenizer", "source_tokenizer", "word_vectors", "rename", "skip",
        "only", "strict", "allow", "section", "revision", "dtype",
    )
} | {"overrides": "--set"}  # fmt: skip
_ARGUMENT = re.compile(rf"(?:warm_start's )?(?<![\w-])({'|'.join(_OPTIONS)})=(?=(.?))")


def as_options(text: str) -> str:
    """`"pass config="` → `"pass --config"`, `"layers='x' is"` → `"--layers 'x' is"`."""
    text = text.replace("section=, or --section", "section=").replace(" (allow_pickle=True)", "")
    text = text.replace("report.check()", "--check")
    text = re.sub(r"rename=(\{(?:'(?:[^'\\]|\\.)*'|[^{}'])*\})", _renames, text)
    return _ARGUMENT.sub(lambda m: _OPTIONS[m[1]] + (" " if re.match(r"[\w'\"{\[]", m[2]) else ""), text)


def _renames(found: re.Match) -> str:
    """`rename={'a': 'b'}` → `--rename 'a=b'`."""
    try:
        entries = ast.literal_eval(found[1])
    except (ValueError, SyntaxError):  # not a dict that can be parsed
        return found[0]
    return " ".join(f"--rename {shlex.quote(f'{pattern}={new}')}" for pattern, new in entries.items())


@contextlib.contextmanager
def in_options() -> Iterator[None]:
    """Within it, errors name options of the command line."""
    try:
        yield
    except CheckpointError as error:
        error.args = (as_options(str(error)),)
        raise


def report_in_options(report: WarmStartReport) -> None:
    """Change the report's notes to name options of the command line."""
    report.notes = [as_options(note) for note in report.notes]
    if report.checked is not None:
        report.checked = replace(report.checked, what=as_options(report.checked.what))

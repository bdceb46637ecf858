"""What several verbs share: their help, options that stand in more than one, values as `name=value`."""

import argparse
import ast
import difflib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console


FAILED = "it failed, the reason is on standard error"  # exit code 1 of every verb
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
DTYPE_CHOICES = [*_DTYPES, *_DTYPES.values()]

# what a card says beyond the folder → its help; each an option of `mymodels build` and `mymodels finetune`
_CARD = {
    "name": "title of the model card",
    "repo_id": "what the card's snippet loads",
    "description": "what the model is",
    "license": "such as apache-2.0",
    "language": "such as en",
    "base_model": "Hub id of the model it was made from",
    "training_data": "what it was trained on",
    "limits": "what it is not for",
    "dataset": "what --metric was measured on",
}


class Parser(argparse.ArgumentParser):
    """Answers a wrong command line with one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help says more)\n")

    def fail_on_unknown(self, argument: str) -> NoReturn:
        near = difflib.get_close_matches(argument.partition("=")[0], self._option_string_actions, 1)
        self.error(f"unexpected {argument!r}" + (f", did you mean {near[0]}?" if near else ""))


def add_verb(
    verbs: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    sentence: str,
    *,
    example: str,
    exit_codes: dict[int, str],
    parents: tuple[argparse.ArgumentParser, ...] = (),
) -> argparse.ArgumentParser:
    """A verb's parser: its help starts with `sentence` and ends with `example`, a shell command, and the exit codes."""
    codes = exit_codes | {2: "the command line is wrong, nothing was done", 130: "interrupted by Ctrl-C"}
    listed = "\n".join(f"  {code:<5}{meaning}" for code, meaning in sorted(codes.items()))
    parser = verbs.add_parser(
        name,
        help=sentence[0].lower() + sentence[1:].rstrip("."),
        description=sentence,
        epilog=f"example:\n  {example}\n\nexit codes:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=list(parents),
    )
    parser.set_defaults(run=run)
    return parser


def checkpoint_options() -> argparse.ArgumentParser:
    """Options of every verb that opens a checkpoint of any format."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--section", metavar="NAME", help="which of the models, in a file that holds several")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="run the code that a pickled object asks for, in another process but with your rights; only if you trust it",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repo")
    return parser


def add_card_options(parser: argparse.ArgumentParser) -> None:
    for name, text in _CARD.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="TEXT", help=f"for the card: {text}")


def card_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name in _CARD if (value := getattr(arguments, name))}


def picked(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options that the function behind the verb takes under the same names."""
    return {name: getattr(arguments, name) for name in names}


def dtype_of(arguments: argparse.Namespace) -> Any:
    """torch's name of `--dtype`."""
    return _DTYPES.get(arguments.dtype, arguments.dtype)


def pair(text: str, form: str) -> tuple[str, str]:
    """`name=value`; `form` is how the error writes it."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} has no '=': write {form}")
    return name, value


def metric(text: str) -> tuple[str, float]:
    """`name=value` of a measured value."""
    name, value = pair(text, "NAME=VALUE")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"--metric {text}: {value!r} is not a finite number")
    return name, number


def read_text(path: Path) -> str:
    """A text file that the user wrote."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is not UTF-8 text ({error.reason} at byte {error.start})") from None


def config_field(text: str) -> tuple[str, Any]:
    """`name=value` with the value as JSON or Python would read it, else as text."""
    name, value = pair(text, "FIELD=VALUE")
    words = {"true": True, "false": False, "null": None}
    try:
        return name, words[value] if value in words else ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def console() -> "Console":
    """rich's, as wide as the terminal; a file or a pipe has no width of its own."""
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> NoReturn:
            raise BrokenPipeError  # `main` answers it

    return PipeConsole() if sys.stdout.isatty() else PipeConsole(width=160)

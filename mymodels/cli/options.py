"""What verbs share: the layout of their help, options that several of them have, and `name=value` arguments."""

import argparse
import ast
import difflib
import math
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console


FAILED = "an error, reported on standard error"  # exit code 1 of every verb
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
DTYPE_CHOICES = [*_DTYPES, *_DTYPES.values()]

# field of the model card → its help; each is an option of `mymodels build`, `finetune` and `adopt`
_CARD = {
    "name": "title of the model card",
    "repo_id": "the repo id that the card's example loads",
    "description": "what the model is",
    "license": "license, such as apache-2.0",
    "language": "language, such as en",
    "base_model": "Hub id of the model it was made from",
    "training_data": "what it was trained on",
    "limits": "limitations and uses it is not meant for",
    "dataset": "what the metrics were measured on",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Breaks sentences and lists of choices between words; an example stays a line that can be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = []
        for line in text.splitlines():
            indented, is_code = line.startswith("  "), line[2:3].isdigit()
            filled = textwrap.wrap(line, width, subsequent_indent=" " * 7 * is_code, break_on_hyphens=False)
            lines += [line] if indented and not is_code else filled or [""]
        return "\n".join(lines)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        if self._has_many_choices(action):
            return lambda count: (default_metavar,) * count
        return super()._metavar_formatter(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if self._has_many_choices(action):
            return f"{action.help}; one of {', '.join(map(str, action.choices or ()))}"
        return action.help

    @staticmethod
    def _has_many_choices(action: argparse.Action) -> bool:
        return action.metavar is None and action.choices is not None and len(",".join(map(str, action.choices))) > 50


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one sentence, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def fail_on_unknown(self, argument: str) -> NoReturn:
        near = difflib.get_close_matches(argument.partition("=")[0], self._option_string_actions, 1)
        self.error(f"unexpected {argument!r}" + (f", did you mean {near[0]}?" if near else ""))

    @staticmethod
    def help_ending(example: str, exit_codes: dict[int, str]) -> str:
        """The end of a help text: an example, and the exit codes with those that all verbs share."""
        codes = exit_codes | {2: "wrong command line, nothing was done", 130: "interrupted by Ctrl-C"}
        listed = "\n".join(f"  {code:<5}{meaning}" for code, meaning in sorted(codes.items()))
        return f"example:\n  {example}\n\nexit codes:\n{listed}"


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
    """Add the parser of a verb.

    Args:
        verbs: what `add_subparsers` returns.
        run: runs the verb and returns the exit code.
        sentence: the first line of the help.
        example: a shell command, shown at the end of the help.
        exit_codes: code → meaning; 2 and 130 mean the same for every verb and are added here.
        parents: parsers whose options the verb has too.
    """
    parser = verbs.add_parser(
        name,
        help=sentence[0].lower() + sentence[1:].rstrip("."),
        description=sentence,
        epilog=Parser.help_ending(example, exit_codes),
        formatter_class=HelpFormatter,
        parents=list(parents),
    )
    parser.set_defaults(run=run, registers_models=True)
    return parser


def checkpoint_options() -> argparse.ArgumentParser:
    """The options of each verb that opens checkpoints of any format."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--section", metavar="NAME", help="the model to take from a file that holds several")
    add_pickle_options(parser)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repo")
    return parser


def add_pickle_options(parser: argparse.ArgumentParser) -> None:
    """The options of each verb that reads pickles."""
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="run the code that a pickle names, in another process, confined where the machine can do it",
    )
    add_isolation_option(parser)


def add_isolation_option(parser: argparse.ArgumentParser) -> None:
    """The option of each verb that runs the code of others; see `show_isolation`."""
    parser.add_argument(
        "--require-isolation",
        action="store_true",
        help="do nothing where the kernel cannot confine that code; without it, one line says what confines it",
    )


def show_isolation(arguments: argparse.Namespace) -> None:
    """Say on standard error what confines the code of others, when a verb begins to run it.

    Raises:
        NotIsolated: nothing does, and `--require-isolation` was given.
    """
    from tqdm import tqdm

    from ..sandbox import available
    from ..sandbox.isolation import when_used

    if arguments.require_isolation:
        available().require()
    # above a progress bar, if one is shown
    when_used(lambda isolation: tqdm.write(str(isolation), file=sys.stderr))


def add_card_options(parser: argparse.ArgumentParser) -> None:
    """An option for each field of the model card."""
    for name, text in _CARD.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="TEXT", help=f"for the card: {text}")


def card_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of the model card that were given."""
    return {name: value for name in _CARD if (value := getattr(arguments, name))}


def picked(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that the function behind the verb takes as arguments of the same names."""
    return {name: getattr(arguments, name) for name in names}


def dtype_of(arguments: argparse.Namespace) -> Any:
    """`--dtype` by torch's name."""
    return _DTYPES.get(arguments.dtype, arguments.dtype)


def pair(text: str, form: str) -> tuple[str, str]:
    """Split `name=value`; `form` is shown in the error, such as `"REGEX=REPLACEMENT"`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} has no '=': write {form}")
    return name, value


def metric(text: str) -> tuple[str, float]:
    """`NAME=NUMBER` as a pair."""
    name, value = pair(text, "NAME=VALUE")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"--metric {text}: {value!r} is not a finite number")
    return name, number


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is not UTF-8 text ({error.reason} at byte {error.start})") from None


def config_field(text: str) -> tuple[str, Any]:
    """`name=value`, the value parsed as JSON or a Python literal, or else kept as text."""
    name, value = pair(text, "FIELD=VALUE")
    literals = {"true": True, "false": False, "null": None}
    try:
        return name, literals[value] if value in literals else ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def console() -> "Console":
    """A console of rich, as wide as the terminal; for a file or a pipe as wide as COLUMNS says, or 160."""
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> NoReturn:
            raise BrokenPipeError  # `main` handles it

    return PipeConsole() if sys.stdout.isatty() or "COLUMNS" in os.environ else PipeConsole(width=160)

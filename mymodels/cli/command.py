"""The parser of all verbs, and the exit code of what they do."""

import argparse
import difflib
import os
import select
import sys

import mymodels

from ..messages import printable
from . import (
    adopt,
    build,
    check,
    convert,
    demo,
    export,
    finetune,
    inspect,
    lock,
    new,
    predict,
    push,
    verify,
    warm_start,
)
from .options import Parser

_VERBS = (demo, new, adopt, inspect, convert, check, warm_start, build, finetune, predict, verify, push, lock, export)


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and each verb's; a verb sets `run`, which takes the parsed arguments."""
    parser = Parser(
        prog="mymodels",
        description="Modified GPT-2 and BERT models that load anywhere.",
        epilog="mymodels VERB --help says more about a verb, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"mymodels {mymodels.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for verb in _VERBS:
        verb.add_parser(verbs)
    return parser, verbs.choices


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with `run` of their verb; raises SystemExit as argparse does."""
    parser, verbs = make_parser()
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if not argv[0].startswith("-") and argv[0] not in verbs:
        near = difflib.get_close_matches(argv[0], verbs, 1)
        parser.error(f"there is no verb {argv[0]!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    arguments, unknown = parser.parse_known_args(argv)
    verb = verbs.get(arguments.verb, parser)
    if unknown:
        verb.fail_on_unknown(unknown[0])
    if arguments.verb is None:
        parser.error("name a verb")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit code.

    0: done; 1: it failed, or what was looked at is not in order; 130: interrupted; 141: nobody reads the output any more;
    others as the verb's help says. Raises SystemExit where argparse ends: 0 after a help, 2 for a wrong command line.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # while a closed pipe can still be answered
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _nobody_reads_stdout():
            raise
        _discard_stdout()
        return 141  # as of a program that the signal ends


def _run(argv: list[str] | None) -> int:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        mymodels._register_all()
        return arguments.run(arguments)
    except (OSError, ValueError, RuntimeError, ImportError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():
            raise
        return _fail(arguments.verb, error)


def _fail(verb: str, error: Exception) -> int:
    text = str(error) or f"it stopped with {type(error).__name__}"
    if isinstance(error, OSError) and error.strerror and error.filename:  # without Python's "[Errno 2]"
        text = f"{error.filename}: {error.strerror}"
    lines = [printable(line) for line in text.split("\n")]  # names from files may steer a terminal
    print(f"mymodels {verb}: " + "\n".join(lines), file=sys.stderr)
    return 1


def _nobody_reads_stdout() -> bool:
    """Whether standard output is a pipe whose reader has closed it; other pipes may break too."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _discard_stdout() -> None:
    """What is still buffered goes nowhere, or Python would complain when it ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)

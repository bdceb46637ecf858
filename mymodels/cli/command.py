"""The parser for all verbs, and `main`, which runs one and returns its exit code."""

import argparse
import atexit
import difflib
import gc
import os
import select
import sys

import mymodels

from ..garbage import no_collection
from ..messages import printable
from ..sandbox.isolation import when_used
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
    upgrade,
    verify,
    warm_start,
)
from .options import HelpFormatter, Parser, show_isolation
from .progress import working

_VERBS = (
    demo,
    new,
    adopt,
    inspect,
    convert,
    check,
    warm_start,
    build,
    finetune,
    predict,
    verify,
    upgrade,
    push,
    lock,
    export,
)


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and the parser of each verb; a verb's `run` takes the parsed arguments."""
    parser = Parser(
        prog="mymodels",
        description="Build, train, check and share modified GPT-2 and BERT models that load anywhere.",
        epilog="mymodels VERB --help shows the options, an example and the exit codes of a verb.\n\n"
        + Parser.help_ending(
            "mymodels inspect hub_repo/mygpt2",
            {0: "success", 1: "a check failed; or an error, reported on standard error"},
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mymodels {mymodels.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for verb in _VERBS:
        verb.add_parser(verbs)
    return parser, verbs.choices


def parse(argv: list[str]) -> argparse.Namespace:
    """The parsed arguments, with `run` of their verb; raises SystemExit as argparse does."""
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

    0: success; 1: an error, or a check that failed; 130: interrupted; 141: the reader of standard output has closed it;
    others: see the verb's help. Raises SystemExit where argparse does: 0 after a help, 2 for a wrong command line.
    """
    atexit.register(gc.freeze)  # at exit Python would look at each object of torch and transformers: up to a second
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # a closed pipe raises here, where it is handled, and not at exit
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        _discard_stdout()
        return 141  # 128 + SIGPIPE, as shells report it


def _run(argv: list[str] | None) -> int:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        if getattr(arguments, "allow_pickle", False):
            show_isolation(arguments)
        if arguments.registers_models:
            with working("loading torch and transformers"), no_collection():
                mymodels._register_all()
        return arguments.run(arguments)
    except (OSError, ValueError, RuntimeError, ImportError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            raise
        return _fail(arguments.verb, error)
    finally:
        when_used(None)


def _fail(verb: str, error: Exception) -> int:
    text = str(error) or f"stopped by {type(error).__name__}"
    if isinstance(error, OSError) and error.strerror and error.filename:  # without Python's "[Errno 2]"
        text = f"{error.filename}: {error.strerror}"
    lines = [printable(line) for line in text.split("\n")]  # names from files may hold control characters
    print(f"mymodels {verb}: " + "\n".join(lines), file=sys.stderr)
    return 1


def _stdout_is_closed() -> bool:
    """Whether standard output is a pipe that its reader has closed; `BrokenPipeError` may be another pipe's."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _discard_stdout() -> None:
    """Send what is still buffered to the null device: Python would report an error when it flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)

"""The `mymodels` command: one thin function per verb."""

import argparse
import sys
from pathlib import Path

from . import __version__


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run_demo

    return 0 if run_demo(arguments.out) else 1


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit code."""
    parser = argparse.ArgumentParser(prog="mymodels", description="Modified GPT-2 and BERT models that load anywhere.")
    parser.add_argument("--version", action="version", version=f"mymodels {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="train both models briefly, save them as Hub repos, load them elsewhere")
    demo.add_argument("--out", type=Path, default=Path("demo_output"), metavar="DIR", help="default: %(default)s")
    demo.set_defaults(run=_demo)

    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
        print(f"mymodels {arguments.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""`mymodels new`."""

import argparse
from pathlib import Path
from typing import Any

from .options import FAILED, add_verb, console


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "new",
        run,
        "Write the files of a new model to start from: code, tests, README.",
        example="mymodels new Whale --base gpt2 --out whale",
        exit_codes={0: "the files are written", 1: FAILED},
    )
    parser.add_argument("name", metavar="NAME", help="name of the classes, such as Whale")
    parser.add_argument("--base", choices=["gpt2", "bert", "blank"], default="gpt2", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new or empty folder; default: NAME in lower case")


def run(arguments: argparse.Namespace) -> int:
    from ..adopting.starting_point import write_starting_point
    from ..tables import print_text

    folder = write_starting_point(arguments.name, arguments.base, arguments.out)
    print_text(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}", console())
    print(f"next: python -m pytest {folder} (after pip install pytest)")
    return 0

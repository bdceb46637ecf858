"""`mymodels demo`."""

import argparse
from pathlib import Path
from typing import Any

from .options import FAILED, add_verb, console


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "demo",
        run,
        "Train both models briefly, save them as Hub repo folders and load them in a process without mymodels.",
        example="mymodels demo --out demo_output",
        exit_codes={0: "both models loaded and gave the same outputs there", 1: f"a check failed; or {FAILED}"},
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output"), metavar="DIR", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    from ..demo import run_demo

    return 0 if run_demo(arguments.out, console()) else 1

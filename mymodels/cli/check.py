"""`mymodels check`."""

import argparse
import json
from pathlib import Path
from typing import Any

from .options import FAILED, add_pickle_options, add_verb, console
from .progress import working


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "check",
        run,
        "Check that a checkpoint is complete: compare its index, headers and manifest.",
        example="mymodels check hub_repo/mygpt2 --full",
        exit_codes={
            0: "no problem was found in what was read",
            1: f"problems were found, and are printed; or {FAILED}",
        },
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a file or folder of safetensors or PyTorch weights")
    parser.add_argument("--full", action="store_true", help="read every byte: hashes, checksums, NaN weights")
    add_pickle_options(parser)
    parser.add_argument(
        "--write-manifest", action="store_true", help="first write manifest.json for the files as they are"
    )
    parser.add_argument("--json", action="store_true", help="print the problems as JSON")


def run(arguments: argparse.Namespace) -> int:
    from rich.text import Text

    from ..checkpoints import check_checkpoint, write_manifest

    if arguments.write_manifest:
        write_manifest(arguments.path)
    with working(f"checking {arguments.path}"):
        problems = check_checkpoint(arguments.path, full=arguments.full, allow_pickle=arguments.allow_pickle)
    if arguments.json:
        print(json.dumps([problem._asdict() for problem in problems], indent=2))
        return int(bool(problems))
    out = console()
    for problem in problems:
        out.print(Text(problem.message), soft_wrap=True)
    read = "every byte read" if arguments.full else "data not read, --full reads it"
    out.print(f"{len(problems)} problems" if problems else f"ok ({read})")
    return int(bool(problems))

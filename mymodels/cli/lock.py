"""`mymodels lock`."""

import argparse
from pathlib import Path
from typing import Any

from .options import FAILED, add_verb
from .progress import working


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "lock",
        run,
        "Record the hashes of reviewed code, so that mymodels.load(…, lock=FILE) runs no other code.",
        example="mymodels lock hub_repo/mygpt2 --out my-gpt2.lock",
        exit_codes={0: "the lock file is written", 1: FAILED},
    )
    parser.add_argument("source", metavar="PATH|REPO_ID@SHA", help="a folder, or a commit of a Hub repo")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("mymodels.lock"),
        metavar="FILE",
        help="the lock file; missing folders above it are created; default: %(default)s",
    )


def run(arguments: argparse.Namespace) -> int:
    from ..hub.lock import write_lock

    with working(f"hashing the code of {arguments.source}"):
        lock = write_lock(arguments.source, arguments.out)
    print(f"{arguments.out}: {len(lock.files)} code files locked")
    print(f"mymodels.load(…, lock={str(arguments.out)!r}) runs no other code")
    return 0

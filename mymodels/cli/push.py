"""`mymodels push`."""

import argparse
from pathlib import Path
from typing import Any

from .options import FAILED, add_verb, console, picked
from .progress import working


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "push",
        run,
        "Push a folder to a private Hub repo: verify it first, and compare every file afterwards.",
        example="mymodels push hub_repo/mygpt2 me/my-gpt2 --dry-run --no-verify",
        exit_codes={0: "the repo has the folder's files; with --dry-run: they are listed", 1: FAILED},
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder as mymodels build writes it")
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name; created if it does not exist")
    parser.add_argument("--public", action="store_true", help="create or expect a public repo; default: a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="created if it does not exist; default: main")
    parser.add_argument("--create-pr", action="store_true", help="commit to a new pull request")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be sent")
    parser.add_argument("--tag", metavar="NAME", help="tag the commit, for example v1")
    parser.add_argument(
        "--no-verify", action="store_true", help="skip the verification, and note this in the commit message"
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="PATTERN", help="also push files that match this pattern"
    )


def run(arguments: argparse.Namespace) -> int:
    from ..hub import verify
    from ..hub.pushing import push

    names = ("revision", "create_pr", "dry_run", "tag", "no_verify", "allow")
    out = console()
    with working(f"pushing {arguments.path}", until=out) as progress:
        push(
            arguments.path,
            arguments.repo_id,
            private=not arguments.public,
            verify=lambda folder: verify(folder, progress=progress),
            console=out,
            **picked(arguments, *names),
        )
    return 0

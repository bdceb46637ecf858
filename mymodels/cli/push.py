"""`mymodels push`."""

import argparse
from pathlib import Path
from typing import Any

from .options import FAILED, add_verb, console, picked


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "push",
        run,
        "Push a folder to a Hub repo, privately: verified before, every file compared afterwards.",
        example="mymodels push hub_repo/mygpt2 me/my-gpt2 --dry-run --no-verify",
        exit_codes={0: "the repo holds the folder; with --dry-run: listed", 1: FAILED},
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder as mymodels build writes it")
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name; made if need be")
    parser.add_argument("--public", action="store_true", help="make or expect a public repo; default: a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="made if need be; default: main")
    parser.add_argument("--create-pr", action="store_true", help="commit to a new pull request")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent, and stop")
    parser.add_argument("--tag", metavar="NAME", help="of the commit, such as v1")
    parser.add_argument("--no-verify", action="store_true", help="skip the verification; the commit message says so")
    parser.add_argument("--allow", action="append", default=[], metavar="PATTERN", help="push further kinds of files")


def run(arguments: argparse.Namespace) -> int:
    from ..hub.push import push

    names = ("revision", "create_pr", "dry_run", "tag", "no_verify", "allow")
    push(
        arguments.path, arguments.repo_id, private=not arguments.public, console=console(), **picked(arguments, *names)
    )
    return 0

"""`mymodels upgrade`."""

import argparse
import json
from pathlib import Path
from typing import Any

from .options import FAILED, add_isolation_option, add_verb, console, show_isolation
from .progress import working


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "upgrade",
        run,
        "Repair custom code from before transformers 5, and prove that it computes the same.",
        example="mymodels upgrade old-model --out new-model --from 4.46",
        exit_codes={
            0: "the result is proven and written; or there was nothing to change",
            1: f"a place cannot be repaired, or a number differs, and nothing was written; or {FAILED}",
            3: "nothing proves the result: a dry run, or no old release runs the original",
        },
    )
    parser.add_argument("path", metavar="PATH|REPO_ID", help="a folder or Hub repo with custom code; it is not changed")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repo")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write; it must be empty or not exist")
    parser.add_argument(
        "--from",
        dest="from_release",
        metavar="RELEASE",
        help="the transformers release that the original runs under, such as 4.46; default: the one in its config",
    )
    parser.add_argument(
        "--to",
        metavar="RELEASES",
        help="releases to prove it for: a range such as 4.56-5.23, or a list; default: 4.56,4.57,5.0,5.4,5.10,5.23",
    )
    parser.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="forward arguments (.safetensors, .npz or JSON), for models whose inputs cannot be generated",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the diff: nothing is run or written")
    parser.add_argument(
        "--unproven", action="store_true", help="write the result also where no old release runs the original"
    )
    parser.add_argument(
        "--attention-interface",
        action="store_true",
        help="also call attention through transformers' interface, if the outputs stay the same; serving engines need it",
    )
    add_isolation_option(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..hub.upgrading import upgrade
    from ..hub.upgrading.report import report_of, show_upgrade

    if arguments.dry_run and arguments.out is not None:
        raise ValueError("--dry-run writes nothing: leave out --out")
    if not arguments.dry_run:
        show_isolation(arguments)
    with working(f"upgrading {arguments.path}") as progress:
        result = upgrade(
            arguments.path,
            arguments.out,
            from_release=arguments.from_release,
            to=arguments.to,
            dry_run=arguments.dry_run,
            unproven=arguments.unproven,
            attention_interface=arguments.attention_interface,
            revision=arguments.revision,
            inputs=arguments.inputs,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps(report_of(result), indent=2))
    else:
        show_upgrade(result, console(), diff=arguments.dry_run)
    if result.refused or (result.proof is not None and result.proof.bad):
        return 1
    return 0 if result.proven or not result.edits else 3

"""`mymodels verify`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .options import FAILED, add_isolation_option, add_verb, console, show_isolation
from .progress import working


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "verify",
        run,
        "Check that a Hub repo folder loads and computes its recorded outputs, here or under other releases.",
        example="mymodels verify hub_repo/mygpt2 --quick",
        exit_codes={
            0: "every check held",
            1: f"a check failed; or {FAILED}",
            3: "no check failed, but some were skipped; the last line names them",
        },
    )
    parser.add_argument("path", metavar="PATH|REPO_ID", help="a folder or Hub repo, with or without custom code")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repo")
    parser.add_argument("--no-exec", action="store_true", help="only read the files: run none of the code")
    parser.add_argument(
        "--transformers", metavar="RELEASES", help="such as 4.57,5.0,latest, or all; default: the installed one"
    )
    parser.add_argument(
        "--record", action="store_true", help="first write golden.safetensors, for a folder known to be correct"
    )
    parser.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="forward arguments (.safetensors, .npz or JSON), for models whose inputs cannot be generated, such as images",
    )
    parser.add_argument("--quick", action="store_true", help="skip worker processes, parallel loading and export")
    parser.add_argument("--no-training", action="store_true", help="skip the loss, gradients and a training step")
    parser.add_argument("--allow-skipped", action="store_true", help="exit with 0, not 3, if checks were skipped")
    parser.add_argument(
        "--write-card", action="store_true", help="if all checks pass, write the table of releases into the model card"
    )
    add_isolation_option(parser)
    parser.set_defaults(registers_models=False)  # models run in other processes, which start sooner so
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--all", action="store_true", help="also list the checks that passed or do not apply")
    shown.add_argument("--json", action="store_true", help="print the checks as JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..hub import record_golden, verify

    for option in ("record", "write_card"):
        if getattr(arguments, option) and (arguments.no_exec or not Path(arguments.path).is_dir()):
            raise ValueError(
                f"--{option.replace('_', '-')} needs a local folder and runs its code: leave out --no-exec"
            )
    if arguments.inputs and arguments.no_exec:
        raise ValueError("--inputs needs to run the model: leave out --no-exec")
    if not arguments.no_exec:
        show_isolation(arguments)
    if arguments.record:
        with working("recording the outputs"):
            recorded = record_golden(arguments.path, inputs=arguments.inputs)
        print(f"recorded {recorded}", file=sys.stderr)
    with working(f"verifying {arguments.path}") as progress:
        found = verify(
            arguments.path,
            revision=arguments.revision,
            releases=arguments.transformers or (),
            execute=not arguments.no_exec,
            quick=arguments.quick,
            training=not arguments.no_training,
            inputs=arguments.inputs,
            progress=progress,
        )
    from ..hub.reporting import show_verification, write_matrix  # imports torch, which may wait until here

    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show_verification(found, console(), every_check=arguments.all)
    if arguments.write_card and found.passed:
        write_matrix(found, arguments.path)
    if not found.passed:
        return 1
    return 0 if found.complete or arguments.allow_skipped else 3

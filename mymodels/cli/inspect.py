"""`mymodels inspect`."""

import argparse
import json
import math
from typing import Any

from .options import FAILED, add_verb, checkpoint_options, console, picked
from .progress import working


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "inspect",
        run,
        "Show what is in a checkpoint, without running any of its code.",
        example="mymodels inspect hub_repo/mygpt2",
        exit_codes={
            0: "with --diff: all tensors are equal; else: success",
            1: f"with --diff: a tensor differs; or {FAILED}",
        },
        parents=(checkpoint_options(),),
    )
    parser.add_argument("path", metavar="PATH|REPO_ID", help="a file or folder of any format, or a Hub repo")
    parser.add_argument("--diff", metavar="OTHER", help="compare with another checkpoint, tensor by tensor")
    parser.add_argument(
        "--all", action="store_true", help="show each tensor in a row of its own, also in repeated layers"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoints import open_checkpoint
    from ..checkpoints.comparing import compare_checkpoints
    from ..checkpoints.inspecting import inspect_checkpoint
    from ..checkpoints.inspection_tables import show_difference, show_inspection

    options = picked(arguments, "section", "allow_pickle", "revision")
    if arguments.diff is None:
        with working(f"reading {arguments.path}"):
            found = inspect_checkpoint(arguments.path, **options)
        if arguments.json:
            print(json.dumps(found, indent=2))
        else:
            show_inspection(found, console(), every_tensor=arguments.all)
        return 0
    with working(f"comparing {arguments.path} with {arguments.diff}"):
        other = open_checkpoint(arguments.diff, allow_pickle=arguments.allow_pickle)
        rows = compare_checkpoints(open_checkpoint(arguments.path, **options), other)
    if arguments.json:
        print(json.dumps(_without_nan(rows), indent=2))
    else:
        show_difference(rows, arguments.path, arguments.diff, console())
    return int(any(row["status"] != "equal" for row in rows))


def _without_nan(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with NaN and infinity, which JSON does not have, as text."""
    return [{k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()} for row in rows]

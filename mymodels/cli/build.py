"""`mymodels build`."""

import argparse
from pathlib import Path
from typing import Any

from .options import (
    FAILED,
    add_card_options,
    add_isolation_option,
    add_verb,
    card_fields,
    console,
    metric,
    pair,
    read_text,
    show_isolation,
)
from .progress import working


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "build",
        run,
        "Make a complete Hub repo folder: flat code, sharded weights, model card, golden outputs, manifest.",
        example="mymodels build hub_repo/mygpt2 --out my-gpt2 --license mit --metric perplexity=21.4",
        exit_codes={0: "the folder is complete", 1: FAILED},
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="a folder or file of weights with config.json beside it, or a Hub repo"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new or empty folder, or an older Hub repo folder"
    )
    parser.add_argument(
        "--code",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.py",
        help="the model's classes, for weights saved without code; default: the code in the folder",
    )
    parser.add_argument(
        "--auto-class",
        action="append",
        default=[],
        metavar="AUTO=CLASS",
        help="such as AutoModel=MyNet, for a class whose name does not end like an Auto class's",
    )
    parser.add_argument(
        "--card", type=Path, metavar="FILE", help="a complete README.md; default: the source's, or a generated one"
    )
    add_card_options(parser)
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME=VALUE", help="for the card: a measured value"
    )
    parser.add_argument(
        "--datasets", action="append", default=[], metavar="ID", help="for the card: Hub id of a training data set"
    )
    parser.add_argument("--tags", action="append", default=[], metavar="TAG", help="for the card: a tag")
    parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")
    parser.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="forward arguments for the golden outputs (.safetensors, .npz or JSON); default: generated from the config",
    )
    parser.add_argument("--no-golden", action="store_true", help="do not run the model and write no golden.safetensors")
    add_isolation_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..hub import build_repo
    from ..hub.card import Card
    from ..tables import print_text

    metrics = dict(metric(text) for text in arguments.metric)
    lists = {"metrics": metrics, "datasets": arguments.datasets, "tags": arguments.tags}
    fields = card_fields(arguments) | {name: value for name, value in lists.items() if value}
    if not arguments.no_golden:
        show_isolation(arguments)
    card = read_text(arguments.card) if arguments.card else Card(**fields) if fields else None
    with working(f"building a folder of {arguments.source}"):
        folder = build_repo(
            arguments.source,
            None,
            arguments.out,
            card=card,
            max_shard_size=arguments.max_shard_size,
            golden=not arguments.no_golden,
            inputs=arguments.inputs,
            code=arguments.code,
            auto_classes=dict(pair(text, "AUTO=CLASS") for text in arguments.auto_class),
        )
    print_text(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}", console())
    print(f"next: mymodels verify {folder}")
    return 0

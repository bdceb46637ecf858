"""`mymodels build`."""

import argparse
from pathlib import Path
from typing import Any

from .options import FAILED, add_card_options, add_verb, card_fields, metric, pair, read_text
from .progress import working


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "build",
        run,
        "Make a complete Hub repo folder: flat code, shards, card, golden outputs, manifest.",
        example="mymodels build hub_repo/mygpt2 --out my-gpt2 --license mit --metric perplexity=21.4",
        exit_codes={0: "the folder is complete", 1: FAILED},
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder or file of weights with a config, or a Hub repo")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new, empty, or an older Hub repo folder"
    )
    parser.add_argument(
        "--code",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.py",
        help="the model's classes, for weights saved without; default: the code that lies in the folder",
    )
    parser.add_argument(
        "--auto-class",
        action="append",
        default=[],
        metavar="AUTO=CLASS",
        help="such as AutoModel=MyNet, for a class whose name does not say which Auto class it is for",
    )
    parser.add_argument(
        "--card", type=Path, metavar="FILE", help="a complete README.md; default: the source's, or a new one"
    )
    add_card_options(parser)
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME=VALUE", help="a measured value for the card"
    )
    parser.add_argument(
        "--datasets", action="append", default=[], metavar="ID", help="Hub id of data it was trained on"
    )
    parser.add_argument("--tags", action="append", default=[], metavar="TAG", help="for the card")
    parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")
    parser.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="arguments of forward to record outputs of (.safetensors, .npz or JSON); default: made up from the config",
    )
    parser.add_argument("--no-golden", action="store_true", help="run nothing; without golden.safetensors")


def run(arguments: argparse.Namespace) -> int:
    from ..hub import build_repo
    from ..hub.card import Card

    metrics = dict(metric(text) for text in arguments.metric)
    lists = {"metrics": metrics, "datasets": arguments.datasets, "tags": arguments.tags}
    fields = card_fields(arguments) | {name: value for name, value in lists.items() if value}
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
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0

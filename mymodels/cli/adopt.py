"""`mymodels adopt`."""

import argparse
from pathlib import Path
from typing import Any

from .options import FAILED, add_card_options, add_pickle_options, add_verb, card_fields, config_field, console, picked
from .progress import working


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "adopt",
        run,
        "Make a verified Hub repo folder from a model class in your own file, which is not changed.",
        example="mymodels adopt my_model.py:MyNet --weights net.pt --config hidden=256,layers=4 --out my-net",
        exit_codes={
            0: "the folder is complete, every check held",
            1: FAILED,
            3: "no check failed, but one was skipped",
        },
    )
    parser.add_argument(
        "source", metavar="FILE.py:CLASS", help="a class that derives from nn.Module or PreTrainedModel"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new or empty folder, or an older Hub repo folder"
    )
    parser.add_argument("--weights", metavar="PATH", help="a checkpoint of any format; default: random weights")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME=VALUE,…",
        help="arguments of the constructor; default: those in the checkpoint, or the constructor's defaults",
    )
    parser.add_argument(
        "--auto-class",
        metavar="NAME",
        help="such as AutoModelForCausalLM; default: inferred from the outputs",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer to save with the model")
    parser.add_argument("--section", metavar="NAME", help="the model to take from a file that holds several")
    add_pickle_options(parser)
    parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="skip the slow checks of mymodels verify")
    parser.add_argument("--no-verify", action="store_true", help="only compare the outputs, without mymodels verify")
    add_card_options(parser)


def split_fields(text: str) -> list[str]:
    """Split `a=1,b=[2,3],c=x` at commas outside brackets and quotes; a piece without `=` is added to the one before it."""
    pieces, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (letter in "([{") - (letter in ")]}") if not quote else 0
        if letter == "," and depth == 0 and not quote:
            pieces.append("")
        else:
            pieces[-1] += letter
    joined: list[str] = []
    for piece in pieces:
        if "=" in piece or not joined:
            joined.append(piece.strip())
        else:
            joined[-1] += f",{piece}"
    return [piece for piece in joined if piece]


def run(arguments: argparse.Namespace) -> int:
    from ..adopting import adopt
    from ..hub.card import Card

    tokenizer = None
    if arguments.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    fields = card_fields(arguments)
    with working(f"making {arguments.out}"):
        adopted = adopt(
            arguments.source,
            arguments.out,
            config=dict(config_field(piece) for text in arguments.config for piece in split_fields(text)),
            tokenizer=tokenizer,
            card=Card(**{"name": arguments.out.name, **fields}) if fields else None,
            check=not arguments.no_verify,
            **picked(arguments, "weights", "auto_class", "section", "allow_pickle", "max_shard_size", "quick"),
        )
    adopted.show(console())
    return 3 if adopted.verification is not None and not adopted.verification.complete else 0

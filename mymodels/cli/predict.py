"""`mymodels predict`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .options import DTYPE_CHOICES, FAILED, add_verb, dtype_of, picked


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "predict",
        run,
        "Run a model on each line of a file or pipe and write one JSON line per line, in order and constant memory.",
        example='echo \'{"text": "the cat sat on the mat"}\' | mymodels predict hub_repo/mybert',
        exit_codes={
            0: "every line has a result",
            1: FAILED,
            3: "invalid lines were skipped; each is reported on standard error",
        },
    )
    parser.add_argument("model", metavar="PATH|REPO_ID", help="a model that transformers' Auto classes load")
    parser.add_argument("--input", type=Path, metavar="FILE", help="default: standard input")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    tasks = [
        "text-classification",
        "token-classification",
        "question-answering",
        "feature-extraction",
        "text-generation",
        "text2text-generation",
        "loss",
    ]
    parser.add_argument("--task", choices=tasks, help="default: the task of the saved model")
    parser.add_argument(
        "--column", default="text", metavar="NAME", help="the field with the text; default: %(default)s"
    )
    parser.add_argument(
        "--pair-column",
        metavar="NAME",
        help="the field with the second text of a pair; default: text_pair, if there is one",
    )
    parser.add_argument("--text", action="store_true", help="lines are plain text, not JSON")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    window = "batches to read ahead and sort by length; 1 writes results after each batch; default: %(default)s"
    parser.add_argument("--window", type=int, default=16, metavar="N", help=window)
    parser.add_argument("--top-k", type=int, metavar="N", help="also write the scores of the N best labels; 0: of all")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens to truncate texts to; default: the model's maximum"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=50, metavar="N", help="tokens to generate; default: %(default)s"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; default: cuda if available")
    parser.add_argument(
        "--dtype", choices=["auto", *DTYPE_CHOICES], default="auto", help="of the weights; default: as saved"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the model's")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repo")
    parser.add_argument("--trust-remote-code", action="store_true", help="run a model's own code that is not mymodels'")


def run(arguments: argparse.Namespace) -> int:
    from ..predicting import predict

    if arguments.input is None and sys.stdin.isatty():
        print("reading lines from the terminal; Ctrl-D ends the input", file=sys.stderr)
    names = ("task", "column", "pair_column", "text", "batch_size", "window", "top_k", "max_length", "max_new_tokens")
    counts = predict(
        arguments.model,
        arguments.input or sys.stdin.buffer,
        arguments.output or sys.stdout.buffer,
        dtype=dtype_of(arguments),
        **picked(arguments, *names, "device", "tokenizer", "revision", "trust_remote_code"),
    )
    cut = f", {counts.cut} of them truncated (--max-length)" if counts.cut else ""
    print(f"{counts.answered} lines answered{cut}, {counts.skipped} skipped", file=sys.stderr)
    return 3 if counts.skipped else 0

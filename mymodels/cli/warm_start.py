"""`mymodels warm-start`."""

import argparse
import re
from pathlib import Path
from typing import Any

from .options import (
    DTYPE_CHOICES,
    FAILED,
    add_verb,
    checkpoint_options,
    config_field,
    console,
    dtype_of,
    pair,
    picked,
)
from .progress import working


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "warm-start",
        run,
        "Load the weights of one model into another, and report what became of every tensor.",
        example="mymodels warm-start hub_repo/mygpt2 --to mygpt2 --set num_key_value_heads=1 --out my-gpt2",
        exit_codes={0: "the report is printed, and the model is saved to --out", 1: FAILED},
        parents=(checkpoint_options(),),
    )
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="a checkpoint of any format, or a Hub repo")
    parser.add_argument(
        "--to", required=True, metavar="TARGET", help="the target: mygpt2, mybert, or a folder with a config.json"
    )
    parser.add_argument(
        "--head", metavar="NAME", help="ForCausalLM, ForSequenceClassification, …, Model; default: the source's"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the target's config"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the source's config, if the source has no config.json"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to save to; default: only report")
    parser.add_argument(
        "--layers",
        default="every",
        metavar="WHICH",
        help="source layers to take: every, first, last or a list such as 0,2,4; default: %(default)s",
    )
    parser.add_argument(
        "--widen", choices=["pad", "split"], default="pad", help="how new MLP units start; default: %(default)s"
    )
    parser.add_argument(
        "--positions",
        choices=["tile", "interpolate"],
        default="tile",
        help="how a longer position table is filled; default: %(default)s",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="the target's, if it differs from the source's")
    parser.add_argument("--source-tokenizer", metavar="PATH", help="the source's, if it is not in the source's folder")
    parser.add_argument(
        "--word-vectors", metavar="FILE", help="word2vec or GloVe text file, plain or .gz, for the embeddings"
    )
    parser.add_argument(
        "--rename", action="append", default=[], metavar="REGEX=NEW", help="rename tensors of the source; applied first"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="REGEX", help="do not load parameters or tensors that match"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="REGEX", help="load only parameters or tensors that match"
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail, and write nothing, if a parameter is new or a tensor unused"
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="REGEX",
        help="names that may be new or unused, for --strict and for sources of which less than a tenth loads",
    )
    parser.add_argument(
        "--check", action="store_true", help="run source and target on the same inputs even if they are large"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="read a source with custom code as if it were mymodels', and run the code of a target folder",
    )
    parser.add_argument("--dtype", choices=DTYPE_CHOICES, help="of the target; default: float32")
    parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="random seed of new parameters; default: %(default)s")
    parser.add_argument(
        "--all", action="store_true", help="show each tensor in a row of its own, also in repeated layers"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report to this file")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from ..checkpoints.safetensors_files import read_json
    from ..checkpoints.writing import parse_size
    from ..warmstart import NotAllowedError, warm_start
    from ..warmstart.option_names import in_options, report_in_options

    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed {arguments.seed}: use a number from 0 to {2**63 - 1}")
    torch.manual_seed(arguments.seed)
    size = parse_size(arguments.max_shard_size)
    config = read_json(arguments.config) if arguments.config else None
    names = ("head", "widen", "positions", "tokenizer", "source_tokenizer", "word_vectors", "skip", "only", "strict")
    layers = arguments.layers
    if re.fullmatch(r"\d+(,\d+)*", layers):
        layers = [int(number) for number in layers.split(",")]
    try:
        with in_options(), working(f"loading {arguments.source}"):
            report = warm_start(
                arguments.to,
                arguments.source,
                overrides=dict(config_field(text) for text in arguments.set),
                rename=dict(pair(text, "REGEX=REPLACEMENT") for text in arguments.rename),
                dtype=dtype_of(arguments),
                config=config,
                layers=layers,
                **picked(arguments, *names, "allow", "section", "allow_pickle", "revision", "trust_remote_code"),
            )
    except NotAllowedError as error:
        error.report.show(console(), every_tensor=arguments.all)
        raise
    if arguments.check:
        with working("running source and target on the same inputs"):
            report.check()
    report_in_options(report)
    report.show(console(), every_tensor=arguments.all)
    if arguments.out:
        with working(f"saving {arguments.out}"):
            report.save_pretrained(arguments.out, max_shard_size=size)
    if arguments.json:
        report.save_json(arguments.json)
    if arguments.out:
        print(
            f"{arguments.out}: {report.target} with code, weights{', tokenizer' if report.tokenizer else ''} and report"
        )
    return 0

"""`mymodels convert`."""

import argparse
from typing import Any

from .options import DTYPE_CHOICES, FAILED, add_verb, checkpoint_options, dtype_of, picked
from .progress import working


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "convert",
        run,
        "Write a checkpoint of any format as safetensors, .bin or .pt.",
        example="mymodels convert hub_repo/mygpt2 mygpt2-bf16 --dtype bf16 --max-shard-size 500MB",
        exit_codes={0: "the checkpoint is written", 1: FAILED},
        parents=(checkpoint_options(),),
    )
    parser.add_argument("source", metavar="SRC", help="a file or folder of any format, or a Hub repo")
    parser.add_argument("destination", metavar="DST", help="the folder (safetensors, bin) or file (pt) to create")
    parser.add_argument(
        "--format", choices=["safetensors", "bin", "pt"], default="safetensors", help="default: %(default)s"
    )
    parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")
    parser.add_argument(
        "--merge-adapter", metavar="BASE", help="merge the LoRA adapter SRC into this base model's weights"
    )
    parser.add_argument("--dtype", choices=DTYPE_CHOICES, help="for floating-point tensors; default: unchanged")


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoints.converting import convert_checkpoint

    with working(f"converting {arguments.source}"):
        source = convert_checkpoint(
            arguments.source,
            arguments.destination,
            dtype=dtype_of(arguments),
            **picked(arguments, "max_shard_size", "format", "section", "allow_pickle", "revision", "merge_adapter"),
        )
    print(f"{arguments.destination}: {len(source)} tensors from {source.format}, written as {arguments.format}")
    if left := [*source.extras, *source.left_out]:
        print(f"not converted: {', '.join(left)}")
    return 0

"""`mymodels export`."""

import argparse
from pathlib import Path
from typing import Any

from .options import FAILED, add_verb, console, dtype_of, picked, read_text
from .progress import working


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "export",
        run,
        "Write a model as a graph that runs without mymodels, and compare its outputs with torch's.",
        example="mymodels export hub_repo/mygpt2 --to pt2 --out mygpt2-pt2",
        exit_codes={0: "written, and its outputs agree", 1: FAILED},
    )
    parser.add_argument(
        "path", metavar="PATH|REPO_ID", help="a folder or Hub repo that transformers' Auto classes load"
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("onnx", "pt2", "aoti", "torchscript"),
        help="ONNX; torch.export; AOTInductor (needs a C++ compiler); TorchScript, which PyTorch calls legacy",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="a new folder; default: NAME-onnx and the like, here"
    )
    parser.add_argument("--int8", action="store_true", help="quantise the weights (ONNX), and say what it costs")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="what --int8 is measured on, a text per line")
    parser.add_argument(
        "--dtype", default="float32", help="of the weights, or auto: the checkpoint's; default: %(default)s"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX; default: 20")
    parser.add_argument("--task", help="text-generation, text-classification, …; default: what the model is for")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repo")
    parser.add_argument("--trust-remote-code", action="store_true", help="run a model's own code that is not mymodels'")


def run(arguments: argparse.Namespace) -> int:
    from ..export import export_model

    names = ("task", "int8", "opset", "revision", "trust_remote_code")
    options = picked(arguments, *names)
    if arguments.texts:
        options["texts"] = [line for line in read_text(arguments.texts).splitlines() if line.strip()]
    with working(f"exporting {arguments.path}"):
        result = export_model(arguments.path, arguments.to, arguments.out, dtype=dtype_of(arguments), **options)
    result.show(console())
    return 0

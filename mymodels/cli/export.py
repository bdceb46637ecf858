"""`mymodels export`."""

import argparse
from pathlib import Path
from typing import Any

from .options import FAILED, add_isolation_option, add_verb, console, dtype_of, picked, read_text, show_isolation


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "export",
        run,
        "Write a model as a graph that runs without mymodels, and compare its outputs with torch's.",
        example="mymodels export hub_repo/mygpt2 --to pt2 --out mygpt2-pt2",
        exit_codes={0: "the graph is written, and its outputs agree", 1: f"the outputs differ; or {FAILED}"},
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
        "--out", type=Path, metavar="FOLDER", help="a new folder; default: NAME-onnx, NAME-pt2 and so on"
    )
    parser.add_argument(
        "--int8", action="store_true", help="quantise the weights (ONNX), and report the loss in quality"
    )
    parser.add_argument("--texts", type=Path, metavar="FILE", help="texts to measure --int8 on, one per line")
    parser.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="forward arguments (.safetensors, .npz or JSON), for models whose inputs cannot be generated, such as images",
    )
    parser.add_argument(
        "--dtype", default="float32", help="of the weights; auto: as in the checkpoint; default: %(default)s"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="opset version of ONNX; default: 20")
    parser.add_argument("--task", help="text-generation, text-classification, …; default: the model's task")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repo")
    parser.add_argument("--trust-remote-code", action="store_true", help="run a model's own code that is not mymodels'")
    add_isolation_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..export import export_model

    names = ("task", "int8", "opset", "revision", "trust_remote_code", "inputs")
    options = picked(arguments, *names)
    if arguments.texts:
        options["texts"] = [line for line in read_text(arguments.texts).splitlines() if line.strip()]
    show_isolation(arguments)
    result = export_model(arguments.path, arguments.to, arguments.out, dtype=dtype_of(arguments), **options)
    result.show(console())
    return 0

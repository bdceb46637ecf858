"""The `mymodels` command: one thin function per verb."""

import argparse
import ast
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from . import __version__

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run_demo

    return 0 if run_demo(arguments.out) else 1


def _console() -> Any:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)  # a file or a pipe has no width of its own


def _inspect(arguments: argparse.Namespace) -> int:
    from .checkpoints import open_checkpoint
    from .checkpoints.inspecting import compare_checkpoints, inspect_checkpoint, show_difference, show_inspection

    options = {name: getattr(arguments, name) for name in ("section", "allow_pickle", "revision")}
    if arguments.diff is None:
        found = inspect_checkpoint(arguments.path, **options)
        print(json.dumps(found, indent=2)) if arguments.json else show_inspection(
            found, _console(), every_tensor=arguments.all
        )
        return 0
    other = open_checkpoint(arguments.diff, allow_pickle=arguments.allow_pickle)
    rows = compare_checkpoints(open_checkpoint(arguments.path, **options), other)
    print(json.dumps(_without_nan(rows), indent=2)) if arguments.json else show_difference(
        rows, arguments.path, arguments.diff, _console()
    )
    return int(any(row["status"] != "equal" for row in rows))


def _without_nan(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no NaN and no infinity: as texts."""
    return [{k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()} for row in rows]


def _convert(arguments: argparse.Namespace) -> int:
    from .checkpoints.converting import convert_checkpoint

    source = convert_checkpoint(
        arguments.source,
        arguments.destination,
        max_shard_size=arguments.max_shard_size,
        dtype=_DTYPES.get(arguments.dtype, arguments.dtype),
        format=arguments.format,
        section=arguments.section,
        allow_pickle=arguments.allow_pickle,
        revision=arguments.revision,
    )
    print(f"{arguments.destination}: {len(source)} tensors from {source.format}, written as {arguments.format}")
    if source.extras:
        print(f"not taken along: {', '.join(source.extras)}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    from .checkpoints import check_checkpoint, write_manifest

    if arguments.write_manifest:
        write_manifest(arguments.path)
    problems = check_checkpoint(arguments.path, full=arguments.full)
    if arguments.json:
        print(json.dumps([problem._asdict() for problem in problems], indent=2))
        return int(bool(problems))
    console = Console(soft_wrap=True)
    for problem in problems:
        console.print(Text(problem.message))
    read = "every byte read" if arguments.full else "data not read, --full reads it"
    console.print(f"{len(problems)} problems" if problems else f"ok ({read})")
    return int(bool(problems))


def _warm_start(arguments: argparse.Namespace) -> int:
    import torch

    from .checkpoints.safetensors_files import read_json
    from .checkpoints.writing import parse_size
    from .warmstart import NotAllowedError, warm_start

    torch.manual_seed(arguments.seed)
    size = parse_size(arguments.max_shard_size)
    config = read_json(arguments.config) if arguments.config else None
    names = ("head", "widen", "positions", "tokenizer", "source_tokenizer", "word_vectors", "skip", "only", "strict")
    options = {name: getattr(arguments, name) for name in (*names, "allow", "section", "allow_pickle", "revision")}
    layers = arguments.layers
    if re.fullmatch(r"\d+(,\d+)*", layers):
        layers = [int(number) for number in layers.split(",")]
    try:
        report = warm_start(
            arguments.to,
            arguments.source,
            overrides=dict(_field(text) for text in arguments.set),
            rename=dict(_pair(text, "REGEX=REPLACEMENT") for text in arguments.rename),
            dtype=_DTYPES.get(arguments.dtype, arguments.dtype),
            config=config,
            layers=layers,
            **options,
        )
    except NotAllowedError as error:
        error.report.show(_console(), every_tensor=arguments.all)
        raise
    report.show(_console(), every_tensor=arguments.all)
    if arguments.out:
        report.save_pretrained(arguments.out, max_shard_size=size)
    if arguments.json:
        report.save_json(arguments.json)
    if arguments.out:
        print(
            f"{arguments.out}: {report.target} with code, weights{', tokenizer' if report.tokenizer else ''} and report"
        )
    return 0


def _pair(text: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} has no '=': write {form}")
    return name, value


def _field(text: str) -> tuple[str, Any]:
    """`name=value` with the value as JSON or Python would read it, else as text."""
    name, value = _pair(text, "FIELD=VALUE")
    words = {"true": True, "false": False, "null": None}
    try:
        return name, words[value] if value in words else ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _build(arguments: argparse.Namespace) -> int:
    from .hub import build_repo
    from .hub.card import Card

    said = {name: getattr(arguments, name) for name in _CARD if getattr(arguments, name)}
    metrics = {name: float(value) for name, value in (_pair(text, "NAME=VALUE") for text in arguments.metric)}
    if not all(map(math.isfinite, metrics.values())):
        raise ValueError(f"--metric {metrics}: a result is a number")
    said |= {
        name: value
        for name, value in (("metrics", metrics), ("datasets", arguments.datasets), ("tags", arguments.tags))
        if value
    }
    card = arguments.card.read_text(encoding="utf-8") if arguments.card else Card(**said) if said else None
    options = {"max_shard_size": arguments.max_shard_size, "golden": not arguments.no_golden}
    folder = build_repo(arguments.source, None, arguments.out, card=card, **options)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


# what a card says beyond the folder → its help; each an option of `mymodels build`
_CARD = {
    "name": "title of the model card",
    "repo_id": "what the card's snippet loads",
    "description": "what the model is",
    "license": "such as apache-2.0",
    "language": "such as en",
    "base_model": "Hub id of the model it was made from",
    "training_data": "what it was trained on",
    "limits": "what it is not for",
    "dataset": "what --metric was measured on",
}


def _finetune(arguments: argparse.Namespace) -> int:
    from .hub.card import Card
    from .training.finetune import finetune

    given = {name: getattr(arguments, name) for name in _FINETUNE if getattr(arguments, name) is not None}
    if (weights := given.get("class_weights")) and weights != "balanced":
        try:
            given["class_weights"] = [float(number) for number in weights.split(",")]
        except ValueError:
            raise ValueError(
                f"--class-weights {weights!r}: say balanced, or a number for each label, with commas between"
            ) from None
    if "validation" in given and re.fullmatch(r"\d*\.?\d+", given["validation"]):
        given["validation"] = float(given["validation"])
    if "lora_target_modules" in given:
        given["lora_target_modules"] = given["lora_target_modules"].split(",")
    others = dict(_field(text) for text in arguments.arg)
    if twice := sorted(others.keys() & _FINETUNE.keys()):
        raise ValueError(f"--arg {twice[0]}={others[twice[0]]}: say it once, as --{twice[0].replace('_', '-')}")
    said = {name: getattr(arguments, name) for name in _CARD if getattr(arguments, name)}
    finetune(
        arguments.model,
        arguments.data,
        arguments.out,
        overrides=dict(_field(text) for text in arguments.set),
        resume_from_checkpoint=arguments.resume_from_checkpoint or arguments.resume,
        card=Card(**said),
        console=_console(),
        **given,
        **others,
    )
    return 0


# option of `mymodels finetune`, named as in Python → type (None: a flag, Ellipsis: a flag with --no-) and help
_FINETUNE: dict[str, tuple[Any, str]] = {
    "task": (str, "classification (default), or lm: the next token for a decoder, hidden ones for an encoder"),
    "to": (str, "warm-start a mybert or mygpt2 from --model"),
    "tokenizer": (str, "default: the model's"),
    "revision": (str, "branch, tag or commit of the model's Hub repo"),
    "trust_remote_code": (None, "run a model's own code that is not mymodels'"),
    "validation": (str, "a file, or the share of the rows to hold out; default: the data's own, or 0.1"),
    "test": (str, "a file, measured once at the end"),
    "text_column": (str, "default: guessed where there is no doubt"),
    "label_column": (str, "the same"),
    "data_config": (str, "configuration of a Hub data set"),
    "max_length": (int, "tokens of the longest example, or of a block; default: what the model takes"),
    "num_train_epochs": (float, "default: 3"),
    "max_steps": (int, "instead of epochs"),
    "per_device_train_batch_size": (int, "default: 16"),
    "gradient_accumulation_steps": (int, "batches for each step; default: 1"),
    "learning_rate": (float, "default: 5e-5, with LoRA 4e-4"),
    "weight_decay": (float, "default: 0.01"),
    "lr_scheduler_type": (str, "linear (default), cosine, constant_with_warmup, …"),
    "warmup_ratio": (float, "share of the steps until the learning rate is reached; default: 0.1"),
    "warmup_steps": (int, "instead of a share"),
    "class_weights": (str, "balanced, or a number for each label, with commas between"),
    "freeze_embeddings": (None, "leave the embeddings as they are"),
    "freeze_layers": (int, "leave the first so many layers as they are"),
    "layer_decay": (float, "factor of the learning rate from layer to layer, down from the head, such as 0.9"),
    "lora_r": (int, "train LoRA adapters of this rank and the head; they are added into the weights at the end"),
    "lora_alpha": (int, "default: twice the rank"),
    "lora_target_modules": (str, "ends of the matrices' names, with commas between; default: all in the layers"),
    "eval_steps": (int, "measure and checkpoint each so many steps; default: each epoch, or a tenth of --max-steps"),
    "metric_for_best_model": (str, "accuracy (default), f1_macro or loss; perplexity for lm"),
    "early_stopping_patience": (int, "stop after so many evaluations without a better one"),
    "bf16": (..., "compute in bfloat16, or not; default: if this machine does it by hardware"),
    "seed": (int, "default: 42"),
    "logging_steps": (int, "default: some 50 times in all"),
    "report_to": (str, "tensorboard, …; default: none"),
    "save_total_limit": (int, "checkpoints to keep; default: 2"),
    "checkpoint_dir": (Path, "default: DIR-checkpoints"),
    "keep_checkpoints": (None, "leave them there when the folder is complete"),
    "max_shard_size": (str, "default: 2GB"),
}


def _predict(arguments: argparse.Namespace) -> int:
    import os

    from .predicting import predict

    if arguments.input is None and sys.stdin.isatty():
        print("reading lines from the terminal, Ctrl-D ends them", file=sys.stderr)
    names = ("task", "column", "pair_column", "text", "batch_size", "window", "top_k", "max_length", "max_new_tokens")
    options = {
        name: getattr(arguments, name) for name in (*names, "device", "tokenizer", "revision", "trust_remote_code")
    }
    try:
        counts = predict(
            arguments.model,
            arguments.input or sys.stdin.buffer,
            arguments.output or sys.stdout.buffer,
            dtype=_DTYPES.get(arguments.dtype, arguments.dtype),
            **options,
        )
    except BrokenPipeError:  # whoever reads the answers has enough of them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 141  # as of a program that the signal ends
    cut = f", {counts.cut} of them cut (--max-length)" if counts.cut else ""
    print(f"{counts.answered} lines answered{cut}, {counts.skipped} skipped", file=sys.stderr)
    return 3 if counts.skipped else 0


def _verify(arguments: argparse.Namespace) -> int:
    from .hub import record_golden, verify
    from .hub.reporting import show_verification, write_matrix

    for option in ("record", "write_card"):
        if getattr(arguments, option) and (arguments.no_exec or not Path(arguments.path).is_dir()):
            raise ValueError(
                f"--{option.replace('_', '-')} is for a folder on this machine, and runs it: leave out --no-exec"
            )
    if arguments.record:
        print(f"recorded {record_golden(arguments.path)}", file=sys.stderr)
    found = verify(
        arguments.path,
        revision=arguments.revision,
        releases=arguments.transformers or (),
        execute=not arguments.no_exec,
        quick=arguments.quick,
        training=not arguments.no_training,
    )
    print(json.dumps(found.to_dict(), indent=2)) if arguments.json else show_verification(found, _console())
    if arguments.write_card and found.passed:
        write_matrix(found, arguments.path)
    if not found.passed:
        return 1
    return 0 if found.complete or arguments.allow_skipped else 3


def _push(arguments: argparse.Namespace) -> int:
    from .hub.push import push

    names = ("revision", "create_pr", "dry_run", "tag", "no_verify", "allow")
    options = {name: getattr(arguments, name) for name in names}
    push(arguments.path, arguments.repo_id, private=not arguments.public, console=_console(), **options)
    return 0


def _lock(arguments: argparse.Namespace) -> int:
    from .hub.lock import write_lock

    lock = write_lock(arguments.source, arguments.out)
    print(
        f"{arguments.out}: {len(lock.files)} code files locked; mymodels.load(…, lock={str(arguments.out)!r}) runs no other"
    )
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from .export import export_model

    names = ("task", "int8", "opset", "revision", "trust_remote_code")
    options = {name: getattr(arguments, name) for name in names}
    if arguments.texts:
        options["texts"] = [line for line in arguments.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    dtype = _DTYPES.get(arguments.dtype, arguments.dtype)
    export_model(arguments.path, arguments.to, arguments.out, dtype=dtype, **options).show(_console())
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit code."""
    parser = argparse.ArgumentParser(prog="mymodels", description="Modified GPT-2 and BERT models that load anywhere.")
    parser.add_argument("--version", action="version", version=f"mymodels {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="train both models briefly, save them as Hub repos, load them elsewhere")
    demo.add_argument("--out", type=Path, default=Path("demo_output"), metavar="DIR", help="default: %(default)s")
    demo.set_defaults(run=_demo)

    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("--section", metavar="NAME", help="of a file with several models, the one that is meant")
    source.add_argument(
        "--allow-pickle",
        action="store_true",
        help="run the code that a pickled object asks for, in another process but with your rights; only if you trust it",
    )
    source.add_argument("--revision", help="branch, tag or commit of a Hub repo")

    inspect = verbs.add_parser("inspect", parents=[source], help="show what is in a checkpoint; nothing is executed")
    inspect.add_argument("path", metavar="PATH|REPO_ID", help="a file or folder of any format, or a Hub repo")
    inspect.add_argument("--diff", metavar="OTHER", help="compare tensor by tensor; exit code 1 if anything differs")
    inspect.add_argument("--all", action="store_true", help="a row for every tensor, also of repeated layers")
    inspect.add_argument("--json", action="store_true", help="everything, for programs")
    inspect.set_defaults(run=_inspect)

    convert = verbs.add_parser("convert", parents=[source], help="write any checkpoint as safetensors, .bin or .pt")
    convert.add_argument("source", metavar="SRC", help="a file or folder of any format, or a Hub repo")
    convert.add_argument("destination", metavar="DST", help="the new folder (safetensors, bin) or file (pt)")
    convert.add_argument("--format", choices=["safetensors", "bin", "pt"], default="safetensors", help="%(default)s")
    convert.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")
    convert.add_argument("--dtype", choices=[*_DTYPES, *_DTYPES.values()], help="of floating-point tensors")
    convert.set_defaults(run=_convert)

    check = verbs.add_parser("check", help="is a checkpoint whole? index, headers and manifest against each other")
    check.add_argument("path", type=Path, metavar="PATH")
    check.add_argument("--full", action="store_true", help="read every byte: hashes, checksums, NaN weights")
    check.add_argument("--write-manifest", action="store_true", help="record what is there now, then check")
    check.add_argument("--json", action="store_true", help="for programs")
    check.set_defaults(run=_check)

    warm = verbs.add_parser(
        "warm-start", parents=[source], help="stock weights into a modified architecture, every tensor accounted for"
    )
    warm.add_argument("source", nargs="?", metavar="SOURCE", help="a checkpoint of any format, or a Hub repo")
    warm.add_argument("--to", required=True, choices=["mygpt2", "mybert"], help="the architecture to fill")
    warm.add_argument(
        "--head", metavar="NAME", help="ForCausalLM, ForSequenceClassification, …, Model; default: the source's"
    )
    warm.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a config field that differs")
    warm.add_argument("--config", type=Path, metavar="FILE", help="the source's config.json, if it is not beside it")
    warm.add_argument("--out", type=Path, metavar="DIR", help="where to save; without it only the report is made")
    warm.add_argument(
        "--layers", default="every", metavar="WHICH", help="every, first, last or 0,2,4 (default: %(default)s)"
    )
    warm.add_argument("--widen", choices=["pad", "split"], default="pad", help="new MLP units; default: %(default)s")
    warm.add_argument(
        "--positions", choices=["tile", "interpolate"], default="tile", help="a longer table; default: %(default)s"
    )
    warm.add_argument("--tokenizer", metavar="PATH", help="the target's, if it is another than the source's")
    warm.add_argument("--source-tokenizer", metavar="PATH", help="the source's, if it is not beside it")
    warm.add_argument("--word-vectors", metavar="FILE", help="word2vec or GloVe text, plain or .gz, for the embeddings")
    warm.add_argument(
        "--rename", action="append", default=[], metavar="REGEX=NEW", help="of the source's names, before all else"
    )
    warm.add_argument("--skip", action="append", default=[], metavar="REGEX", help="parameters or tensors not to load")
    warm.add_argument("--only", action="append", default=[], metavar="REGEX", help="load nothing else")
    warm.add_argument("--strict", action="store_true", help="fail if anything is new or unused, and write nothing")
    warm.add_argument("--allow", action="append", default=[], metavar="REGEX", help="names that --strict lets pass")
    warm.add_argument("--dtype", choices=[*_DTYPES, *_DTYPES.values()], help="of the new model; default: float32")
    warm.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")
    warm.add_argument("--seed", type=int, default=0, help="of what is new; default: %(default)s")
    warm.add_argument("--all", action="store_true", help="a row for every tensor, also of repeated layers")
    warm.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    warm.set_defaults(run=_warm_start)

    build = verbs.add_parser("build", help="make a complete Hub repo folder: flat code, shards, card, golden, manifest")
    build.add_argument("source", metavar="SOURCE", help="a folder with config and weights, or a Hub repo")
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="new, empty, or an older Hub repo folder")
    build.add_argument(
        "--card", type=Path, metavar="FILE", help="the whole README.md; default: the source's, or a new one"
    )
    for name, text in _CARD.items():
        build.add_argument(f"--{name.replace('_', '-')}", metavar="TEXT", help=text)
    build.add_argument(
        "--metric", action="append", default=[], metavar="NAME=VALUE", help="a measured value for the card"
    )
    build.add_argument("--datasets", action="append", default=[], metavar="ID", help="Hub id of data it was trained on")
    build.add_argument("--tags", action="append", default=[], metavar="TAG", help="for the card")
    build.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")
    build.add_argument("--no-golden", action="store_true", help="run nothing; without golden.safetensors")
    build.set_defaults(run=_build)

    tune = verbs.add_parser("finetune", help="train a model on your data, to a complete Hub repo folder")
    tune.add_argument(
        "--model", required=True, metavar="PATH|REPO_ID", help="mymodels', stock, or any with such a head"
    )
    tune.add_argument(
        "--data", required=True, metavar="PATH|DATASET", help="file, folder, Hub data set, or sample_text"
    )
    tune.add_argument("--out", type=Path, required=True, metavar="DIR", help="new, empty, or an older Hub repo folder")
    tune.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a config field that differs")
    tune.add_argument("--resume", action="store_true", help="go on after the newest checkpoint")
    tune.add_argument("--resume-from-checkpoint", type=Path, metavar="DIR", help="go on after this one")
    for name, (kind, text) in _FINETUNE.items():
        how: dict[str, Any] = {"type": kind, "metavar": getattr(kind, "__name__", "").upper()}
        if kind in (None, ...):
            how = {"action": argparse.BooleanOptionalAction if kind is ... else "store_true"}
        tune.add_argument(f"--{name.replace('_', '-')}", default=None, help=text, **how)
    for name, text in _CARD.items():
        tune.add_argument(f"--{name.replace('_', '-')}", metavar="TEXT", help=f"for the card: {text}")
    tune.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="any other of TrainingArguments")
    tune.set_defaults(run=_finetune)

    predict = verbs.add_parser(
        "predict",
        help="a model's answer to each line of a file or a pipe, as JSON",
        description="Read a text from each line of standard input, JSON objects or plain text, and write the model's answer as "
        "a line of JSON, in the same order and in constant memory. Exit code 0: all answered; 3: some lines were skipped as "
        "bad, each is named on standard error; 1: it could not go on.",
    )
    predict.add_argument("model", metavar="PATH|REPO_ID", help="any that transformers' Auto classes load")
    predict.add_argument("--input", type=Path, metavar="FILE", help="default: standard input")
    predict.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    tasks = ["text-classification", "token-classification", "feature-extraction", "text-generation", "loss"]
    predict.add_argument("--task", choices=tasks, help="default: what the model was saved for")
    predict.add_argument(
        "--column", default="text", metavar="NAME", help="the field with the text; default: %(default)s"
    )
    predict.add_argument(
        "--pair-column", metavar="NAME", help="with the second one of a pair; default: text_pair, if there"
    )
    predict.add_argument("--text", action="store_true", help="lines are texts, not JSON")
    predict.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    window = "batches read ahead and sorted by length; 1 answers after each batch; default: %(default)s"
    predict.add_argument("--window", type=int, default=16, metavar="N", help=window)
    predict.add_argument("--top-k", type=int, metavar="N", help="also give the scores of so many labels, 0 for all")
    predict.add_argument(
        "--max-length", type=int, metavar="N", help="tokens to cut texts to; default: what the model takes"
    )
    predict.add_argument(
        "--max-new-tokens", type=int, default=50, metavar="N", help="of generation; default: %(default)s"
    )
    predict.add_argument("--device", help="such as cpu or cuda:1; default: cuda where there is one")
    dtypes = ["auto", *_DTYPES, *_DTYPES.values()]
    predict.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights; default: as they are saved")
    predict.add_argument("--tokenizer", metavar="PATH", help="default: the model's")
    predict.add_argument("--revision", help="branch, tag or commit of a Hub repo")
    predict.add_argument(
        "--trust-remote-code", action="store_true", help="run a model's own code that is not mymodels'"
    )
    predict.set_defaults(run=_predict)

    verify = verbs.add_parser(
        "verify", help="prove that a Hub repo folder loads and gives its recorded outputs, anywhere"
    )
    verify.add_argument("path", metavar="PATH|REPO_ID", help="a folder or Hub repo, with custom code or without")
    verify.add_argument("--revision", help="branch, tag or commit of a Hub repo")
    verify.add_argument("--no-exec", action="store_true", help="read only: none of its code runs")
    verify.add_argument(
        "--transformers", metavar="RELEASES", help="such as 4.57,5.0,latest, or all; default: the installed one"
    )
    verify.add_argument(
        "--record", action="store_true", help="first write golden.safetensors, for a folder known to be right"
    )
    verify.add_argument("--quick", action="store_true", help="leave out worker processes, parallel loading and export")
    verify.add_argument("--no-training", action="store_true", help="leave out the loss, gradients and a training step")
    verify.add_argument(
        "--allow-skipped", action="store_true", help="exit with 0 also if something had to be left out, not with 3"
    )
    verify.add_argument(
        "--write-card", action="store_true", help="if all holds, write the table of releases into the card"
    )
    verify.add_argument("--json", action="store_true", help="for programs")
    verify.set_defaults(run=_verify)

    push = verbs.add_parser(
        "push", help="push a folder to a Hub repo: privately, verified before, read again afterwards"
    )
    push.add_argument("path", type=Path, metavar="PATH")
    push.add_argument("repo_id", metavar="REPO_ID", help="user/name; made if need be")
    push.add_argument("--public", action="store_true", help="make or expect a public repo; default: a private one")
    push.add_argument("--revision", metavar="BRANCH", help="made if need be; default: main")
    push.add_argument("--create-pr", action="store_true", help="commit to a new pull request")
    push.add_argument("--dry-run", action="store_true", help="list what would be sent, and stop")
    push.add_argument("--tag", metavar="NAME", help="of the commit, such as v1")
    push.add_argument("--no-verify", action="store_true", help="skip the verification; the commit message says so")
    push.add_argument("--allow", action="append", default=[], metavar="PATTERN", help="push further kinds of files")
    push.set_defaults(run=_push)

    lock = verbs.add_parser("lock", help="record the code that was reviewed; mymodels.load(…, lock=FILE) runs no other")
    lock.add_argument("source", metavar="PATH|REPO_ID@SHA")
    lock.add_argument("--out", type=Path, default=Path("mymodels.lock"), metavar="FILE", help="default: %(default)s")
    lock.set_defaults(run=_lock)

    export = verbs.add_parser(
        "export", help="write a model as a graph that runs without mymodels, and compare it with torch"
    )
    export.add_argument(
        "path", metavar="PATH|REPO_ID", help="a folder or Hub repo that transformers' Auto classes load"
    )
    export.add_argument(
        "--to",
        required=True,
        choices=("onnx", "pt2", "aoti", "torchscript"),
        help="ONNX; torch.export; AOTInductor (needs a C++ compiler); TorchScript, which PyTorch calls legacy",
    )
    export.add_argument(
        "--out", type=Path, metavar="FOLDER", help="a new folder; default: NAME-onnx and the like, here"
    )
    export.add_argument("--int8", action="store_true", help="quantise the weights (ONNX), and say what it costs")
    export.add_argument("--texts", type=Path, metavar="FILE", help="what --int8 is measured on, a text per line")
    export.add_argument(
        "--dtype", default="float32", help="of the weights, or auto: the checkpoint's; default: %(default)s"
    )
    export.add_argument("--opset", type=int, metavar="N", help="of ONNX; default: 20")
    export.add_argument("--task", help="text-generation, text-classification, …; default: what the model is for")
    export.add_argument("--revision", help="branch, tag or commit of a Hub repo")
    export.add_argument("--trust-remote-code", action="store_true", help="run a model's own code that is not mymodels'")
    export.set_defaults(run=_export)

    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
        from .checkpoints.inspecting import printable

        lines = [printable(line) for line in str(error).split("\n")]  # names from files may steer a terminal
        print(f"mymodels {arguments.verb}: " + "\n".join(lines), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

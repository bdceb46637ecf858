"""`mymodels finetune`."""

import argparse
import re
from pathlib import Path
from typing import Any

from .options import FAILED, add_card_options, add_verb, card_fields, config_field, console
from .progress import working


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "finetune",
        run,
        "Train a model on your data and save it as a complete Hub repo folder.",
        example="mymodels finetune --model hub_repo/mybert --data sample_text --max-length 32 --max-steps 20 --out tuned",
        exit_codes={0: "the model is trained, evaluated and saved", 1: FAILED},
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH|REPO_ID", help="a model that transformers' Auto classes load"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH|DATASET",
        help="a file, a folder, a Hub data set, or sample_text, which ships with mymodels",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new or empty folder, or an older Hub repo folder"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the config"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.add_argument("--resume-from-checkpoint", type=Path, metavar="DIR", help="continue from this checkpoint")
    for name, (kind, text) in _OPTIONS.items():
        how: dict[str, Any] = {"type": kind, "metavar": _METAVARS.get(kind)}
        if kind in (None, ...):
            how = {"action": argparse.BooleanOptionalAction if kind is ... else "store_true"}
        parser.add_argument(f"--{name.replace('_', '-')}", default=None, help=text, **how)
    add_card_options(parser)
    parser.add_argument(
        "--arg", action="append", default=[], metavar="NAME=VALUE", help="any other field of TrainingArguments"
    )


_METAVARS: dict[Any, str] = {str: "TEXT", int: "N", float: "X", Path: "DIR"}
# argument of `finetune` → its type (None: a flag; Ellipsis: a flag with a --no- form) and the help of the option
_OPTIONS: dict[str, tuple[Any, str]] = {
    "task": (
        str,
        "classification (default), token-classification, question-answering, lm (causal or masked) or seq2seq",
    ),
    "to": (str, "mybert or mygpt2: train one that is warm-started from --model"),
    "tokenizer": (str, "default: the model's"),
    "revision": (str, "branch, tag or commit of the model's Hub repo"),
    "trust_remote_code": (None, "run a model's own code that is not mymodels'"),
    "validation": (str, "a file, or the fraction of rows to hold out; default: the data's validation split, or 0.1"),
    "test": (str, "a file, evaluated once at the end"),
    "text_column": (str, "column of the text; default: inferred if it is unambiguous"),
    "label_column": (str, "column of the label; default: likewise"),
    "target_column": (str, "column of the target text for --task seq2seq; default: likewise"),
    "data_config": (str, "configuration name of a Hub data set"),
    "max_length": (int, "tokens per example or block; default: the model's maximum"),
    "num_train_epochs": (float, "default: 3"),
    "max_steps": (int, "number of steps, instead of epochs"),
    "per_device_train_batch_size": (int, "default: 16"),
    "gradient_accumulation_steps": (int, "batches per step; default: 1"),
    "learning_rate": (float, "default: 5e-5, or 4e-4 with LoRA"),
    "weight_decay": (float, "default: 0.01"),
    "lr_scheduler_type": (str, "linear (default), cosine, constant_with_warmup, …"),
    "warmup_ratio": (float, "fraction of the steps with a rising learning rate; default: 0.1"),
    "warmup_steps": (int, "number of steps, instead of a fraction"),
    "class_weights": (str, "balanced, or one number per label, separated by commas"),
    "freeze_embeddings": (None, "do not train the embeddings"),
    "freeze_layers": (int, "number of layers, from the first, not to train"),
    "layer_decay": (float, "factor of the learning rate per layer below the head, such as 0.9"),
    "lora_r": (int, "rank: train LoRA adapters and the head only; the adapters are merged at the end"),
    "lora_alpha": (int, "default: twice the rank"),
    "lora_target_modules": (str, "suffixes of module names, separated by commas; default: all matrices of the layers"),
    "eval_steps": (int, "steps between evaluations with a checkpoint; default: an epoch, or a tenth of --max-steps"),
    "metric_for_best_model": (
        str,
        "accuracy, f1_macro, exact_match or loss, by the task; perplexity for lm and seq2seq",
    ),
    "early_stopping_patience": (int, "stop after this many evaluations without improvement"),
    "bf16": (..., "compute in bfloat16 or not; default: if the hardware supports it"),
    "seed": (int, "default: 42"),
    "logging_steps": (int, "steps between log lines; default: about 50 lines in all"),
    "report_to": (str, "tensorboard, …; default: none"),
    "save_total_limit": (int, "checkpoints to keep; default: 2"),
    "checkpoint_dir": (Path, "default: DIR-checkpoints"),
    "keep_checkpoints": (None, "do not delete the checkpoints at the end"),
    "max_shard_size": (str, "default: 2GB"),
}


def run(arguments: argparse.Namespace) -> int:
    from ..hub.card import Card
    from ..training.finetune import finetune

    given = {name: getattr(arguments, name) for name in _OPTIONS if getattr(arguments, name) is not None}
    if (weights := given.get("class_weights")) and weights != "balanced":
        try:
            given["class_weights"] = [float(number) for number in weights.split(",")]
        except ValueError:
            raise ValueError(
                f"--class-weights {weights!r}: write balanced, or one number per label, separated by commas"
            ) from None
    if "validation" in given and re.fullmatch(r"\d*\.?\d+", given["validation"]):
        given["validation"] = float(given["validation"])
    if "lora_target_modules" in given:
        given["lora_target_modules"] = given["lora_target_modules"].split(",")
    others = dict(config_field(text) for text in arguments.arg)
    if twice := sorted(others.keys() & _OPTIONS.keys()):
        raise ValueError(f"--arg {twice[0]}={others[twice[0]]}: use the option --{twice[0].replace('_', '-')}")
    overrides = dict(config_field(text) for text in arguments.set)
    out = console()
    with working("reading the data and the model", until=out):
        finetune(
            arguments.model,
            arguments.data,
            arguments.out,
            overrides=overrides,
            resume_from_checkpoint=arguments.resume_from_checkpoint or arguments.resume,
            card=Card(**card_fields(arguments)),
            console=out,
            **given,
            **others,
        )
    return 0

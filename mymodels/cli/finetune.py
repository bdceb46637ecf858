"""`mymodels finetune`."""

import argparse
import re
from pathlib import Path
from typing import Any

from .options import FAILED, add_card_options, add_verb, card_fields, config_field, console


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "finetune",
        run,
        "Train a model on your data and save it as a complete Hub repo folder.",
        example="mymodels finetune --model hub_repo/mybert --data sample_text --max-length 32 --max-steps 20 --out tuned",
        exit_codes={0: "trained, measured and saved", 1: FAILED},
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH|REPO_ID", help="mymodels', stock, or any with such a head"
    )
    parser.add_argument(
        "--data", required=True, metavar="PATH|DATASET", help="file, folder, Hub data set, or sample_text"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new, empty, or an older Hub repo folder"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a config field that differs")
    parser.add_argument("--resume", action="store_true", help="go on after the newest checkpoint")
    parser.add_argument("--resume-from-checkpoint", type=Path, metavar="DIR", help="go on after this one")
    for name, (kind, text) in _OPTIONS.items():
        how: dict[str, Any] = {"type": kind, "metavar": getattr(kind, "__name__", "").upper()}
        if kind in (None, ...):
            how = {"action": argparse.BooleanOptionalAction if kind is ... else "store_true"}
        parser.add_argument(f"--{name.replace('_', '-')}", default=None, help=text, **how)
    add_card_options(parser)
    parser.add_argument(
        "--arg", action="append", default=[], metavar="NAME=VALUE", help="any other of TrainingArguments"
    )


# option of `mymodels finetune`, named as in Python → type (None: a flag, Ellipsis: a flag with --no-) and help
_OPTIONS: dict[str, tuple[Any, str]] = {
    "task": (
        str,
        "classification (default); lm: the next token, or hidden ones for an encoder; seq2seq: a target per text",
    ),
    "to": (str, "warm-start a mybert or mygpt2 from --model"),
    "tokenizer": (str, "default: the model's"),
    "revision": (str, "branch, tag or commit of the model's Hub repo"),
    "trust_remote_code": (None, "run a model's own code that is not mymodels'"),
    "validation": (str, "a file, or the share of the rows to hold out; default: the data's own, or 0.1"),
    "test": (str, "a file, measured once at the end"),
    "text_column": (str, "default: guessed where there is no doubt"),
    "label_column": (str, "the same"),
    "target_column": (str, "the same, of the texts to make for --task seq2seq"),
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
    "metric_for_best_model": (str, "accuracy (default), f1_macro or loss; perplexity for lm and seq2seq"),
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


def run(arguments: argparse.Namespace) -> int:
    from ..hub.card import Card
    from ..training.finetune import finetune

    given = {name: getattr(arguments, name) for name in _OPTIONS if getattr(arguments, name) is not None}
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
    others = dict(config_field(text) for text in arguments.arg)
    if twice := sorted(others.keys() & _OPTIONS.keys()):
        raise ValueError(f"--arg {twice[0]}={others[twice[0]]}: say it once, as --{twice[0].replace('_', '-')}")
    finetune(
        arguments.model,
        arguments.data,
        arguments.out,
        overrides=dict(config_field(text) for text in arguments.set),
        resume_from_checkpoint=arguments.resume_from_checkpoint or arguments.resume,
        card=Card(**card_fields(arguments)),
        console=console(),
        **given,
        **others,
    )
    return 0

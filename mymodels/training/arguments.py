"""`TrainingArguments` for `finetune`: defaults, checks, and differences between transformers releases."""

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from ..models.compat import TRANSFORMERS_VERSION
from .datasets_io import require_module

# defaults that differ from transformers.TrainingArguments
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "weight_decay": 0.01,
    "save_total_limit": 2,
    "report_to": "none",
    "load_best_model_at_end": True,
    "restore_callback_states_from_checkpoint": True,  # the counter of early stopping
    "remove_unused_columns": False,
    "label_names": ["labels"],
}
_POSITIVE = {
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "eval_steps",
    "save_steps",
    "logging_steps",
}
# task → the metrics that can choose the weights, the default first; of other tasks only the loss is measured
METRICS = {
    "classification": ["accuracy", "f1_macro", "loss"],
    "token-classification": ["f1_macro", "accuracy", "loss"],
    "question-answering": ["exact_match", "loss"],
}
LEARNING_RATE, LORA_LEARNING_RATE = 5e-5, 4e-4  # the latter from table 9 of the LoRA paper, arXiv 2106.09685


def checked_options(task: str, given: Mapping[str, Any], lora: bool) -> dict[str, Any]:
    """The arguments for `TrainingArguments`, checked by name."""
    known = TrainingArguments.__dataclass_fields__
    own = {"output_dir", "bf16", "bf16_full_eval", "warmup_ratio", "resume_from_checkpoint", "push_to_hub"}
    if unknown := sorted(name for name in given if name not in known or name in own):
        raise ValueError(f"{', '.join(unknown)}: finetune and transformers.TrainingArguments have no such option")
    options = {**DEFAULTS, "seed": 42, "learning_rate": LORA_LEARNING_RATE if lora else LEARNING_RATE, **given}
    for name in _POSITIVE & options.keys():
        if not isinstance(options[name], Real) or not options[name] > 0:
            raise ValueError(f"{name}={options[name]!r}, but it must be a number above 0")
    possible = METRICS.get(task, ["loss", "perplexity"])
    best = str(options.setdefault("metric_for_best_model", possible[0]))
    if best.removeprefix("eval_") not in possible:
        raise ValueError(f"metric_for_best_model={best!r} is none of {', '.join(possible)}")
    if best.endswith("perplexity"):  # the minimum of both is at the same step
        options["metric_for_best_model"] = "loss"
    if task not in METRICS:
        options["prediction_loss_only"] = True
    if task == "question-answering":
        options["label_names"] = ["start_positions", "end_positions"]
    steps = int(options.get("max_steps", -1))
    if "eval_steps" in given or (steps > 0 and "eval_strategy" not in given):
        options |= {"eval_strategy": "steps", "eval_steps": given.get("eval_steps", max(1, steps // 10))}
    strategy = options.setdefault("eval_strategy", "epoch")
    options.setdefault("save_strategy", strategy)
    if options["save_strategy"] == "steps" and "eval_steps" in options:
        options.setdefault("save_steps", options["eval_steps"])
    if "load_best_model_at_end" not in given and "no" in (strategy, options["save_strategy"]):
        options["load_best_model_at_end"] = False  # no evaluations or no checkpoints to choose from
    return options


def make_arguments(
    where: Path, options: Mapping[str, Any], examples: int, warmup_ratio: float, bf16: bool
) -> TrainingArguments:
    """`TrainingArguments` under this transformers release."""
    options = dict(options)
    if "warmup_steps" not in options:  # since transformers 5.0 a ratio too; before, warmup_ratio
        options["warmup_steps" if TRANSFORMERS_VERSION >= (5, 0) else "warmup_ratio"] = warmup_ratio
    if "logging_steps" not in options and "logging_strategy" not in options:  # about 50 points of the loss curve
        batch = options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1)
        total = math.ceil(options["num_train_epochs"] * math.ceil(examples / (batch * PartialState().num_processes)))
        steps = int(options.get("max_steps", -1))
        options["logging_steps"] = max(1, (steps if steps > 0 else total) // 50)
    if "tensorboard" in str(options["report_to"]):
        require_module("tensorboard", "tensorboard")
    if bf16 and not torch.accelerator.is_available():
        options.setdefault("use_cpu", True)  # otherwise TrainingArguments rejects bf16
    options.setdefault("dataloader_pin_memory", torch.accelerator.is_available())
    try:
        return TrainingArguments(output_dir=str(where), bf16=bf16, **options)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"transformers.TrainingArguments rejects this: {' '.join(str(error).split())}") from error


def bf16_is_faster() -> bool:
    """Whether the accelerator, or else the CPU (AVX-512 BF16 or AMX), supports bfloat16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.xpu.is_bf16_supported()
    if torch.backends.mps.is_available():
        return False
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))

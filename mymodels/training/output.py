"""The result of a fine-tuning: evaluate it, and write it as a Hub repo folder with plots and model card."""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from ..checkpoints.atomic_write import replace_file
from ..checkpoints.writing import save_model_files, save_tokenizer_files
from ..hub import build_repo
from ..hub.card import Card
from ..hub.own_classes import code_of
from ..released import is_installed
from .arguments import METRICS as MEASURED
from .checkpoint_dirs import list_checkpoints
from .data import Data
from .load_base import LoadedBase
from .plots import draw_confusion_matrix, draw_loss_curve
from .run_record import METRICS
from .training_state import trial_save
from .tuner import is_metric


@dataclass
class FineTuned:
    """The result of `finetune`.

    Attributes:
        path: the Hub repo folder.
        model, tokenizer: its model and tokenizer.
        metrics: `"validation"`, and `"test"` if there is a test split → metric → value.
        history: the Trainer's log: losses, learning rates and metrics by step.
        best_step: the step of the weights; None for those of the last step.
        data: the splits of the data.
        logits: a classifier's logits of the validation texts, `[texts, labels]`.
        confusion_matrix: `[true, predicted]` counts on the validation texts.
        checkpoint_dir: the folder with the other files of the training.
    """

    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    metrics: dict[str, dict[str, float]]
    history: list[dict[str, Any]]
    best_step: int | None
    data: Data
    checkpoint_dir: Path
    logits: np.ndarray | None = None
    confusion_matrix: np.ndarray | None = None


def evaluate_splits(
    trainer: Trainer, examples: Mapping[str, Any], task: str
) -> tuple[dict[str, dict[str, float]], np.ndarray | None]:
    """Metrics on validation and test data, and a classifier's validation logits."""
    found: dict[str, dict[str, float]] = {}
    logits = None
    for split in ("validation", "test"):
        if split not in examples:
            continue
        predicted = trainer.predict(examples[split], metric_key_prefix="test")
        values: Mapping[str, float] = predicted.metrics or {}
        if split == "validation" and task == "classification":
            logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
        metrics = {name.removeprefix("test_"): float(value) for name, value in values.items() if is_metric(name)}
        if task not in MEASURED:
            metrics["perplexity"] = math.exp(metrics["loss"]) if metrics["loss"] < 700 else math.inf
        found[split] = metrics
    return found, logits


def best_step(trainer: Trainer) -> int | None:
    """The step of the best weights, if the Trainer loaded them at the end; else None."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return int(best.rsplit("-", 1)[-1]) if best else None


def write_repo(
    result: FineTuned, base: LoadedBase, card: Card, task: str, *, max_shard_size: int | str, golden: bool
) -> None:
    """Write the Hub repo folder from a temporary folder with model, tokenizer and plots."""
    for left in result.checkpoint_dir.glob(".finished-????????"):  # of a run that was killed here
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=result.checkpoint_dir, prefix=".finished-") as staging:
        _write_repo(result, base, card, task, Path(staging), max_shard_size, golden)


def try_to_write_repo(model: PreTrainedModel, where: Path, *, golden: bool) -> None:
    """Save a model and build its repo in a scratch folder, so that errors are raised before the training.

    Golden outputs are recorded for custom code, because only running it in another process shows that it works there.

    Raises:
        ValueError: the model cannot be saved, its repo cannot be built, or its code does not run in another process.
    """
    known = is_installed(type(model)) or type(model).__module__.startswith("transformers.")
    with trial_save(model, where) as scratch:
        if not known:
            code_of(model.config, model)
        save_model_files(model, scratch / "saved", "2GB")
        build_repo(scratch / "saved", None, scratch / "built", card="# Trial", golden=golden and not known)


def _write_repo(
    result: FineTuned, base: LoadedBase, card: Card, task: str, finished: Path, max_shard_size: int | str, golden: bool
) -> None:
    save_model_files(result.model, finished, max_shard_size)
    save_tokenizer_files(result.tokenizer, finished)
    pictures = {"loss_curve.png": "Loss on the training and the validation data"}
    draw_loss_curve(result.history, finished / "loss_curve.png", result.best_step)
    if result.confusion_matrix is not None and result.data.labels is not None:
        pictures["confusion_matrix.png"] = "Confusion matrix on the validation data"
        draw_confusion_matrix(result.confusion_matrix, result.data.labels, finished / "confusion_matrix.png")
    full_card = _card(result, base, card, task, pictures)
    build_repo(finished, None, result.path, card=full_card, max_shard_size=max_shard_size, golden=golden)


def _card(result: FineTuned, base: LoadedBase, card: Card, task: str, pictures: Mapping[str, str]) -> Card:
    """The user's card, with missing fields filled in from the training."""
    data, empty = result.data, Card()
    split = "test" if "test" in result.metrics else "validation"
    names = {"f1_macro": "f1 (macro)", "loss": "loss" if task in MEASURED else "loss (nats per token)"}
    last = sorted(result.metrics[split].items(), key=lambda item: item[0] == "loss")  # the loss last
    measured = {names.get(name, name): value for name, value in last}
    chosen = (
        f", which also chose the weights (step {result.best_step})"
        if result.best_step and split == "validation"
        else ""
    )
    rows = getattr(data, split)
    known: dict[str, Any] = {
        "metrics": measured,
        "dataset": f"{len(rows):,} {split} rows of {data.name}{chosen}",
        "training_data": f"{len(data.train):,} rows of {data.name}"
        + (f", with the labels {', '.join(data.labels)}." if data.labels and len(data.labels) <= 30 else "."),
        "base_model": base.hub_id,
        "datasets": [data.hub_id] if data.hub_id else [],
        "pictures": pictures,
    }
    return replace(
        card, **{name: value for name, value in known.items() if getattr(card, name) == getattr(empty, name)}
    )


def finish_run(result: FineTuned, keep_checkpoints: bool) -> None:
    """Write `metrics.json`, which marks the training as finished, and remove the checkpoints."""
    record = {name: getattr(result, name) for name in ("metrics", "history", "best_step")}
    record["labels"] = result.data.labels
    record["confusion_matrix"] = None if result.confusion_matrix is None else result.confusion_matrix.tolist()
    with replace_file(result.checkpoint_dir / METRICS) as file:
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not keep_checkpoints:
        for old in list_checkpoints(result.checkpoint_dir):
            shutil.rmtree(old)

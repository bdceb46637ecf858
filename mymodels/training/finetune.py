"""`finetune`: a model and your data to a complete Hub repo folder, on transformers' `Trainer`."""

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..checkpoints.writing import save_model_files, save_tokenizer_files
from ..hub import build_repo
from ..hub.build import check_output_dir
from ..hub.card import Card
from ..models.layers import TRANSFORMERS_VERSION
from .data import Data, load_data, need
from .encoding import choose_collator, encode_blocks, encode_classification, longest_input
from .parameters import add_lora, decayed_groups, freeze
from .results import (
    class_table,
    classification_metrics,
    confusion_matrix,
    draw_confusion_matrix,
    draw_loss_curve,
    metric_table,
)
from .starting import Start, known_labels, start

RECORD, METRICS = "finetune.json", "metrics.json"
# where they differ from transformers.TrainingArguments
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "weight_decay": 0.01,
    "save_total_limit": 2,
    "report_to": "none",
    "load_best_model_at_end": True,
    "remove_unused_columns": False,
    "label_names": ["labels"],
}
LEARNING_RATE, LORA_LEARNING_RATE = 5e-5, 4e-4  # the second: of the LoRA paper's table 9, arXiv 2106.09685


@dataclass
class FineTuned:
    """What `finetune` made.

    Attributes:
        path: the Hub repo folder.
        model, tokenizer: what is in it.
        metrics: `"validation"`, and `"test"` if there is a test split → metric → value.
        history: the Trainer's log: losses, learning rates and metrics by step.
        data: texts and labels as they were split.
        logits: of a classifier, for the validation texts in their order, `[texts, labels]`.
        confusion_matrix: `[true, predicted]` counts on the validation texts.
        checkpoint_dir: what else the training left.
    """

    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    metrics: dict[str, dict[str, float]]
    history: list[dict[str, Any]]
    data: Data
    checkpoint_dir: Path
    logits: np.ndarray | None = None
    confusion_matrix: np.ndarray | None = None


def finetune(
    model: PreTrainedModel | str | os.PathLike,
    data: Any,
    output_dir: str | os.PathLike,
    *,
    task: str = "classification",
    to: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    validation: str | os.PathLike | float | None = None,
    test: str | os.PathLike | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    data_config: str | None = None,
    max_length: int | None = None,
    class_weights: str | Sequence[float] | None = None,
    freeze_embeddings: bool = False,
    freeze_layers: int = 0,
    layer_decay: float | None = None,
    lora_r: int | None = None,
    lora_alpha: int | None = None,
    lora_target_modules: Sequence[str] | None = None,
    warmup_ratio: float = 0.1,
    early_stopping_patience: int | None = None,
    bf16: bool | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    keep_checkpoints: bool = False,
    resume_from_checkpoint: bool | str | os.PathLike = False,
    card: Card | None = None,
    max_shard_size: int | str = "2GB",
    console: Console | None = None,
    **training_arguments: Any,
) -> FineTuned:
    """Fine-tune a model on your data with transformers' `Trainer`, and write it as a Hub repo folder.

    The weights that are kept are the best by `metric_for_best_model` on the validation data, which are measured after
    each epoch, or with `max_steps` ten times on the way. While it trains, checkpoints lie in `checkpoint_dir`; they are
    removed when the folder is complete, and `metrics.json`, TensorBoard logs and LoRA's `adapter/` stay there.

    Args:
        model: a folder or Hub id of a mymodels or any other model, or a model in memory (then with `tokenizer`).
        data, validation, test, text_column, label_column, data_config: see `mymodels.training.data.load_data`.
        output_dir: the new folder; an older Hub repo folder there is replaced.
        task: `"classification"`, or `"lm"`: the next token for a decoder, hidden ones for an encoder.
        to, overrides: warm-start a `"mybert"` or `"mygpt2"` with these config fields from `model`; see `warm_start`.
        tokenizer: default: the model's.
        max_length: tokens of the longest example, the rest of it is cut; for `"lm"` of every block. Default: what the
            model takes, for `"lm"` at most 1024.
        class_weights: `"balanced"` (`examples / (classes * examples of the class)` in the training data), or one per
            label: weights in the loss. MyBert keeps them in its config.
        freeze_embeddings, freeze_layers: leave the embeddings and the first so many layers as they are.
        layer_decay: learning rates fall by this factor from layer to layer, down from the head.
        lora_r, lora_alpha, lora_target_modules: train adapters of this rank and the head only, see
            `mymodels.training.parameters.add_lora`; they are added into the weights at the end.
        warmup_ratio: of the steps, until the learning rate is reached; `warmup_steps` goes before it.
        early_stopping_patience: stop after so many evaluations without a better one.
        bf16: default: if this machine computes in bfloat16 by hardware. The weights stay float32.
        checkpoint_dir: default: `output_dir` with `-checkpoints` behind its name.
        keep_checkpoints: leave them there.
        resume_from_checkpoint: true: go on after the newest checkpoint in `checkpoint_dir`, from the start if there is
            none; or the path of one.
        card: what the model card should say; what is left out is filled in from the training.
        training_arguments: any of `transformers.TrainingArguments`, by their names. Defaults that are not the library's:
            `DEFAULTS`; `learning_rate` 5e-5, with LoRA 4e-4.

    Returns:
        a `FineTuned`.

    Raises:
        ValueError: data, model and options do not go together; the sentence says what to change. Nothing was trained.
        FileExistsError: `output_dir` or `checkpoint_dir` holds something that would be lost.

    Example:
        >>> tuned = finetune("bert-base-uncased", "reviews.csv", "my-bert", to="mybert", overrides={"pooling": "mean"})
        >>> tuned.metrics["validation"]["accuracy"]
    """
    if task not in ("classification", "lm"):
        raise ValueError(f"task={task!r} is none of 'classification', 'lm'")
    need("datasets", "finetune"), need("sklearn", "finetune"), need("matplotlib", "finetune")
    output_dir = check_output_dir(output_dir)
    where = Path(checkpoint_dir or f"{str(output_dir).rstrip('/')}-checkpoints")
    is_main = PartialState().is_main_process
    console = console or Console(quiet=not is_main)
    lora = lora_r is not None
    if lora and (freeze_embeddings or freeze_layers):
        raise ValueError("LoRA trains nothing but adapters and the head: leave out what freezes layers or embeddings")
    options = _options(task, training_arguments, lora)
    seed = options["seed"]

    if task == "classification":
        known = known_labels(model, revision)
    loaded = load_data(
        data,
        task=task,
        validation=validation,
        test=test,
        text_column=text_column,
        label_column=label_column,
        data_config=data_config,
        known_labels=known if task == "classification" else (),
        seed=seed,
    )
    set_seed(seed)
    begun = start(
        model,
        task,
        labels=loaded.labels,
        to=to,
        overrides=overrides,
        tokenizer=tokenizer,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    length = longest_input(begun.model, begun.tokenizer, max_length)
    weights = _class_weights(class_weights, loaded)
    loss = _apply_class_weights(begun.model, weights)
    if freeze_embeddings or freeze_layers:
        freeze(begun.model, embeddings=freeze_embeddings, layers=freeze_layers)
    record = {
        "task": task,
        "model": str(model) if not isinstance(model, PreTrainedModel) else type(model).__name__,
        "to": to,
        "overrides": dict(overrides or {}),
        "data": _fingerprint(loaded),
        "labels": loaded.labels,
        "max_length": length,
        "class_weights": weights,
        "freeze": [freeze_embeddings, freeze_layers],
        "layer_decay": layer_decay,
        "lora": [lora_r, lora_alpha, list(lora_target_modules or [])] if lora else None,
        "training_arguments": {name: value for name, value in sorted(options.items()) if name not in _MAY_CHANGE},
    }
    checkpoint = _checkpoint(where, output_dir, record, resume_from_checkpoint)

    if task == "classification":
        examples = encode_classification(loaded, begun.tokenizer, length)
    else:
        examples = encode_blocks(loaded, begun.tokenizer, length, masked=begun.kind == "masked", seed=seed)
    trained: Any = begun.model
    if lora_r is not None:
        trained = add_lora(begun.model, r=lora_r, alpha=lora_alpha, target_modules=lora_target_modules, new=begun.new)
    arguments = _arguments(
        where, options, len(examples["train"]), warmup_ratio, bf16_is_faster() if bf16 is None else bf16
    )
    _tell(console, begun, loaded, examples, trained, arguments, checkpoint)
    trainer = _FineTuner(
        model=trained,
        args=arguments,
        data_collator=choose_collator(begun.kind, begun.tokenizer),
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        processing_class=begun.tokenizer,
        compute_metrics=_metrics if task == "classification" else None,
        compute_loss_func=loss,
        callbacks=[] if early_stopping_patience is None else [EarlyStoppingCallback(early_stopping_patience)],
    )
    trainer.layer_decay = layer_decay
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Progress)
    if is_main:
        where.mkdir(parents=True, exist_ok=True)
        (where / METRICS).unlink(missing_ok=True)
        (where / RECORD).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    trainer.train(resume_from_checkpoint=checkpoint)

    metrics, logits = _measure(trainer, examples, task)
    history = trainer.state.log_history
    best = trainer.state.best_model_checkpoint
    matrix = None if logits is None else confusion_matrix(logits, np.asarray(loaded.validation["label"]))
    final: Any = begun.model
    if lora:
        if is_main:
            trained.save_pretrained(where / "adapter")
        final = trained.merge_and_unload()
    final.eval()
    result = FineTuned(
        output_dir, final, begun.tokenizer, metrics, history, loaded, where, logits=logits, confusion_matrix=matrix
    )
    if is_main:
        best_step = int(best.rsplit("-", 1)[-1]) if best else None
        _build(result, begun, card or Card(), task, best_step, max_shard_size)
        told = {"metrics": metrics, "history": history, "best_step": best_step, "labels": loaded.labels}
        told["confusion_matrix"] = None if matrix is None else matrix.tolist()
        (where / METRICS).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if not keep_checkpoints:
            for old in where.glob("checkpoint-*"):
                shutil.rmtree(old)
        if matrix is not None and loaded.labels is not None:
            console.print(class_table(matrix, loaded.labels, "on the validation data"))
        console.print(metric_table(metrics))
        console.print(f"{output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir()))}", highlight=False)
    PartialState().wait_for_everyone()
    return result


_MAY_CHANGE = {"report_to", "disable_tqdm", "logging_steps", "save_total_limit", "dataloader_num_workers"}  # to resume


def bf16_is_faster() -> bool:
    """Whether this machine computes in bfloat16 by hardware: the accelerator, or the CPU (AVX-512 BF16 or AMX)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.xpu.is_bf16_supported()
    if torch.backends.mps.is_available():
        return False
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


class _FineTuner(Trainer):
    """The Trainer, with learning rates by layer."""

    layer_decay: float | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.layer_decay is not None and self.optimizer is None:
            assert isinstance(self.model, torch.nn.Module)
            optimizer_class, how = self.get_optimizer_cls_and_kwargs(self.args)
            groups = decayed_groups(
                self.model,
                self.get_decay_parameter_names(self.model),
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                layer_decay=self.layer_decay,
            )
            self.optimizer = optimizer_class(groups, **how)
        return super().create_optimizer(*args, **kwargs)


class _Progress(ProgressCallback):
    """The Trainer's bar, with the loss in it and a line for each evaluation, instead of a dict for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}", refresh=False)
        if "eval_loss" in logs:
            shown = {name.removeprefix("eval_"): logs[name] for name in logs if _is_metric(name)}
            told = ", ".join(f"{name} {float(value):.4f}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}: validation {told}")


def _is_metric(name: str) -> bool:
    skipped = ("_runtime", "_per_second", "_time", "_step", "_steps", "_samples", "_memory")
    return name.startswith(("eval_", "test_")) and not name.endswith(skipped)


def _metrics(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return classification_metrics(logits, prediction.label_ids)


def _options(task: str, given: Mapping[str, Any], lora: bool) -> dict[str, Any]:
    """The arguments for `TrainingArguments`, checked by name."""
    known = TrainingArguments.__dataclass_fields__
    own = {"output_dir", "bf16", "bf16_full_eval", "warmup_ratio", "resume_from_checkpoint", "push_to_hub"}
    if unknown := sorted(name for name in given if name not in known or name in own):
        raise ValueError(f"{', '.join(unknown)}: finetune and transformers.TrainingArguments have no such option")
    options = {**DEFAULTS, "seed": 42, "learning_rate": LORA_LEARNING_RATE if lora else LEARNING_RATE, **given}
    best = str(options.setdefault("metric_for_best_model", "accuracy" if task == "classification" else "loss"))
    possible = ["accuracy", "f1_macro", "loss"] if task == "classification" else ["loss", "perplexity"]
    if best.removeprefix("eval_") not in possible:
        raise ValueError(f"metric_for_best_model={best!r} is none of {', '.join(possible)}")
    if best.endswith("perplexity"):  # what has the least loss has the least of it
        options["metric_for_best_model"] = "loss"
    if task == "lm":
        options["prediction_loss_only"] = True
    steps = int(options.get("max_steps", -1))
    if "eval_steps" in given or (steps > 0 and "eval_strategy" not in given):
        options |= {"eval_strategy": "steps", "eval_steps": given.get("eval_steps", max(1, steps // 10))}
    strategy = options.setdefault("eval_strategy", "epoch")
    options.setdefault("save_strategy", strategy)
    if options["save_strategy"] == "steps" and "eval_steps" in options:
        options.setdefault("save_steps", options["eval_steps"])
    return options


def _arguments(
    where: Path, options: Mapping[str, Any], examples: int, warmup_ratio: float, bf16: bool
) -> TrainingArguments:
    """`TrainingArguments` under this transformers release."""
    options = dict(options)
    if "warmup_steps" not in options:  # a share of the steps since 5.0 too; before, an option of its own
        options["warmup_steps" if TRANSFORMERS_VERSION >= (5, 0) else "warmup_ratio"] = warmup_ratio
    if "logging_steps" not in options and "logging_strategy" not in options:  # some 50 points for the picture
        batch = options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1)
        total = math.ceil(options["num_train_epochs"] * math.ceil(examples / (batch * PartialState().num_processes)))
        steps = int(options.get("max_steps", -1))
        options["logging_steps"] = max(1, (steps if steps > 0 else total) // 50)
    if "tensorboard" in str(options["report_to"]):
        need("tensorboard", "tensorboard")
    if bf16 and not torch.accelerator.is_available():
        options.setdefault("use_cpu", True)  # else TrainingArguments takes bfloat16 for a mistake
    return TrainingArguments(output_dir=str(where), bf16=bf16, **options)


def _class_weights(given: str | Sequence[float] | None, data: Data) -> list[float] | None:
    if given is None:
        return None
    if data.labels is None:
        raise ValueError("class_weights are for classification")
    if given == "balanced":
        counts = Counter(data.train["label"])
        return [len(data.train) / (len(data.labels) * max(counts[i], 1)) for i in range(len(data.labels))]
    if isinstance(given, str) or len(given) != len(data.labels) or min(given) <= 0:
        raise ValueError(
            f"class_weights={given!r}: say 'balanced', or one positive number for each of {len(data.labels)} labels"
        )
    return [float(weight) for weight in given]


def _apply_class_weights(model: PreTrainedModel, weights: list[float] | None) -> Callable | None:
    """MyBert's config has a field for them; for other models, the loss function for the Trainer."""
    if weights is None:
        return None
    if hasattr(model.config, "class_weights"):
        model.config.class_weights = weights
        return None

    def weighted_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"].float()
        losses = torch.nn.functional.cross_entropy(
            logits, labels.view(-1), weight=logits.new_tensor(weights), reduction="none"
        )
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch

    return weighted_loss


def _fingerprint(data: Data) -> str:
    """Of the texts and labels that are trained on, in their order."""
    digest = hashlib.sha256()
    for rows in (data.train, data.validation):
        for column in rows.column_names:
            for value in rows[column]:
                digest.update(f"{value}\0".encode())
    return digest.hexdigest()


def _checkpoint(
    where: Path, output_dir: Path, record: Mapping[str, Any], resume: bool | str | os.PathLike
) -> str | None:
    """The checkpoint to go on from.

    Raises:
        FileExistsError: there are some, and resuming was not asked for.
        ValueError: they are of another training, or the training is finished.
    """
    there = sorted(where.glob("checkpoint-*"), key=lambda path: int("0" + path.name.rsplit("-", 1)[-1]))
    if resume is False or resume is None:
        if there:
            raise FileExistsError(
                f"{where} holds checkpoints of an earlier training, the newest is {there[-1].name}: go on with --resume, or "
                "remove the folder, or choose another --checkpoint-dir"
            )
        return None
    if resume is not True:
        if not Path(resume, "trainer_state.json").is_file():
            raise ValueError(f"{resume} is no checkpoint of a training: name a folder checkpoint-N")
        return str(resume)
    if (where / RECORD).is_file():
        before = json.loads((where / RECORD).read_text(encoding="utf-8"))
        now = json.loads(json.dumps(record, default=str))
        if differ := [name for name in now if before.get(name) != now[name]]:
            raise ValueError(
                f"{where} is of another training, {', '.join(differ)} differ{'s' * (len(differ) == 1)}: use the same "
                "options to resume, or leave out --resume and choose another --checkpoint-dir"
            )
    if (where / METRICS).is_file():
        raise ValueError(
            f"the training in {where} is finished, {output_dir} is its result: leave out --resume to train anew"
        )
    return str(there[-1]) if there else None


def _tell(
    console: Console,
    begun: Start,
    data: Data,
    examples: Mapping[str, Any],
    trained: Any,
    arguments: TrainingArguments,
    checkpoint: str | None,
) -> None:
    """What is about to happen."""
    console.print(begun.how, highlight=False)
    for note in data.notes:
        console.print(f"note: {note}", highlight=False)
    count = sum(parameter.numel() for parameter in trained.parameters())
    learning = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    kind = "texts" if data.labels else "blocks"
    sizes = ", ".join(
        f"{len(rows):,} {kind} to {'train on' if split == 'train' else split}" for split, rows in examples.items()
    )
    labels = f", {len(data.labels)} labels" if data.labels else ""
    console.print(
        f"{data.name}: {sizes}{labels}; {learning / 1e6:.2f} of {count / 1e6:.2f} million parameters are trained"
        f"{', in bfloat16 by hardware' if arguments.bf16 else ''}",
        highlight=False,
    )
    if checkpoint:
        console.print(f"going on from {checkpoint}", highlight=False)


def _measure(
    trainer: Trainer, examples: Mapping[str, Any], task: str
) -> tuple[dict[str, dict[str, float]], np.ndarray | None]:
    """Metrics on validation and test data, and a classifier's validation logits."""
    found: dict[str, dict[str, float]] = {}
    logits = None
    for split in ("validation", "test"):
        if split not in examples:
            continue
        if task == "classification":
            predicted = trainer.predict(examples[split], metric_key_prefix="test")
            values: Mapping[str, float] = predicted.metrics or {}
            if split == "validation":
                logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
        else:
            values = trainer.evaluate(examples[split], metric_key_prefix="test")
        metrics = {name.removeprefix("test_"): float(value) for name, value in values.items() if _is_metric(name)}
        if task == "lm":
            metrics["perplexity"] = math.exp(metrics["loss"]) if metrics["loss"] < 700 else math.inf
        found[split] = metrics
    return found, logits


def _build(
    result: FineTuned, begun: Start, card: Card, task: str, best_step: int | None, max_shard_size: int | str
) -> None:
    """The Hub repo folder, from a folder with model, tokenizer and pictures."""
    finished = result.checkpoint_dir / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir(parents=True)
    save_model_files(result.model, finished, max_shard_size)
    save_tokenizer_files(result.tokenizer, finished)
    pictures = {"loss_curve.png": "Loss on the training and the validation data"}
    draw_loss_curve(result.history, finished / "loss_curve.png", best_step)
    if result.confusion_matrix is not None and result.data.labels is not None:
        pictures["confusion_matrix.png"] = "Confusion matrix on the validation data"
        draw_confusion_matrix(result.confusion_matrix, result.data.labels, finished / "confusion_matrix.png")
    build_repo(
        finished,
        None,
        result.path,
        card=_card(result, begun, card, task, best_step, pictures),
        max_shard_size=max_shard_size,
    )
    shutil.rmtree(finished)


def _card(
    result: FineTuned, begun: Start, card: Card, task: str, best_step: int | None, pictures: Mapping[str, str]
) -> Card:
    """The user's card, with what the training knows where it says nothing."""
    data, empty = result.data, Card()
    split = "test" if "test" in result.metrics else "validation"
    names = {"f1_macro": "f1 (macro)", "loss": "loss (nats per token)" if task == "lm" else "loss"}
    measured = {names.get(name, name): value for name, value in result.metrics[split].items()}
    chosen = f", which also chose the weights (step {best_step})" if best_step and split == "validation" else ""
    rows = getattr(data, split)
    told: dict[str, Any] = {
        "metrics": measured,
        "dataset": f"{len(rows):,} {split} rows of {data.name}{chosen}",
        "training_data": f"{len(data.train):,} rows of {data.name}"
        + (f", with the labels {', '.join(data.labels)}." if data.labels and len(data.labels) <= 30 else "."),
        "base_model": begun.hub_id,
        "datasets": [data.hub_id] if data.hub_id else [],
        "pictures": pictures,
    }
    return replace(card, **{name: value for name, value in told.items() if getattr(card, name) == getattr(empty, name)})

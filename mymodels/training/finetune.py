"""`finetune`: train a model on your data with transformers' `Trainer`, and write a complete Hub repo folder."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from rich.console import Console
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)

from ..forward_calls import fitting_collator, is_known, uniform_outputs
from ..hub.build import check_output_dir
from ..hub.card import Card
from ..tables import print_table
from .arguments import bf16_is_faster, checked_options, make_arguments
from .checkpoint_dirs import list_checkpoints
from .data import Data, load_data
from .datasets_io import require_module
from .generated import measure_texts
from .load_base import KINDS, LABELLED, LoadedBase, check_task, known_labels, load_base
from .output import FineTuned, best_step, evaluate_splits, finish_run, try_to_write_repo, write_repo
from .parameters import add_lora, freeze
from .plots import class_table, confusion_matrix, metric_table
from .preprocessing import choose_collator, encode_blocks, encode_classification, encode_pairs, longest_input
from .run_record import ADAPTER, MAY_CHANGE, checkpoint_to_resume, hash_data, hash_vocabulary, write_run_record
from .training_state import check_code_of_checkpoint
from .tuner import FineTuner, Progress, apply_class_weights, class_weights_of, compute_metrics
from .words_and_answers import answer_metrics, encode_answers, encode_words, word_metrics

MEASURES = {
    "classification": compute_metrics,
    "token-classification": word_metrics,
    "question-answering": answer_metrics,
}


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
    target_column: str | None = None,
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
    golden: bool = True,
    console: Console | None = None,
    **training_arguments: Any,
) -> FineTuned:
    """Fine-tune a model on your data with transformers' `Trainer`, and write it as a Hub repo folder.

    The result has the best weights by `metric_for_best_model` on the validation data, which are evaluated after each
    epoch, or with `max_steps` ten times. Checkpoints are written to `checkpoint_dir` and removed when the folder is
    complete; `metrics.json`, TensorBoard logs and LoRA's `adapter/` stay there.

    Args:
        model: a folder or Hub id of a mymodels or any other model, or a model in memory (then with `tokenizer`).
        data, validation, test, text_column, label_column, target_column, data_config: see `mymodels.training.data.load_data`.
        output_dir: the new folder; an older Hub repo folder there is replaced.
        task: `"classification"`; `"token-classification"`: a label for each word; `"question-answering"`: an answer in a
            context; `"lm"`: next tokens for a decoder, masked tokens for an encoder; or `"seq2seq"`: the
            target text for an encoder-decoder.
        to, overrides: warm-start a `"mybert"` or `"mygpt2"` with these config fields from `model`; see `warm_start`.
        tokenizer: default: the model's.
        max_length: longer examples are truncated to this many tokens; for `"lm"` the length of every block. Default: the
            model's maximum, for `"lm"` at most 1024.
        class_weights: weights in the loss: `"balanced"` (`examples / (classes * examples of the class)` in the training
            data), or one per label. MyBert stores them in its config.
        freeze_embeddings, freeze_layers: freeze the embeddings, and this many layers from the first.
        layer_decay: the factor of the learning rates from one layer to the next, downwards from the head.
        lora_r, lora_alpha, lora_target_modules: train adapters of this rank and the head only, see
            `mymodels.training.parameters.add_lora`; they are merged into the weights at the end.
        warmup_ratio: share of the steps in which the learning rate rises; `warmup_steps` takes precedence.
        early_stopping_patience: stop after this many evaluations without an improvement.
        bf16: default: whether the hardware supports bfloat16. The weights stay float32.
        checkpoint_dir: default: `output_dir` with the suffix `-checkpoints`.
        keep_checkpoints: do not remove the checkpoints.
        resume_from_checkpoint: true: resume from the newest checkpoint in `checkpoint_dir`, or start if there is none;
            or the path of a checkpoint.
        max_shard_size, golden: see `build_repo`.
        card: content of the model card; missing fields are filled in from the training.
        training_arguments: any arguments of `transformers.TrainingArguments`. Defaults that differ from the library's:
            `DEFAULTS` in `arguments.py`; `learning_rate` 5e-5, with LoRA 4e-4.

    Returns:
        A `FineTuned`.

    Raises:
        ValueError: data, model and options do not fit together; the message says what to change. Nothing was trained.
        FileExistsError: `output_dir` or `checkpoint_dir` holds files that would be lost.

    Examples:
        >>> tuned = finetune("bert-base-uncased", "reviews.csv", "my-bert", to="mybert", overrides={"pooling": "mean"})
        >>> tuned.metrics["validation"]["accuracy"]
    """
    if task not in KINDS:
        raise ValueError(f"task={task!r} is none of {', '.join(map(repr, KINDS))}")
    for module in ("datasets", "sklearn", "matplotlib"):
        require_module(module, "finetune")
    output_dir = check_output_dir(output_dir)
    where = Path(checkpoint_dir or f"{str(output_dir).rstrip('/')}-checkpoints")
    console = console or Console(quiet=not PartialState().is_main_process)
    if lora_r is not None and (freeze_embeddings or freeze_layers):
        raise ValueError("LoRA trains only adapters and the head: leave out freeze_layers and freeze_embeddings")
    options = checked_options(task, training_arguments, lora=lora_r is not None)
    if early_stopping_patience is not None and options["eval_strategy"] == "no":
        raise ValueError("early stopping needs evaluations: leave out eval_strategy='no'")
    seed = options["seed"]

    loaded = load_data(
        data,
        task=task,
        validation=validation,
        test=test,
        text_column=text_column,
        label_column=label_column,
        target_column=target_column,
        data_config=data_config,
        known_labels=known_labels(model, revision) if task in LABELLED else (),
        seed=seed,
    )
    set_seed(seed)
    base = load_base(
        model,
        task,
        labels=loaded.labels,
        to=to,
        overrides=overrides,
        tokenizer=tokenizer,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    length = longest_input(base.model, base.tokenizer, max_length)
    weights = class_weights_of(class_weights, loaded, task)
    loss_function = apply_class_weights(base.model, weights)
    if freeze_embeddings or freeze_layers:
        freeze(base.model, embeddings=freeze_embeddings, layers=freeze_layers)
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay} is not between 0 and 1")
    bf16 = bf16_is_faster() if bf16 is None else bf16
    record = {
        "task": task,
        "model": type(model).__name__ if isinstance(model, PreTrainedModel) else str(model),
        "to": to,
        "overrides": dict(overrides or {}),
        "data": hash_data(loaded),
        "labels": loaded.labels,
        "max_length": length,
        "class_weights": weights,
        "freeze": [freeze_embeddings, freeze_layers],
        "layer_decay": layer_decay,
        "lora": [lora_r, lora_alpha, list(lora_target_modules or [])],
        "warmup_ratio": warmup_ratio,
        "bf16": bf16,
        "tokenizer": hash_vocabulary(base.tokenizer),
        "revision": revision,
        **{name: value for name, value in options.items() if name not in MAY_CHANGE},
    }
    checkpoint = checkpoint_to_resume(where, output_dir, record, resume_from_checkpoint)
    known = is_known(base.model)
    if (isinstance(model, PreTrainedModel) or not known) and PartialState().is_main_process:
        try_to_write_repo(base.model, where, golden=golden)
    if checkpoint:
        check_code_of_checkpoint(base.model, Path(checkpoint))

    if task == "token-classification":
        examples = encode_words(loaded, base.tokenizer, length)
    elif task == "question-answering":
        examples = encode_answers(loaded, base.tokenizer, length)
    elif task == "classification":
        examples = encode_classification(loaded, base.tokenizer, length)
    elif task == "seq2seq":
        examples = encode_pairs(loaded, base.tokenizer, length)
    else:
        examples = encode_blocks(loaded, base.tokenizer, length, masked=base.kind == "masked", seed=seed)
    collator = choose_collator(base.kind, base.tokenizer, base.model)
    if not known:
        collator = fitting_collator(base.model, collator)
        check_task(base, loaded, collator([examples["train"][i] for i in range(min(2, len(examples["train"])))]))
    trained: Any = base.model
    use_cache = getattr(base.model.config, "use_cache", None)
    if lora_r is not None:
        trained = add_lora(base.model, r=lora_r, alpha=lora_alpha, target_modules=lora_target_modules, new=base.new)
    arguments = make_arguments(where, options, len(examples["train"]), warmup_ratio, bf16)
    _print_plan(console, base, loaded, examples, trained, arguments, checkpoint)
    trainer = FineTuner(
        model=trained,
        args=arguments,
        data_collator=collator,
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        processing_class=base.tokenizer,
        compute_metrics=MEASURES.get(task),
        compute_loss_func=loss_function,
        callbacks=[] if early_stopping_patience is None else [EarlyStoppingCallback(early_stopping_patience)],
    )
    trainer.layer_decay = layer_decay
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress)
    if trainer.is_world_process_zero():
        write_run_record(where, record)
    try:
        with nullcontext() if known else uniform_outputs(trained):
            trainer.train(resume_from_checkpoint=checkpoint)
            metrics, logits = evaluate_splits(trainer, examples, task)
    except KeyboardInterrupt:
        there = list_checkpoints(where)
        remedy = f"{there[-1]}: the same command with --resume resumes from there" if there else "no checkpoint yet"
        console.print(f"\nstopped; {remedy}", highlight=False, soft_wrap=True)
        raise

    if task == "seq2seq":
        measure_texts(metrics, base, loaded, length)
    matrix = None if logits is None else confusion_matrix(logits, np.asarray(loaded.validation["label"]))
    final: Any = base.model
    if lora_r is not None:
        if trainer.is_world_process_zero():
            trained.save_pretrained(where / ADAPTER)
        final = trained.merge_and_unload()
    if use_cache is not None:
        final.config.use_cache = use_cache  # the Trainer of transformers 5 disables it, also in the saved config
    result = FineTuned(
        path=output_dir,
        model=final.eval(),
        tokenizer=base.tokenizer,
        metrics=metrics,
        history=trainer.state.log_history,
        best_step=best_step(trainer),
        data=loaded,
        checkpoint_dir=where,
        logits=logits,
        confusion_matrix=matrix,
    )
    if trainer.is_world_process_zero():
        write_repo(result, base, card or Card(), task, max_shard_size=max_shard_size, golden=golden)
        finish_run(result, keep_checkpoints)
        if matrix is not None and loaded.labels is not None:
            print_table(class_table(matrix, loaded.labels, "on the validation data"), console)
        print_table(metric_table(metrics), console)
        names = ", ".join(sorted(path.name for path in output_dir.iterdir()))
        console.print(f"{output_dir}: {names}", highlight=False, soft_wrap=True)
    PartialState().wait_for_everyone()
    return result


def _print_plan(
    console: Console,
    base: LoadedBase,
    data: Data,
    examples: Mapping[str, Any],
    trained: Any,
    arguments: TrainingArguments,
    checkpoint: str | None,
) -> None:
    """Print the model, the data, the numbers of examples and parameters, and the checkpoint to resume from."""
    console.print(base.how, highlight=False, soft_wrap=True)
    for note in data.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    count = sum(parameter.numel() for parameter in trained.parameters())
    learning = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    kind = "texts" if data.labels else "pairs" if base.kind == "seq2seq" else "blocks"
    sizes = ", ".join(f"{len(rows):,} {kind} for {split}" for split, rows in examples.items())
    labels = f", {len(data.labels)} labels" if data.labels else ""
    console.print(
        f"{data.name}: {sizes}{labels}; {learning / 1e6:.2f} of {count / 1e6:.2f} million parameters are trained"
        f"{', in bfloat16' if arguments.bf16 else ''}",
        highlight=False,
        soft_wrap=True,
    )
    if checkpoint:
        console.print(f"resuming from {checkpoint}", highlight=False, soft_wrap=True)

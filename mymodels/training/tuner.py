"""The Trainer for fine-tuning: learning rates by layer, class weights, metrics, one progress bar."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, ProgressCallback

from .data import Data
from .parameters import decayed_groups
from .plots import classification_metrics
from .trainer import Trainer


class FineTuner(Trainer):
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


class Progress(ProgressCallback):
    """The Trainer's progress bar with the loss, and one line for each evaluation instead of a dict for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}", refresh=False)
        if "eval_loss" in logs:
            metrics = {name.removeprefix("eval_"): logs[name] for name in logs if is_metric(name)}
            values = ", ".join(f"{name} {float(value):.4f}" for name, value in metrics.items())
            self.training_bar.write(f"step {state.global_step}: validation {values}")


def is_metric(name: str) -> bool:
    skipped = ("_runtime", "_per_second", "_time", "_step", "_steps", "_samples", "_memory")
    return name.startswith(("eval_", "test_")) and not name.endswith(skipped)


def compute_metrics(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return classification_metrics(logits, prediction.label_ids)


def class_weights_of(given: str | Sequence[float] | None, data: Data, task: str) -> list[float] | None:
    if given is None:
        return None
    if data.labels is None or task != "classification":
        raise ValueError("class_weights are for classification")
    if given == "balanced":
        counts = Counter(data.train["label"])
        return [len(data.train) / (len(data.labels) * max(counts[i], 1)) for i in range(len(data.labels))]
    if isinstance(given, str) or len(given) != len(data.labels) or min(given) <= 0:
        raise ValueError(
            f"class_weights={given!r}: pass 'balanced', or one positive number for each of {len(data.labels)} labels"
        )
    return [float(weight) for weight in given]


def apply_class_weights(model: PreTrainedModel, weights: list[float] | None) -> Callable | None:
    """Set MyBert's `config.class_weights`; for other models, return a loss function for the Trainer."""
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

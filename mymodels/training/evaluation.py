"""Losses of a model on held-out examples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..forward_calls import accepted, loss_of


def count_labels(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The number of labels over which the model's loss of `batch` is the mean, `[]`: those that are not -100.

    In a causal language model the first label of a row is not predicted, so it does not count. Without `labels`, as for
    question answering, the number of rows. For a module that is not a transformers model, all labels but -100 count.
    """
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor):
        first = next(value for value in batch.values() if isinstance(value, torch.Tensor))
        return torch.tensor(len(first), device=first.device)
    plain = extract_model_from_parallel(model)
    if not isinstance(plain, PreTrainedModel):
        return (labels != -100).sum()
    # transformers falls back to the causal language model's loss, for example for GPT2LMHeadModel
    shifted = LOSS_MAPPING.get(getattr(plain, "loss_type", None) or "ForCausalLM") is ForCausalLMLoss
    if shifted and labels.ndim > 1 and not getattr(plain.config, "is_encoder_decoder", False):
        return (labels[..., 1:] != -100).sum()
    return (labels != -100).sum()


def required_loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The loss of a batch, from any form of output.

    Raises:
        ValueError: the model returns no loss.
    """
    loss = loss_of(model(**accepted(model, batch)))
    if loss is None:
        raise ValueError(f"{type(extract_model_from_parallel(model)).__name__} returns no loss for {', '.join(batch)}")
    return loss


@torch.no_grad()  # not inference_mode, whose tensors a sharded model could not train on
def mean_loss(model: torch.nn.Module, dataset: Sequence[Any], data_collator: Callable, batch_size: int) -> float:
    """Mean loss over `dataset`, every label of `count_labels` weighted equally; restores the mode of `model`.

    A batch without labels is ignored; NaN if there are no labels at all.
    """
    mode, device = model.training, next(model.parameters()).device
    model.eval()
    total = weight = 0.0
    # a loader draws from its generator; its own one keeps training's random numbers independent of evaluations
    for batch in DataLoader(dataset, batch_size, collate_fn=data_collator, generator=torch.Generator()):  # type: ignore[arg-type]
        moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        loss, count = required_loss(model, moved).item(), count_labels(model, batch).item()
        total += loss * count if count else 0.0
        weight += count
    model.train(mode)
    return total / weight if weight else float("nan")


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Mean loss over `batches`, weighted equally, and all logits and labels, on the CPU."""
    model.eval()
    losses, logits, labels = [], [], []
    for batch in batches:
        outputs = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        losses.append(outputs.loss.item())
        logits.append(outputs.logits.cpu())
        labels.append(batch["labels"].cpu())
    return sum(losses) / len(losses), torch.cat(logits), torch.cat(labels)

"""What a model makes of held-out examples."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel


@torch.no_grad()  # not inference_mode, whose tensors a sharded model could not train on
def mean_loss(model: torch.nn.Module, dataset: Sequence[Any], data_collator: Callable, batch_size: int) -> float:
    """Mean loss over `dataset`, each label that is not -100 weighing alike; `model` goes back to the mode it was in."""
    mode, device = model.training, next(model.parameters()).device
    model.eval()
    total = weight = 0.0
    # a loader draws from its generator, and training's random numbers are not to depend on evaluations
    for batch in DataLoader(dataset, batch_size, collate_fn=data_collator, generator=torch.Generator()):  # type: ignore[arg-type]
        count = (batch["labels"] != -100).sum().item()
        moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        total += model(**moved).loss.item() * count
        weight += count
    model.train(mode)
    return total / weight


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Mean loss over `batches` (each counts alike), all logits and all labels, on the CPU."""
    model.eval()
    losses, logits, labels = [], [], []
    for batch in batches:
        outputs = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        losses.append(outputs.loss.item())
        logits.append(outputs.logits.cpu())
        labels.append(batch["labels"].cpu())
    return sum(losses) / len(losses), torch.cat(logits), torch.cat(labels)

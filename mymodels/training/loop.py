"""A training loop you can read, on accelerate: the same file runs on one device or on several processes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and embeddings; leave norms and biases (every tensor of one dimension) alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def train(
    model: PreTrainedModel,
    dataset: Sequence[dict[str, torch.Tensor]],
    *,
    num_train_epochs: int = 1,
    per_device_train_batch_size: int = 16,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    warmup_ratio: float = 0.1,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    description: str = "training",
) -> list[float]:
    """Train `model` in place with AdamW under a cosine schedule with warm-up.

    Args:
        dataset: examples as keyword arguments of the model's `forward`, `labels` among them, all of one shape.
        learning_rate: its peak, reached after `warmup_ratio` of the steps.
        seed: of the order of the examples and of dropout.
        description: what the progress bar says.

    Returns:
        The loss of each step, on this process.

    Raises:
        FloatingPointError: the loss became NaN or infinite; the message says at which step. The weights are those of
            the step before.
    """
    accelerator = Accelerator()
    torch.manual_seed(seed)
    loader: DataLoader = DataLoader(
        dataset,  # type: ignore[arg-type]  # any sequence will do
        batch_size=per_device_train_batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=(0.9, 0.95))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = num_train_epochs * len(loader)
    # the schedule counts the optimizer's steps itself, so it is not prepared
    scheduler = get_cosine_schedule_with_warmup(optimizer, int(warmup_ratio * steps), steps)

    losses: list[float] = []
    model.train()
    hidden = {} if accelerator.is_local_main_process else {"disable": True}  # one bar; TQDM_DISABLE=1 hides it too
    with tqdm(total=steps, desc=description, mininterval=0.5, **hidden) as progress:
        for _ in range(num_train_epochs):
            for batch in loader:
                loss = model(**batch).loss
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss is {loss.item()} at step {len(losses) + 1} of {steps}: lower learning_rate={learning_rate}"
                    )
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                progress.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
                progress.update()
    accelerator.unwrap_model(model).eval()
    return losses


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

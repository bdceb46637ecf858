"""A readable training loop on accelerate, for one device, several processes (DDP) and FSDP2."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..forward_calls import accepted, check_loss
from .checkpoint_dirs import find_checkpoint
from .evaluation import count_labels, mean_loss, required_loss
from .processes import make_accelerator, unwrap
from .sampling import FiniteCheck, SeededCollator, Shuffled, check_sizes
from .training_state import (
    Progress,
    check_code_of_checkpoint,
    load_training_state,
    load_weights,
    save_training_checkpoint,
    save_weights,
    trial_save,
)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weight decay for matrices and embeddings, none for norms and biases (tensors of one dimension)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


# fmt: off
def train(
    model: torch.nn.Module, dataset: Sequence[Any], *, eval_dataset: Sequence[Any] | None = None,
    data_collator: Callable[[list], dict[str, torch.Tensor]] = default_collate, output_dir: str | None = None,
    num_train_epochs: int = 1, max_steps: int = -1, per_device_train_batch_size: int = 16,
    gradient_accumulation_steps: int = 1, learning_rate: float = 1e-3, weight_decay: float = 0.1,
    lr_scheduler_type: str = "cosine", warmup_ratio: float = 0.1, max_grad_norm: float | None = 1.0, save_steps: int = 500,
    save_total_limit: int | None = None, resume_from_checkpoint: bool | str = False,
    mixed_precision: str | None = None, seed: int = 0, description: str = "training",
) -> list[float]:
    # fmt: on
    """Train `model` in place with AdamW; the arguments have the names and meanings of transformers' `TrainingArguments`.

    Args:
        model: a transformers model, or any module whose `forward` returns its loss: as `loss` of a mapping or a
            dataclass, or as the only scalar of a tuple. Checkpoints of a plain module hold its weights without a config.
        dataset: examples from which `data_collator` makes the model's keyword arguments, including `labels`.
        eval_dataset: evaluated before each save; the checkpoint with the lowest loss is never removed.
        output_dir: where a folder `checkpoint-STEP` is written every `save_steps` and at the end; None saves nothing.
        learning_rate: the peak, reached after `warmup_ratio` of the steps.
        resume_from_checkpoint: a folder, or True for the newest complete one of `output_dir`. On the same number and kind
            of devices, the resumed run is equal bit for bit to one that was not interrupted.
        seed: for the order of the examples and dropout.

    Returns:
        The loss of each step since the beginning: the mean over all labels of all batches and processes.

    Raises:
        FloatingPointError: a loss or the gradient is NaN or infinite; the message names the step and the examples. The
            weights are those of the step before, and the checkpoints are kept.
        ValueError: no examples, a size below 1, or a batch without labels to predict; the model cannot be saved, or
            returns no loss.
    """
    arguments = {name: value for name, value in locals().items() if isinstance(value, (int, float, str))}
    size, accumulate = per_device_train_batch_size, gradient_accumulation_steps
    check_sizes(arguments, dataset=dataset, eval_dataset=eval_dataset)
    accelerator = make_accelerator(mixed_precision)  # an `Accelerator`
    if output_dir is not None and accelerator.is_main_process:
        with trial_save(model, output_dir) as scratch:
            save_weights(model, scratch, "2GB")
    check_loss(model, accepted(model, SeededCollator(data_collator, seed)([dataset[i] for i in range(min(2, len(dataset)))])))
    set_seed(seed, device_specific=True)  # different dropout on each process
    if checkpoint := find_checkpoint(output_dir, resume_from_checkpoint):
        check_code_of_checkpoint(model, checkpoint)
        load_weights(model, checkpoint)

    sampler = Shuffled(dataset, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    collate = SeededCollator(data_collator, seed, accelerator.process_index)
    loader: Any = DataLoader(dataset, size, sampler=sampler, generator=sampler.generator, collate_fn=collate)  # type: ignore[arg-type]
    optimizer: Any = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=(0.9, 0.95))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # distributes the batches
    steps_per_epoch = math.ceil(len(loader) / accumulate)
    steps = max_steps if max_steps > 0 else num_train_epochs * steps_per_epoch
    # the scheduler is not prepared, because it steps once for each optimizer step
    scheduler = get_scheduler(lr_scheduler_type, optimizer, math.ceil(warmup_ratio * steps), steps)

    parts = (accelerator, model, optimizer, scheduler)
    fixed = {"examples_per_step": size * accumulate * accelerator.num_processes, "num_examples": len(dataset)} | {"seed": seed}
    progress = load_training_state(checkpoint, *parts, fixed, arguments) if checkpoint else Progress(fixed=fixed)
    if progress.sampler is not None:
        sampler.generator.set_state(progress.sampler)
    hidden = {} if accelerator.is_local_main_process else {"disable": True}  # one bar; TQDM_DISABLE=1 hides it too
    bar = tqdm(total=steps, initial=progress.step, desc=description, mininterval=0.5, **hidden)
    check_finite = FiniteCheck(accelerator, sampler, size, steps, learning_rate)
    model.train()
    while progress.step < steps:
        epoch, done = divmod(progress.step, steps_per_epoch)  # done: steps of an epoch that was interrupted
        progress.sampler = sampler.generator.get_state()
        collate.count = epoch * len(loader) + done * accumulate
        batches = iter(accelerator.skip_first_batches(loader, done * accumulate))
        while progress.step < steps and (group := list(islice(batches, accumulate))):
            every_count = accelerator.gather(counts := torch.stack([count_labels(model, batch) for batch in group]))
            shares, losses = counts / every_count.sum() * accelerator.num_processes, []  # every label has the same weight
            for batch, share in zip(group, shares):  # gradients add up, and with the last one are averaged over processes
                with nullcontext() if batch is group[-1] else accelerator.no_sync(model):
                    loss = required_loss(model, batch)
                    accelerator.backward(loss * share)
                losses.append(loss.detach())
            every_loss = accelerator.gather(torch.stack(losses))
            norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
            check_finite(every_loss, every_count, norm, progress.step, done * accumulate)
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:  # as fp16 does while it adjusts the loss scale
                scheduler.step()
            optimizer.zero_grad()
            progress.add(((every_loss * every_count).sum() / every_count.sum()).item())
            bar.set_postfix(loss=f"{progress.recent_loss:.3f}", refresh=False)
            bar.update()
            done += 1
            if done == steps_per_epoch:
                progress.sampler = sampler.generator.get_state()  # the next epoch's
            if output_dir is not None and (progress.step % save_steps == 0 or progress.step == steps):
                if eval_dataset is not None:
                    progress.note_held_out(mean_loss(model, eval_dataset, SeededCollator(data_collator, seed), size))
                save_training_checkpoint(output_dir, *parts, progress, save_total_limit, arguments)
    bar.close()
    unwrap(accelerator, model).eval()
    return progress.losses

"""The order of the examples and a collator's random numbers, reproducible when a run is resumed."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import RandomSampler


class Shuffled(RandomSampler):
    """A `RandomSampler` that stores the order of the current epoch, so that an error can name examples.

    Its only state is that of its generator: restored to the state before an epoch, it repeats that epoch.
    """

    def __iter__(self) -> Iterator[int]:
        self.order = list(super().__iter__())
        return iter(self.order)

    def batches(self, numbers: list[int], size: int) -> list[int]:
        """The indices in the data set of the examples in these batches (from 0) of the current epoch."""
        return [i for number in numbers for i in self.order[number * size : (number + 1) * size]]


class SeededCollator:
    """A collator whose random numbers (masking, augmentation) depend only on the seed and the batch's number.

    Data loaders collate ahead of the training step, so drawing from dropout's generator would not be reproducible after a
    resume. Collators without random numbers are not affected. With workers (`dataloader_num_workers`), each counts its
    own batches, and random collators are not reproduced exactly.

    Args:
        collator: makes a batch of a list of examples.
        seed: integers that differ between runs and processes.

    Attributes:
        count: the number of the next batch since the beginning of training; set it after skipping batches.
    """

    def __init__(self, collator: Callable[[list], Any], *seed: int):
        self.collator, self.seed, self.count = collator, seed, 0

    def __call__(self, examples: list) -> Any:
        state = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seed = int(np.random.SeedSequence([*self.seed, self.count]).generate_state(1)[0])
        self.count += 1
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # the CPU's only; `torch.manual_seed` seeds every device
        try:
            return self.collator(examples)
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.set_rng_state(state[2])


def check_sizes(arguments: Mapping[str, Any], **datasets: Sequence[Any] | None) -> None:
    """Raise a `ValueError` for an empty data set, or for a size below 1."""
    for name, dataset in datasets.items():
        if dataset is not None and not len(dataset):
            raise ValueError(f"{name} is empty")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "save_steps"):
        if arguments[name] < 1:
            raise ValueError(f"{name}={arguments[name]}: it must be at least 1")


class FiniteCheck:
    """Raise at a step whose loss or gradient is NaN or infinite, with the step and its examples.

    Args:
        size: examples in a batch of one process.
        steps: number of steps of the run.
    """

    def __init__(self, accelerator: Accelerator, sampler: Shuffled, size: int, steps: int, learning_rate: float):
        self.accelerator, self.sampler, self.size = accelerator, sampler, size
        self.steps, self.learning_rate = steps, learning_rate

    def __call__(
        self, losses: torch.Tensor, counts: torch.Tensor, norm: torch.Tensor, step: int, first_batch: int
    ) -> None:
        """Check a step.

        Args:
            losses, counts: loss and number of labels of each of the step's batches, process by process.
            norm: norm of the gradient before clipping.
            step: number of completed steps.
            first_batch: number of each process's batches in this epoch before this step.

        Raises:
            FloatingPointError: a loss or the gradient is not finite.
            ValueError: a batch has no labels to predict.
        """
        bad = [number for number, finite in enumerate(losses.isfinite().tolist()) if not finite]
        if not bad and (math.isfinite(float(norm)) or self.accelerator.scaler):  # fp16 overflows until its scale fits
            return
        processes = self.accelerator.num_processes
        accumulated = len(losses) // processes
        batches = [(first_batch + n % accumulated) * processes + n // accumulated for n in range(len(losses))]
        if empty := [batches[n] for n in bad if not counts[n]]:
            raise ValueError(
                f"there is nothing to predict at step {step + 1} of {self.steps}: no labels (a single token or "
                f"only -100){_name_examples(self.sampler.batches(empty, self.size), ' in')}: leave such examples out"
            )
        examples = self.sampler.batches([batches[n] for n in bad] or batches, self.size)
        what = f"loss is {losses[bad[0]].item()}" if bad else f"gradient's norm is {float(norm)}"
        raise non_finite_error(what, step + 1, self.steps, self.learning_rate, examples)


def non_finite_error(what: str, step: int, steps: int, learning_rate: float, examples: list[int]) -> FloatingPointError:
    """The error for a loss or gradient that is NaN or infinite."""
    check = _name_examples(examples, ", or check the examples of this batch,") if examples else ""
    return FloatingPointError(
        f"the {what} at step {step} of {steps}: lower learning_rate={learning_rate:g}{check}; the weights are those of the "
        "step before, and the checkpoints are unchanged"
    )


def _name_examples(examples: list[int], how: str) -> str:
    return f"{how} dataset[i] for i in {', '.join(map(str, examples[:32]))}{', …' * (len(examples) > 32)}"

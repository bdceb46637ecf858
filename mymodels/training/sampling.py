"""The order of the examples, and a collator's random numbers, such that a resumed run gets what it would have got."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import RandomSampler


class Shuffled(RandomSampler):
    """A `RandomSampler` that remembers the order of the current epoch, so that an error can name examples.

    Its whole state is that of its generator before an epoch: set it back, and the epoch is the same again.
    """

    def __iter__(self) -> Iterator[int]:
        self.order = list(super().__iter__())
        return iter(self.order)

    def batches(self, numbers: list[int], size: int) -> list[int]:
        """The examples, by their place in the data set, of these batches (from 0) of the current epoch."""
        return [i for number in numbers for i in self.order[number * size : (number + 1) * size]]


class SeededCollator:
    """A collator whose random numbers (masking, augmentation) depend on the seed and the batch's number alone.

    Data loaders collate ahead of the training step; with the random numbers of dropout they would not be the same
    again after a resume. Collators without random numbers give what they give anyway. With workers
    (`dataloader_num_workers`), each counts its own batches, and random collators are not repeated exactly.

    Args:
        collator: what makes a batch of examples.
        seed: anything hashable that tells runs and processes apart, numbers only.

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
        torch.default_generator.manual_seed(seed)  # the CPU's only: `torch.manual_seed` is for every device
        try:
            return self.collator(examples)
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.set_rng_state(state[2])


def check_sizes(arguments: Mapping[str, Any], **datasets: Sequence[Any] | None) -> None:
    """Raise a ValueError for a data set that is empty, or an argument that must be at least 1 and is not."""
    for name, dataset in datasets.items():
        if dataset is not None and not len(dataset):
            raise ValueError(f"{name} is empty")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "save_steps"):
        if arguments[name] < 1:
            raise ValueError(f"{name}={arguments[name]}: it must be at least 1")


class FiniteCheck:
    """Stops a run at a step whose loss or gradient is NaN or infinite, naming the step and its examples.

    Args:
        size: examples in a batch of one process.
        steps: of the run.
    """

    def __init__(self, accelerator: Accelerator, sampler: Shuffled, size: int, steps: int, learning_rate: float):
        self.accelerator, self.sampler, self.size = accelerator, sampler, size
        self.steps, self.learning_rate = steps, learning_rate

    def __call__(
        self, losses: torch.Tensor, counts: torch.Tensor, norm: torch.Tensor, step: int, first_batch: int
    ) -> None:
        """Check a step.

        Args:
            losses, counts: of the step's batches and of their labels, those of one process after those of another.
            norm: of the gradient, before clipping.
            step: steps done.
            first_batch: each process's batches of this epoch before this step.

        Raises:
            FloatingPointError: something is not finite.
            ValueError: because there is nothing to predict.
        """
        bad = [number for number, finite in enumerate(losses.isfinite().tolist()) if not finite]
        if not bad and (math.isfinite(float(norm)) or self.accelerator.scaler):  # it looks for its scale by overflowing
            return
        processes = self.accelerator.num_processes
        accumulated = len(losses) // processes
        batches = [(first_batch + n % accumulated) * processes + n // accumulated for n in range(len(losses))]
        if empty := [batches[n] for n in bad if not counts[n]]:
            raise ValueError(
                f"there is nothing to predict at step {step + 1} of {self.steps}: no label that counts (a single token or "
                f"nothing but -100){_name_examples(self.sampler.batches(empty, self.size), ' in')}: leave such examples out"
            )
        examples = self.sampler.batches([batches[n] for n in bad] or batches, self.size)
        what = f"loss is {losses[bad[0]].item()}" if bad else f"gradient's norm is {float(norm)}"
        raise non_finite_error(what, step + 1, self.steps, self.learning_rate, examples)


def non_finite_error(what: str, step: int, steps: int, learning_rate: float, examples: list[int]) -> FloatingPointError:
    """The error for a loss that is NaN or infinite."""
    look = _name_examples(examples, ", or look at the examples of this batch,") if examples else ""
    return FloatingPointError(
        f"the {what} at step {step} of {steps}: lower learning_rate={learning_rate:g}{look}; the weights are those of the "
        "step before, and the checkpoints are as they were"
    )


def _name_examples(examples: list[int], how: str) -> str:
    return f"{how} dataset[i] for i in {', '.join(map(str, examples[:32]))}{', …' * (len(examples) > 32)}"

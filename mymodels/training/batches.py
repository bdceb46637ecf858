"""The order of the examples, and a collator's random numbers, such that a resumed run gets what it would have got."""

import math
import random
from collections.abc import Callable, Iterator
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


def check_finite(
    losses: torch.Tensor,
    norm: torch.Tensor,
    accelerator: Accelerator,
    sampler: Shuffled,
    step: int,
    steps: int,
    first_batch: int,
    size: int,
    learning_rate: float,
) -> None:
    """Raise if a loss or the gradient's norm is NaN or infinite, naming step, batches and examples.

    Args:
        losses: of the step's batches, those of one process after those of another.
        step, steps: steps done, and in all.
        first_batch, size: each process's batches of this epoch before this step, and the examples in one.
    """
    accumulated = len(losses) // accelerator.num_processes
    bad = [number for number, finite in enumerate(losses.isfinite().tolist()) if not finite]
    if not bad and (math.isfinite(float(norm)) or accelerator.scaler):  # a scaler looks for its scale by overflowing
        return
    batches = [
        (first_batch + n % accumulated) * accelerator.num_processes + n // accumulated for n in range(len(losses))
    ]
    examples = sampler.batches([batches[n] for n in bad or range(len(losses))], size)
    what = f"loss is {losses[bad[0]].item()}" if bad else f"gradient's norm is {float(norm)}"
    raise bad_number(what, step + 1, steps, learning_rate, examples)


def bad_number(what: str, step: int, steps: int, learning_rate: float, examples: list[int]) -> FloatingPointError:
    """The error for a loss that is NaN or infinite."""
    named = ", ".join(map(str, examples[:32])) + (", …" if len(examples) > 32 else "")
    look = f", or look at the examples of this batch, dataset[i] for i in {named}" if examples else ""
    return FloatingPointError(
        f"the {what} at step {step} of {steps}: lower learning_rate={learning_rate:g}{look}; the weights are those of the "
        "step before, and the checkpoints are as they were"
    )

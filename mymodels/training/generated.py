"""Metrics of the texts that an encoder-decoder generates, compared with the targets."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ..messages import first_line
from .data import Data
from .load_base import LoadedBase

TEXTS = 64  # generated for each split
BATCH = 16
NEW_TOKENS = 128


def measure_texts(metrics: dict[str, dict[str, float]], base: LoadedBase, data: Data, max_length: int) -> None:
    """Add `exact_match` and `token_f1` of greedily generated texts to the metrics of each split.

    Both are over the first `TEXTS` texts of the split, as a note in `data.notes` says. Models that cannot generate get
    neither.
    """
    if not base.model.can_generate():
        data.notes.append(
            f"{type(base.model).__name__} does not generate, so its texts were not compared with the targets"
        )
        return
    for split in metrics:
        rows = getattr(data, split)
        texts, targets = list(rows["text"][:TEXTS]), list(rows["target"][:TEXTS])
        try:
            found = generate_texts(base.model, base.tokenizer, texts, max_length)
        except Exception as error:  # raised by custom code; the trained model is kept
            data.notes.append(f"texts could not be generated, so they were not compared: {first_line(error)}")
            return
        metrics[split] |= compare_texts(found, targets)
        if len(rows) > TEXTS:
            data.notes.append(f"exact_match and token_f1 are over the first {TEXTS} of {len(rows)} {split} texts")


@torch.no_grad()
def generate_texts(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> list[str]:
    """The text that the model generates greedily for each text."""
    model.eval()
    found: list[str] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            list(texts[start : start + BATCH]),
            truncation=True,
            max_length=max_length,
            padding=True,
            return_token_type_ids=False,
            return_tensors="pt",
        ).to(model.device)
        tokens = model.generate(**batch, do_sample=False, num_beams=1, max_new_tokens=min(NEW_TOKENS, max_length))
        found += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return found


def compare_texts(found: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """`exact_match`: the share of texts that are equal except for white space; `token_f1`: mean F1 of their words.

    Example:
        >>> compare_texts(["a b"], ["a c"])
        {'exact_match': 0.0, 'token_f1': 0.5}
    """
    exact, f1 = 0.0, 0.0
    for text, target in zip(found, targets, strict=True):
        ours, theirs = text.split(), target.split()
        exact += ours == theirs
        common = sum((Counter(ours) & Counter(theirs)).values())
        f1 += 2 * common / (len(ours) + len(theirs)) if ours or theirs else 1.0
    return {"exact_match": exact / len(targets), "token_f1": f1 / len(targets)}

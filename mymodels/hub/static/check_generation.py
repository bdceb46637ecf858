"""Checks of `generation_config.json`: values that transformers' own validation, or its logits processors, refuse."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from .api_availability import Span, judge
from .repo_snapshot import Finding, Folder, brief

_FILE = "generation_config.json"
_NOT_SAVED = Span(last=(5, 22))  # `save_pretrained` refuses what `validate(strict=True)` does


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _number(low: float, high: float = float("inf"), *, zero: bool = False) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        return plain and (low < value <= high or (zero and value == low))

    return fits


# field → whether a value can be used, and what it must be; what generate() raises, or takes for something else
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (_number(0), "a number above 0"),
    "top_p": (_number(0, 1), "above 0 and at most 1"),
    "top_k": (_whole(0), "a whole number, 0 or more"),
    "min_p": (_number(0, 1, zero=True), "between 0 and 1"),
    "typical_p": (_number(0, 1), "above 0 and at most 1"),
    "repetition_penalty": (_number(0), "a number above 0"),
    "encoder_repetition_penalty": (_number(0), "a number above 0"),
    "num_beams": (_whole(1), "a whole number, 1 or more"),
    "num_return_sequences": (_whole(1), "a whole number, 1 or more"),
    "max_length": (_whole(1), "a whole number, 1 or more"),
    "max_new_tokens": (_whole(1), "a whole number, 1 or more"),
    "min_length": (_whole(0), "a whole number, 0 or more"),
    "min_new_tokens": (_whole(0), "a whole number, 0 or more"),
    "no_repeat_ngram_size": (_whole(0), "a whole number, 0 or more"),
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "use_cache": (lambda value: isinstance(value, bool), "true or false"),
}
_ONLY_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def generation_config(folder: Folder) -> Iterator[Finding]:
    """Values that generation refuses, and combinations with which the model cannot be saved."""
    values = folder.values.get(_FILE, {})
    refused = False
    for key, (fits, must) in _RANGES.items():
        value = values.get(key)
        if value is None or fits(value):
            continue
        refused = True
        used = values.get("do_sample") is True or key not in _ONLY_SAMPLING
        greedy = key == "temperature" and value == 0 and not used  # "0" for greedy, which is what it does then
        what = f"{key} is {brief(value)}, but must be {must}"
        status = "warning" if greedy else "failed"
        yield Finding(status, what, f"{_FILE}: {key}", "correct it, or remove the key")
    least, most = values.get("min_length"), values.get("max_length")
    if isinstance(least, int) and isinstance(most, int) and least > most > 0:
        yield Finding("failed", f"min_length is {least}, more than max_length, {most}", _FILE, "correct one of them")
    if values and not refused:
        yield from _validated(folder, values)


def _validated(folder: Folder, values: dict[str, Any]) -> Iterator[Finding]:
    """What `GenerationConfig.validate` of the installed release says of the values, which are data, not code."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    known = vars(GenerationConfig())
    plain = {key: value for key, value in values.items() if key in known and not key.startswith("_")}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        made = GenerationConfig(**plain)
        made.validate()
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        what = f"transformers refuses these generation settings: {_first(str(error))}"
        yield Finding("failed", what, _where(plain, str(error)), "correct the value, or remove the key")
        return
    finally:
        logging.set_verbosity(verbosity)
    try:
        made.validate(strict=True)
    except ValueError as error:
        what = f"the model cannot be saved {_NOT_SAVED}: {_first(str(error))}"
        remedy = "correct the value, or remove the key: with do_sample unset, sampling settings have no effect"
        yield Finding(judge(_NOT_SAVED, folder.releases), what, _where(plain, str(error)), remedy)


def _first(text: str) -> str:
    """The first sentence of an error, the heading before a list left out."""
    lines = [line.strip(" -") for line in text.splitlines() if line.strip() and not line.rstrip().endswith(":")]
    return re.split(r"(?<=[.!]) (?=[A-Z])| -- ", lines[0])[0][:250] if lines else "no reason given"


def _where(values: dict[str, Any], text: str) -> str:
    named = [key for key in re.findall(r"`(\w+)", text) if key in values]
    return f"{_FILE}: {named[0]}" if named else _FILE


CHECKS = {"generation config": generation_config}

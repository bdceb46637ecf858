"""Checks of `generation_config.json`: values that transformers' validation or its logits processors reject."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from ...library_logging import only_errors_logged
from .api_availability import Span, level_for
from .repo_snapshot import Finding, Folder, brief
from .settings import POSITIONS, position_rows, setting, stretches_positions

_FILE = "generation_config.json"
_NOT_SAVED = Span(last=(5, 22))  # `save_pretrained` refuses what `validate(strict=True)` does


def _integer(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _number(low: float, high: float = float("inf"), *, zero: bool = False) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        return plain and (low < value <= high or (zero and value == low))

    return fits


# field → whether a value is valid, and what it must be; with others, generate() raises or misreads them
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (_number(0), "a number above 0"),
    "top_p": (_number(0, 1), "above 0 and at most 1"),
    "top_k": (_integer(0), "an integer, 0 or more"),
    "min_p": (_number(0, 1, zero=True), "between 0 and 1"),
    "typical_p": (_number(0, 1), "above 0 and at most 1"),
    "repetition_penalty": (_number(0), "a number above 0"),
    "encoder_repetition_penalty": (_number(0), "a number above 0"),
    "num_beams": (_integer(1), "an integer, 1 or more"),
    "num_return_sequences": (_integer(1), "an integer, 1 or more"),
    "max_length": (_integer(1), "an integer, 1 or more"),
    "max_new_tokens": (_integer(1), "an integer, 1 or more"),
    "min_length": (_integer(0), "an integer, 0 or more"),
    "min_new_tokens": (_integer(0), "an integer, 0 or more"),
    "no_repeat_ngram_size": (_integer(0), "an integer, 0 or more"),
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "use_cache": (lambda value: isinstance(value, bool), "true or false"),
}
_ONLY_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def generation_config(folder: Folder) -> Iterator[Finding]:
    """Values that generation rejects, and combinations with which the model cannot be saved."""
    values = folder.values.get(_FILE, {})
    refused = False
    for key, (fits, must) in _RANGES.items():
        value = values.get(key)
        if value is None or fits(value):
            continue
        refused = True
        used = values.get("do_sample") is True or key not in _ONLY_SAMPLING
        greedy = key == "temperature" and value == 0 and not used  # meant as greedy, which it is without sampling
        what = f"{key} is {brief(value)}, but must be {must}"
        status = "warning" if greedy else "failed"
        yield Finding(status, what, f"{_FILE}: {key}", "correct it, or remove the key")
    for low, high in (
        ("min_length", "max_length"),
        ("min_new_tokens", "max_new_tokens"),
        ("min_new_tokens", "max_length"),
    ):
        least, most = values.get(low), values.get(high)
        if isinstance(least, int) and isinstance(most, int) and least > most > 0:
            what = f"{low} is {least}, more than {high}, {most}"
            yield Finding("failed", what, f"{_FILE}: {low}", "correct one of them")
    yield from _beyond_positions(folder, values)
    yield from _types(values)
    if values and not refused:
        yield from _validated(folder, values)
    if values or folder.config.get("is_encoder_decoder") is True:
        yield from _start(folder, values)
        yield from _ends(folder, values)


def _beyond_positions(folder: Folder, values: dict[str, Any]) -> Iterator[Finding]:
    """Lengths that the model has no positions for."""
    limit = setting(folder, *POSITIONS)
    learned = position_rows(folder)
    known = [n for n in (limit, learned) if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    for key in ("max_length", "max_new_tokens", "min_length", "min_new_tokens") if known else ():
        value = values.get(key)
        if isinstance(value, int) and value > min(known) and not stretches_positions(folder):
            # without a position table nothing raises, but the texts become bad
            what = f"{key} is {value}, but the model has {min(known)} positions"
            status = "failed" if learned is not None or key.startswith("min") else "warning"
            yield Finding(status, what, f"{_FILE}: {key}", "name a length that the model has positions for")


_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "stop_strings": ((str, list), "a text or a list of texts"),
    "early_stopping": ((bool, str), 'true, false or "never"'),
    "output_scores": ((bool,), "true or false"),
    "return_dict_in_generate": ((bool,), "true or false"),
    "cache_implementation": ((str,), "the name of a cache"),
    "length_penalty": ((int, float), "a number"),
    "renormalize_logits": ((bool,), "true or false"),
    "remove_invalid_values": ((bool,), "true or false"),
    "bad_words_ids": ((list,), "a list of lists of ids"),
    "force_words_ids": ((list,), "a list of lists of ids"),
    "suppress_tokens": ((list,), "a list of ids"),
    "begin_suppress_tokens": ((list,), "a list of ids"),
}


def _types(values: dict[str, Any]) -> Iterator[Finding]:
    for key, (types, must) in _TYPES.items():
        value = values.get(key)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            yield Finding("failed", f"{key} is {brief(value)}, but must be {must}", f"{_FILE}: {key}", "correct it")
    words = values.get("bad_words_ids")
    if isinstance(words, list) and any(not isinstance(word, list) or not word for word in words):
        what = f"bad_words_ids is {brief(words)}, but must be a list of lists of ids"
        yield Finding("failed", what, f"{_FILE}: bad_words_ids", "write each word as a list of its ids")
    beams, groups = values.get("num_beams"), values.get("num_beam_groups")
    if isinstance(beams, int) and isinstance(groups, int) and groups > 1 and beams % groups:
        what = f"num_beams is {beams}, which num_beam_groups, {groups}, does not divide"
        yield Finding("failed", what, f"{_FILE}: num_beam_groups", "name a divisor of num_beams, or remove the key")


_WRITES = re.compile(r"(ForConditionalGeneration|ForSeq2SeqLM|ForSpeechSeq2Seq|EncoderDecoderModel)$")


def _serves(folder: Folder) -> bool:
    return any(auto in folder.auto_map for auto in ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"))


def _start(folder: Folder, values: dict[str, Any]) -> Iterator[Finding]:
    """Encoder-decoder models need an id that the decoder starts with."""
    key, where = "decoder_start_token_id", "config.json: decoder_start_token_id"
    listed = folder.config.get("architectures")
    name = str(listed[0]) if isinstance(listed, list) and listed else ""
    if folder.config.get("is_encoder_decoder") is not True or not (values or _WRITES.search(name) or _serves(folder)):
        return
    named = [table.get(name) for table in (values, folder.config) for name in (key, "bos_token_id")]
    if all(value is None for value in named) and setting(folder, key, "bos_token_id") is None:
        what = "this is an encoder and decoder, but nothing says which token the decoder begins with"
        yield Finding("failed", what, where, f"give config and generation config a {key}")
    elif folder.config.get(key) is None and _in_vocabulary(folder, values.get(key)):
        what = f"{key} is in {_FILE} only: training, which shifts the labels by it, does not find it there"
        yield Finding("warning", what, where, f"give the config a {key} too")


def _in_vocabulary(folder: Folder, value: Any) -> bool:
    """Whether a value is a token id; `token ids` reports ids outside the vocabulary."""
    size = setting(folder, "vocab_size")
    return isinstance(value, int) and value >= 0 and not (isinstance(size, int) and value >= size)


def _ends(folder: Folder, values: dict[str, Any]) -> Iterator[Finding]:
    """Generation ends at the end token of config.json."""
    end, ends = folder.config.get("eos_token_id"), values.get("eos_token_id")
    if isinstance(end, int) and ends is not None and end not in (ends if isinstance(ends, list) else [ends]):
        what = f"eos_token_id is {brief(ends)} here, but {end} in config.json: generation does not end there"
        yield Finding("warning", what, f"{_FILE}: eos_token_id", "make the two agree")


def _validated(folder: Folder, values: dict[str, Any]) -> Iterator[Finding]:
    """Errors of `GenerationConfig.validate` of the installed release; the values are data, so no code of the folder runs."""
    from transformers import GenerationConfig

    known = vars(GenerationConfig())
    plain = {key: value for key, value in values.items() if key in known and not key.startswith("_")}
    try:
        with only_errors_logged():
            made = GenerationConfig(**plain)
            made.validate()
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        what = f"transformers refuses these generation settings: {_first(str(error))}"
        yield Finding("failed", what, _where(plain, str(error)), "correct the value, or remove the key")
        return
    try:
        made.validate(strict=True)
    except ValueError as error:
        what = f"the model cannot be saved {_NOT_SAVED}: {_first(str(error))}"
        remedy = "correct the value, or remove the key: with do_sample unset, sampling settings have no effect"
        yield Finding(level_for(_NOT_SAVED, folder.releases), what, _where(plain, str(error)), remedy)


def _first(text: str) -> str:
    """The first sentence of an error, without the heading of a list."""
    lines = [line.strip(" -") for line in text.splitlines() if line.strip() and not line.rstrip().endswith(":")]
    return re.split(r"(?<=[.!]) (?=[A-Z])| -- ", lines[0])[0][:250] if lines else "no reason given"


def _where(values: dict[str, Any], text: str) -> str:
    named = [key for key in re.findall(r"`(\w+)", text) if key in values]
    return f"{_FILE}: {named[0]}" if named else _FILE


CHECKS = {"generation config": generation_config}

"""Checks that token ids in configs, generation configs and the tokenizer's files are in the vocabulary."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .check_config import own_code
from .repo_snapshot import Finding, Folder, brief
from .settings import TEXT_PARTS, setting, text_config
from .vocabulary import special_tokens, vocabulary

_IDS = re.compile(r"\w*token_ids?|\w*_token_index|\w*suppress_tokens|\w*_tokens_ids?|(lang|task)_to_id")
_LISTS = {"bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias"}
# ids of text tokens; others may be audio or image codes with a separate vocabulary
_OF_TEXT = re.compile(
    r"(pad|eos|bos|unk|sep|cls|mask|decoder_start|forced_\w+|begin_suppress|suppress|prev_sot|no_timestamps|sot|eot)(_|$)|"
    r"suppress_tokens$|bad_words|force_words|sequence_bias|(lang|task)_to_id"
)
_REMEDY = "write the tokenizer's id of this token"


def token_ids(folder: Folder) -> Iterator[Finding]:
    """Ids in configs and tokenizer files are in the vocabulary, which the embeddings cover."""
    size = _size(setting(folder, "vocab_size"))
    yield from _tokenizer_ids(folder, size)
    parts = [("config.json", "", folder.config, _own_size(folder.config) or size)]
    for key, value in folder.config.items():
        if isinstance(value, dict) and (key in TEXT_PARTS or key.endswith("_config") or key in ("encoder", "decoder")):
            own = _own_size(value)
            parts.append(("config.json", f"{key}.", value, own or (size if key in TEXT_PARTS else None)))
    parts.append(
        ("generation_config.json", "", folder.values.get("generation_config.json", {}), _generated(folder, size))
    )
    found: dict[str, Finding] = {}  # by fault: save_pretrained writes an id into both files, which is one fault
    largest = max(_all_sizes(folder.config) | {size or 0})
    for file, path, values, limit in parts:
        coded = any("codebook" in key for key in values)  # there, vocab_size includes the audio codes
        for key, value in values.items() if limit != 1 and not coded else ():
            if not key.startswith("_") and (_IDS.fullmatch(key) or key in _LISTS):
                text = bool(_OF_TEXT.match(key))
                known = limit if text else largest or None
                where = f"{file}: {path}{key}"
                for one in _one_field(f"{path}{key}", key, value, known if limit else None, where, text):
                    first = found.setdefault(one.what, one)
                    found[one.what] = one if first is one else first._replace(where=f"{first.where}, {where}")
    yield from found.values()


def _size(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _own_size(values: Mapping[str, Any]) -> int | None:
    """The vocabulary size of one config; the text vocabulary if its `vocab_size` includes audio codes."""
    return max((n for key in ("vocab_size", "text_vocab_size") if (n := _size(values.get(key)))), default=None)


def _generated(folder: Folder, size: int | None) -> int | None:
    """The vocabulary size for generation: the decoder's, if encoder and decoder have separate configs."""
    decoder = folder.config.get("decoder")
    return _own_size(decoder) if isinstance(decoder, dict) else _own_size(folder.config) or size


def _all_sizes(config: Mapping[str, Any]) -> set[int]:
    """All sizes of vocabularies and codebooks in a config, at any depth."""
    found: set[int] = set()
    waiting: list[Any] = [config]
    while waiting:
        values = waiting.pop()
        for key, value in values.items():
            if isinstance(value, dict):
                waiting.append(value)
            elif re.search(r"vocab_size|codebook_size|num_codes|n_codes|vocabulary_size", key) and (n := _size(value)):
                found.add(n)
    return found


def _one_field(shown: str, key: str, value: Any, size: int | None, where: str, text: bool) -> Iterator[Finding]:
    if isinstance(value, list) and key in ("pad_token_id", "bos_token_id", "decoder_start_token_id", "sep_token_id"):
        yield Finding("failed", f"{shown} is {brief(value)}, a list: it must be one id", where, _REMEDY)
        return
    for number in _numbers(key, value):
        if number is None:
            continue
        if not isinstance(number, int) or isinstance(number, bool):
            what = f"{shown} is {brief(value)}, not a token id" + ("" if number is value else f": {brief(number)}")
            yield Finding("failed", what, where, "write the id as a number")
            return
        if size is not None and number >= size:
            what = f"{shown} is {number}, outside of the vocabulary of {size} tokens (0 to {size - 1})"
            yield Finding("failed", what, where, _REMEDY)
            return
        if text and (number < -1 or (number == -1 and key != "pad_token_id" and "suppress" not in key)):
            what = f"{shown} is {number}, which is not a token id"
            yield Finding("failed", what, where, f"{_REMEDY}, or null")
            return


def _numbers(key: str, value: Any) -> Iterator[Any]:
    """The ids of a field: one, a list, lists of lists, pairs of a position and an id, or the values of a table."""
    if key == "forced_decoder_ids":
        yield from (pair[1] for pair in value or () if isinstance(pair, list) and len(pair) == 2)
    elif key == "sequence_bias":
        lists = [entry[0] for entry in value if isinstance(entry, list) and entry] if isinstance(value, list) else []
        yield from (number for entry in lists if isinstance(entry, list) for number in entry)
    elif isinstance(value, dict):
        yield from (number for number in value.values() if isinstance(number, int))
    else:
        waiting, nested = [value], key in _LISTS or "token" in key
        while waiting:
            one = waiting.pop()
            if isinstance(one, list) and nested:
                waiting += reversed(one)
            else:
                yield one


def _tokenizer_ids(folder: Folder, size: int | None) -> Iterator[Finding]:
    """The embeddings have a row for every id of the tokenizer, and no two tokens have the same id."""
    tokens = vocabulary(folder)
    remedy = "save the tokenizer that belongs to this model again, or call resize_token_embeddings"
    if size is not None:
        for file, ids in tokens.files.items():
            if ids and max(ids.values()) >= size:
                token = max(ids, key=lambda t: ids[t])
                what = f"{file} has the token {brief(token)} with id {ids[token]}, but vocab_size is {size}"
                yield Finding("failed", what, file, remedy)
    for file, ids in tokens.files.items():
        seen: dict[int, str] = {}
        for token, number in ids.items():
            other = tokens.ids.get(token, number)
            if other != number:
                what = f"{file} gives {brief(token)} the id {number}, but {tokens.file_of(token)} {other}"
                yield Finding("failed", what, file, "save the tokenizer again")
                break
            if seen.setdefault(number, token) != token:
                what = f"{file} gives {brief(seen[number])} and {brief(token)} the same id, {number}"
                yield Finding("failed", what, file, "save the tokenizer again")
                break


_GENERATES = re.compile(r"(ForCausalLM|LMHead\w*|ForConditionalGeneration|ForSeq2SeqLM|ForSpeechSeq2Seq)$")


def special_ids(folder: Folder) -> Iterator[Finding]:
    """The tokens for padding, start and end are in the vocabulary, under the ids that the configs name."""
    tokens, named = vocabulary(folder), special_tokens(folder)
    if not tokens.ids:
        return
    size = _size(setting(folder, "vocab_size"))
    following = max(tokens.ids.values()) + 1
    for role, by_file in named.items():
        texts = set(by_file.values())
        if len(texts) > 1:
            (first, one), (second, other) = list(by_file.items())[:2]
            what = f"{first} says that {role} is {brief(one)}, but {second} says {brief(other)}"
            yield Finding("failed", what, f"{second}: {role}", "make the two agree: save the tokenizer again")
        file, text = next(iter(by_file.items()))
        if text not in tokens.ids:
            outside = size is not None and following >= size
            does = f"it would be added as {following}, " + (
                f"for which the embedding of {size} rows has none" if outside else "whose row was not trained for it"
            )
            status = "failed" if outside or tokens.complete else "warning"
            what = f"{role} is {brief(text)}, which is not in the vocabulary: {does}"
            yield Finding(
                status, what, f"{file}: {role}", "name a token of the vocabulary, or save the tokenizer again"
            )
            following += 1
        else:
            yield from _same_id(folder, role, text, tokens.ids[text])


def _same_id(folder: Folder, role: str, text: str, number: int) -> Iterator[Finding]:
    key = f"{role}_id"
    values = text_config(folder)
    if role not in ("eos_token", "pad_token", "bos_token") or values is not folder.config:
        return
    generation, size = folder.values.get("generation_config.json", {}), _size(setting(folder, "vocab_size"))
    tables = {"config.json": values.get(key), "generation_config.json": generation.get(key)}
    given = {file: ids if isinstance(ids, list) else [ids] for file, ids in tables.items() if ids is not None}
    if role == "eos_token" and any(number in ids for ids in given.values()):
        return  # chat models end at more tokens than the config names
    for file, ids in given.items():
        if size is not None and any(isinstance(one, int) and one >= size for one in ids):
            continue  # reported by `token ids`
        if number not in ids and ids != [-1]:
            generates = any(_GENERATES.search(str(name)) for name in folder.config.get("architectures") or ())
            generates = generates or "AutoModelForCausalLM" in folder.auto_map
            matters = role == "pad_token" if not generates else role != "bos_token" or own_code(folder)
            what = f"{key} is {brief(ids[0] if len(ids) == 1 else ids)}, but the tokenizer's {role}, {brief(text)}, is {number}"
            yield Finding("failed" if matters else "warning", what, f"{file}: {key}", _REMEDY)
            return


CHECKS = {"token ids": token_ids, "special tokens": special_ids}

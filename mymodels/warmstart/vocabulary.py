"""Rows of embeddings: match the tokens of two tokenizers, and read pretrained word vectors from a text file."""

import gzip
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..checkpoints import CheckpointError
from ..messages import first_line
from .conversion import TokenVectors

_ROLES = (
    "bos_token_id",
    "eos_token_id",
    "unk_token_id",
    "sep_token_id",
    "pad_token_id",
    "cls_token_id",
    "mask_token_id",
)
_SAME_ROLE = {
    "bos_token_id": "cls_token_id",
    "eos_token_id": "sep_token_id",
}  # begin and end of a text, in GPT-2 and BERT


def load_tokenizer(source: str | os.PathLike | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one saved in a folder or Hub repo.

    Raises:
        CheckpointError: there is none.
    """
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    if Path(source).is_dir() and not has_tokenizer(Path(source)):
        raise CheckpointError(f"{source} has no tokenizer: name a folder that has one")
    try:
        bare = _bare_tokenizer(Path(source)) if Path(source).is_dir() else None
        return AutoTokenizer.from_pretrained(source) if bare is None else bare
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            f"no tokenizer could be loaded from {source} ({first_line(error)}): name a folder that has one"
        ) from error


def has_tokenizer(folder: Path) -> bool:
    return any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "encoder.json")
    )


def _bare_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder in the format of Google's BERT or OpenAI's GPT-2, with vocabulary files and no config."""
    if any((folder / name).is_file() for name in ("config.json", "tokenizer_config.json", "tokenizer.json")):
        return None
    if (folder / "vocab.txt").is_file():
        words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        cased = any(word != word.lower() for word in words if not re.fullmatch(r"\[\w+\]", word.strip()))
        return transformers.BertTokenizerFast.from_pretrained(folder, do_lower_case=not cased)  # type: ignore[attr-defined]
    for vocabulary, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            with tempfile.TemporaryDirectory() as staged:  # under the names that the class expects
                shutil.copyfile(folder / vocabulary, Path(staged, "vocab.json"))
                shutil.copyfile(folder / merges, Path(staged, "merges.txt"))
                return transformers.GPT2TokenizerFast.from_pretrained(staged)  # type: ignore[attr-defined]
    return None


def missing_rows(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str | None:
    """A note if the tokenizer has token ids of `vocab_size` or above; else None."""
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last < vocab_size:
        return None
    return (
        f"the tokenizer has {len(tokenizer)} tokens, with ids up to {last}, but the model {vocab_size} embeddings, so other "
        f"tokens fail; overrides= with vocab_size={last + 1} adds rows for them"
    )


def match_tokens(
    old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, old_size: int, new_size: int
) -> tuple[list[list[int]], dict[str, int]]:
    """For each token of `new`, the tokens of `old` whose mean row it starts with; and the counts of each method.

    A token with the same string keeps its row, and a special token that of its role; any other gets the tokens that the
    old tokenizer splits it into. An empty list means the mean of all rows: for tokens without any, and for rows up to
    `new_size` that have no token.
    """
    vocabulary = old.get_vocab()
    rows: list[list[int]] = [[] for _ in range(new_size)]
    by_role: dict[int, int] = {}
    for role in _ROLES:
        for other in (role, _SAME_ROLE.get(role), next((k for k, v in _SAME_ROLE.items() if v == role), None)):
            mine, theirs = getattr(new, role, None), getattr(old, other, None) if other else None
            if mine is not None and theirs is not None:
                by_role.setdefault(mine, theirs)
    unknown, pieces_inside = old.unk_token_id, any(token.startswith("##") for token in new.get_vocab())
    counts = dict.fromkeys(("same token", "same role", "mean of old pieces", "mean of all"), 0)
    for token, number in new.get_vocab().items():
        if number >= new_size:
            continue
        if vocabulary.get(token, old_size) < old_size:
            rows[number], how = [vocabulary[token]], "same token"
        elif by_role.get(number, old_size) < old_size:
            rows[number], how = [by_role[number]], "same role"
        else:
            text = _token_text(new, token, pieces_inside)
            pieces = old(text, add_special_tokens=False, verbose=False).input_ids if text else []
            rows[number] = [piece for piece in pieces if piece != unknown and piece < old_size]
            how = "mean of old pieces" if rows[number] else "mean of all"
        counts[how] += 1
    counts["mean of all"] += new_size - sum(counts.values())
    return rows, {f"tokens, {how}": count for how, count in counts.items()}


def _token_text(tokenizer: PreTrainedTokenizerBase, token: str, pieces_inside: bool = False) -> str:
    """The text of a token, with its leading space; "" for a part of a character.

    Args:
        pieces_inside: whether the tokenizer marks pieces inside words (`##ing`) instead of first pieces.
    """
    if token.startswith("##"):
        return token[2:]
    if token.startswith("▁"):
        return token.replace("▁", " ")
    text = tokenizer.convert_tokens_to_string([token])
    if "\ufffd" in text and "\ufffd" not in token:
        return ""
    return f" {text}" if pieces_inside and text.isalnum() else text


class WordVectors(NamedTuple):
    """The vectors of a file for the words that are needed."""

    vectors: dict[str, np.ndarray]
    name: str  # the file's
    size: int  # number of vectors in the file


def read_word_vectors(path: str | os.PathLike, wanted: set[str], width: int) -> WordVectors:
    """Read a word2vec or GloVe text file, plain or `.gz`, line by line; only words in `wanted` are kept.

    Raises:
        CheckpointError: a line is not a word and `width` numbers, or the file is damaged; the message has the line number.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} of word vectors")
    found: dict[str, np.ndarray] = {}
    count = 0
    for number, line in _lines(path):
        parts = re.split(r"[ \t]+", line.strip(" \t\r\n"))
        if number == 1 and len(parts) == 2:  # word2vec's first line: count and width
            if parts[1] != str(width):
                raise CheckpointError(
                    f"{path} has vectors of width {parts[1]}, but hidden_size={width}: they must be equal"
                )
            continue
        if parts == [""]:
            continue
        if len(parts) <= width:
            raise CheckpointError(
                f"{path}, line {number}: a word and {width} numbers are needed for hidden_size={width}, there are "
                f"{len(parts)} parts: use vectors of that width"
            )
        words = [" ".join(parts[:-width]), *parts[-width:]]
        count += 1
        if words[0] in wanted and words[0] not in found:
            try:
                vector = np.array(words[1:], dtype=np.float32)
            except ValueError:
                vector = np.array([np.nan])
            if not np.isfinite(vector).all():
                raise CheckpointError(
                    f"{path}, line {number}: the vector of {words[0]!r} has a value that is not a finite number"
                )
            found[words[0]] = vector
    return WordVectors(found, path.name, count)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    with (
        path.open("rb") as raw,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="vectors", disable=None) as bar,
    ):
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        lines: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        try:
            for number, line in enumerate(lines, 1):
                if number % 1000 == 0:
                    bar.update(raw.tell() - bar.n)
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace")
        except (OSError, EOFError, zlib.error) as error:
            raise CheckpointError(
                f"{path}, after line {number}: cannot be read ({error}): copy or download it again"
            ) from error


def vectors_by_token(
    vectors: WordVectors, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[TokenVectors, dict[str, int]]:
    """The vectors of the tokens that have one, and the counts.

    Raises:
        CheckpointError: no token has one.
    """
    words = {number: vector_name(tokenizer, token, vectors.vectors) for token, number in tokenizer.get_vocab().items()}
    index = [number for number, word in words.items() if word is not None and number < vocab_size]
    if not index:
        raise CheckpointError(
            f"{vectors.name} has vectors for no word of the tokenizer: it may be for another language"
        )
    table = torch.from_numpy(np.stack([vectors.vectors[words[number]] for number in index]))  # type: ignore[index]
    coverage = {
        f"tokens with a vector in {vectors.name}": len(index),
        f"tokens without one in {vectors.name}": vocab_size - len(index),
    }
    return TokenVectors(torch.tensor(index), table, vectors.name, vectors.size), coverage


def vector_name(tokenizer: PreTrainedTokenizerBase, token: str, known: Any) -> str | None:
    """The word in `known` of a token: itself, without its space, or in lower case; None for pieces inside words."""
    if token.startswith("##"):
        return None
    plain = _token_text(tokenizer, token).strip()
    return next((word for word in (token, plain, plain.lower()) if word in known), None)


def words_of(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Every word that `vector_name` may return."""
    tokens = list(tokenizer.get_vocab())
    plain = [_token_text(tokenizer, token).strip() for token in tokens]
    return {*tokens, *plain, *(word.lower() for word in plain)} - {""}

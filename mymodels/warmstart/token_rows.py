"""Match the rows of embeddings by tokenizers and word vectors."""

import os
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..checkpoints import CheckpointError
from .conversion import TokenVectors
from .vocabulary import (
    has_tokenizer,
    load_tokenizer,
    match_tokens,
    missing_rows,
    read_word_vectors,
    vectors_by_token,
    words_of,
)


class Match(NamedTuple):
    """The result of matching tokens and word vectors.

    Attributes:
        rows: for each token of the target, the source's tokens; None: the same ids.
        vectors: word vectors to copy.
        coverage: name → count, for the report.
        tokenizer: the target's.
        notes: for the report.
    """

    rows: list[list[int]] | None
    vectors: TokenVectors | None
    coverage: dict[str, int]
    tokenizer: PreTrainedTokenizerBase | None
    notes: list[str]


def match_vocabulary(
    where: str,
    folder: Path | None,
    sizes: tuple[int, int, int],
    tokenizer: PreTrainedTokenizerBase | None,
    source_tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None,
    word_vectors: str | os.PathLike | None,
) -> Match:
    """Match tokens and word vectors.

    Args:
        where, folder: name and folder of the source.
        sizes: vocabulary size of the source (0: none) and of the target, width of the target's embeddings.
        tokenizer: the target's; default: the source's.
        source_tokenizer: the source's; default: the one in its folder.
        word_vectors: file of word vectors.

    Raises:
        CheckpointError: a tokenizer is missing, or no token matches.
    """
    beside = folder if folder is not None and has_tokenizer(folder) else None
    theirs = beside if source_tokenizer is None else source_tokenizer
    size, rows, vectors = sizes[1], None, None
    coverage: dict[str, int] = {}
    if tokenizer is not None and sizes[0]:
        if theirs is None:
            raise CheckpointError(f"{where} has no tokenizer to match tokens with: pass source_tokenizer=")
        rows, coverage = match_tokens(load_tokenizer(theirs), tokenizer, sizes[0], size)
    notes: list[str] = []
    if tokenizer is None and theirs is not None:
        try:
            tokenizer = load_tokenizer(theirs)
        except CheckpointError as error:
            if theirs is not beside or word_vectors is not None:
                raise
            notes.append(f"the model is saved without a tokenizer: {error}, with tokenizer=")
    if word_vectors is not None:
        if tokenizer is None:
            raise CheckpointError("word_vectors need a tokenizer to match words with rows: pass tokenizer=")
        found = read_word_vectors(word_vectors, words_of(tokenizer), sizes[2])
        vectors, counts = vectors_by_token(found, tokenizer, size)
        coverage |= counts
    if tokenizer is not None and (note := missing_rows(tokenizer, size)):
        notes.append(note)
    return Match(rows, vectors, coverage, tokenizer, notes)

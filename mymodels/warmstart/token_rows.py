"""What tokenizers and word vectors say of the rows of the embeddings."""

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
    """What tokenizers and word vectors say of the rows of the embeddings."""

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
        where, folder: of the source.
        sizes: tokens of the source (0: it has none), tokens of the target, width of the target's embeddings.

    Raises:
        CheckpointError: a tokenizer is missing, or fits nothing.
    """
    beside = folder if folder is not None and has_tokenizer(folder) else None
    theirs = beside if source_tokenizer is None else source_tokenizer
    size, rows, vectors = sizes[1], None, None
    coverage: dict[str, int] = {}
    if tokenizer is not None and sizes[0]:
        if theirs is None:
            raise CheckpointError(f"{where} has no tokenizer beside it to compare with: pass source_tokenizer=")
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
            raise CheckpointError("word_vectors need to know which row is which word: pass tokenizer=")
        found = read_word_vectors(word_vectors, words_of(tokenizer), sizes[2])
        vectors, counts = vectors_by_token(found, tokenizer, size)
        coverage |= counts
    if tokenizer is not None and (note := missing_rows(tokenizer, size)):
        notes.append(note)
    return Match(rows, vectors, coverage, tokenizer, notes)

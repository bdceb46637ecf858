"""The sample text that ships with the package: public-domain passages for children or adults (see PROVENANCE.md)."""

import json
from importlib.resources import files
from typing import NamedTuple


class Document(NamedTuple):
    id: int
    label: str  # "children" or "adult"
    text: str


def load_sample_text(split: str) -> list[Document]:
    """The documents of `split`, `"train"` (112) or `"held_out"` (28), in a fixed order.

    Raises:
        ValueError: there is no such split.
    """
    lines = (files(__package__) / "book_excerpts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    documents = [Document(row["id"], row["label"], row["text"]) for row in rows if row["split"] == split]
    if not documents:
        raise ValueError(f"the sample text has no split {split!r}: choose 'train' or 'held_out'")
    return documents


def passages(documents: list[Document], words: int = 96) -> list[tuple[str, str]]:
    """(passage, label) of each document's passages of `words` words; a rest shorter than half a passage is dropped."""
    cut = []
    for document in documents:
        all_words = document.text.split()
        starts = range(0, len(all_words) - words // 2, words)
        cut += [(" ".join(all_words[i : i + words]), document.label) for i in starts]
    return cut

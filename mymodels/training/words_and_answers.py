"""Data for labels of words and for answers in a context: read, check and encode them, and measure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .data import Data, order_labels, quote_names
from .datasets_io import DataError, require_module
from .plots import classification_metrics

_WORDS, _TAGS = ("tokens", "words"), ("ner_tags", "tags", "labels", "pos_tags", "label")
_IGNORED = -100


def _column(rows: Any, where: str, asked: str | None, names: Sequence[str], what: str, option: str) -> str:
    found = [asked] if asked is not None else [name for name in names if name in rows.column_names]
    if found and found[0] in rows.column_names:
        return found[0]
    hint = f"name the one with the {what} by {option}" if option else f"name one of them {' or '.join(names)}"
    raise DataError(f"{where} has the columns {quote_names(rows.column_names)}: {hint}")


def read_labelled_words(
    splits: Mapping[str, tuple[Any, str]],
    words_column: str | None,
    labels_column: str | None,
    known_labels: Sequence[str],
) -> Data:
    """The splits for token classification, with the columns `text`, `words`, and `tags`, the number of each word's label.

    Raises:
        DataError: a row has no words, or not as many labels as words.
    """
    dataset = require_module("datasets", "finetune").Dataset
    read: dict[str, tuple[list, list, str, str]] = {}
    feature: Any = None
    for split, (rows, where) in splits.items():
        words = _column(rows, where, words_column, _WORDS, "lists of words", "--text-column")
        tags = _column(rows, where, labels_column, _TAGS, "lists of labels", "--label-column")
        inner = getattr(rows.features[tags], "feature", None)
        feature = feature or inner
        names = getattr(inner, "names", None)
        read[split] = rows[words][:], [_names(row, names) for row in rows[tags]], where, tags
        for number, (row, labels) in enumerate(zip(*read[split][:2]), 1):
            if not isinstance(row, list) or not row or not all(isinstance(word, str) for word in row):
                raise DataError(
                    f"{where} row {number}, column {words!r}: it is no list of words: split the text into words"
                )
            if labels is None or len(labels) != len(row):
                count = "no list of labels" if labels is None else f"{len(labels)} labels"
                raise DataError(
                    f"{where} row {number}, column {tags!r}: {count} for {len(row)} words: give each word one"
                )
    train, where = read["train"][1], read["train"][2]
    labels = order_labels(feature, [label for row in train for label in row], known_labels)
    if len(labels) < 2:
        raise DataError(
            f"{where}, column {read['train'][3]!r}: every word has the label {labels[0]!r}, so nothing can be learnt"
        )
    numbers = {label: number for number, label in enumerate(labels)}
    found = {}
    for split, (words, tags, where, column) in read.items():
        if unknown := sorted({label for row in tags for label in row} - numbers.keys()):
            raise DataError(f"{where}, column {column!r}: the label {unknown[0]!r} does not occur in the training data")
        texts = [" ".join(row) for row in words]
        encoded = [[numbers[label] for label in row] for row in tags]
        found[split] = dataset.from_dict({"text": texts, "words": words, "tags": encoded})
    return Data(found["train"], found.get("validation"), found.get("test"), labels)


def _names(row: Any, names: Sequence[str] | None) -> list[str] | None:
    if not isinstance(row, list) or any(label is None or isinstance(label, (list, dict)) for label in row):
        return None
    return [names[label] if names is not None else str(label) for label in row]


def read_answers(splits: Mapping[str, tuple[Any, str]]) -> Data:
    """The splits for question answering, with `text` (the question), `context`, `start` and `end` in characters.

    A row has `question`, `context` and, as in SQuAD, `answers` with `text` and `answer_start`; or `answer` and
    `answer_start`. A row without an answer, as in SQuAD 2, has the end 0.

    Raises:
        DataError: an answer is not where its row says it is.
    """
    dataset = require_module("datasets", "finetune").Dataset
    found = {}
    for split, (rows, where) in splits.items():
        for name in ("question", "context"):
            _column(rows, where, None, (name,), name, "")
        nested = "answers" in rows.column_names
        if not nested:
            _column(rows, where, None, ("answer",), "answers", "")
        spans = []
        for number, row in enumerate(rows, 1):
            place = f"{where} row {number}"
            given = row["answers"] if nested else {"text": row["answer"], "answer_start": row.get("answer_start")}
            text, start = (_first(given.get(key)) for key in ("text", "answer_start"))
            if not isinstance(row["question"], str) or not isinstance(row["context"], str):
                raise DataError(f"{place}: the question or the context is no text: fill it in, or remove the row")
            if not text:
                spans.append((0, 0))
                continue
            if start is None:
                if row["context"].count(text) != 1:
                    raise DataError(
                        f"{place}: {text[:40]!r} is {row['context'].count(text)} times in the context, so give its answer_start"
                    )
                start = row["context"].index(text)
            start = int(start)
            if row["context"][start : start + len(text)] != text:
                raise DataError(
                    f"{place}: the context has no {text[:40]!r} at the character {start}: correct answer_start"
                )
            spans.append((start, start + len(text)))
        columns = {"text": rows["question"][:], "context": rows["context"][:]}
        found[split] = dataset.from_dict({**columns, "start": [s for s, _ in spans], "end": [e for _, e in spans]})
    return Data(found["train"], found.get("validation"), found.get("test"))


def _first(value: Any) -> Any:
    return (value[0] if value else None) if isinstance(value, list) else value


def encode_words(data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """Split → unpadded examples; the first token of each word has its label, the others have none."""
    cut = 0

    def encode(rows: dict[str, list]) -> dict[str, list]:
        nonlocal cut
        options = {"is_split_into_words": True, "truncation": True, "max_length": max_length}
        try:
            encoded = tokenizer(rows["words"], **options)
        except (AssertionError, ValueError) as error:
            if "add_prefix_space" not in str(error):
                raise
            raise DataError(
                "this tokenizer takes words only with add_prefix_space=True: load it so, and pass tokenizer="
            ) from None
        labels = []
        for number, tags in enumerate(rows["tags"]):
            words = encoded.word_ids(number)
            before = [None, *words[:-1]]
            labels.append([tags[w] if w is not None and w != b else _IGNORED for w, b in zip(words, before)])
            cut += max((w for w in words if w is not None), default=-1) < len(tags) - 1
        return {**encoded, "labels": labels}

    found = _map(data, encode)
    if cut:
        data.notes.append(f"{cut} texts are longer than max_length={max_length} tokens and are truncated, labels too")
    return found


def encode_answers(data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """Split → unpadded pairs of question and context with `start_positions` and `end_positions`.

    Both are of the first token for a row without an answer. A row whose answer is truncated is left out.
    """
    left = 0

    def encode(rows: dict[str, list]) -> dict[str, list]:
        nonlocal left
        options = {"truncation": "only_second", "max_length": max_length, "return_offsets_mapping": True}
        try:
            encoded = tokenizer(rows["text"], rows["context"], **options)
        except Exception as error:  # the tokenizers library raises no other
            if "Truncation error" not in str(error):
                raise
            raise DataError(f"{data.name}: a question alone is longer than max_length={max_length}: raise it") from None
        kept, starts, ends = [], [], []
        for number, (start, end) in enumerate(zip(rows["start"], rows["end"])):
            places, parts = encoded["offset_mapping"][number], encoded.sequence_ids(number)
            inside = [i for i, (a, b) in enumerate(places) if parts[i] == 1 and a < end and b > start]
            covered = bool(inside) and places[inside[0]][0] <= start and places[inside[-1]][1] >= end
            if end and not covered:
                left += 1
                continue
            kept.append(number)
            starts.append(inside[0] if end else 0)
            ends.append(inside[-1] if end else 0)
        names = [name for name in encoded if name != "offset_mapping"]
        columns = {name: [encoded[name][number] for number in kept] for name in names}
        return {**columns, "start_positions": starts, "end_positions": ends}

    found = _map(data, encode)
    for split, rows in found.items():
        if not len(rows):
            raise DataError(f"{data.name}, {split}: every answer is truncated at max_length={max_length}: raise it")
    if left:
        data.notes.append(f"{left} rows are left out, because max_length={max_length} truncates their answers")
    return found


def _map(data: Data, encode: Any) -> dict[str, Any]:
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        split: rows.map(
            encode, batched=True, load_from_cache_file=False, remove_columns=rows.column_names, desc=f"encoding {split}"
        )
        for split, rows in splits.items()
        if rows is not None
    }


def word_metrics(prediction: Any) -> dict[str, float]:
    """`accuracy` and `f1_macro` over the labelled words."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    kept = prediction.label_ids != _IGNORED
    return classification_metrics(logits[kept], prediction.label_ids[kept])


def answer_metrics(prediction: Any) -> dict[str, float]:
    """`exact_match`: the share of rows whose start and end both have the largest logits."""
    starts, ends = (np.asarray(logits).argmax(-1) for logits in prediction.predictions[:2])
    first, last = (np.asarray(positions).reshape(-1) for positions in prediction.label_ids)
    return {"exact_match": float(((starts == first) & (ends == last)).mean())}

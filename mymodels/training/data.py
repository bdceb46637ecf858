"""Texts and labels for fine-tuning, from files, folders or Hub data sets, checked row by row before training."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..messages import shorten
from .datasets_io import DataError, read_files, read_splits, require_module

_TEXT_NAMES = ("text", "sentence", "content", "document")
_SOURCE_NAMES = (*_TEXT_NAMES, "source", "input", "article", "question", "prompt")
_TARGET_NAMES = ("target", "summary", "output", "answer", "translation", "response", "label", "labels")
_LABEL_NAMES = ("label", "labels", "class", "category")


@dataclass
class Data:
    """Training and evaluation data: `datasets.Dataset`s with a column `text`, and `label` (numbers) or `target` (texts).

    Attributes:
        test: evaluated once, at the end; None if there is none.
        labels: the name of each label number; None without labels.
        name: name of the file, folder or Hub data set.
        hub_id: its id if it is a Hub data set.
        is_running_text: whether rows are consecutive paragraphs instead of independent texts.
        notes: notes for the user, a sentence each.
    """

    train: Any
    validation: Any
    test: Any = None
    labels: list[str] | None = None
    name: str = ""
    hub_id: str | None = None
    is_running_text: bool = False
    notes: list[str] = field(default_factory=list)


def load_data(
    data: Any,
    *,
    task: str,
    validation: str | os.PathLike | float | None = None,
    test: str | os.PathLike | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    target_column: str | None = None,
    data_config: str | None = None,
    known_labels: Sequence[str] = (),
    seed: int = 0,
) -> Data:
    """Read and check training data.

    Args:
        data: a CSV, TSV, JSON, JSONL, Parquet or text file; a folder with files `train.…`, and optionally
            `validation.…` and `test.…`; the id of a Hub data set; `"sample_text"`; or a `datasets.Dataset` or `DatasetDict`.
        task: `"classification"`, `"token-classification"` (a list of words and a list of labels a row),
            `"question-answering"` (`question`, `context`, and `answers` as in SQuAD or `answer`), `"lm"` or `"seq2seq"`.
        validation: a file, or the share of the training rows to hold out (default 0.1 where `data` has no validation
            split): drawn by `seed`, with the labels' shares; of running text its end.
        test: a file.
        text_column, label_column, target_column: default: found by common names and types where unambiguous.
        data_config: the configuration of a Hub data set that has several.
        known_labels: the labels of the model, whose order is kept if the data have the same labels.

    Raises:
        DataError: the data cannot be read or used for training; the message names file, row and column.
    """
    datasets = require_module("datasets", "finetune")
    splits, name, hub_id = read_splits(data, data_config, datasets)
    for split, path in (("validation", validation), ("test", test)):
        if path is not None and not isinstance(path, (int, float)):
            splits[split] = (read_files([Path(path)], datasets), str(path))
    running = name.endswith(".txt") or splits["train"][1].endswith(".txt")
    if task == "classification":
        if running:
            raise DataError(f"{splits['train'][1]} is a text file, which has no labels: use CSV, JSONL or Parquet")
        loaded = _read_labelled_texts(splits, text_column, label_column, known_labels, datasets)
    elif task == "seq2seq":
        if running:
            raise DataError(f"{splits['train'][1]} is a text file, which has no targets: use CSV, JSONL or Parquet")
        loaded = _read_pairs(splits, text_column, target_column)
    elif task in ("token-classification", "question-answering"):
        from .words_and_answers import read_answers, read_labelled_words

        if task == "question-answering":
            loaded = read_answers(splits)
        else:
            loaded = read_labelled_words(splits, text_column, label_column, known_labels)
    else:
        loaded = _read_texts(splits, text_column)
    train, held_out = loaded.train, loaded.validation
    classes = loaded.labels if task == "classification" else None  # one for each row
    if held_out is None:
        share = 0.1 if validation is None else float(validation)  # type: ignore[arg-type]  # a path was read above
        train, held_out = _hold_out(train, share, classes, seed, running, splits["train"][1])
    else:
        if isinstance(validation, (int, float)):
            raise DataError(f"{name} has a validation split already: leave out the share {validation}")
        if shared := len(set(held_out["text"]) & set(train["text"])):
            loaded.notes.append(f"{shared} of the validation texts are also training texts: the metrics are too good")
        if classes and (lacking := set(range(len(classes))) - set(held_out["label"])):
            names = quote_names(classes[number] for number in sorted(lacking))
            loaded.notes.append(f"the validation data have no example of {names}: the metrics do not cover it")
    loaded.train, loaded.validation = train, held_out
    loaded.name, loaded.hub_id, loaded.is_running_text = name, hub_id, running
    return loaded


def _read_texts(splits: dict[str, tuple[Any, str]], text_column: str | None) -> Data:
    """The splits for a language model, with the column `text`."""
    found: dict[str, Any] = {}
    for split, (rows, where) in splits.items():
        column = _text_column(rows, where, text_column)
        rows = rows.select_columns([column]).rename_columns({column: "text"} if column != "text" else {})
        _check_texts(rows, where, column)
        found[split] = rows
    return Data(found["train"], found.get("validation"), found.get("test"))


def _read_pairs(splits: dict[str, tuple[Any, str]], text_column: str | None, target_column: str | None) -> Data:
    """The splits for an encoder-decoder, with the columns `text` and `target`."""
    found: dict[str, Any] = {}
    for split, (rows, where) in splits.items():
        names = rows.column_names
        if target_column is not None:
            target = _require_column(rows, where, target_column, "--target-column")
        else:
            named = [name for name in _TARGET_NAMES if name in names and name != text_column]
            named = named[:1] if named[:1] == ["target"] else [n for n in named if n not in _LABEL_NAMES] or named
            others = [name for name in names if "string" in str(rows.features[name]) and name != text_column]
            others = others if text_column is not None and len(others) == 1 else []
            if len(named or others) != 1:
                raise DataError(
                    f"{where} has the columns {quote_names(names)}: name the one with the targets by --target-column"
                )
            target = (named or others)[0]
        if text_column is not None:
            source = _require_column(rows, where, text_column, "--text-column")
        else:
            texts = [name for name in _SOURCE_NAMES if name in names and name != target]
            rest = [name for name in names if "string" in str(rows.features[name]) and name != target]
            if not texts and len(rest) != 1:
                raise DataError(
                    f"{where} has the columns {quote_names(names)}: name the one with the texts by --text-column"
                )
            source = (texts or rest)[0]
        if source == target:
            raise DataError(f"{where}, column {source!r} is named as text and as target: name two columns")
        _check_texts(rows, where, source)
        _check_texts(rows, where, target, "--target-column")
        rows = require_module("datasets", "finetune").Dataset.from_dict(
            {"text": rows[source][:], "target": rows[target][:]}
        )
        found[split] = rows
    return Data(found["train"], found.get("validation"), found.get("test"))


def _read_labelled_texts(
    splits: dict[str, tuple[Any, str]],
    text_column: str | None,
    label_column: str | None,
    known_labels: Sequence[str],
    datasets: Any,
) -> Data:
    """The splits for classification, with the columns `text` and `label`; the training rows define the labels."""
    columns: dict[str, tuple[str, str]] = {}
    names: dict[str, list[str | None]] = {}
    for split, (rows, where) in splits.items():
        label = _label_column(rows, where, label_column, text_column)
        columns[split] = _text_column(rows, where, text_column, without=label), label
        _check_texts(rows, where, columns[split][0])
        names[split] = _label_names(rows, where, label)
    if "test" in splits and not any(names["test"]):  # Hub data sets of contests have unlabelled test splits
        del splits["test"], names["test"]
    labels = order_labels(splits["train"][0].features[columns["train"][1]], names["train"], known_labels)
    numbers = {name: i for i, name in enumerate(labels)}
    found = {}
    for split, (rows, where) in splits.items():
        text, label = columns[split]
        for row, name in enumerate(names[split], 1):
            if name is None:
                raise DataError(
                    f"{where} row {row}, column {label!r}: the label is missing: fill it in, or remove the row"
                )
            if name not in numbers:
                raise DataError(
                    f"{where} row {row}, column {label!r}: the label {name!r} does not occur in {splits['train'][1]}, "
                    f"which has {quote_names(labels)}: correct it, or add training examples of it"
                )
        encoded = [numbers[str(name)] for name in names[split]]
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=labels)})
        found[split] = datasets.Dataset.from_dict({"text": rows[text][:], "label": encoded}, features=features)
    where, label, counts = splits["train"][1], columns["train"][1], Counter(names["train"])
    if len(counts) < 2:
        raise DataError(
            f"{where}, column {label!r}: every row has the label {labels[0]!r}, so there is nothing to classify: "
            "add examples of another label, or name another --label-column"
        )
    if len(counts) == len(names["train"]):
        raise DataError(
            f"{where}, column {label!r}: each of {len(counts)} rows has a different label, so nothing can be learnt: "
            "name another --label-column, or add examples"
        )
    return Data(found["train"], found.get("validation"), found.get("test"), labels)


def order_labels(feature: Any, names: Sequence[str | None], known: Sequence[str]) -> list[str]:
    """The labels in a stable order: the data set's or the model's order, else numeric, else alphabetical."""
    present = {name for name in names if name is not None}
    if hasattr(feature, "names"):
        own = list(feature.names)
        return list(known) if set(own) == set(known) else own
    if set(known) == present:
        return list(known)
    if all(re.fullmatch(r"-?\d+", name) for name in present):
        return sorted(present, key=lambda name: (int(name), name))
    return sorted(present)


def _label_names(rows: Any, where: str, column: str) -> list[str | None]:
    """The name of each row's label; None where it is missing."""
    feature, names = rows.features[column], []
    class_names = getattr(feature, "names", None)
    for row, value in enumerate(rows[column], 1):
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of integers with missing values is read as floats
        if isinstance(value, (float, list, dict)) and value == value:
            raise DataError(
                f"{where} row {row}, column {column!r}: the label is {shorten(repr(value), 40)}, but classification needs one name or "
                "integer per text: name another --label-column"
            )
        if class_names is not None and value is not None:
            value = class_names[value] if value >= 0 else None
        missing = value is None or value != value or str(value).strip() == ""
        names.append(None if missing else str(value) if class_names else str(value).strip())
    return names


def _check_texts(rows: Any, where: str, column: str, option: str = "--text-column") -> None:
    bad = [(row, text) for row, text in enumerate(rows[column], 1) if not isinstance(text, str) or not text.strip()]
    if bad:
        row, text = bad[0]
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        what = "the text is empty: fill it in, or remove such rows"
        if text is not None and text == text and not isinstance(text, str):
            what = f"{shorten(repr(text), 40)} is not a text: name the column with the texts by {option}"
        raise DataError(f"{where} row {row}{more}, column {column!r}: {what}")


def _text_column(rows: Any, where: str, asked: str | None, without: str | None = None) -> str:
    if asked is not None:
        return _require_column(rows, where, asked, "--text-column")
    named = [name for name in _TEXT_NAMES if name in rows.column_names and name != without]
    texts = [name for name in rows.column_names if "string" in str(rows.features[name]) and name != without]
    if named or len(texts) == 1:
        return (named or texts)[0]
    raise DataError(
        f"{where} has the columns {quote_names(rows.column_names)}: name the one with the texts by --text-column"
    )


def _label_column(rows: Any, where: str, asked: str | None, text_column: str | None) -> str:
    if asked is not None:
        return _require_column(rows, where, asked, "--label-column")
    others = [name for name in rows.column_names if name != text_column]
    named = [name for name in _LABEL_NAMES if name in others]
    if len(named) == 1:
        return named[0]
    if not named and text_column is None:
        texts = [name for name in _TEXT_NAMES if name in others]
        others = [name for name in others if not texts or name != texts[0]]
    if not named and len(others) == 1:
        return others[0]
    raise DataError(
        f"{where} has the columns {quote_names(rows.column_names)}: name the one with the labels by --label-column"
    )


def _require_column(rows: Any, where: str, column: str, option: str) -> str:
    if column not in rows.column_names:
        raise DataError(f"{where} has no column {column!r}, but {quote_names(rows.column_names)}: correct {option}")
    return column


def _hold_out(
    train: Any, share: float, labels: list[str] | None, seed: int, running: bool, where: str
) -> tuple[Any, Any]:
    """Training and validation rows."""
    if not 0 < share < 1:
        raise DataError(f"validation={share:g} is not between 0 and 1: pass the share of the data, or a file")
    count = max(round(share * len(train)), len(labels or [1]))
    if labels is not None:
        for number, times in Counter(train["label"]).items():
            if times < 2:
                row = list(train["label"]).index(number) + 1
                raise DataError(
                    f"{where} row {row} is the only one with the label {labels[number]!r}, so it cannot be in both the "
                    "training and the validation data: add examples, remove the row, or pass --validation FILE"
                )
    if len(train) < 2 or len(train) - count < len(labels or [1]):
        what = "paragraphs, separated by empty lines" if running else "rows"
        raise DataError(
            f"{where} has {len(train)} {what}, too few to hold some out for validation: add more, or pass --validation FILE"
        )
    if running:
        return train.select(range(len(train) - count)), train.select(range(len(train) - count, len(train)))
    if labels is None:
        split = train.train_test_split(test_size=count, seed=seed)
        return split["train"], split["test"]
    split = train.train_test_split(test_size=count, seed=seed, stratify_by_column="label")
    kept, held_out = _one_of_each(split["train"], split["test"])
    return _one_of_each(held_out, kept)[::-1]


def _one_of_each(giving: Any, taking: Any) -> tuple[Any, Any]:
    """Move one example of each label that is missing in `taking`, where stratifying rounds rare labels to none."""
    numbers = list(giving["label"])
    moved = [numbers.index(number) for number in sorted(set(numbers) - set(taking["label"]))]
    if not moved:
        return giving, taking
    rest = [i for i in range(len(giving)) if i not in moved]
    return giving.select(rest), require_module("datasets", "finetune").concatenate_datasets(
        [taking, giving.select(moved)]
    )


def quote_names(names: Iterable[str], most: int = 12) -> str:
    names = list(map(str, names))
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")

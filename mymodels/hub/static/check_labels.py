"""Checks of labels: one name for each output of the classifier, and a valid problem type."""

import re
from collections.abc import Iterator
from typing import Any

from .headers import tensor_headers
from .repo_snapshot import Finding, Folder, brief

_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
_CLASSIFIER = re.compile(r"For(Sequence|Token|Image|Audio|Video)\w*Classification$")
_HEAD = re.compile(r"(^|\.)(classifier|score|classifier\.out_proj|classification_head\.out_proj)\.weight$")


def labels(folder: Folder) -> Iterator[Finding]:
    """`id2label`, `label2id`, `num_labels` and the rows of the classifier agree."""
    config, where = folder.config, "config.json: id2label"
    names, numbers, count = config.get("id2label"), config.get("label2id"), config.get("num_labels")
    remedy = "give the config id2label and label2id for all labels, from 0 on, and save it again"
    for key, value in (("id2label", names), ("label2id", numbers)):
        if value is not None and not isinstance(value, dict):
            yield Finding("failed", f"{key} is {brief(value)}, not a table", f"config.json: {key}", remedy)
    ids: dict[int, Any] = {}
    if isinstance(names, dict) and names:
        odd = [key for key in names if not re.fullmatch(r"\d+", str(key))]
        if odd:
            yield Finding("failed", f"id2label has the key {brief(odd[0])}, which is not a number", where, remedy)
            return
        ids = {int(key): value for key, value in names.items()}
        yield from _names(ids, where, remedy)
        if count is not None and count != len(ids):
            what = f"num_labels is {brief(count)}, but id2label has {len(ids)} labels"
            yield Finding("failed", what, "config.json: num_labels", remedy)
        if isinstance(numbers, dict) and numbers:
            yield from _inverse(ids, numbers)
    elif isinstance(numbers, dict) and numbers and names is None:
        ids = {number: name for name, number in numbers.items() if isinstance(number, int)}
    found = len(ids) or count
    if isinstance(found, int) and (rows := _head_rows(folder)) is not None and rows[1] != found:
        what = f"the config has {found} labels, but {rows[0]} has {rows[1]} rows"
        yield Finding("failed", what, where if ids else "config.json: num_labels", remedy)
    problem = config.get("problem_type")
    if problem is not None and problem not in _PROBLEMS:
        what = f"problem_type is {brief(problem)}, which transformers does not know: no loss is computed"
        yield Finding("failed", what, "config.json: problem_type", f"write one of {', '.join(_PROBLEMS)}")
    if problem == "single_label_classification" and found == 1:
        what = "problem_type is single_label_classification, but there is one label only: the loss is always 0"
        yield Finding("failed", what, "config.json: problem_type", 'write "regression", or give it two labels')


def _names(ids: dict[int, Any], where: str, remedy: str) -> Iterator[Finding]:
    if gaps := sorted(set(range(max(ids) + 1)) - ids.keys()):
        what = f"id2label has {len(ids)} labels up to {max(ids)}, but none for {gaps[0]}"
        yield Finding("failed", what, where, remedy)
    if odd := [number for number, name in ids.items() if not isinstance(name, str)]:
        yield Finding("failed", f"the label of {odd[0]} is {brief(ids[odd[0]])}, no text", where, remedy)
        return
    seen: dict[str, int] = {}
    twice = [(seen[name], number) for number, name in sorted(ids.items()) if seen.setdefault(name, number) != number]
    if twice:
        first, second = twice[0]
        what = f"id2label names {first} and {second} both {brief(ids[first])}"
        few = len(twice) <= len(ids) / 100  # ImageNet itself has a few duplicates
        yield Finding("warning" if few else "failed", what, where, "give each label a name of its own")


def _inverse(ids: dict[int, Any], numbers: dict[str, Any]) -> Iterator[Finding]:
    where, remedy = "config.json: label2id", "make label2id the inverse of id2label: {name: id}"
    texts = [name for name, number in numbers.items() if isinstance(number, str)]
    plain: dict[str, int] = {}
    for name, number in numbers.items():
        if isinstance(number, bool) or not re.fullmatch(r"\d+", str(number)):
            yield Finding("failed", f"label2id gives {brief(name)} the id {brief(number)}, no number", where, remedy)
            return
        plain[name] = int(number)
    if texts:
        what = f"label2id gives {brief(texts[0])} the id {brief(numbers[texts[0]])}, a text: write it as a number"
        yield Finding("warning", what, where, remedy)
    if extra := [name for name, number in plain.items() if number not in ids]:
        what = f"label2id gives {brief(extra[0])} the id {plain[extra[0]]}, for which id2label has no name"
        yield Finding("failed", what, where, remedy)
        return
    for number, name in ids.items():
        known = name in plain or len(set(ids.values())) == len(ids)
        if isinstance(name, str) and known and plain.get(name) != number and list(ids.values()).count(name) == 1:
            other = f"gives it {plain[name]}" if name in plain else "does not have it"
            yield Finding("failed", f"id2label names {number} {brief(name)}, but label2id {other}", where, remedy)
            return


def _head_rows(folder: Folder) -> tuple[str, int] | None:
    """Name and number of rows of the classifier's weight, if the config and the folder have one."""
    listed = folder.config.get("architectures")
    if not isinstance(listed, list) or not any(_CLASSIFIER.search(str(name)) for name in listed):
        return None
    info = tensor_headers(folder)
    heads = [(name, tensor.shape[0]) for name, tensor in info.items() if _HEAD.search(name) and len(tensor.shape) == 2]
    return heads[0] if len(heads) == 1 else None


CHECKS = {"labels": labels}

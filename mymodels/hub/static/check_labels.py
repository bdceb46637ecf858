"""Checks of labels and processors: one name for each output, and the processor that the model needs."""

import re
from collections.abc import Iterator
from typing import Any

from ...checkpoints import CheckpointError, open_checkpoint
from ...checkpoints.opening import weight_files
from .check_config import all_code, library_names, own_code, target
from .code_tree import references
from .repo_snapshot import Finding, Folder, brief

_CLASSIFIER = re.compile(r"For(Sequence|Token|Image|Audio|Video)\w*Classification$")
_HEAD = re.compile(r"(^|\.)(classifier|score|classifier\.out_proj|classification_head\.out_proj)\.weight$")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


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
            yield Finding("failed", f"id2label has the key {brief(odd[0])}, which is no number", where, remedy)
            return
        ids = {int(key): value for key, value in names.items()}
        yield from _names(ids, where, remedy)
        if count is not None and count != len(ids):
            what = f"num_labels is {brief(count)}, but id2label has {len(ids)} labels"
            yield Finding("failed", what, "config.json: num_labels", remedy)
        if isinstance(numbers, dict) and numbers:
            yield from _inverse(ids, numbers)
    found = len(ids) or count
    if isinstance(found, int) and (rows := _head_rows(folder)) is not None and rows[1] != found:
        what = f"the config has {found} labels, but {rows[0]} has {rows[1]} rows"
        yield Finding("failed", what, where if ids else "config.json: num_labels", remedy)
    if config.get("problem_type") == "single_label_classification" and found == 1:
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
        few = len(twice) <= len(ids) / 100  # ImageNet has a few of these itself
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
    for number, name in ids.items():
        known = name in plain or len(set(ids.values())) == len(ids)
        if isinstance(name, str) and known and plain.get(name) != number and list(ids.values()).count(name) == 1:
            other = f"gives it {plain[name]}" if name in plain else "does not have it"
            yield Finding("failed", f"id2label names {number} {brief(name)}, but label2id {other}", where, remedy)
            return


def _head_rows(folder: Folder) -> tuple[str, int] | None:
    """The classifier's weight and how many rows it has, if the folder has one and its config says so."""
    listed = folder.config.get("architectures")
    if folder.odd or not isinstance(listed, list) or not any(_CLASSIFIER.search(str(name)) for name in listed):
        return None
    try:
        info = open_checkpoint(folder.path).info if weight_files(folder.path) else {}
    except (CheckpointError, OSError):
        return None  # named by `weights`
    heads = [(name, tensor.shape[0]) for name, tensor in info.items() if _HEAD.search(name) and len(tensor.shape) == 2]
    return heads[0] if len(heads) == 1 else None


# file → the keys whose values are classes
_CLASSES = {
    "preprocessor_config.json": ("image_processor_type", "feature_extractor_type", "processor_class"),
    "processor_config.json": ("processor_class",),
    "video_preprocessor_config.json": ("video_processor_type", "processor_class"),
    "tokenizer_config.json": ("processor_class",),
}
_NEEDS = {
    "pixel_values": "AutoImageProcessor",
    "input_features": "AutoFeatureExtractor",
    "input_values": "AutoFeatureExtractor",
}
_AUTOS = ("AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor")


def processors(folder: Folder) -> Iterator[Finding]:
    """The processor's class can be found, and the files it is made from are there."""
    code = all_code(folder)
    own = {reference.rpartition(".")[2] for _, _, reference in references(folder)}
    for file, keys in _CLASSES.items():
        values = folder.values.get(file, {})
        served = isinstance(values.get("auto_map"), dict) or any(auto in folder.auto_map for auto in _AUTOS)
        for key in keys:
            name = values.get(key)
            if name is None or name in own or served or any(klass.name == name for klass in code.classes):
                continue
            known = library_names()
            if not isinstance(name, str) or not ({name, f"{name}Fast", name.removesuffix("Fast")} & known):
                what = f"transformers has no class {brief(name)}, and auto_map does not lead to one"
                yield Finding("failed", what, f"{file}: {key}", "name a class of transformers, or add it to auto_map")
    if any(name in folder.files for name in _PROCESSOR_FILES) or not folder.config:
        return
    promised = _promised(folder)
    remedy = "save the processor beside the model: processor.save_pretrained(folder)"
    if promised:
        what = f"there is no preprocessor_config.json, although {promised}"
        yield Finding("failed", what, "preprocessor_config.json", remedy)
    elif takes := _takes(folder):
        what = f"the model takes {takes}, but there is no preprocessor_config.json to make them with"
        yield Finding("warning", what, "preprocessor_config.json", remedy)


def _promised(folder: Folder) -> str:
    """What in the folder says that there is a processor."""
    for name, auto, _ in references(folder):
        if auto in ("AutoImageProcessor", "AutoFeatureExtractor"):
            return f"auto_map of {name} has {auto}"
    named = folder.values.get("tokenizer_config.json", {}).get("processor_class")
    if isinstance(named, str) and _takes(folder):
        return f"tokenizer_config.json names {named}"
    card = folder.files.get("README.md")
    if card is not None and _takes(folder):
        text = card.open("rb").read(200_000).decode("utf-8", errors="replace")
        if used := re.search(
            r"\b(Auto(Image)?Processor|AutoFeatureExtractor|\w+ImageProcessor|pipeline)\b(?=[.(])", text
        ):
            return f"the README uses {used[0]}"
        if tag := re.search(r"^pipeline_tag: *((image|audio|video|zero-shot-image|automatic-speech)\S*)", text, re.M):
            return f"the README has pipeline_tag: {tag[1]}"
    return ""


def _takes(folder: Folder) -> str:
    """Which input of images or sounds the main model asks for, if it is known not to take texts alone."""
    if own_code(folder):
        code = all_code(folder)
        for auto in folder.auto_map:
            klass = target(folder, code, auto) if str(auto).startswith("AutoModel") else None
            found = code.method(klass, "forward") if klass is not None else None
            if found is not None:
                arguments = [a.arg for a in [*found[1].args.args, *found[1].args.kwonlyargs]]
                if arguments[1:] and arguments[1] in _NEEDS:
                    return arguments[1]
        return ""
    listed = folder.config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    if not isinstance(name, str) or name not in library_names() or "Timm" in name:
        return ""
    import transformers

    main = getattr(getattr(transformers, name, None), "main_input_name", "input_ids")
    return main if main in _NEEDS else ""


CHECKS = {"labels": labels, "processors": processors}

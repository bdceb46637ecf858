"""The Auto class of a model class by the suffix of its name, from transformers' own mappings."""

import re
from collections import Counter
from collections.abc import Collection
from functools import cache

import transformers

_OTHER_SUFFIXES = {  # suffixes other than `For…`; "" for a class without an Auto class
    "PreTrainedModel": "",
    "Config": "AutoConfig",
    "LMHeadModel": "AutoModelForCausalLM",
    "Model": "AutoModel",
}
_SOUNDS, _PICTURES = {"input_features", "input_values"}, {"pixel_values", "pixel_values_videos"}
_SOUND_NAMES = re.compile("Speech|Audio|CTC|Wave|Spectrogram|RNNT|TDT")
_PICTURE_NAMES = re.compile("Image|Visual|Vision|Video|Document|Object|Segmentation|Depth")
_UNSPECIFIC = {
    "AutoModel",
    "AutoModelForPreTraining",
    "AutoModelForMultimodalLM",
}  # their mappings repeat classes of other Auto classes


@cache
def _auto_classes_by_suffix() -> dict[str, Counter[str]]:
    """Suffix such as `ForConditionalGeneration` → Auto class → number of its model classes with this suffix."""
    found: dict[str, Counter[str]] = {}
    for auto_class in dir(transformers):
        if not auto_class.startswith("AutoModelFor"):
            continue
        mapping = getattr(getattr(transformers, auto_class), "_model_mapping", None)
        for names in getattr(mapping, "_model_mapping", {}).values():
            for name in names if isinstance(names, (tuple, list)) else [names]:
                if ending := _head_suffix(name):
                    found.setdefault(ending, Counter())[auto_class] += 1
    return found


def _head_suffix(class_name: str) -> str:
    """The suffix `ForSomething` of a class name, or ""."""
    found = re.search(r"For[A-Z](?:(?!For[A-Z])\w)*$", class_name)
    return found[0] if found else ""


def auto_class_of(class_name: str, arguments: Collection[str] = ()) -> str:
    """The Auto class of a class by the suffix of its name; `""` if no Auto class has this suffix.

    Args:
        arguments: of its `forward`. They decide where several Auto classes have the suffix:
            `ForConditionalGeneration` is `AutoModelForSpeechSeq2Seq` with `input_features`,
            `AutoModelForImageTextToText` with `pixel_values`, else `AutoModelForSeq2SeqLM`.

    Example:
        >>> auto_class_of("MyNetForImageClassification")
        'AutoModelForImageClassification'
    """
    ending = _head_suffix(class_name)
    if not ending:
        return next((auto for end, auto in _OTHER_SUFFIXES.items() if class_name.endswith(end)), "")
    counts = _auto_classes_by_suffix().get(ending, Counter())
    same = f"AutoModel{ending}"
    if hasattr(transformers, same) and same not in counts:
        return same
    candidates = [name for name, _ in counts.most_common() if name not in _UNSPECIFIC] or list(counts)
    sound = [name for name in candidates if _SOUND_NAMES.search(name)]
    picture = [name for name in candidates if _PICTURE_NAMES.search(name)]
    if _SOUNDS & set(arguments):
        preferred = sound
    elif _PICTURES & set(arguments):
        preferred = [same] if same in picture else picture
    else:
        preferred = [same] if same in candidates else [n for n in candidates if n not in sound and n not in picture]
    return next(iter([*preferred, *candidates]), "")


@cache  # the thousands of names take transformers half a second
def known_auto_classes() -> tuple[str, ...]:
    """The Auto classes of models in the installed transformers."""
    return tuple(sorted(name for name in dir(transformers) if re.fullmatch(r"AutoModel(For\w+)?", name)))

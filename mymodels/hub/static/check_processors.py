"""Checks of processors: their classes and files exist, and their output fits the model."""

import ast
import re
from collections.abc import Iterator
from typing import Any

from .check_config import all_code, in_library, library_names, own_code, target
from .code_tree import Code, constant, references
from .repo_snapshot import Finding, Folder, brief

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

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
    """The processor's class can be found, and its files exist."""
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
    """The evidence in the folder that the model needs a processor; "" if there is none."""
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
    """The image or audio input of the main model, if it is known to need one."""
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

    try:
        main = getattr(getattr(transformers, name, None), "main_input_name", "input_ids")
    except ImportError:  # a class whose package is not installed raises on any attribute
        return ""
    return main if main in _NEEDS else ""


# families whose position table is for one image size; they raise for another
_FIXED_SIZE = re.compile(
    r"(vit|vit_mae|vit_msn|deit|beit|clip\w*|clip_vision_model|chinese_clip\w*|siglip|siglip_vision_model|blip|blip_\w+|yolos|"
    r"altclip\w*|x-clip|vilt|dpt|data2vec-vision|ijepa)$"
)
_SOUNDS_OF_16_KHZ = re.compile(
    r"(wav2vec2\w*|wav2vec2-\w+|hubert|wavlm|unispeech\S*|sew\S*|whisper|audio-spectrogram-transformer)$"
)


def processor_values(folder: Folder) -> Iterator[Finding]:
    """The processor's image sizes, scale and sampling rate match the model."""
    values = folder.values.get("preprocessor_config.json", {})
    inner = folder.values.get("processor_config.json", {})
    for key in ("image_processor", "feature_extractor"):
        values = values or (inner[key] if isinstance(inner.get(key), dict) else {})
    if not values:
        return
    yield from _colours(folder, values)
    yield from _image_size(folder, values)
    yield from _sounds(folder, values)


_FILE = "preprocessor_config.json"


def _colours(folder: Folder, values: dict[str, Any]) -> Iterator[Finding]:
    mean, std = (
        [values[key]] if isinstance(values.get(key), (int, float)) else values.get(key)
        for key in ("image_mean", "image_std")
    )
    vision = _vision(folder)
    channels = vision.get("num_channels", vision.get("in_channels", 3))
    for key, value in (("image_mean", mean), ("image_std", std)):
        if not isinstance(value, list) or not value:
            continue
        where = f"{_FILE}: {key}"
        if not all(isinstance(n, (int, float)) for n in value):
            yield Finding("failed", f"{key} is {brief(value)}, not numbers", where, "write one number for each channel")
        elif isinstance(channels, int) and len(value) not in (1, channels) and isinstance(values.get(key), list):
            what = f"{key} has {len(value)} values, but the model takes {channels} channels"
            yield Finding("failed", what, where, "write one number for each channel")
        elif len(value) == 1 and channels == 3 and isinstance(values.get(key), list):
            what = f"{key} has one value, but the model takes 3 channels"
            yield Finding("failed", what, where, "write one number for each channel")
        elif key == "image_std" and any(n <= 0 for n in value):
            what = f"image_std is {brief(value)}: pixels are divided by it"
            yield Finding(
                "failed", what, where, "write the standard deviation of the pixels that the model was trained on"
            )
        elif (
            values.get("do_rescale", True) is True and values.get("rescale_factor", 1 / 255) < 0.5 and max(value) > 1.5
        ):
            what = f"{key} is {brief(value)}, for pixels from 0 to 255, but they are scaled to 0 to 1 first"
            yield Finding("failed", what, where, "divide it by 255, or set do_rescale to false")


def _vision(folder: Folder) -> dict[str, Any]:
    inner = folder.config.get("vision_config")
    return inner if isinstance(inner, dict) else folder.config


def _image_size(folder: Folder, values: dict[str, Any]) -> Iterator[Finding]:
    vision = _vision(folder)
    family, wanted = vision.get("model_type"), vision.get("image_size")
    if not isinstance(wanted, int) or not isinstance(family, str) or not _FIXED_SIZE.match(family):
        return
    crops = values.get("do_center_crop") is True or (
        "crop_size" in values and values.get("do_center_crop") is not False
    )
    key = "crop_size" if crops and "crop_size" in values else "size"
    size = values.get(key)
    if values.get("do_resize") is False and key == "size":
        return
    made = set(size.values()) if isinstance(size, dict) else {size}
    if isinstance(size, dict) and not {"height", "shortest_edge"} & size.keys():
        return
    sides = sorted(n for n in made if isinstance(n, int))
    if sides and {*sides} != {wanted}:
        what = f"{key} makes images of {' × '.join(map(str, sides))}, but the model takes {wanted} × {wanted}"
        yield Finding("failed", what, f"{_FILE}: {key}", "save the processor that belongs to this model")


def _sounds(folder: Folder, values: dict[str, Any]) -> Iterator[Finding]:
    rate, family = values.get("sampling_rate"), folder.config.get("model_type")
    expected = folder.config.get("sampling_rate")
    if isinstance(family, str) and _SOUNDS_OF_16_KHZ.match(family):
        expected = 16000
    if isinstance(rate, int) and isinstance(expected, int) and rate != expected:
        what = f"sampling_rate is {rate}, but the model takes sounds of {expected} Hz"
        yield Finding("failed", what, f"{_FILE}: sampling_rate", "save the processor that belongs to this model")
    bins = folder.config.get("num_mel_bins")
    for key in ("feature_size", "num_mel_bins"):
        made = values.get(key)
        if isinstance(bins, int) and isinstance(made, int) and made != bins and made > 1:
            what = f"{key} is {made}, but the model takes {bins} mel bins"
            yield Finding("failed", what, f"{_FILE}: {key}", "save the processor that belongs to this model")
            return


def processor_code(folder: Folder) -> Iterator[Finding]:
    """The classes that the folder's processor class names can be found."""
    code = all_code(folder)
    for klass in code.classes:
        if not any(root.rpartition(".")[2] == "ProcessorMixin" for root in code.roots(klass)):
            continue
        listed = klass.value("attributes")
        parts = [constant(part) for part in listed.elts] if isinstance(listed, (ast.List, ast.Tuple)) else []
        for part in parts:
            named = klass.value(f"{part}_class")
            if named is None and code.value(klass, f"{part}_class") is None and part != "audio_tokenizer":
                what = f"{klass.name}.attributes has {brief(part)}, but there is no {part}_class"
                yield Finding("warning", what, klass.where, "name the class, which transformers 4 asks for")
            for name in _texts(named):
                if not in_library(name) and not _in_code(code, name):
                    what = f"{klass.name}.{part}_class names {brief(name)}, which is not a class of transformers or this folder"
                    yield Finding(
                        "failed", what, klass.where, "name the class, or AutoTokenizer, AutoImageProcessor, …"
                    )


def _texts(node: ast.AST | None) -> Iterator[str]:
    for inner in [node, *getattr(node, "elts", [])]:
        if isinstance(text := constant(inner), str):
            yield text


def _in_code(code: Code, name: str) -> bool:
    return any(klass.name == name for klass in code.classes)


CHECKS = {"processors": processors, "processor values": processor_values, "processor code": processor_code}

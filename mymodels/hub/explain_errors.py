"""Explain errors: from the text of an exception to a sentence with the cause and the file, by one table."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .checks import Check
from .config_attributes import DEFAULTS_OF_4

_STANDARD = {  # attributes that transformers reads from every config
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim"),
    *("max_position_embeddings", "intermediate_size"),
}


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _attribute(match: re.Match, folder: Path) -> str:
    owner, name = match["owner"], match["name"]
    if name in _STANDARD:
        return (
            f"{owner} has no {name}, which transformers reads: rename the field, or add "
            f'attribute_map = {{"{name}": "your name"}} to the class'
        )
    if name in DEFAULTS_OF_4:
        return (
            f"{owner} has no {name}, which transformers 5.0 and newer do not set by default: take it as an argument of "
            f"__init__ ({name}=None) and set self.{name}"
        )
    return ""


def _without_mixin(match: re.Match, folder: Path) -> str:
    name = match["name"].rpartition(".")[2]
    text = "".join(_read_text(path) for path in sorted(folder.glob("*.py")))
    found = re.search(rf"^class {re.escape(name)}\((?P<bases>[^)]*)\)", text, re.MULTILINE)
    if found is None or "GenerationMixin" in found["bases"]:
        return ""
    return (
        f"{name} cannot be pickled: it does not derive from GenerationMixin, so transformers creates a subclass of the "
        f"same name; write class {name}({found['bases'].strip()}, GenerationMixin)"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:1_000_000]
    except OSError:
        return ""


def _index(match: re.Match, folder: Path) -> str:
    config = _read_json(folder, "config.json")
    inner = config.get("text_config")
    size = (inner if isinstance(inner, dict) else config).get("vocab_size")
    for name in ("config.json", "generation_config.json"):
        for key, value in _read_json(folder, name).items():
            ids = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)]
            outside = [v for v in ids if isinstance(size, int) and (v >= size or v < 0)]
            if key.endswith("_token_id") and outside:
                return (
                    f"{key} in {name} is {outside[0]}, for which the embeddings have no row (vocab_size is {size}): "
                    "index out of range"
                )
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    of = f" ({longest} positions)" if isinstance(longest, int) else ""
    tokens = f" ({size} tokens)" if isinstance(size, int) else ""
    return f"an embedding has no row for an index: a token id beyond the vocabulary{tokens}, or a position beyond the last{of}"


def _class_entry(match: re.Match, folder: Path) -> str:
    for name in ("tokenizer_config.json", "config.json", "preprocessor_config.json", "processor_config.json"):
        table = _read_json(folder, name).get("auto_map")
        for auto, entry in table.items() if isinstance(table, dict) else ():
            if auto == "AutoTokenizer" and isinstance(entry, str):
                return f"auto_map.AutoTokenizer in {name} is a string: write a pair, [{json.dumps(entry)}, null]"
            for one in entry if isinstance(entry, list) else [entry]:
                if isinstance(one, str) and one.count(".") != 1:
                    return f"auto_map.{auto} in {name} is {one[:80]!r}, which is not file.Class"
    return ""


def _no_vocabulary(match: re.Match, folder: Path) -> str:
    config = _read_json(folder, "tokenizer_config.json")
    if not config:
        return ""
    kind = config.get("tokenizer_class", "the tokenizer")
    files = sorted(
        {f for path in folder.glob("*.py") for f in re.findall(r'_file"\s*:\s*"([\w.-]+)"', _read_text(path))}
    )
    missing = [name for name in files if not (folder / name).exists()]
    named = f" ({', '.join(missing)})" if missing else ""
    return f"{kind} has no vocabulary file{named} in the folder, so its path is None: add the file"


def _not_json(match: re.Match, folder: Path) -> str:
    for path in sorted(folder.glob("*.json*")):
        head = _first_bytes(path)
        if head.startswith(b"version https://git-lfs"):
            return f"{path.name} is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it again"
        if head.startswith(b"\xef\xbb\xbf"):
            return f"{path.name} begins with a byte order mark (BOM): save it as UTF-8 without BOM"
        if not head:
            return f"{path.name} is empty: copy or download it again"
    for path in sorted(folder.glob("*.json")):
        if _invalid(path):
            return f"{path.name} is not valid JSON: copy or download it again"
    return ""


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(40).strip(b" \n\t")
    except OSError:
        return b""


def _invalid(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return True
    except OSError:
        return False
    return False


def _lfs_pointer(match: re.Match, folder: Path) -> str:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and _first_bytes(path).startswith(b"version https://git-lfs"):
            return f"{path.name} is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it again"
    return ""


def _plain_tuple(match: re.Match, folder: Path) -> str:
    return (
        f"forward returns a plain tuple, without .{match['name']}: return a ModelOutput of "
        "transformers.modeling_outputs unless return_dict=False is passed"
    )


def _unknown_type(match: re.Match, folder: Path) -> str:
    config = _read_json(folder, "config.json")
    mapped = config.get("auto_map")
    if isinstance(mapped, dict) and "AutoConfig" in mapped:
        return ""
    kind = config.get("model_type")
    code = "no auto_map names the folder's code" if any(folder.glob("*.py")) else "the folder holds no code"
    known = (
        f"model_type {str(kind)[:60]!r} is unknown to this transformers release" if kind else "there is no model_type"
    )
    return (
        f"in config.json {known}, and {code}: save the model with its code (`mymodels build`, or "
        "register_for_auto_class before save_pretrained), or use a release that has it"
    )


Explain = Callable[[re.Match, Path], str]
# pattern of an error's text → function that returns the explanation, or "" if the folder does not confirm it
EXPLANATIONS: list[tuple[str, Explain]] = [
    (r"'(?P<owner>\w+)' object has no attribute '(?P<name>\w+)'", _attribute),
    (r"Can't pickle <class '(?P<name>[\w.]+)'>: it's not the same object as", _without_mixin),
    (r"index out of range in self|index -?\d+ is out of bounds for dimension", _index),
    (r"not enough values to unpack \(expected 2, got 1\)|too many values to unpack \(expected 2", _class_entry),
    (
        r"expected str, bytes or os\.PathLike object, not (NoneType|None)|stat: path should be .* not NoneType",
        _no_vocabulary,
    ),
    (
        r"Expecting value: line 1|Unexpected UTF-8 BOM|JSONDecodeError|expected value at line 1|not a valid JSON",
        _not_json,
    ),
    (r"does not recognize this architecture|Unrecognized model in", _unknown_type),
    (r"'tuple' object has no attribute '(?P<name>\w+)'", _plain_tuple),
    (r"header too large|HeaderTooLarge|invalid load key, 'v'|could not parse ModelProto|HeaderTooSmall", _lfs_pointer),
]


def explain(what: str, folder: Path) -> str:
    """An explanation followed by the error; `what` unchanged if no explanation is known.

    Args:
        what: the error in one line, as a clean process reports it.
        folder: the folder whose code raised it; its files are read, not run.
    """
    for pattern, sentence in EXPLANATIONS:
        match = re.search(pattern, what)
        if match and (text := sentence(match, folder)):
            return f"{text} [{what[:200]}]"
    return what


# a check of a clean process → the static checks that can name the cause of its failure
_CAUSES = {
    "load": (
        *("json files", "config", "auto_map", "auto classes", "config code", "code files", "relative imports"),
        *("other imports", "transformers names", "post_init", "tied weights", "data in __init__", "architectures"),
        *("masks and caches", "weights"),
    ),
    "tokenizer": ("json files", "tokenizer", "tokenizer.json", "auto_map", "token ids", "chat template"),
    "processor": ("json files", "processors"),
    "forward": ("token ids", "transformers names", "masks and caches", "devices", "lengths"),
    "meta": ("data in __init__", "init weights"),
    "weights": ("init weights", "tied weights", "post_init"),
    "device map": ("devices", "no split modules"),
    "save": ("generation config", "tied weights"),
}
# pattern of an error's text → the static check that covers it
_ABOUT = [
    (r"all_tied_weights_keys|post_init", "post_init"),
    (r"_tied_weights_keys|'list' object has no attribute '(keys|items)'", "tied weights"),
    (r"cannot import name|No module named|packages that were not found", "imports"),
    (r"meta tensor|\.item\(\)|Cannot copy out of meta", "data in __init__"),
    (r"GenerationConfig|generation config", "generation config"),
]


def point_to_cause(checks: Sequence[Check], static: Sequence[Check]) -> list[Check]:
    """The checks, with the remedy of failures that a static check explains replaced by a reference to it.

    A static check explains a failure if it concerns the same line, mentions the same name, or covers such errors.
    """
    found = [check for check in static if check.status == "failed"]
    pointed = []
    for check in checks:
        if check.status == "failed" and check.name in _CAUSES:
            cause = next((one for one in found if one.name in _CAUSES[check.name] and _explains(one, check)), None)
            if cause is not None:
                place = f" ({cause.where})" if cause.where else ""
                check = check._replace(remedy=f"see {cause.name!r} above{place}: {cause.remedy or cause.what}")
        pointed.append(check)
    return pointed


def _explains(static: Check, failure: Check) -> bool:
    if re.search(r":\d+$", static.where) and static.where == failure.where:
        return True
    if any(re.search(p, failure.what) and (name == static.name or name in static.name) for p, name in _ABOUT):
        words = set(re.findall(r"'([\w.]+)'", failure.what))
        return "imports" not in static.name or any(word.split(".")[-1] in static.what for word in words) or not words
    names = set(re.findall(r"'([\w.-]{4,})'|\b([\w-]+\.(?:json|py|jinja|txt))\b", failure.what))
    words = {word for pair in names for word in pair if word}
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", f"{static.what} {static.where}") for word in words)

"""Checks of the JSON files: valid, complete, consistent with the code, and without keys that override code."""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config_attributes import GENERATION
from .api_availability import Span, level_for, model_types
from .code_tree import Code, Klass, constant, is_self, references
from .headers import tensor_headers
from .repo_snapshot import Finding, Folder, brief
from .walking import walk


def json_files(folder: Folder) -> Iterator[Finding]:
    """Every config is one JSON object without duplicate keys, `NaN` or excessive nesting."""
    for name, path in folder.files.items():
        head = _head(path)
        if head.startswith(b"version https://git-lfs"):
            what = f"{name} is a Git LFS pointer, not the file itself"
            yield Finding("failed", what, name, "run `git lfs pull` in its repository, or download the file again")
        elif head.startswith(b"\xef\xbb\xbf") and name.endswith((".json", ".jsonl")):
            what = f"{name} begins with a byte order mark (BOM), which JSON readers refuse"
            yield Finding("failed", what, name, "save it as UTF-8 without BOM")
    for name, reason in folder.invalid.items():
        if _head(folder.files[name]).startswith((b"version https://git-lfs", b"\xef\xbb\xbf")):
            continue
        reason = reason.removeprefix(f"{name}: ").removesuffix("; copy or download it again")
        yield Finding("failed", f"{name} cannot be read: {reason}", name, "correct it, or save it again")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(40)


def config(folder: Folder) -> Iterator[Finding]:
    """There is a config, and it identifies the model."""
    if "config.json" not in folder.files:
        if "adapter_config.json" in folder.files:
            yield Finding("n/a", "this is an adapter (PEFT), which is loaded onto a model of another repo")
        else:
            yield Finding("failed", "there is no config.json", "", "save the model with save_pretrained")
        return
    if "config.json" not in folder.values:
        return
    model_type, own = folder.config.get("model_type"), model_types(folder.releases)
    if model_type is None and "AutoConfig" in folder.auto_map:
        what = "config.json has no model_type: transformers finds the class by auto_map, other tools do not"
        yield Finding("warning", what, "config.json: model_type", "save the config again, or add its model_type")
    elif not isinstance(model_type, str) or not re.fullmatch(r"[\w.-]+", model_type):
        what = "config.json has no model_type" if model_type is None else f"model_type is {brief(model_type)}, no name"
        yield Finding("failed", what, "config.json: model_type", "give the config class a model_type and save again")
    elif own_code(folder) and model_type in own and "AutoConfig" not in folder.auto_map:
        auto, reference = next(iter(folder.auto_map.items()))
        name = str(reference).rpartition(".")[2]
        what = f"the config class is transformers' {own[model_type]}, so where code is not trusted, {auto} loads the library's {model_type!r} instead of {name}"
        remedy = (
            f"derive a config class from {own[model_type]} with a model_type of its own, make it {name}.config_class, "
            "and name it as AutoConfig in auto_map"
        )
        yield Finding("failed", what, "config.json: model_type", remedy)
    elif own_code(folder) and model_type in own:
        what = f"model_type {model_type!r} is one of transformers' own, which loads instead where code is not trusted"
        named = str(folder.auto_map.get("AutoConfig", "")).rpartition(".")[2]
        adopted = named.lower() == own[model_type].lower()  # transformers added this family after the code was written
        remedy = "give the config class a model_type of its own"
        if adopted:
            remedy += ", or check that the library's class gives the same outputs"
        yield Finding("warning" if adopted else "failed", what, "config.json: model_type", remedy)
    elif not folder.auto_map and own and model_type not in own:
        what = f"model_type {model_type!r} is unknown to transformers, and no auto_map says where its code is"
        yield Finding(
            "failed", what, "config.json: model_type", "add auto_map: register_for_auto_class, then save again"
        )


def own_code(folder: Folder) -> bool:
    """Whether config and model have code in the folder, and not only its tokenizer or processor."""
    return any(name == "AutoConfig" or name.startswith("AutoModel") for name in folder.auto_map)


def all_code(folder: Folder) -> Code:
    """The classes of all files."""
    if "all code" not in folder.memo:
        folder.memo["all code"] = Code(folder)
    return folder.memo["all code"]


_AUTO = re.compile(
    r"(TF|Flax)?Auto(Config|Model|Tokenizer|Processor|ImageProcessor|FeatureExtractor|VideoProcessor)\w*"
)


def auto_map(folder: Folder) -> Iterator[Finding]:
    """Every entry names an existing class, and the entries suffice to load the folder."""
    code = all_code(folder)
    for name in folder.values:
        value = folder.values[name].get("auto_map")
        if value is not None and not isinstance(value, dict):
            yield Finding("failed", f"auto_map is {brief(value)}, not a table", f"{name}: auto_map", "save again")
    for name in folder.values:
        entry = table.get("AutoTokenizer") if isinstance(table := folder.values[name].get("auto_map"), dict) else None
        if isinstance(entry, str) or (isinstance(entry, list) and (len(entry) != 2 or entry == [None, None])):
            what = f"AutoTokenizer is {brief(entry)}, but transformers takes a pair: [slow class or null, fast class or null]"
            remedy = f"write [{json.dumps(entry if isinstance(entry, str) else (entry or [''])[0])}, null]"
            yield Finding("failed", what, f"{name}: auto_map.AutoTokenizer", remedy)
    for name, auto, reference in references(folder):
        where = f"{name}: auto_map.{auto}"[:120]
        if not _AUTO.fullmatch(auto):
            yield Finding(
                "failed", f"{brief(auto)} is not an Auto class", where, "name one of transformers' Auto classes"
            )
            continue
        repo, marked, local = reference.rpartition("--")
        if marked:
            sha = folder.values[name].get("code_revision")
            pinned = isinstance(sha, str) and re.fullmatch(r"[0-9a-f]{40}", sha)
            what = f"{auto} takes its code from another repo, {brief(repo)}, " + (
                "and transformers leaves it to the reader to pass code_revision"
                if pinned
                else "without a pinned code_revision: it can change at any time"
            )
            remedy = f"copy the code here and write {brief(local)}"
            yield Finding("warning" if pinned else "failed", what, where, remedy)
            continue
        parts = reference.split(".")
        if len(parts) != 2 or not all(part.isidentifier() for part in parts):
            what = f"{auto} names {brief(reference)}, which is not file.Class"
            yield Finding("failed", what, where, "name a file of this folder, without .py, and a class in it")
        elif f"{parts[0]}.py" not in folder.files:
            what = f"{auto} names the file {parts[0]}.py, which is not in the folder"
            yield Finding("failed", what, where, "add the file, or take the entry out")
        elif f"{parts[0]}.py" in folder.code and not _defines(code, f"{parts[0]}.py", parts[1]):
            what = f"{auto} names the class {parts[1]}, which {parts[0]}.py does not define"
            yield Finding("failed", what, where, "correct the name of the class")
    yield from _complete(folder, code)


def _defines(code: Code, file: str, name: str) -> bool:
    return code.find(code.files[file], name) is not None or any(
        getattr(node, "name", "") == name or name in code.files[file].names for node in code.files[file].tree.body
    )


def target(folder: Folder, code: Code, auto: str) -> Klass | None:
    """The class that an entry of the config's `auto_map` names."""
    reference = folder.auto_map.get(auto)
    module, _, name = reference.rpartition(".") if isinstance(reference, str) else ("", "", "")
    file = code.files.get(f"{module}.py")
    return code.find(file, name) if file is not None else None


def _complete(folder: Folder, code: Code) -> Iterator[Finding]:
    models = [auto for auto in folder.auto_map if str(auto).startswith("AutoModel")]
    own = model_types(folder.releases)
    stock = "AutoConfig" not in folder.auto_map and str(folder.config.get("model_type")) in own
    if models and "AutoConfig" not in folder.auto_map and not stock:
        what = f"auto_map has {models[0]}, but no AutoConfig, so the model cannot be found"
        yield Finding("failed", what, "config.json: auto_map", "add AutoConfig: file.Class")
    if models and "AutoModel" not in models:
        served = ", ".join(map(str, models[:4]))
        what = f"AutoModel.from_pretrained fails here: auto_map serves {served} only"
        if stock:
            what = f"AutoModel loads transformers' own {folder.config['model_type']!r}, not this code: auto_map serves {served} only"
        yield Finding("warning", what, "config.json: auto_map", "fill config.auto_map for every class before saving")
    config_class = target(folder, code, "AutoConfig")
    for auto in models:
        klass = target(folder, code, auto)
        if klass is None or config_class is None:
            continue
        found = code.value(klass, "config_class")
        named = code.find(found[0].file, found[0].file.dotted(found[1])) if found else None
        if named is not None and named.name != config_class.name:
            what = f"{klass.name}.config_class is {named.name}, but auto_map's AutoConfig is {config_class.name}"
            yield Finding("failed", what, klass.where, "make the two agree: loading raises otherwise")


@lru_cache(maxsize=1)
def library_names() -> frozenset[str]:
    """The top-level names of the installed `transformers`."""
    import transformers

    return frozenset(dir(transformers))


def in_library(name: str) -> bool:
    """Whether transformers has a class of this name; newer releases do not list all of them."""
    import transformers

    return name in library_names() or (name.isidentifier() and name.endswith("Fast") and hasattr(transformers, name))


def architectures(folder: Folder) -> Iterator[Finding]:
    """The saved class is in the code, and an entry of `auto_map` names it."""
    if "config.json" not in folder.values:
        return
    value, where = folder.config.get("architectures"), "config.json: architectures"
    if value is None:
        yield Finding("warning", "config.json does not say which class was saved", where, "save with save_pretrained")
        return
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        yield Finding("failed", f"architectures is {brief(value)}, not a list of class names", where, "save again")
        return
    served = {reference.rpartition(".")[2] for name, _, reference in references(folder) if name == "config.json"}
    code = all_code(folder)
    defined = {klass.name for klass in code.classes}
    for name in value:
        if own_code(folder) and name in served:
            continue
        if own_code(folder) and name in defined:
            what = f"{name} was saved, but no entry of auto_map leads to it"
            yield Finding("failed", what, where, f"add an entry for {name} to auto_map")
        elif own_code(folder) and not any("--" in str(entry) for entry in folder.auto_map.values()):
            yield Finding("failed", f"the code has no class {brief(name)}", where, "name the class that was saved")
        elif not own_code(folder) and name not in library_names():
            what = f"transformers here has no class {brief(name)}, and there is no auto_map"
            yield Finding("failed", what, where, "name the class that was saved, or add auto_map")


# key → what it does there
_OVERRIDES: dict[str, tuple[str, str]] = {
    "attribute_map": ("failed", "renames config fields without the class's knowledge"),
    # no effect in tokenizer_config.json
    "trust_remote_code": ("failed", "would make the folder trusted without asking"),
    "_attn_implementation_internal": ("failed", "sets transformers' own state"),
    "_experts_implementation_internal": ("failed", "sets transformers' own state"),
    "_commit_hash": ("failed", "claims the commit that code and weights come from"),
    "_auto_class": ("failed", "sets transformers' own state"),
    "kernel_config": ("failed", "makes transformers download and run kernels"),
    "custom_pipelines": ("warning", "makes pipeline() run code of the folder"),
    "_attn_implementation": ("warning", "sets the attention function for every user"),
    "attn_implementation": ("warning", "sets the attention function for every user"),
    "base_model_tp_plan": ("warning", "replaces the class's tensor-parallel plan"),
    "base_model_pp_plan": ("warning", "replaces the class's pipeline plan"),
}


@lru_cache(maxsize=1)
def _methods() -> frozenset[str]:
    from transformers import PretrainedConfig

    return frozenset(n for n in dir(PretrainedConfig) if callable(getattr(PretrainedConfig, n, None))) - {"auto_map"}


def config_keys(folder: Folder) -> Iterator[Finding]:
    """Keys that are not settings of the model: they override methods or internals, or run code."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        waiting: list[tuple[str, Any]] = [("", folder.values.get(name, {}))]
        while waiting:
            path, value = waiting.pop()
            for key, inner in value.items():
                full, where = f"{path}{key}", f"{name}: {path}{key}"[:120]
                if isinstance(inner, dict) and key.endswith("_config") and len(path) < 200:
                    waiting.append((f"{full}.", inner))
                if key.startswith("__") or (name == "config.json" and key in _methods()):
                    what = f"{brief(full)} replaces a method of the config class"
                    yield Finding("failed", what, where, "remove the key; do not load a folder that sets it")
                elif isinstance(inner, str) and key.lstrip("_").endswith("implementation") and "/" in inner:
                    what = f"{full} is {brief(inner)}, a repo whose compiled code would be downloaded and run"
                    yield Finding("failed", what, where, "remove the key")
                elif key == "trust_remote_code" and name == "tokenizer_config.json":
                    continue
                elif key in _OVERRIDES and inner not in (None, {}, [], "sdpa", "eager"):
                    status, does = _OVERRIDES[key]
                    yield Finding(status, f"the key {full} {does}", where, "remove the key")
                elif name == "config.json" and not path and key in GENERATION and folder.auto_map:
                    what = f"{key} belongs to generation; transformers 5 refuses to save a config that has it"
                    yield Finding("warning", what, where, "move it to generation_config.json")


def config_code(folder: Folder) -> Iterator[Finding]:
    """The config class has a model_type, can be built without arguments, and passes on unknown ones."""
    code = all_code(folder)
    klass = target(folder, code, "AutoConfig")
    if klass is None or not code.is_config(klass):
        return
    found = code.value(klass, "model_type")
    named = constant(found[1]) if found else None
    inherits = any(not re.search(r"(^|\.)Pre[Tt]rainedConfig$", root) for root in code.roots(klass))
    if not named and not (inherits and found is None):
        what = f"{klass.name} has no model_type, so what it saves cannot be loaded"
        yield Finding("failed", what, klass.where, 'add model_type = "…" to the class')
    elif named and isinstance(folder.config.get("model_type"), str) and named != folder.config["model_type"]:
        what = f"{klass.name}.model_type is {named!r}, but config.json says {brief(folder.config['model_type'])}"
        yield Finding("failed", what, klass.where, "make the two agree")
    if (init := klass.method("__init__")) is None:
        return
    positional = [*init.args.posonlyargs, *init.args.args][1:]
    bare = [a.arg for a in positional[: len(positional) - len(init.args.defaults)]]
    bare += [a.arg for a, default in zip(init.args.kwonlyargs, init.args.kw_defaults) if default is None]
    composite = constant(klass.value("has_no_defaults_at_init")) or klass.value("is_composition") is not None
    if bare and not composite:
        what = f"{klass.name}.__init__ needs {', '.join(bare)}, but transformers builds configs without arguments"
        yield Finding("failed", what, klass.file.at(init), "give every argument a default")
    if init.args.kwarg is None:
        what = f"{klass.name}.__init__ has no **kwargs, so fields that every config has are refused"
        yield Finding("failed", what, klass.file.at(init), "add **kwargs and pass them to super().__init__")
    for argument in [*init.args.args, *init.args.kwonlyargs]:
        if argument.arg in GENERATION or argument.arg == "rope_scaling":
            owner = "rope_parameters in transformers 5" if argument.arg == "rope_scaling" else "generation"
            what = f"the config field {argument.arg} is taken over by {owner}"
            yield Finding("warning", what, klass.file.at(argument), "give the field a name of its own")
    yield from _lost_fields(folder, klass, init)


_SET_BY_PARENT = {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "is_encoder_decoder"}
_FORGETS = Span(last=(4, 57))


def _lost_fields(folder: Folder, klass: Klass, init: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Finding]:
    """Fields that `PretrainedConfig.__init__` of transformers 4 overwrites with its default."""
    parent = [i for i, step in enumerate(init.body) if "super().__init__(" in ast.unparse(step)]
    if not parent:
        return
    later = ast.Module(body=init.body[parent[0] :], type_ignores=[])
    kept = {node.arg for node in walk(later) if isinstance(node, ast.keyword)}
    kept |= {node.attr for node in walk(later) if isinstance(node, ast.Attribute) and is_self(node)}
    for argument in [*init.args.args, *init.args.kwonlyargs]:
        if argument.arg in _SET_BY_PARENT - kept:
            what = f"{klass.name}.__init__ does not pass {argument.arg} on, so it falls back to the default {_FORGETS}"
            remedy = f"write super().__init__({argument.arg}={argument.arg}, …)"
            yield Finding(level_for(_FORGETS, folder.releases), what, klass.file.at(argument), remedy)


def dtype(folder: Folder) -> Iterator[Finding]:
    """The weights have the dtype of the config, which transformers 5 loads them in."""
    named = folder.config.get("dtype", folder.config.get("torch_dtype"))
    if named is None or "quantization_config" in folder.config:
        return
    sizes: Counter[str] = Counter()
    for tensor in tensor_headers(folder).values():
        if tensor.dtype is not None and tensor.dtype.is_floating_point:
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel
    if sizes and (most := sizes.most_common(1)[0][0]) != named:
        what = (
            f"the config says {brief(named)}, but the weights are {most}; which one they load in depends on the release"
        )
        yield Finding("warning", what, "config.json: dtype", "make the two agree, and pass dtype= when loading")


CHECKS = {
    "json files": json_files,
    "config": config,
    "auto_map": auto_map,
    "architectures": architectures,
    "config keys": config_keys,
    "config code": config_code,
    "dtype": dtype,
}

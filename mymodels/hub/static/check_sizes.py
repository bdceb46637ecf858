"""Checks of the config's sizes (widths, heads, layers, rows) against the shapes in the checkpoint.

Models of transformers are built on meta from the config and compared tensor by tensor. Code of the folder is not run;
layers are compared if `__init__` takes their sizes from the config unchanged.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

import mymodels

from ...checkpoints import open_checkpoint
from ...library_logging import only_errors_logged
from ...messages import first_line
from .check_config import library_names, own_code
from .check_model import live_code
from .code_tree import Code, Klass, is_self
from .headers import tensor_headers
from .repo_snapshot import Finding, Folder, brief
from .settings import class_defaults, setting, text_config
from .walking import walk

_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_HEAD_WIDTHS = re.compile(
    r"head_dim|d_kv|kv_channels|d_head|head_size|attention_hidden|emb_dim|true_hidden|head_hidden"
)
_REMEDY = "take config and weights from the same model, or correct the config"


def sizes(folder: Folder) -> Iterator[Finding]:
    """The sizes in the config are consistent with each other and with the shapes of the weights."""
    if not folder.config:
        return
    wrong = list(_arithmetic(folder))
    yield from wrong
    if wrong or "quantization_config" in folder.config:
        return
    names = tensor_headers(folder)
    if own_code(folder):
        yield from _by_own_code(folder, names)
    else:
        yield from _by_library(folder, names)


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _arithmetic(folder: Folder) -> Iterator[Finding]:
    """Sizes that contradict each other, independent of the weights."""
    values = text_config(folder)
    for key in ("vocab_size", *_HIDDEN, *_HEADS, *_LAYERS, "num_key_value_heads"):
        value = values.get(key)
        least = 0 if key in _LAYERS else 1
        if isinstance(value, (int, float, str)) and (_integer(value) is None or int(value) < least):
            what = f"{key} is {brief(value)}, which is not a size"
            yield Finding("failed", what, f"config.json: {key}", _REMEDY)
    width, heads = _integer(setting(folder, *_HIDDEN)), _integer(setting(folder, *_HEADS))
    layers, groups = _integer(setting(folder, *_LAYERS)), _integer(setting(folder, "num_key_value_heads"))
    where = f"config.json: {next((key for key in _HEADS if key in values), _HEADS[0])}"
    fields = {key for key, value in values.items() if value is not None} | class_defaults(folder)[0].keys()
    own_width = any(_HEAD_WIDTHS.search(key) for key in fields)
    if width and heads and width % heads and not own_width and _divides(folder):
        what = f"the width {width} cannot be divided by {heads} attention heads, and there is no head_dim"
        yield Finding("failed", what, where, _REMEDY)
    if heads and groups and groups > 0 and heads % groups and _integer(values.get("num_key_value_heads")):
        what = f"{heads} attention heads cannot share {groups} heads of keys and values"
        yield Finding("failed", what, "config.json: num_key_value_heads", "name a divisor of the attention heads")
    kinds = values.get("layer_types")
    if layers is not None and isinstance(kinds, list) and len(kinds) != layers:
        what = f"layer_types names {len(kinds)} layers, but there are {layers}"
        yield Finding("failed", what, "config.json: layer_types", "name each layer once")


def _divides(folder: Folder) -> bool:
    """Whether the folder's code divides the width by the heads; transformers' own code is checked by building it."""
    return own_code(folder) and any(
        isinstance(node, ast.BinOp)
        and isinstance(node.op, (ast.FloorDiv, ast.Div))
        and re.search(r"(hidden|embd|d_model|embed)", ast.unparse(node.left))
        and "head" in ast.unparse(node.right)
        for file in live_code(folder).files.values()
        if not re.search(r"getattr\(\s*(self\.)?config,\s*\"head_dim", file.text)  # a width of its own, if it is given
        for node in walk(file.tree)
    )


# ------------------------------------------------------------------------------------------- transformers' own models

_REACHES_OUT = re.compile(r"backbone|auto_map|timm|pretrained_model|_pretrained$|question_encoder|generator$")
MAX_PARTS = 1000  # layers, blocks or experts: more than any model has


def _by_library(folder: Folder, names: Mapping[str, Any]) -> Iterator[Finding]:
    listed = folder.config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    if not isinstance(name, str) or name not in library_names() or not _is_bounded(folder.config):
        return
    try:
        model = _on_meta(folder.config, name)
    except (ValueError, AssertionError, ZeroDivisionError, KeyError) as error:
        reason = first_line(error, 200).strip("'\"")
        yield Finding("failed", f"transformers cannot build {name} from config.json: {reason}", "config.json", _REMEDY)
        return
    except Exception:  # a missing package, or a class that cannot be built without data
        return
    if model is None or not names:
        return
    made = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    in_file = {_counterpart(key, made, prefix): (key, tuple(info.shape)) for key, info in names.items()}
    for key, shape in made.items():
        if key in in_file and in_file[key][1] != shape:
            what = f"config.json makes {key} of shape {list(shape)}, but the weights have {list(in_file[key][1])}"
            yield Finding("failed", what, f"config.json: {_field(folder.config, shape, in_file[key][1])}", _REMEDY)
            return
    known = len(in_file.keys() & made.keys())
    if known < len(in_file) / 2:
        return  # weights are converted on loading, so names do not show what is missing
    ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    in_use = [key for key in in_file if not any(re.search(pattern, key) for pattern in ignored)]
    yield from _counted(folder, _depths(made), _depths(in_use))
    yield from _head(folder, model, in_file)


def _is_bounded(config: dict[str, Any]) -> bool:
    """Whether a config describes a model of plausible size, so that building it takes little time."""
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        if value not in (None, False) and _REACHES_OUT.search(key):
            return False
        if isinstance(value, dict):
            waiting += [(str(k), v) for k, v in value.items()] if not key.startswith("label2id") else []
        elif re.search(r"layer|block|depth|expert|num_|stage", key) and not key.startswith("id2label"):
            parts = value if isinstance(value, list) else [value]
            if any(isinstance(part, (int, float)) and part > MAX_PARTS * 200 for part in parts):
                return False
            if re.search(r"num_\w*layers|n_layers?|depth|blocks|experts", key) and any(
                isinstance(part, (int, float)) and part > MAX_PARTS for part in parts
            ):
                return False
    return True


def _on_meta(config: dict[str, Any], name: str) -> Any:
    """A model of transformers, built from a config on the meta device; None without a config."""
    import torch
    import transformers
    from transformers import CONFIG_MAPPING

    mymodels._register_all()  # `mymodels verify` does not before
    values = {key: value for key, value in config.items() if not key.endswith("_implementation")}
    if values.get("model_type") not in CONFIG_MAPPING:
        return None
    with only_errors_logged(), torch.device("meta"):
        made = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        made._attn_implementation = "eager"
        klass = getattr(transformers, name)
        return klass(made) if getattr(klass, "config_class", None) is type(made) else None


def _counterpart(key: str, made: Mapping[str, Any], prefix: str) -> str:
    """The model's name for a tensor of the files, which may be saved with or without the base model's prefix."""
    other = key.removeprefix(prefix) if key.startswith(prefix) else f"{prefix}{key}"
    if key in made or other in made:
        return key if key in made else other
    own = any(name.startswith(prefix) for name in made)  # tensors that the model lacks are named like the others
    return other if own != key.startswith(prefix) else key


def _field(config: dict[str, Any], made: tuple[int, ...], found: tuple[int, ...]) -> str:
    """The config field with the value of the differing size, if exactly one has it."""
    odd = {a for a, b in zip(made, found) if a != b}
    fields = [key for key, value in config.items() if _integer(value) in odd]
    return fields[0] if len(fields) == 1 else "sizes"


def _depths(keys: Any) -> dict[str, int]:
    """The number of layers of each list, by the prefix before the layer number: `{"model.layers": 32}`."""
    found: dict[str, int] = {}
    for key in keys:
        if match := re.match(r"(.*?)\.(\d+)\.", key):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _counted(folder: Folder, made: dict[str, int], found: dict[str, int]) -> Iterator[Finding]:
    extra = _integer(folder.config.get("num_nextn_predict_layers")) or 0
    for place, count in made.items():
        if place in found and found[place] != count and found[place] != count + extra:
            what = f"config.json makes {count} layers in {place}, but the weights have {found[place]}"
            lost = "some of them stay unused" if found[place] > count else "the others start at random"
            yield Finding("failed", f"{what}: {lost}", f"config.json: {_layers_field(folder)}", _REMEDY)
            return


def _layers_field(folder: Folder) -> str:
    return next((k for k in (*_LAYERS, "num_layers") if k in text_config(folder)), _LAYERS[0])


def _head(folder: Folder, model: Any, in_file: Mapping[str, Any]) -> Iterator[Finding]:
    """An untied head is in the files; a tied head equals the embedding."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    weight, embedding = names.get(id(head), ""), names.get(id(table), "")
    if head is None or not weight or embedding not in in_file:
        return
    where = "config.json: tie_word_embeddings"
    configs = {id(one): one for one in (model.config, model.config.get_text_config())}.values()
    tied = any(getattr(one, "tie_word_embeddings", True) for one in configs)
    if not tied and weight not in in_file:
        what = f"tie_word_embeddings is false, but the weights have no {weight}: the head starts at random"
        yield Finding("failed", what, where, "write true if the head is the embedding, or save the model again")
    elif tied and weight in in_file and in_file[weight][1] == in_file[embedding][1]:
        checkpoint = open_checkpoint(folder.path)
        if not checkpoint[in_file[weight][0]].equal(checkpoint[in_file[embedding][0]]):
            what = f"tie_word_embeddings is true, but {weight} is not {embedding}: which one is used depends on the release"
            yield Finding("warning", what, where, "write false if the head has weights of its own, or save again")


# ---------------------------------------------------------------------------------------------- the folder's own code

_SHAPES = {"Embedding": (0, 1), "Linear": (1, 0), "Conv1D": (1, 0), "LayerNorm": (0,), "RMSNorm": (0,)}
_NESTED = re.compile(r"_config$|^(encoder|decoder)$")


def _by_own_code(folder: Folder, names: Mapping[str, Any]) -> Iterator[Finding]:
    """Layers whose sizes are config fields, compared with the tensors whose names end in theirs."""
    nested = any(_NESTED.search(key) and isinstance(value, dict) for key, value in folder.config.items())
    if nested or not names:
        return  # a nested config: the name alone does not show which part's field is meant
    code = live_code(folder)
    shapes, counts = _declared(folder, code)
    for attribute, (shape, fields) in sorted(shapes.items()):
        found = {tuple(info.shape) for key, info in names.items() if f".{key}".endswith(f".{attribute}.weight")}
        if len(found) == 1 and (real := found.pop()) != shape and len(real) == len(shape):
            what = f"config.json makes {attribute}.weight of shape {list(shape)}, but the weights have {list(real)}"
            yield Finding("failed", what, f"config.json: {fields}", _REMEDY)
    depths = _depths(names)
    for attribute, (count, fields) in sorted(counts.items()):
        real_counts = {n for place, n in depths.items() if f".{place}".endswith(f".{attribute}")}
        if len(real_counts) == 1 and (real_count := real_counts.pop()) != count:
            what = f"config.json makes {count} layers in {attribute}, but the weights have {real_count}"
            yield Finding("failed", what, f"config.json: {fields}", _REMEDY)


_Shapes = dict[str, tuple[tuple[int, ...], str]]


def _declared(folder: Folder, code: Code) -> tuple[_Shapes, dict[str, tuple[int, str]]]:
    """The layers and lists of layers that `__init__` creates with sizes from the config, by attribute name.

    Names with several sizes, or with an unknown one, are omitted.
    """
    shapes: dict[str, set[Any]] = {}
    counts: dict[str, set[Any]] = {}
    for klass in code.classes:
        init = klass.method("__init__") if code.is_module(klass) else None
        for node in walk(init) if init is not None else ():
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
                continue
            kept = [goal.attr for goal in node.targets if isinstance(goal, ast.Attribute) and is_self(goal)]
            made = klass.file.dotted(node.value.func).rpartition(".")[2]
            for attribute in kept:
                if made == "ModuleList":
                    counts.setdefault(attribute, set()).add(_length(folder, klass, init, node.value))
                else:
                    shapes.setdefault(attribute, set()).add(_shape(folder, klass, init, made, node.value))
    return (
        {key: value.pop() for key, value in shapes.items() if len(value) == 1 and None not in value},
        {key: value.pop() for key, value in counts.items() if len(value) == 1 and None not in value},
    )


def _shape(folder: Folder, klass: Klass, init: Any, made: str, call: ast.Call) -> tuple[tuple[int, ...], str] | None:
    places = _SHAPES.get(made, ())
    if not places or len(call.args) < len(places):
        return None
    fields: list[str] = []
    found = [_size(folder, klass, init, call.args[place], fields) for place in places]
    plain = [size for size in found if size is not None]
    return (tuple(plain), ", ".join(dict.fromkeys(fields))) if len(plain) == len(found) and fields else None


def _length(folder: Folder, klass: Klass, init: Any, call: ast.Call) -> tuple[int, str] | None:
    """The length of `ModuleList([… for i in range(config.n)])`."""
    first = call.args[0] if call.args else None
    if not isinstance(first, (ast.ListComp, ast.GeneratorExp)) or len(first.generators) != 1:
        return None
    over = first.generators[0]
    if over.ifs or not isinstance(over.iter, ast.Call) or klass.file.dotted(over.iter.func) != "range":
        return None
    fields: list[str] = []
    count = _size(folder, klass, init, over.iter.args[0], fields) if len(over.iter.args) == 1 else None
    return (count, ", ".join(dict.fromkeys(fields))) if count is not None and fields else None


def _size(folder: Folder, klass: Klass, init: Any, node: ast.expr, fields: list[str], depth: int = 0) -> int | None:
    """The value of an expression over config fields; the names of these are added to `fields`."""
    if depth > 6:
        return None
    if isinstance(node, ast.Constant):
        return _integer(node.value)
    if isinstance(node, ast.BinOp):
        left = _size(folder, klass, init, node.left, fields, depth + 1)
        right = _size(folder, klass, init, node.right, fields, depth + 1)
        if left is None or right is None:
            return None
        if isinstance(node.op, ast.FloorDiv):
            return left // right if right else None
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, (ast.Add, ast.Sub)):
            return left + right if isinstance(node.op, ast.Add) else left - right
        return None
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("config", "self.config"):
        fields.append(node.attr)
        return _integer(setting(folder, node.attr))
    if isinstance(node, ast.Name) or is_self(node):
        text = ast.unparse(node)
        values = [
            step.value
            for step in walk(init)
            if isinstance(step, ast.Assign) and any(ast.unparse(goal) == text for goal in step.targets)
        ]
        return _size(folder, klass, init, values[0], fields, depth + 1) if len(values) == 1 else None
    return None


CHECKS = {"sizes": sizes}

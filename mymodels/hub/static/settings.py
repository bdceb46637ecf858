"""Settings from `config.json`, or the defaults of its config class."""

import ast
import re
from typing import Any

import mymodels

from .check_config import all_code, target
from .code_tree import constant
from .headers import tensor_headers
from .repo_snapshot import Folder

TEXT_PARTS = ("text_config", "llm_config", "language_config")
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")


def text_config(folder: Folder) -> dict[str, Any]:
    """The config of the language model: `config.json` itself, or a nested config in it."""
    for name in TEXT_PARTS:
        if isinstance(inner := folder.config.get(name), dict):
            return inner
    return folder.config


def setting(folder: Folder, *names: str) -> Any:
    """The value of a config field under the first of these names that is set; None if none is."""
    nested = text_config(folder) is not folder.config
    # the defaults belong to the outer class, not to a nested config
    defaults, renamed = ({}, {}) if nested else class_defaults(folder)
    for values in (text_config(folder), folder.config):
        for name in names:
            for key in (name, renamed.get(name, name)):
                if values.get(key) is not None:
                    return values[key]
    for name in names:
        if defaults.get(renamed.get(name, name)) is not None:
            return defaults[renamed.get(name, name)]
    return None


def class_defaults(folder: Folder) -> tuple[dict[str, Any], dict[str, Any]]:
    """The literal defaults of the config class in `auto_map`, and its `attribute_map`."""
    if "config defaults" not in folder.memo:
        folder.memo["config defaults"] = _read_defaults(folder)
    return folder.memo["config defaults"]


def _read_defaults(folder: Folder) -> tuple[dict[str, Any], dict[str, Any]]:
    code = all_code(folder)
    klass = target(folder, code, "AutoConfig")
    if klass is None:
        return _library_defaults(folder), {}
    defaults: dict[str, Any] = {}
    renamed: dict[str, Any] = {}
    for member in reversed(code.lineage(klass)):
        for node in member.node.body:  # a dataclass
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defaults[node.target.id] = constant(node.value)
        table = member.value("attribute_map")
        if isinstance(table, ast.Dict):
            renamed |= {constant(key): constant(value) for key, value in zip(table.keys, table.values)}
        init = member.method("__init__")
        if init is not None:
            arguments = [*init.args.posonlyargs, *init.args.args]
            pairs = zip(reversed(arguments), reversed(init.args.defaults))
            defaults |= {argument.arg: constant(default) for argument, default in pairs}
            defaults |= {a.arg: constant(d) for a, d in zip(init.args.kwonlyargs, init.args.kw_defaults)}
    return defaults, renamed


def _library_defaults(folder: Folder) -> dict[str, Any]:
    """The defaults of transformers' own class for this model type."""
    from transformers import CONFIG_MAPPING

    mymodels._register_all()  # `mymodels verify` does not before
    try:
        return dict(CONFIG_MAPPING[folder.config["model_type"]]().to_dict())
    except Exception:  # an unknown type, or a class that needs arguments
        return {}


_POSITION_TABLE = re.compile(
    r"(^|\.)(\w*position\w*embed\w*|\w*embed\w*position\w*|wpe|pos_emb\w*|position_embedding)\.weight$"
)


def position_rows(folder: Folder) -> int | None:
    """The rows of the learned position table for texts, if the checkpoint has one."""
    rows = [
        tensor.shape[0]
        for name, tensor in tensor_headers(folder).items()
        if _POSITION_TABLE.search(name)
        and len(tensor.shape) == 2
        and tensor.shape[0] > 1
        and not re.search(r"vision|visual|image|patch|encoder_pos|rel|bias", name)
    ]
    return min(rows) if rows else None


def stretches_positions(folder: Folder) -> bool:
    """Whether rotary positions are scaled beyond the trained length."""
    tables = [text_config(folder).get(key) for key in ("rope_scaling", "rope_parameters")]
    return any(isinstance(t, dict) and t.get("rope_type", t.get("type")) not in (None, "default") for t in tables)

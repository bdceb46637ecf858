"""Configs found with weights: config files in the folder, and what training scripts store in the checkpoint itself."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from ..checkpoints.safetensors_files import read_json
from .configs import fields_of
from .families import FAMILIES
from .key_mapping import CONFIGS

# keys under which training scripts store the arguments of the model; the most specific first
_CONFIG_KEYS = ("model_args", "model_config", "config", "cfg", "hyper_parameters", "hparams", "args", "params")
# other names of our fields: in nanoGPT, in OpenAI's hparams.json, and common ones
_ALIASES = {
    "block_size": "max_position_embeddings",
    "n_ctx": "max_position_embeddings",
    "n_vocab": "vocab_size",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
}
# fields that may mean something else in a training script
_NOT_ARCHITECTURE = {
    "pooling", "layer_mix", "label_smoothing", "class_weights", "focal_gamma", "multi_sample_dropout", "use_cache",
    "num_labels", "output_attentions", "output_hidden_states", "initializer_range", "position_embedding_type",
}  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "n_heads")
# fixed in the code of Google's BERT, and so not in its config
_GOOGLE = {"model_type": "bert", "layer_norm_eps": 1e-12}
_OPENAI = {"model_type": "gpt2"}
# nanoGPT's model_args, and what its code fixes; a fork with more arguments may not fix it
_NANOGPT_ARGS = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
_NANOGPT = {
    "norm_type": "layernorm",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


class FoundConfig(NamedTuple):
    """The config found with a source.

    Attributes:
        config: its fields; complete if there is a `model_type`.
        assumed: usual values of fields that were not found.
    """

    config: dict[str, Any]
    assumed: dict[str, Any] = {}


def config_in_folder(folder: Path) -> dict[str, Any]:
    """The config file of a folder: `config.json`, Google's `bert_config.json` or OpenAI's `hparams.json`; {} if none."""
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json")
    if (folder / "bert_config.json").is_file():
        return {**_GOOGLE, **read_json(folder / "bert_config.json")}
    if (folder / "hparams.json").is_file():
        raw = read_json(folder / "hparams.json")
        if {"n_head", "n_embd", "n_layer"} <= raw.keys():
            return {**_OPENAI, **{_ALIASES.get(name, name): value for name, value in raw.items()}}
    return {}


def config_in_file(extras: Mapping[str, Any]) -> FoundConfig:
    """The config in the extras of a training checkpoint (`Checkpoint.extras`).

    A complete config (with `model_type` and the number of heads) is returned as it is; of anything else, the fields that
    describe the architecture.
    """
    fields: dict[str, Any] = {}
    nano = False
    for entries in _possible_configs(extras):
        if isinstance(entries.get("model_type"), str) and any(name in entries for name in _HEADS):
            return FoundConfig(entries)
        nano = nano or {"n_head", "n_embd", "block_size", "bias"} <= entries.keys() <= _NANOGPT_ARGS
        for name, value in entries.items():
            if _is_plain_value(value) and (name in _known_fields() or name in _ALIASES):
                fields.setdefault(_our_name(name), value)
    if nano:
        return FoundConfig({**_NANOGPT, **fields}, {"activation_function": "gelu"})
    return FoundConfig(fields)


def _our_name(name: str) -> str:
    return _ALIASES.get(name) or CONFIGS["mygpt2"].attribute_map.get(name, name)


def _known_fields() -> set[str]:
    own = {
        name for config_class in CONFIGS.values() for name in (*fields_of(config_class), *config_class.attribute_map)
    }
    return (own | {name for family in FAMILIES for name in family.fields}) - _NOT_ARCHITECTURE


def _is_plain_value(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool)) or (
        isinstance(value, (list, dict)) and all(isinstance(item, (str, int)) for item in value)
    )


def _possible_configs(extras: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The mappings in extras that may describe the model, the likeliest first; the extras themselves last."""

    def rank(name: str) -> int:
        last = name.rpartition(".")[2].lower()
        return _CONFIG_KEYS.index(last) if last in _CONFIG_KEYS else len(_CONFIG_KEYS)

    level = [(name, _entries(extras[name])) for name in sorted(extras, key=rank)]
    level = [
        (name, entries)
        for name, entries in level
        if rank(name) < len(_CONFIG_KEYS) or _may_describe_model(name, entries)
    ]
    for _ in range(3):  # nested, as a config in Lightning's hyper_parameters
        yield from (entries for _, entries in level)
        level = [(key, _entries(value)) for _, entries in level for key, value in entries.items()]
        level = [(key, entries) for key, entries in level if entries]
    yield {name: value for name, value in extras.items() if isinstance(name, str)}


def _may_describe_model(name: str, entries: Mapping[str, Any]) -> bool:
    return bool(entries) and any(word in name.lower() for word in ("config", "args", "param", "model"))


def _entries(value: Any) -> dict[str, Any]:
    if isinstance(value, PretrainedConfig):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {name: entry for name, entry in value.items() if isinstance(name, str)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if isinstance(value, (str, bytes, int, float, list, tuple, type)) or value is None or callable(value):
        return {}
    return {name: entry for name, entry in getattr(value, "__dict__", {}).items() if not name.startswith("_")}

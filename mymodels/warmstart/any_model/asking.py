"""The requested target of a warm start, and checks of the source against it."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import PretrainedConfig, PreTrainedModel

from ...checkpoints import CheckpointError, TensorInfo
from ..configs import own_config
from ..key_mapping import CONFIGS, kind_of, plain
from .roles import roles_by_name
from .sides import own_tensors
from .targets import (
    changed_config,
    class_for,
    config_in,
    has_weights,
    is_of_ones_own,
    is_stock_of_ours,
    load_target,
    remote_class,
)  # fmt: skip

# model types without a table whose roles MyGPT2 and MyBert share
SHARING_ROLES = {
    "mygpt2": (
        "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi", "phi3", "opt", "bloom", "falcon", "mixtral", "gemma",
        "olmo", "olmo2", "starcoder2", "stablelm", "gpt_bigcode", "smollm3", "gptj", "gpt_neo", "glm", "cohere", "helium",
        "ernie4_5", "granite", "gemma2", "gemma3_text", "nemotron", "mpt", "qwen3_moe",
    ),
    "mybert": ("electra", "modernbert"),
}  # fmt: skip


@dataclass
class Asked:
    """The target that a caller asks for.

    Attributes:
        own: `"mygpt2"` or `"mybert"`, if it is one of these.
        model: the target, if it was given or loaded.
        config: the config to build the target from.
        like: a config of MyGPT2 or MyBert with the settings that the source leaves open.
        model_class: the class to build, if known.
    """

    own: str | None = None
    model: Any = None
    config: PretrainedConfig | None = None
    like: PretrainedConfig | None = None
    model_class: Any = None
    head: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def ask(target: Any, model_class: Any, head: str | None, overrides: Mapping[str, Any], trusted: bool) -> Asked:
    """Interpret the target argument of `warm_start`.

    Raises:
        CheckpointError: it is not a target, or an option cannot be combined with it.
    """
    if isinstance(target, (str, os.PathLike)):
        if str(target) in CONFIGS and not Path(target).is_dir():
            if model_class is not None:
                raise CheckpointError(
                    f"model_class= needs a config or a folder, but {str(target)!r} names a model of mymodels"
                )
            return Asked(str(target), head=head, overrides=overrides)
        return _folder(target, model_class, head, overrides, trusted)
    if isinstance(target, PretrainedConfig):
        return _config(target, model_class, head, overrides)
    if not isinstance(target, torch.nn.Module):
        raise CheckpointError(
            f"a {type(target).__name__} is neither a model nor a config: pass a model, a config, a folder, or one of "
            f"{' and '.join(CONFIGS)}"
        )
    target = extract_model_from_parallel(target, keep_torch_compile=False)
    if overrides:
        raise CheckpointError(
            "overrides= changes the config before a model is built, but this model is built already: pass its config"
        )
    if model_class is not None:
        raise CheckpointError("model_class= is the class to build, but this model is built already: leave it out")
    return _instance(target)


def is_ours(config: Any) -> bool:
    return isinstance(config, tuple(CONFIGS.values()))


def _instance(model: Any) -> Asked:
    config = getattr(model, "config", None)
    if isinstance(model, PreTrainedModel) and is_ours(model.config):
        return Asked(kind_of(model.config), model, like=model.config)
    return Asked(None, model, config if isinstance(config, PretrainedConfig) else None)


def _config(config: PretrainedConfig, model_class: Any, head: str | None, overrides: Mapping[str, Any]) -> Asked:
    if type(config) in CONFIGS.values() and model_class is None:
        like = own_config(config)
        return Asked(kind_of(like), config=like, like=like, head=head, overrides=overrides)
    if is_stock_of_ours(config) and model_class is None:
        like = own_config(config)
        return Asked(kind_of(like), config=like, like=like, head=head, overrides=overrides)
    if is_of_ones_own(config) and config.model_type in CONFIGS and not is_ours(config):
        kind_of(config)  # raises for a folder with its own copy of the code
    changed = changed_config(config, overrides)
    if is_ours(config):
        found = class_for(changed, head, "", model_class)
        if issubclass(found, PreTrainedModel):
            return Asked(kind_of(config), config=changed, like=changed, model_class=found, head=head)
        return Asked(None, config=changed, model_class=found, head=head)
    return Asked(None, config=changed, model_class=model_class, head=head)


def _folder(folder: Any, model_class: Any, head: str | None, overrides: Mapping[str, Any], trusted: bool) -> Asked:
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"{str(folder)!r} is not a model of mymodels: warm_start fills {' and '.join(CONFIGS)}, a folder with a config.json, a "
            "config or a model, and there is no such folder"
        )
    config = config_in(folder, trusted)
    if getattr(config, "auto_map", None) and config.model_type not in CONFIGS and model_class is None:
        model_class = remote_class(folder, config, head)
    named = (getattr(config, "architectures", None) or [""])[0]
    if overrides or not has_weights(folder):
        if is_stock_of_ours(config) and model_class is None:
            model_class = class_for(config, head, named)
        asked = _config(config, model_class, head or _ending(named), overrides)
        if overrides and has_weights(folder):
            asked.notes.append(f"the target {folder}: its weights are not used, as overrides= changes its config")
        return asked
    model_class = model_class or class_for(config, head, named)
    return _instance(load_target(folder, config, model_class, trusted))


def _ending(name: str) -> str | None:
    found = name.rfind("For")
    return name[found:] if found > 0 else None


def table_rows(info: Mapping[str, TensorInfo]) -> int:
    """The number of token embeddings of a source; 0 if unknown."""
    names = {plain(name): about.shape for name, about in info.items()}
    roles = roles_by_name(names)
    return next((names[n][0] for n, role in roles.items() if role.parts[0] == "model.embed_tokens.weight"), 0)


def vocabulary_of(model: torch.nn.Module) -> tuple[int, int]:
    """Number and width of a model's token embeddings; zeros if unknown."""
    tensors = own_tensors(model)
    roles = roles_by_name(tensors)
    found = next((n for n, role in roles.items() if role.parts[0] == "model.embed_tokens.weight"), None)
    return (0, 0) if found is None else (tensors[found].shape[0], tensors[found].shape[1])


def worth_trying(model: torch.nn.Module, info: Mapping[str, TensorInfo]) -> bool:
    """Whether a source with unknown names has most of a model's shapes, so that matching by structure may work."""
    ours = Counter(tuple(sorted(t.shape)) for t in own_tensors(model).values())
    theirs = Counter(tuple(sorted(about.shape)) for about in info.values())
    return sum((ours & theirs).values()) > sum(ours.values()) // 2

"""The target of a warm start from a model, a config or a folder."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ...checkpoints import CheckpointError
from ...checkpoints.safetensors_files import read_json
from ...library_logging import only_errors_logged, without_progress_bars
from ...messages import first_line
from ..key_mapping import CONFIGS, family_of

_ENDINGS = ("ForCausalLM", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_STOCK = {"LMHeadModel": "ForCausalLM", "DoubleHeadsModel": "ForCausalLM", "ForPreTraining": "ForMaskedLM"}


def is_of_ones_own(config: PretrainedConfig) -> bool:
    """Whether a config's class is neither of mymodels nor of transformers."""
    return type(config) not in CONFIGS.values() and type(config).__module__.split(".")[0] != "transformers"


def is_stock_of_ours(config: PretrainedConfig) -> bool:
    """Whether a config is of a transformers family that can be converted to MyGPT2 or MyBert."""
    family = family_of(vars(config).get("model_type", type(config).model_type))
    return family is not None and not is_of_ones_own(config)


def class_for(config: PretrainedConfig, head: str | None, hint: str, model_class: Any = None) -> type[torch.nn.Module]:
    """The model class for a config.

    Args:
        head: suffix of its name; `"Model"` for the base model.
        hint: name of the source's class, whose head is used if `head` is None.
        model_class: the class from the caller.

    Raises:
        CheckpointError: there is no such class, or several.
    """
    name = type(config).__name__
    if model_class is not None:
        if not (isinstance(model_class, type) and issubclass(model_class, torch.nn.Module)):
            raise CheckpointError(f"model_class={model_class!r} is not a model class: pass a subclass of nn.Module")
        return model_class
    found = _classes_of(type(config))
    if not found:
        raise CheckpointError(
            f"no model class has config_class = {name}, so the model of this config is unknown: pass model_class=, or "
            "an instance of the model"
        )
    wanted = head or next((_STOCK.get(end, end) for end in (*_ENDINGS, *_STOCK) if hint.endswith(end)), None)
    if len(found) > 1 and wanted is not None:
        found = [
            c for c in found if c.__name__.endswith(wanted) and (wanted != "Model" or "For" not in c.__name__)
        ] or found
    if len(found) > 1 and head is None:
        with_head = [c for c in found if c.__name__.endswith(("ForCausalLM", "ForMaskedLM", "LMHeadModel"))]
        found = with_head if len(with_head) == 1 else found
    if head is not None and not any(c.__name__.endswith(head) for c in found):
        raise CheckpointError(f"head={head!r}: {name} has {', '.join(sorted(c.__name__ for c in found))}")
    if len(found) > 1:
        names = ", ".join(sorted(c.__name__ for c in found))
        raise CheckpointError(f"{name} belongs to several models: {names}: name one with model_class= or head=")
    return found[0]


def _classes_of(config_class: type) -> list[type[PreTrainedModel]]:
    """The model classes with this `config_class`, from the Auto classes and all other defined classes."""
    found: dict[str, type[PreTrainedModel]] = {}
    for auto in (*(f"AutoModel{end}" for end in _ENDINGS), "AutoModel"):
        mapping = getattr(transformers, auto)._model_mapping
        if config_class in mapping:
            entry = mapping[config_class]
            for model_class in entry if isinstance(entry, (tuple, list)) else (entry,):
                found.setdefault(model_class.__name__, model_class)
    pending: list[Any] = [PreTrainedModel]
    while pending:
        for child in pending.pop().__subclasses__():
            pending.append(child)
            own = child.__dict__.get("config_class") or getattr(child, "config_class", None)
            abstract = any(getattr(sub, "config_class", None) is config_class for sub in child.__subclasses__())
            if own is config_class and not (abstract and child.__name__.endswith("PreTrainedModel")):
                found[child.__name__] = child  # of two classes with one name, the later one
    return [c for c in found.values() if not c.__name__.endswith("PreTrainedModel")]


def changed_config(config: PretrainedConfig, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """A copy of a config with changed fields.

    Raises:
        CheckpointError: there is no such field.
    """
    changed = copy.deepcopy(config)
    for name, value in overrides.items():
        if not hasattr(changed, name):
            raise CheckpointError(f"{type(config).__name__} has no field {name!r}")
        setattr(changed, name, value)
    return changed


def build(model_class: type[torch.nn.Module], config: PretrainedConfig, dtype: torch.dtype | None) -> torch.nn.Module:
    """Build the model with the initial weights of its class.

    Raises:
        CheckpointError: its class rejects the config.
    """
    try:
        if issubclass(model_class, PreTrainedModel):
            model = model_class._from_config(copy.deepcopy(config), dtype=dtype or torch.float32)
        else:
            model = model_class(copy.deepcopy(config)).to(dtype or torch.float32)
    except CheckpointError:
        raise
    except Exception as error:  # any constructor
        raise CheckpointError(
            f"{model_class.__name__} cannot be built from this {type(config).__name__}: {first_line(error, 200)}"
        ) from error
    return model.eval()


def config_in(folder: str | os.PathLike, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a target folder.

    Raises:
        CheckpointError: there is none, or it needs code that may not be run.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: pass a model, or a folder with one")
    raw = read_json(path)
    if raw.get("model_type") in CONFIGS:
        return CONFIGS[raw["model_type"]].from_pretrained(folder)
    if raw.get("auto_map") and not trust_remote_code:
        raise CheckpointError(
            f"the target {folder} has code of its own, which would be run to build it: read it, then pass "
            "trust_remote_code=True (--trust-remote-code), or pass an instance"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # many kinds
        raise CheckpointError(f"the target {folder} cannot be read: {first_line(error, 200)}") from error
    return config


def has_weights(folder: str | os.PathLike) -> bool:
    return any(
        file.name.endswith(
            (".safetensors", ".safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
        )
        and file.name != "golden.safetensors"
        for file in Path(folder).iterdir()
    )


def load_target(
    folder: str | os.PathLike, config: PretrainedConfig, model_class: Any, trusted: bool
) -> torch.nn.Module:
    """Load the model of a folder.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    try:
        with only_errors_logged(), without_progress_bars():
            loaded: Any = model_class.from_pretrained(folder, config=config, trust_remote_code=trusted)
    except Exception as error:  # many kinds
        raise CheckpointError(f"the target {folder} cannot be loaded: {first_line(error, 200)}") from error
    model: torch.nn.Module = loaded
    return model.eval()


def remote_class(folder: str | os.PathLike, config: PretrainedConfig, head: str | None) -> Any:
    """The model class in a folder with custom code: with the requested head, else from its `architectures`."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    entries: Mapping[str, Any] = getattr(config, "auto_map", None) or {}
    wanted = (getattr(config, "architectures", None) or [""])[0]
    references = [entry for auto, entry in entries.items() if auto.startswith("AutoModel") and isinstance(entry, str)]
    if head is not None:
        references = [r for r in references if r.endswith(head)] or references
    found = next((r for r in references if r.rpartition(".")[2] == wanted and head is None), None) or next(
        iter(references), None
    )
    if found is None:
        raise CheckpointError(
            f"the target {folder} has code of its own, but its auto_map names no model: pass an instance"
        )
    return get_class_from_dynamic_module(found, folder)

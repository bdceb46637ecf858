"""The code files and the `auto_map` of a model in memory."""

import copy
import inspect
import sys
import warnings
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..checkpoints import CheckpointError
from ..released import is_installed
from .auto_class_names import auto_class_of
from .code_files import auto_map_of_files, collect_code, file_of

_WRAPPERS = {"torch", "accelerate", "transformers"}  # packages that subclass a model's class at run time, as FSDP2 does


class Code(NamedTuple):
    """Code files by name, and `auto_map`: Auto class → `file.Class`."""

    files: dict[str, str]
    auto_map: dict[str, str]


class CodeNotSaved(UserWarning):
    """`save_pretrained` saved a model without its code."""


def code_of(config: PretrainedConfig, model: PreTrainedModel | None = None) -> Code:
    """The code of a config, or of a model and its config, for one flat folder; empty for classes of transformers.

    `auto_map` contains the model's class, the class of its base model, other heads of the same name and config class in
    the code files, and the config's `AUTO_MAP` if the model has the base model that those heads create.

    Raises:
        CheckpointError: a class is not defined in a file, its imports cannot be made flat, or it has no Auto class.
    """
    classes = [defining_class(thing) for thing in (model, config) if thing is not None]
    if all(cls.__module__.split(".")[0] == "transformers" for cls in classes):
        return Code({}, {})
    for cls in classes:
        _check_importable(cls)
    files = collect_code([file for file in map(file_of, classes) if file is not None])
    config_class = classes[-1]
    auto_map = {} if file_of(config_class) is None else {"AutoConfig": _target(config_class)}
    if model is None:
        return Code(files, auto_map)
    _check_config_class(classes[0], config_class)
    declared = vars(config_class).get("AUTO_MAP") or {}
    siblings = auto_map_of_files(files, [cls.__name__ for cls in classes], config_class=config_class.__name__)
    body = defining_class(model.base_model) if isinstance(model.base_model, PreTrainedModel) else None
    if _has_standard_body(model):
        auto_map = {**declared, **siblings, **auto_map}
    else:  # our other heads would create another base model
        ours = {auto for auto, target in siblings.items() if target == declared.get(auto)}
        auto_map = {**{auto: target for auto, target in siblings.items() if auto not in ours}, **auto_map}
        if body is not None and body is not classes[0] and _can_serve(body, config_class, files):
            auto_map["AutoModel"] = _target(body)
    if (auto_class := _auto_class(classes[0])) == "":
        raise CheckpointError(
            f"the Auto class of {classes[0].__name__} cannot be determined: call "
            f"{classes[0].__name__}.register_for_auto_class('AutoModelFor…') once, or give it a name that ends in ForCausalLM or the like"
        )
    if file_of(classes[0]) is not None:
        auto_map[auto_class] = _target(classes[0])
    return Code(files, dict(sorted(auto_map.items())))


def files_and_auto_map(config: Any, model: PreTrainedModel | None) -> tuple[dict[str, str], dict[str, Any]]:
    """`code_of` for `save_pretrained`, with the `auto_map` entries of tokenizers and processors; warns on errors."""
    named = getattr(config, "auto_map", None) or {}
    others = {
        auto: target for auto, target in named.items() if auto != "AutoConfig" and not auto.startswith("AutoModel")
    }
    try:
        code = code_of(config, model)
    except CheckpointError as error:
        name = type(config if model is None else model).__name__
        warnings.warn(
            f"{name} was saved without its code, so it loads only where that is imported ({error}); "
            "mymodels.build_repo writes a folder with code once this is fixed",
            CodeNotSaved,
            stacklevel=5,
        )
        return {}, others
    return code.files, {**others, **code.auto_map}


def defining_class(thing: Any) -> type:
    """The class as its author defined it, without subclasses that a library created at run time."""
    classes = [cls for cls in type(thing).__mro__ if cls.__module__.split(".")[0] not in _WRAPPERS - {"transformers"}]
    return classes[0]


def _target(cls: type) -> str:
    file = file_of(cls)
    assert file is not None
    return f"{file.stem}.{cls.__name__}"


def _check_importable(cls: type) -> None:
    """Raise a `CheckpointError` unless the class can be imported from its module."""
    if cls.__module__ == "__main__":
        raise CheckpointError(
            f"{cls.__name__} is defined in __main__, a notebook or script: put it into a .py file and import it from there"
        )
    if getattr(sys.modules.get(cls.__module__), cls.__name__, None) is not cls:
        raise CheckpointError(
            f"{cls.__qualname__} is not at the top level of {cls.__module__} under its name: define it there"
        )


def _check_config_class(model_class: Any, config_class: type) -> None:
    taken = getattr(model_class, "config_class", None)
    if taken is not None and taken.__name__ != config_class.__name__:
        raise CheckpointError(
            f"{model_class.__name__} has config_class = {taken.__name__}, so Auto classes reject a {config_class.__name__}: "
            f"subclass it with config_class = {config_class.__name__}"
        )


def _can_serve(cls: type, config_class: type, files: dict[str, str]) -> bool:
    taken, file = getattr(cls, "config_class", None), file_of(cls)
    same = taken is not None and taken.__name__ == config_class.__name__
    return (
        same
        and file is not None
        and file.name in files
        and getattr(sys.modules[cls.__module__], cls.__name__, None) is cls
    )


def _auto_class(cls: Any) -> str:
    """The Auto class of a model class: as registered, else by its suffix, else that of its base class."""
    registered = vars(cls).get("_auto_class")
    named = auto_class_of(cls.__name__, inspect.signature(cls.forward).parameters)
    return registered or (named if named != "AutoModel" else "") or cls._auto_class or named


def _has_standard_body(model: PreTrainedModel) -> bool:
    """Whether the base model has the modules and parameter shapes that its class creates from the config."""
    body: Any = model.base_model
    if body is model or not is_installed(defining_class(body)):
        return is_installed(defining_class(model))
    with torch.device("meta"):
        fresh = defining_class(body)(copy.deepcopy(model.config))

    def modules(module: Any) -> list[tuple[str, str]]:
        return [(name, defining_class(part).__qualname__) for name, part in module.named_modules()]

    if getattr(model, "hf_quantizer", None) is not None:  # quantisers replace modules
        return True
    return modules(fresh) == modules(body) and [(n, p.shape) for n, p in fresh.named_parameters()] == [
        (n, p.shape) for n, p in body.named_parameters()
    ]

"""What `import mymodels` changes in the classes of transformers and our own; called once, from `__init__`.

The models are remote code and do not import this. Both families are registered with the Auto classes, but a folder with
custom code is loaded with that code or not at all; `from_pretrained` also loads stock checkpoints; `save_pretrained`
also saves the code of subclasses.
"""

import functools
import json
import os
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .models import base, modeling_mybert, modeling_mygpt2
from .models.configuration_mybert import MyBertConfig
from .models.configuration_mygpt2 import MyGPT2Config
from .released import OwnCodeError, check_code, is_installed, names_of_ours


class _Loading(NamedTuple):
    """A config that is being loaded: from where, with which arguments, and whether without a model."""

    where: Any
    kwargs: dict[str, Any]
    config_only: bool


_loading: ContextVar[_Loading | None] = ContextVar("loading", default=None)
_saving: ContextVar[Any] = ContextVar("saving", default=None)  # the model whose config is saved with it


def register_auto_classes() -> None:
    """Register both families with transformers' Auto classes."""
    for config, modeling in ((MyGPT2Config, modeling_mygpt2), (MyBertConfig, modeling_mybert)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto_class, reference in config.AUTO_MAP.items():
            if auto_class != "AutoConfig":
                model = getattr(modeling, reference.split(".")[1])
                getattr(transformers, auto_class).register(config, model, exist_ok=True)
                # `transformers serve` looks for it there; `transformers` may be another module object since its import
                setattr(sys.modules["transformers"], model.__name__, model)


def prefer_code_of_folders() -> None:
    """Let Auto classes load a folder with custom code by that code if it is trusted, and otherwise raise.

    transformers 5.5 and newer uses a registered class even if the folder's code is trusted; older releases use it if the
    code is not trusted.
    """
    original = AutoConfig.from_pretrained.__func__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def auto_from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        token = _loading.set(_Loading(pretrained_model_name_or_path, kwargs, False))
        try:
            return _clear_model_mapping(original(cls, pretrained_model_name_or_path, **kwargs))
        except OwnCodeError as error:
            if not kwargs.get("trust_remote_code"):
                raise
            reference = getattr(error, "reference", None)
        finally:
            _loading.reset(token)
        if reference is None:
            raise OwnCodeError(
                f"{pretrained_model_name_or_path}: auto_map names custom code, but no AutoConfig, so no Auto class "
                "can load it: add AutoConfig to auto_map in config.json"
            )
        kwargs = {**kwargs, "_from_auto": True, "name_or_path": pretrained_model_name_or_path}
        kwargs.pop("trust_remote_code")
        code_revision = kwargs.pop("code_revision", None)
        own: Any = get_class_from_dynamic_module(
            reference, pretrained_model_name_or_path, code_revision=code_revision, **kwargs
        )
        own.register_for_auto_class()
        return _clear_model_mapping(own.from_pretrained(pretrained_model_name_or_path, **kwargs))

    AutoConfig.from_pretrained = classmethod(auto_from_pretrained)  # type: ignore[assignment]

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        token = _loading.set(_Loading(pretrained_model_name_or_path, kwargs, True))
        try:
            return super(base.MyPretrainedConfig, cls).from_pretrained(pretrained_model_name_or_path, **kwargs)
        finally:
            _loading.reset(token)

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        loading = _loading.get()
        if loading is not None and is_installed(cls):
            try:
                check_code(config_dict, loading.where, loading.kwargs, config_only=loading.config_only)
            except OwnCodeError as error:
                error.reference = (config_dict.get("auto_map") or {}).get("AutoConfig")  # type: ignore[attr-defined]
                raise
        return super(base.MyPretrainedConfig, cls).from_dict(config_dict, **kwargs)

    def _from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
        named = (getattr(config, "auto_map", None) or {}).get(cls._auto_class)
        ours = is_installed(cls) and is_installed(type(config))
        if ours and named is not None and named.rpartition("--")[2] != config.AUTO_MAP.get(cls._auto_class):
            raise OwnCodeError(
                f"the config names {named} for {cls._auto_class}, but {cls.__name__} is another class: load the "
                "config by AutoConfig from its folder with trust_remote_code=True, or create the model with its class"
            )
        return super(base.MyPreTrainedModel, cls)._from_config(config, **kwargs)  # type: ignore[misc]

    base.MyPretrainedConfig.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
    base.MyPretrainedConfig.from_dict = classmethod(from_dict)  # type: ignore[assignment]
    base.MyPreTrainedModel._from_config = classmethod(_from_config)  # type: ignore[assignment]


def _clear_model_mapping(loaded: Any) -> Any:
    """Remove the model classes that transformers registered for the config class of a folder with custom code.

    Folders with the same name and the same configuration code share that class; 5.5 and newer would load the second
    folder with the model class of the first.
    """
    config = loaded[0] if isinstance(loaded, tuple) else loaded
    if hasattr(type(config), "AUTO_MAP") and type(config).__module__.startswith("transformers_modules."):
        for auto_class in config.auto_map or {}:
            mapping = getattr(getattr(transformers, auto_class, None), "_model_mapping", None)
            getattr(mapping, "_extra_content", {}).pop(type(config), None)
    return loaded


def _own_config(model_class: Any, path: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The `config.json` of a folder of this family, or None; then the conversion code need not be imported."""
    try:
        config = json.loads(Path(path, kwargs.get("subfolder") or "", "config.json").read_bytes())
        return config if config["model_type"] == model_class.config_class.model_type else None
    except (OSError, TypeError, ValueError, KeyError, AttributeError):
        return None


def convert_stock_checkpoints() -> None:
    """Let `from_pretrained` load stock checkpoints too, and refuse folders with custom code."""

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        config = _own_config(cls, pretrained_model_name_or_path, kwargs)
        if config is not None:
            if is_installed(cls):
                check_code(config, pretrained_model_name_or_path, kwargs, saved=True)
            return super(base.MyPreTrainedModel, cls).from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *model_args, **kwargs
            )
        from .warmstart.pretrained import from_pretrained as convert

        return convert(cls, pretrained_model_name_or_path, *model_args, **kwargs)

    from_pretrained.__doc__ = base.MyPreTrainedModel.from_pretrained.__doc__
    base.MyPreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign, assignment]


def save_code_of_subclasses() -> None:
    """Let `save_pretrained` save a subclass with its code, flat, as `build_repo` does; it warns of what cannot be saved."""

    def save_model(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        if is_installed(type(self)) and is_installed(type(self.config)):
            return super(base.MyPreTrainedModel, self).save_pretrained(save_directory, *args, **kwargs)
        token = _saving.set(self)
        # disables transformers' own copying of code, which does not rewrite imports (4.x reads the first attribute, 5.x
        # the second); `save_config` writes the code
        self._auto_class, self.is_remote_code = None, lambda: False
        try:
            return super(base.MyPreTrainedModel, self).save_pretrained(save_directory, *args, **kwargs)
        finally:
            _saving.reset(token)
            del self._auto_class, self.is_remote_code

    def save_config(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        model = _saving.get()
        model = model if getattr(model, "config", None) is self else None
        before, architectures = getattr(self, "auto_map", None), self.architectures
        files: dict[str, str] = {}
        if model is None and is_installed(type(self)):
            self.auto_map = _auto_map_of_installed(type(self), before or {})
        else:
            from .hub.own_classes import files_and_auto_map

            files, self.auto_map = files_and_auto_map(self, model)
            self._auto_class = None
            if not files and type(model).__name__ in names_of_ours():  # with its module, or it would be loaded as ours
                self.architectures = [f"{type(model).__module__}.{type(model).__qualname__}"]
        try:
            if files:
                os.makedirs(save_directory, exist_ok=True)
            for name, text in files.items():
                Path(save_directory, name).write_text(text, encoding="utf-8")
            return super(base.MyPretrainedConfig, self).save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.auto_map, self.architectures = before, architectures
            vars(self).pop("_auto_class", None)

    base.MyPreTrainedModel.save_pretrained = save_model  # type: ignore[method-assign]
    base.MyPretrainedConfig.save_pretrained = save_config  # type: ignore[method-assign]


def _auto_map_of_installed(config_class: Any, auto_map: dict[str, Any]) -> dict[str, Any]:
    """`auto_map` without classes of the folder that the config was loaded from, as their code is not saved."""
    kept = {}
    for auto, target in auto_map.items():
        is_ours = auto == "AutoConfig" or auto.startswith("AutoModel")
        if not is_ours or auto in config_class.AUTO_MAP:
            kept[auto] = config_class.AUTO_MAP[auto] if is_ours else target
    return kept

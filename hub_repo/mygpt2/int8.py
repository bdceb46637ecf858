"""int8 models: `quantize(model)`, and a quantisation method with which transformers saves and loads them.

Each row of a weight is stored as int8, followed by its scale `largest absolute value / 127` in float32.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import copy
import functools
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .base import is_hooked
from .int8_layers import (
    Int8Linear,
    Int8Weight,
    initial_bias,
    int8_modules,
    is_embedding,
    is_valid,
    make_float,
    quantized,
    replace,
    size_of_linear,
)
from .int8_products import OUTLIERS, largest_columns

logger = logging.get_logger(__name__)
METHOD = "mymodels-int8"


class Int8Config(QuantizationConfigMixin):
    """`quantization_config` of int8 models, also for `from_pretrained(path, quantization_config=Int8Config())`.

    Args:
        activation_bits: precision of the states in a product: 16, or 8, which is faster for many tokens at once. Default:
            16 for models that generate, else 8.
        modules_to_not_convert: names of modules, or their first or last parts, that stay in float.
        modules: patterns of the names of the converted modules; set by `quantize`.

    Raises:
        ValueError: another number of bits; a string instead of a list.
    """

    def __init__(
        self,
        activation_bits: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        modules: list[str] | None = None,
        **kwargs: Any,
    ):
        if activation_bits not in (None, 8, 16):
            raise ValueError(f"activation_bits={activation_bits!r}, but it must be 8 or 16")
        if isinstance(modules_to_not_convert, str):
            raise ValueError(f"modules_to_not_convert={modules_to_not_convert!r}, but it must be a list of names")
        self.quant_method: Any = METHOD
        self.activation_bits, self.modules_to_not_convert = activation_bits, modules_to_not_convert
        self.modules = modules

    def get(self, name: str, default: Any = None) -> Any:
        """For `from_pretrained(path, config=model.config)`, where transformers expects a dictionary."""
        return getattr(self, name, default)


def quantize(
    model: PreTrainedModel, *, activation_bits: int | None = None, modules_to_not_convert: list[str] | None = None
) -> PreTrainedModel:
    """Convert the linear layers and token embeddings of a model to int8, in place, for inference.

    `model.save_pretrained(path)` then writes int8 weights, and `from_pretrained(path)` loads them, with `mymodels`
    imported or by the code in the folder. Layers with fewer than 32 inputs or outputs stay in float.

    Args:
        model: any transformers model with loaded weights.
        activation_bits, modules_to_not_convert: see `Int8Config`.

    Returns:
        The same model, with a config of its own.

    Raises:
        ValueError: it is no transformers model, has an adapter, or is quantised already; no layer can be converted; a
            weight is not finite or has no data. The model is not changed.

    Example:
        >>> model = mymodels.quantize(AutoModelForCausalLM.from_pretrained(path))
        >>> model.save_pretrained("model-int8")
    """
    adapted = isinstance(model, nn.Module) and any("base_layer" in module._modules for module in model.modules())
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False) or adapted:
        adapted = adapted or hasattr(model, "peft_config")
        what = "with an adapter: merge it first" if adapted else "that is no transformers model"
        raise ValueError(f"quantize was called on a {type(model).__name__} {what}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{type(model).__name__} is quantised already: its config has a quantization_config")
    config = Int8Config(activation_bits, modules_to_not_convert)
    quantizer = Int8Quantizer(config, pre_quantized=False)
    _convert(model, config)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    _copy_configs(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):  # one that can be saved alone, or loaded out of the folder
            part.config._is_quantized = True
            part.config.quantization_config = config
    return model


def _copy_configs(model: PreTrainedModel) -> None:
    """Give a model a config of its own: another one may share it."""
    copies: dict[int, Any] = {}  # by the id of a config: a module may have a part of the model's one
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PretrainedConfig):
                setattr(module, name, copy.deepcopy(value, copies))


def _convert(model: PreTrainedModel, config: Int8Config) -> None:
    """Quantise the weights of a model, and note the converted modules in `config`."""
    if config.activation_bits is None:
        config.activation_bits = 16 if model.can_generate() else 8
    owners: dict[int, list[str]] = defaultdict(list)  # of each weight: the modules that hold it
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        for parameter in module._parameters.values():
            owners[id(parameter)].append(name)
    try:
        tokens: Any = model.get_input_embeddings()
    except NotImplementedError:
        tokens = None
    tokens = getattr(tokens, "weight", None)
    able = {
        name
        for name, module in modules.items()
        if size_of_linear(module) or (is_embedding(module) and module.weight is tokens)
    }
    read = {name for name in able if _is_read(name, modules)}
    changed = {name for name in able if is_hooked(modules[name]) or "weight" not in modules[name]._parameters}
    if changed:  # an int8 layer would silently do without
        logger.warning(
            f"quantize: {', '.join(sorted(changed))} stay in float, with their hooks, replaced forward or computed weight"
        )
    excluded = config.modules_to_not_convert or []
    if unknown := [part for part in excluded if not any(_is_excluded(name, [part]) for name in modules)]:
        raise ValueError(f"modules_to_not_convert: {type(model).__name__} has no module {', '.join(unknown)}")
    chosen = {name for name in able - read - changed if not _is_excluded(name, excluded)}
    chosen = {name for name in chosen if chosen >= set(owners[id(modules[name].weight)])}
    if not chosen and any(hasattr(module, "_hf_hook") for module in modules.values()):
        raise ValueError(
            f"{type(model).__name__} was placed by a device_map: quantise and save it without one, then load that with it"
        )
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no layer that can be quantised")
    done: dict[int, nn.Parameter] = {}  # by the float weight: tied weights stay tied
    for name in sorted(chosen):  # all of them before the first module is replaced: an error leaves the model as it was
        module = modules[name]
        weight: Any = module.weight
        if weight.is_meta:
            raise ValueError(f"{name}.weight has no data (it is on the meta device), so it cannot be quantised")
        if id(weight) not in done:
            values = quantized(weight.t() if isinstance(module, Conv1D) else weight, name)
            done[id(weight)] = nn.Parameter(values, requires_grad=False)
    linear = [modules[name] for name in sorted(chosen) if size_of_linear(modules[name])]
    large = largest_columns(model, linear) if linear and config.activation_bits == 8 else {}
    for module, new in replace(model, {name: modules[name] for name in chosen}, config.activation_bits):
        new.weight = done[id(module.weight)]
        if getattr(new, "outliers", None) is not None:
            columns = large.get(id(module), new.outliers)
            new.outliers = nn.Parameter(columns.to(new.weight.device), requires_grad=False)
    config.modules = _patterns(chosen, able - chosen)


def _is_read(name: str, modules: dict[str, Any]) -> bool:
    """Whether the code reads a layer's weight, and not only calls the layer.

    It may do so in the class around it (`self.proj.weight`), as Mamba's, or where it is an argument of the same name.
    """
    around, _, last = name.rpartition(".")
    own = takewhile(lambda kind: kind not in (PreTrainedModel, nn.Module), type(modules[around]).__mro__)
    others = {type(module) for module in modules.values() if not isinstance(module, PreTrainedModel)}
    read = rf"\b{re.escape(last)}\.weight\b"
    return any(re.search(rf"\bself\.{read}", _source(kind)) for kind in own) or any(
        re.search(rf"(?<![.\w]){read}", _source(kind)) for kind in others
    )


@functools.cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _is_excluded(name: str, excluded: list[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in excluded)


def _patterns(chosen: set[str], others: set[str]) -> list[str]:
    """Names with * for the number of a layer, where all layers are alike."""
    starred = {name: re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in chosen | others}
    uneven = {starred[name] for name in others}
    return sorted({name if starred[name] in uneven else starred[name] for name in chosen})


def _in_folder(names: Iterable[str], patterns: list[str], prefix: str) -> set[str]:
    """The modules that `_patterns` describes, in the model that was quantised, its base model, a part, or another head.

    So the patterns may have more names in front than the modules, or lack the one of the base model.
    """
    names = list(names)
    stems = {pattern[: dot.end()] for pattern in patterns for dot in re.finditer(r"\.", pattern)}
    shorter = [[one[len(stem) :] for one in patterns if one.startswith(stem)] for stem in sorted(stems)]
    found = []
    for each in (patterns, [prefix + one for one in patterns], *shorter):
        regex = re.compile("|".join(re.escape(one).replace(r"\*", r"\d+") for one in each))
        found.append({name for name in names if regex.fullmatch(name)})
    return max(found, key=len)


def _is_new(parameter: torch.Tensor) -> bool:
    """Whether a parameter is not in the files, while a model is loaded: others are loaded already, or still on meta."""
    return not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False)


def _size(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of the values: an int8 row ends with its scale."""
    *rows, columns = parameter.shape or (1,)
    return (*rows, columns - 4 if parameter.dtype is torch.int8 else columns)


def _initialized(parameter: Any) -> Any:
    parameter._is_hf_initialized = True
    return parameter


def _tied(model: Any, modules: dict[str, Any]) -> list[set[str]]:
    """Groups of modules whose weights are tied."""
    groups: dict[Any, set[str]] = defaultdict(set)
    for name, module in modules.items():  # before 5.0, they are tied already
        groups[id(module.weight)].add(name)
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():  # later, after loading
        pair = target.removesuffix(".weight"), source.removesuffix(".weight")
        groups[source] |= {name for name in pair if name in modules}
    return [group for group in groups.values() if len(group) > 1]


class Int8Quantizer(HfQuantizer):
    """transformers' quantiser of int8 models, see `quantize`."""

    requires_calibration = False
    quantization_config: Any
    expected: dict[str, nn.Parameter] = {}
    tied: list[set[str]] = []

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        own = sys.modules.get(f"{type(model).__module__.rpartition('.')[0]}.int8")
        if own is not None and hasattr(own, "Int8Quantizer") and own.Int8Quantizer is not Int8Quantizer:
            self.__class__ = own.Int8Quantizer  # the last imported one is registered, perhaps of another folder
            return self._process_model_before_weight_loading(model, **kwargs)
        if not self.pre_quantized:
            return
        able: dict[str, Any] = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if size_of_linear(module) or is_embedding(module)
        }
        chosen = _in_folder(able, self.quantization_config.modules or [], f"{model.base_model_prefix}.")
        # a head that is not in the folder may be tied
        self.tied = [group for group in _tied(model, able) if group & chosen]
        heads = set().union(*self.tied) - chosen
        chosen |= heads
        weights: dict[int, nn.Parameter] = {}
        bits = self.quantization_config.activation_bits or 16
        for module, new in replace(model, {name: able[name] for name in chosen}, bits):
            new.weight = weights.setdefault(id(module.weight), new.weight)
        self.expected = dict(model.named_parameters(remove_duplicate=False))
        for name in heads:  # the folder has no such tensor for them, and memory that nothing is loaded into is not it
            if isinstance(head := model.get_submodule(name), Int8Linear):
                head.outliers = None
        model.initialize_weights = functools.partial(self._initialize, model)

    def _initialize(self, model: Any) -> None:
        """Called in place of `model.initialize_weights`, when tensors that the files lack, and only these, have memory.

        Int8 layers without a weight become float layers again, which the model initialises.
        """
        del model.initialize_weights
        for name, parameter in model.named_parameters():  # 5.0 to 5.10 do not compare sizes in int8 folders
            read, size = _size(parameter), _size(self.expected.get(name, parameter))
            if read != size:
                raise ValueError(
                    f"{name} has the shape {read} in the files, {size} by the config: make them agree. In int8 folders, this "
                    f"release of transformers ({transformers.__version__}) does not support ignore_mismatched_sizes"
                )
        if not self._keeps_float32(model) and hasattr(model.config, "_pre_quantization_dtype"):
            # before 5.0: cast no parameter to it, as Mamba's A_log, which has a dtype of its own
            model.config._pre_quantization_dtype = None
        model._keys_to_ignore_on_load_missing = [*(model._keys_to_ignore_on_load_missing or []), r"\.outliers$"]
        modules = dict(int8_modules(model))
        lacking = {name for name, module in modules.items() if _is_new(module.weight)}
        for group in self.tied:  # if one lacks its weight, so do all, but only one has memory before they are tied
            there = {name for name in group if not modules[name].weight.is_meta} - lacking
            lacking = lacking - group if there or not lacking & group else lacking | group
        make_float(model, {name: modules[name] for name in lacking})
        for name in lacking:  # before 5.0, the files' outliers are loaded after this, and need a place
            if (columns := getattr(modules[name], "outliers", None)) is not None and columns.is_meta:
                model.get_submodule(name).outliers = columns
        layers: list[Any] = [module for module in model.modules() if isinstance(module, Int8Weight)]
        weights = [layer.weight for layer in layers]
        for layer, weight in zip(layers, weights):
            if getattr(layer, "bias", None) is not None and _is_new(layer.bias):
                values = initial_bias(model, len(layer.bias)).to(layer.bias)
                layer.bias = nn.Parameter(values, layer.bias.requires_grad)  # which the block's class may change
            if getattr(layer, "outliers", None) is not None and _is_new(layer.outliers):
                columns = torch.full((OUTLIERS,), -1, device=layer.outliers.device)
                layer.outliers = _initialized(nn.Parameter(columns, requires_grad=False))
            # a block's class may also initialise the weights of its layers, for which integers are an error
            layer.weight = _initialized(nn.Parameter(torch.empty(weight.shape, device="meta")))
        try:
            model.initialize_weights()
        finally:
            for layer, weight in zip(layers, weights):
                layer.weight = weight

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            _convert(model, self.quantization_config)
            return model
        if "initialize_weights" in vars(model):
            raise ValueError("this release of transformers does not call initialize_weights, as those up to 5.23 do")
        self._cast(model)
        for module in model.modules():
            if "outliers" in module._parameters and not isinstance(module, Int8Linear):
                del module.outliers
        for name, module in int8_modules(model):
            if not module.weight.is_meta and not is_valid(module.weight):
                raise ValueError(f"{name}.weight was not loaded: the files of this int8 model do not have it in int8")
        return model

    def _keeps_float32(self, model: Any) -> bool:
        return bool(model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict)

    def _cast(self, model: PreTrainedModel) -> None:
        """Give parameters the dtype that they have without int8. From 5.0 to 5.10, those whose names get a prefix lack it."""
        cast: dict[int, nn.Parameter] = {}  # tied ones stay tied
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            expected = self.expected.get(name, parameter)
            if not expected.is_floating_point() or parameter.is_meta or parameter.dtype == expected.dtype:
                continue
            if not self._keeps_float32(model):
                values = parameter.detach().to(expected.dtype)
                around, _, own = name.rpartition(".")
                new = cast.setdefault(id(parameter), nn.Parameter(values, parameter.requires_grad))
                setattr(model.get_submodule(around), own, new)
        self.expected = {}

    def update_missing_keys_after_loading(
        self, model: PreTrainedModel, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """Called by 4.56, whose report ignores `_keys_to_ignore_on_load_missing`."""
        return [key for key in missing_keys if not key.endswith(".outliers")]

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Called by `model.dequantize()`: convert it to a float model whose weights are those in int8, in place."""
        modules = dict(int8_modules(model))
        with torch.no_grad():
            weights = {id(module.weight): module.dequantized(module.dtype) for module in modules.values()}
            make_float(model, modules, weights)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                vars(part.config).pop("quantization_config", None)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


# the code of a folder does not take the place of the installed package's
if not getattr(auto.AUTO_QUANTIZER_MAPPING.get(METHOD), "__module__", "").startswith("mymodels."):
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Int8Config
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = Int8Quantizer

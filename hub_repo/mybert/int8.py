"""int8 models: `quantize(model)`, and a quantisation method with which transformers saves and loads them.

Each row of a weight is stored as int8, followed by its scale `largest absolute value / 127` in float32.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import functools
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .base import is_hooked
from .compat import is_new
from .int8_layers import OUTLIERS, Int8Embedding, Int8Linear, Int8Weight, initial_bias, is_valid, quantized

logger = logging.get_logger(__name__)
METHOD = "mymodels-int8"
LEAST = 32  # a layer with fewer inputs or outputs, such as a classifier, is not converted


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
        The same model.

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
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
    model.config.quantization_config = config
    return model


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
        tokens = model.get_input_embeddings()
    except NotImplementedError:
        tokens = None
    able = {
        name
        for name, module in modules.items()
        if _size_of_linear(module) or (module is tokens and _is_embedding(module))
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
    large = _largest_columns(model, {name: modules[name] for name in chosen}) if config.activation_bits == 8 else {}
    for module, new in _replace(model, {name: modules[name] for name in chosen}, config):
        new.weight = done[id(module.weight)]
        if getattr(new, "outliers", None) is not None:
            columns = large.get(id(module), new.outliers)
            new.outliers = nn.Parameter(columns.to(new.weight.device), requires_grad=False)
    config.modules = _patterns(chosen, able - chosen)


def _is_read(name: str, modules: dict[str, Any]) -> bool:
    """Whether the code around a layer reads its weight (`self.proj.weight`), as Mamba's does, and not only calls it."""
    around, _, last = name.rpartition(".")
    own = takewhile(lambda kind: kind not in (PreTrainedModel, nn.Module), type(modules[around]).__mro__)
    return any(re.search(rf"\bself\.{re.escape(last)}\.weight\b", _source(kind)) for kind in own)


@functools.cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _largest_columns(model: PreTrainedModel, modules: dict[str, Any]) -> dict[int, torch.Tensor]:
    """By the id of a linear layer, the columns of its largest states in a forward pass of random tokens, if they stand out.

    They belong to the model: in BERT, the same few columns of a layer are large for every token of every text.
    """
    largest: dict[int, torch.Tensor] = {}

    def note(module: nn.Module, states: tuple[Any, ...]) -> None:
        top = states[0].detach().flatten(0, -2).abs().amax(0)
        largest[id(module)] = torch.maximum(top, largest.get(id(module), top))

    hooks = [each.register_forward_pre_hook(note) for each in modules.values() if _size_of_linear(each)]
    training = [each for each in model.modules() if each.training]
    length = min(64, getattr(model.config, "max_position_embeddings", None) or 64)
    device = next(iter(modules.values())).weight.device
    try:
        model.eval()
        ids = torch.randint(model.config.vocab_size, (8, length), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model(input_ids=ids.to(device))
    except Exception as error:  # a model of other inputs
        logger.warning(
            f"quantize: {type(model).__name__} could not be run on random tokens to find its largest states ({error}): "
            "8 bits may cost more accuracy than necessary"
        )
    finally:
        for hook in hooks:
            hook.remove()
        for each in training:
            each.training = True
    found = {key: top.topk(OUTLIERS + 1) for key, top in largest.items()}
    # where the largest is no larger than others, nothing is gained by float products, which cost time
    return {key: top.indices[:-1] for key, top in found.items() if top.values[0] > 1.5 * top.values[-1]}


def _size_of_linear(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer that can be converted; None for another module."""
    if type(module) is nn.Linear:
        size = module.in_features, module.out_features
    elif type(module) is Conv1D:
        size = module.nx, module.nf
    else:
        return None
    return size if min(size) >= LEAST and module.weight.is_floating_point() else None


def _is_excluded(name: str, excluded: list[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in excluded)


def _patterns(chosen: set[str], others: set[str]) -> list[str]:
    """Names with * for the number of a layer, where all layers are alike."""
    starred = {name: re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in chosen | others}
    uneven = {starred[name] for name in others}
    return sorted({name if starred[name] in uneven else starred[name] for name in chosen})


def _in_folder(names: Iterable[str], patterns: list[str], prefix: str) -> set[str]:
    """The modules that `_patterns` describes. A folder is also loaded without its head, or by a model with another one.

    So the patterns, or the modules, may have the name of the base model in front.
    """
    names = list(names)
    found = []
    for each in (patterns, [prefix + one for one in patterns], [one.removeprefix(prefix) for one in patterns]):
        regex = re.compile("|".join(re.escape(one).replace(r"\*", r"\d+") for one in each))
        found.append({name for name in names if regex.fullmatch(name)})
    return max(found, key=len)


def _is_embedding(module: nn.Module) -> bool:
    return type(module) is nn.Embedding and module.max_norm is None and module.weight.is_floating_point()


def _int8_modules(model: nn.Module) -> list[tuple[str, Any]]:
    named = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in named if isinstance(module, Int8Weight)]


def _make_float(model: nn.Module, modules: dict[str, Any], values: dict[int, torch.Tensor] | None = None) -> list[Any]:
    """Put float modules in the place of int8 ones, in training again. Returns the new modules.

    Args:
        values: float weight by the id of the int8 one; else the weights are empty.
    """
    weights: dict[int, nn.Parameter] = {}  # tied weights stay tied
    made: dict[int, Any] = {}
    for name, module in modules.items():
        if id(module) not in made:
            rows, columns = module.weight.shape[0], module.weight.shape[1] - 4
            if id(module.weight) not in weights:
                empty = torch.empty(rows, columns, dtype=module.dtype, device=module.weight.device)
                weights[id(module.weight)] = nn.Parameter((values or {}).get(id(module.weight), empty))
            new: Any
            weight = weights[id(module.weight)]
            if isinstance(module, Int8Embedding):
                new = nn.Embedding(rows, columns, module.padding_idx, device="meta")
            elif getattr(module, "was_conv1d", False):
                with torch.device("meta"):
                    new = Conv1D(rows, columns)
                weight, new.bias = nn.Parameter(weight.detach().t().contiguous()), module.bias
            else:
                new = nn.Linear(columns, rows, module.bias is not None, device="meta")
                new.bias = module.bias
            new.weight = weight
            made[id(module)] = new.train(module.training)
        _set_submodule(model, name, made[id(module)])
    return list(made.values())


def _replace(model: nn.Module, modules: dict[str, Any], config: Int8Config) -> list[tuple[Any, Any]]:
    """Put empty int8 modules in the place of others. Returns each with the new one."""
    made: dict[int, tuple[Any, Any]] = {}  # a module may be there under several names
    for name, module in modules.items():
        if id(module) not in made:
            made[id(module)] = module, _int8_module(module, config)
        elif _size_of_linear(module):  # files share no tensors that the model's class does not declare as tied
            made[id(module)][1].outliers = None
        _set_submodule(model, name, made[id(module)][1])
    return list(made.values())


def _int8_module(module: Any, config: Int8Config) -> nn.Module:
    like = {"dtype": module.weight.dtype, "device": module.weight.device}
    new: Any
    if size := _size_of_linear(module):
        new = Int8Linear(*size, module.bias is not None, config.activation_bits or 16, **like)
        new.bias, new.was_conv1d = module.bias, type(module) is Conv1D
    else:
        new = Int8Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, **like)
    return new.train(module.training)


def _set_submodule(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


class Int8Quantizer(HfQuantizer):
    """transformers' quantiser of int8 models, see `quantize`."""

    requires_calibration = False
    quantization_config: Any
    missing: set[str] = set()  # before 5.0: what the files do not have
    shapes: dict[str, torch.Size] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        own = sys.modules.get(f"{type(model).__module__.rpartition('.')[0]}.int8")
        if own is not None and hasattr(own, "Int8Quantizer") and own.Int8Quantizer is not Int8Quantizer:
            self.__class__ = own.Int8Quantizer  # the last imported one is registered, perhaps of another folder
            return self._process_model_before_weight_loading(model, **kwargs)
        if not self.pre_quantized:
            return
        able: dict[str, Any] = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if _size_of_linear(module) or _is_embedding(module)
        }
        chosen = _in_folder(able, self.quantization_config.modules or [], f"{model.base_model_prefix}.")
        # a head that is not in the folder may be tied: before 5.0 it is by now, later releases do so after loading
        shared = {id(able[name].weight) for name in chosen}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        heads = {name for name in able if tied.get(f"{name}.weight", "").removesuffix(".weight") in chosen}
        heads = (heads | {name for name, module in able.items() if id(module.weight) in shared}) - chosen
        chosen |= heads
        weights: dict[int, nn.Parameter] = {}
        for module, new in _replace(model, {name: able[name] for name in chosen}, self.quantization_config):
            new.weight = weights.setdefault(id(module.weight), new.weight)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for name in heads:  # the folder has no such tensor for them, and memory that nothing is loaded into is not it
            if isinstance(head := model.get_submodule(name), Int8Linear):
                head.outliers = None

    def update_missing_keys(self, model: PreTrainedModel, missing_keys: list[str], prefix: str) -> list[str]:
        """Called before 5.0, before weights are loaded and new ones initialised."""
        modules = _int8_modules(model)
        stored = {id(module.weight) for name, module in modules if f"{name}.weight" not in missing_keys}
        _make_float(model, {name: each for name, each in modules if id(each.weight) not in stored})
        for name, _ in _int8_modules(model):
            parent, _, _ = name.rpartition(".")
            around: Any = model.get_submodule(parent)
            # 4.57 passes `around` to `_init_weights` even if it has all its tensors; stock GPT-2's initialises `c_proj` there
            if not any(f"{parent}.{own}" in missing_keys for own in around._parameters):
                around._is_hf_initialized = True
        self.missing, self.shapes = set(missing_keys), {}  # these releases compare sizes themselves
        gone = {f"{name}.outliers" for name, _ in modules} - {f"{name}.outliers" for name, _ in _int8_modules(model)}
        return [key for key in missing_keys if key not in gone]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            _convert(model, self.quantization_config)
            return model
        for name, parameter in model.named_parameters():  # some 5.x releases do not compare sizes in int8 folders
            if (read := tuple(parameter.shape)) != (size := tuple(self.shapes.get(name, parameter.shape))):
                raise ValueError(f"{name} has the shape {read} in the files, {size} by the config: make them agree")
        modules = dict(_int8_modules(model))
        if not all(new := [is_new(module) for module in modules.values()]):
            missing = {name: module for (name, module), is_missing in zip(modules.items(), new) if is_missing}
            for module in _make_float(model, missing):
                with torch.no_grad():
                    model._init_weights(module)
        for name, module in _int8_modules(model):
            for own in ("outliers", "bias"):  # which the files may lack, as those of a tied head
                parameter = getattr(module, own, None)
                if parameter is not None and (f"{name}.{own}" in self.missing or is_new(module, own)):
                    with torch.no_grad():
                        parameter.copy_(initial_bias(model, len(parameter)) if own == "bias" else torch.tensor(-1))
            if not module.weight.is_meta and not is_valid(module.weight):
                raise ValueError(f"{name}.weight was not loaded: the files of this int8 model do not have it in int8")
        return model

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Called by `model.dequantize()`: convert it to a float model whose weights are those in int8, in place."""
        modules = dict(_int8_modules(model))
        with torch.no_grad():
            weights = {id(module.weight): module.dequantized(module.dtype) for module in modules.values()}
            _make_float(model, modules, weights)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Int8Config
auto.AUTO_QUANTIZER_MAPPING[METHOD] = Int8Quantizer

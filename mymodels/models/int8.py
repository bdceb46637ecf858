"""int8 models: `quantize(model)`, and a quantisation method with which transformers saves and loads them.

Each row of a weight is stored as int8, with the scale `largest absolute value / 127` in float32. On an x86 CPU without
gradients, products are those of FBGEMM, torch's library of int8 products; elsewhere the weight is converted to float for
each product, which saves memory but no time.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import fnmatch
import functools
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .compat import readable
from .huge_pages import PATIENCE, move_process

METHOD = "mymodels-int8"
LEAST = 32  # a layer with fewer inputs or outputs, such as a classifier, is not converted
ROWS = 512  # of states that are multiplied at once, so that the temporary tensors stay in the caches
TINY = torch.tensor(1e-30)  # no division by 0 for a row of zeros


# ---- products


@functools.cache
def _levels() -> int:
    """The largest quantised state: 127, or 63 on processors whose 16-bit sums would overflow; 0 without FBGEMM."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return 0
    try:
        packed = _pack(torch.full((64, 64), 127, dtype=torch.int8), torch.ones(64))
        product = _product_of_integers(torch.full((2, 64), 127.0), packed, 127)
    except (AttributeError, RuntimeError):  # a torch without these operators
        return 0
    return 127 if bool((product == 127 * 127 * 64).all()) else 63


@functools.cache
def _finer(levels: int) -> torch.Tensor:
    """As a tensor: a number would be converted to one at each product."""
    return torch.tensor(2.0 * levels)


def _pack(weight: torch.Tensor, scale: torch.Tensor) -> Any:
    """FBGEMM's form of a weight `[outputs, inputs]`."""
    engine = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "fbgemm"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(
                weight, scale.double(), torch.zeros_like(scale, dtype=torch.long), 0
            )
        return torch.ops.quantized.linear_prepack(quantized, None)
    finally:
        torch.backends.quantized.engine = engine


def _product_of_integers(rows: torch.Tensor, packed: Any, levels: int) -> torch.Tensor:
    """The product of float32 `rows`, rounded to integers from `-levels` to `levels`, with a packed weight."""
    product: Callable = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    return product(rows, 1.0, levels + 1, packed)


def _product(rows: torch.Tensor, packed: Any, bias: torch.Tensor | None, bits: int) -> torch.Tensor:
    """The product of float32 `rows` `[rows, inputs]` with a packed weight. Each row is quantised by itself.

    With 16 bits, a row is the sum of a rounded one and the quantised rest, which are multiplied in one call: the weight
    is read once.
    """
    levels = _levels()
    step = torch.add(TINY, rows.abs().amax(-1, keepdim=True), alpha=1 / levels)  # [rows, 1]
    rows = rows / step  # a new tensor
    if bits == 16:
        rounded = rows.round()
        both = torch.cat((rounded, rows.sub_(rounded).mul_(_finer(levels))))
        both = _product_of_integers(both, packed, levels)
        product = both[: len(rows)].add_(both[len(rows) :], alpha=1 / (2 * levels))
    else:
        product = _product_of_integers(rows, packed, levels)
    return product.mul_(step) if bias is None else torch.addcmul(bias, product, step)


def _quantized(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values and the scale of each row of a float weight."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1).div_(127)
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{name}.weight has values that are not finite, so it cannot be quantised")
    scale[scale == 0] = 1.0
    return weight.div(scale[:, None]).round_().to(torch.int8), scale


# ---- modules


class _Int8Weight(nn.Module):
    """An int8 `weight` `[rows, columns]` and the float32 `scale` `[rows]`. Neither is trained."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, rows: int, columns: int, device: Any = None):
        super().__init__()
        weight = torch.empty(rows, columns, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(rows, dtype=torch.float32, device=device), requires_grad=False)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (self.weight.to(self.scale.dtype) * self.scale[:, None]).to(dtype)


class Int8Embedding(_Int8Weight):
    """`nn.Embedding` with an int8 weight. Returns the dtype of `scale`."""

    is_tokenwise = True

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, device: Any = None):
        super().__init__(num_embeddings, embedding_dim, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[…, embedding_dim]` of ids `[…]`."""
        return self.weight[ids] * self.scale[ids][..., None]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Int8Linear(_Int8Weight):
    """`nn.Linear` with an int8 weight.

    Not a subclass of `nn.Linear`: what edits float weights in place, such as merging an adapter, must not accept it. A
    packed copy of the weight is made for the first product, and again after the weight was modified (but changes through
    `weight.data` are not noticed).

    Args:
        activation_bits: 16 or 8, the precision of the states in a product on the CPU without gradients.
    """

    is_tokenwise = True
    bias: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, activation_bits: int = 16, device: Any = None
    ):
        super().__init__(out_features, in_features, device)
        self.in_features, self.out_features, self.activation_bits = in_features, out_features, activation_bits
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, device=device)) if bias else None)
        self._packed: tuple[Any, Any] = (None, None)
        self._joint: tuple[Any, ...] = (None,)
        self._products = 0  # of few rows

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The product `[…, out_features]` of states `[…, in_features]`, in their dtype."""
        if not self._is_fast(states):
            return nn.functional.linear(states, self.dequantized(states.dtype), self.bias)
        rows, packed = states.reshape(-1, self.in_features).float(), self._pack()
        bias = None if self.bias is None else self.bias.float()
        if len(rows) <= ROWS:
            product = _product(rows, packed, bias, self.activation_bits)
        else:
            product = rows.new_empty(len(rows), self.out_features)
            for part, into in zip(rows.split(ROWS), product.split(ROWS)):
                into.copy_(_product(part, packed, bias, self.activation_bits))
        return product.view(*states.shape[:-1], self.out_features).to(states.dtype)

    def product_of_few(self, rows: torch.Tensor) -> torch.Tensor:
        """`forward` for float32 `rows` `[rows, in_features]` on the CPU, few and without gradients."""
        own = self.__dict__  # for speed: `nn.Module` looks up and checks each attribute
        own["_products"] += 1
        if own["_products"] == 2 * PATIENCE:
            move_process()
        return _product(rows, self._pack(), own["_parameters"]["bias"], own["activation_bits"])

    def _is_fast(self, states: torch.Tensor) -> bool:
        plain = type(states) is torch.Tensor and states.is_cpu and self.weight.is_cpu and not self.weight.is_inference()
        if not plain or torch.is_grad_enabled() or states.numel() == 0 or states.shape[-1] != self.in_features:
            return False
        return readable() and not torch.is_autocast_enabled("cpu") and _levels() > 0

    def _pack(self) -> Any:
        own = self.__dict__
        weight, scale = own["_parameters"]["weight"], own["_parameters"]["scale"]
        version = (weight.data_ptr(), weight._version, scale.data_ptr(), scale._version)
        if own["_packed"][0] != version:
            self._packed = version, _pack(weight, scale)
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": (None, None), "_joint": (None,)}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.activation_bits} bits"


def joint_product_of_few(layers: Sequence[Int8Linear], rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """`product_of_few` of several layers for the same rows, as one product with a joint weight."""
    first = layers[0]
    parameters = [tensor for layer in layers for tensor in layer._parameters.values() if tensor is not None]
    version = [(tensor.data_ptr(), tensor._version) for tensor in parameters]
    if first._joint[0] != version:
        if len({(layer.activation_bits, layer.bias is None) for layer in layers}) > 1:
            return [layer.product_of_few(rows) for layer in layers]
        packed = _pack(torch.cat([layer.weight for layer in layers]), torch.cat([layer.scale for layer in layers]))
        bias = None if first.bias is None else torch.cat([layer.bias for layer in layers if layer.bias is not None])
        first._joint = version, packed, bias, [layer.out_features for layer in layers]
    _, packed, bias, sizes = first._joint
    return _product(rows, packed, bias, first.activation_bits).split(sizes, -1)


# ---- models


class Int8Config(QuantizationConfigMixin):
    """`quantization_config` of int8 models, also for `from_pretrained(path, quantization_config=Int8Config())`.

    Args:
        activation_bits: precision of the states in a product: 16, or 8, which is faster for many tokens at once. Default:
            16 for models that generate, else 8.
        modules_to_not_convert: names of modules, or their first or last parts, that stay in float.
        modules: patterns of the names of the converted modules; set by `quantize`.

    Raises:
        ValueError: another number of bits.
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
        ValueError: the model is quantised already, no layer can be converted, or a weight is not finite.

    Example:
        >>> model = mymodels.quantize(AutoModelForCausalLM.from_pretrained(path))
        >>> model.save_pretrained("model-int8")
    """
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
    modules = dict(model.named_modules())
    for name, module in modules.items():
        for parameter in module._parameters.values():
            owners[id(parameter)].append(name)
    tokens = model.get_input_embeddings()
    able = {
        name
        for name, module in modules.items()
        if _size_of_linear(module) or (type(module) is nn.Embedding and module.max_norm is None and module is tokens)
    }
    chosen = {name for name in able if not _is_excluded(name, config.modules_to_not_convert or [])}
    chosen = {name for name in chosen if chosen >= set(owners[id(modules[name].weight)])}
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no layer that can be quantised")
    done: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    for name in sorted(chosen):
        module = modules[name]
        weight: Any = module.weight
        if weight.is_meta:
            raise ValueError(f"{name}.weight has no data (it is on the meta device), so it cannot be quantised")
        if id(weight) not in done:
            values, scale = _quantized(weight.t() if isinstance(module, Conv1D) else weight, name)
            done[id(weight)] = nn.Parameter(values, requires_grad=False), scale
        new = _replace(model, name, module, config)
        new.weight, scale = done[id(weight)]
        new.scale = nn.Parameter(scale.clone(), requires_grad=False)  # one of its own: files share no tensors
        if getattr(new, "bias", None) is not None:
            new.bias = module.bias
        new.train(module.training)
    config.modules = _patterns(chosen, able - chosen)


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


def _replace(model: nn.Module, name: str, module: Any, config: Int8Config) -> Any:
    """Put an empty int8 module in the place of another one."""
    device = module.weight.device
    new: nn.Module
    if size := _size_of_linear(module):
        new = Int8Linear(*size, module.bias is not None, config.activation_bits or 16, device)
    else:
        new = Int8Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
    return new


class Int8Quantizer(HfQuantizer):
    """transformers' quantiser of int8 models, see `quantize`."""

    requires_calibration = False
    quantization_config: Any

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        start = f"{model.base_model_prefix}."  # a folder of a model with a head is also loaded without it
        patterns = [pattern.removeprefix(start) for pattern in self.quantization_config.modules or []]
        for name, module in list(model.named_modules()):
            able = _size_of_linear(module) or type(module) is nn.Embedding
            if able and any(fnmatch.fnmatchcase(name.removeprefix(start), pattern) for pattern in patterns):
                _replace(model, name, module, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            _convert(model, self.quantization_config)
        return model

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


# The last imported file replaces earlier ones, so that a folder's code uses its own classes.
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Int8Config
auto.AUTO_QUANTIZER_MAPPING[METHOD] = Int8Quantizer

"""Linear layers and embeddings with int8 weights, put in the place of float ones and back.

On an x86 CPU without gradients, products are those of int8_products.py; elsewhere the weight is converted to float for each
product, which saves memory but no time.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .compat import readable
from .int8_products import OUTLIERS, Forms, Outliers, product_of, top_level

LEAST = 32  # a layer with fewer inputs or outputs, such as a classifier, is not converted
OFTEN = 64  # products of few rows, after which it is worth while to move the weights into huge pages
ROWS = 512  # of states that are multiplied at once, so that the temporary tensors stay in the caches
POWERS = torch.tensor([2.0 ** max(n - 150, -149) for n in range(255)], device="cpu")  # of float32's exponents


@torch.inference_mode(False)  # else the weight could not be packed, as changes of it would not be counted
def quantized(weight: torch.Tensor, name: str) -> torch.Tensor:
    """The form in which a float weight `[rows, columns]` is stored: int8 `[rows, columns + 4]`, see `Int8Weight`."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1, keepdim=True).div_(127)
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{name}.weight has values that are not finite, so it cannot be quantised")
    scale[scale == 0] = 1.0
    values = weight.div(scale).round_().clamp_(-127, 127).to(torch.int8)  # tiny scales are inexact
    return torch.cat((values, scale.view(torch.int8)), 1)


def is_valid(weight: torch.Tensor) -> bool:
    """Whether this is a weight as `quantized` makes it, and not memory that nothing was loaded into."""
    if weight.dtype is not torch.int8:
        return False
    scale = _scale(weight)
    return bool((scale.isfinite() & (scale > 0)).all())


def initial_bias(model: Any, outputs: int) -> torch.Tensor:
    """The bias that a model gives a new linear layer; 0 if it gives none."""
    layer = nn.Linear(1, outputs, device="cpu")
    with torch.no_grad():
        layer.bias.zero_()
        model._init_weights(layer)
    return layer.bias


class Int8Weight(nn.Module):
    """An int8 weight that is not trained.

    Attributes:
        weight: `[rows, columns + 4]`; the last 4 bytes of each row are its scale in float32. So no cast to another dtype
            changes the scales, tied weights share them, and no module for float weights can load the tensor by mistake.
        dtype: that of what a module returns which is not given states.
    """

    weight: torch.Tensor

    def __init__(self, rows: int, columns: int, dtype: torch.dtype | None = None, device: Any = None):
        super().__init__()
        weight = torch.empty(rows, columns + 4, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.dtype = dtype or torch.get_default_dtype()

    @property
    def values(self) -> torch.Tensor:
        """The int8 values, `[rows, columns]`."""
        return self.weight[:, :-4]

    @property
    def scale(self) -> torch.Tensor:
        """What a row's values are multiplied with, float32 `[rows]`."""
        return _scale(self.weight)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as floating-point numbers, `[rows, columns]`."""
        return _dequantized(self.weight, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)


def _scale(weight: torch.Tensor) -> torch.Tensor:
    """The positive float32 numbers in the last 4 bytes of each row."""
    last = weight[..., -4:]
    if readable():
        last = last.clone(
            memory_format=torch.contiguous_format
        )  # a copy: in one row of any length, they are not aligned
        return last.view(torch.float32)[..., 0]
    # TorchScript and ONNX cannot read bytes as another type, so the number is put together: 24 bits and an exponent
    numbers = torch.where(last < 0, last.float() + 256, last.float())
    low, middle, high, top = numbers.unbind(-1)
    exponent = 2 * top + (high >= 128)
    bits = low + 256 * middle + 65536 * (high - 128 * (high >= 128)) + (1 << 23) * (exponent > 0)
    return bits * POWERS.to(last.device)[exponent.long().clamp(1, 254)]


def _dequantized(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (weight[..., :-4] * _scale(weight)[..., None]).to(dtype)


class Int8Embedding(Int8Weight):
    """`nn.Embedding` with an int8 weight."""

    is_tokenwise = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ):
        super().__init__(num_embeddings, embedding_dim, dtype, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[…, embedding_dim]` of ids `[…]`."""
        return _dequantized(nn.functional.embedding(ids, self.weight), self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Int8Linear(Int8Weight):
    """`nn.Linear` with an int8 weight.

    Not a subclass of `nn.Linear`: what edits float weights in place, such as merging an adapter, must not accept it.
    Packed copies of the weight are made for the first products, and again after the weight was modified (only changes through
    `weight.data`, which torch does not count, are not noticed: call `repack()` after them).

    Args:
        activation_bits: 16 or 8, the precision of the states in a product on the CPU without gradients.

    Attributes:
        outliers: with 8 bits, the `OUTLIERS` columns of states that are multiplied in float, or -1 for none; any choice is
            right, but the columns of the largest states make the others more precise.
    """

    is_tokenwise = True
    bias: torch.Tensor | None
    _packed: tuple[Any, Any, int, Any]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation_bits: int = 16,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ):
        super().__init__(out_features, in_features, dtype, device)
        self.in_features, self.out_features, self.activation_bits = in_features, out_features, activation_bits
        parameter = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", parameter)
        columns = torch.full((OUTLIERS,), -1, device=device)
        self.outliers = nn.Parameter(columns, requires_grad=False) if activation_bits == 8 else None
        self._products = 0  # of few rows
        self.repack()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The product `[…, out_features]` of states `[…, in_features]`, in their dtype.

        Raises:
            TypeError: the states are integers, as where a model casts them to the dtype of the weight.
        """
        if not states.is_floating_point():
            raise TypeError(
                f"an int8 layer of {self.in_features} inputs and {self.out_features} outputs was given states in "
                f"{states.dtype}, which are rounded: the model's code casts them to the dtype of the layer's weight. Name "
                "the layer in modules_to_not_convert"
            )
        if not self._is_fast(states):
            return nn.functional.linear(states, self.dequantized(states.dtype), self.bias)
        rows, forms = states.reshape(-1, self.in_features).float(), self.forms()
        bias = None if self.bias is None else self.bias.float()
        if len(rows) <= ROWS:
            product = product_of([self], forms, rows, bias)
        else:
            product = rows.new_empty(len(rows), self.out_features)
            for part, into in zip(rows.split(ROWS), product.split(ROWS)):
                product_of([self], forms, part, bias, into)
        return product.view(*states.shape[:-1], self.out_features).to(states.dtype)

    def product_of_few(self, rows: torch.Tensor) -> torch.Tensor:
        """`forward` for float32 `rows` `[rows, in_features]` on the CPU, few and without gradients."""
        self.count_product()
        return product_of([self], self.forms(), rows, self._parameters["bias"])

    def count_product(self) -> None:
        """Count a product of few rows. After `OFTEN`, the weights are moved into huge pages."""
        own = self.__dict__  # for speed: `nn.Module` looks up and checks each attribute
        own["_products"] += 1
        if own["_products"] == OFTEN and "mymodels.huge_pages" in sys.modules:
            sys.modules["mymodels.huge_pages"].move_process()

    def _is_fast(self, states: torch.Tensor) -> bool:
        if type(states) is not torch.Tensor or not states.is_cpu or torch.is_grad_enabled() or not readable():
            return False
        if states.numel() == 0 or states.shape[-1] != self.in_features or torch.is_autocast_enabled("cpu"):
            return False
        return self.packs()

    def packs(self) -> bool:
        """Whether FBGEMM can multiply with this weight."""
        weight: Any = self._parameters["weight"]
        if not weight.is_cpu or weight.is_inference() or self.in_features > 1 << 16:  # longer sums exceed 32 bits
            return False
        return top_level() > 0

    def forms(self) -> Forms:
        """Forms of the weight, new ones after it or `activation_bits` was modified."""
        weight, (made_from, alias, version, forms) = self.weight, self._packed
        is_same = weight is made_from and weight._version == version and weight.data_ptr() == alias.data_ptr()
        if not is_same or forms.bits != self.activation_bits:
            forms = Forms(self.activation_bits, self._outliers())
            # references to the weight's parameter and memory: neither can be reused for another one
            self._packed = weight, weight.detach(), weight._version, forms
        return forms

    def _outliers(self) -> Outliers | None:
        if self.outliers is None or self.activation_bits == 16:
            return None
        columns = self.outliers.detach().clone()
        if bool((columns == -1).all()):
            return None
        if len(columns.unique()) < len(columns) or columns.min() < 0 or columns.max() >= self.in_features:
            raise ValueError(
                f"outliers={columns.tolist()}, but they must be different columns below {self.in_features}"
            )
        others = torch.ones(self.in_features, dtype=torch.float32, device="cpu").index_fill_(0, columns, 0.0)
        return Outliers(columns, others, self.dequantized()[:, columns].t().contiguous())

    def repack(self) -> None:
        """Drop all packed copies of the weight."""
        self._packed = (None, None, -1, None)
        self._joint: tuple[Any, ...] = ([], None)
        self._repacks = self.__dict__.get("_repacks", 0) + 1  # of a joint copy, another layer may be the owner

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.repack()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": (None, None, -1, None), "_joint": ([], None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.repack()  # other releases keep other forms

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.activation_bits} bits"


def joint_product_of_few(layers: Sequence[Int8Linear], rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """`product_of_few` of several layers for the same rows: one product with a joint copy of their weights."""
    forms = joint_forms(layers)
    if forms is None:
        return [layer.product_of_few(rows) for layer in layers]
    biases: list[Any] = [layer._parameters["bias"] for layer in layers]
    # joined at each call: a copy would miss changes through `bias.data`
    bias = None if biases[0] is None else torch.cat(biases)
    return product_of(layers, forms, rows, bias).split([layer.out_features for layer in layers], -1)


def joint_forms(layers: Sequence[Int8Linear]) -> Forms | None:
    """Forms of the layers' joint weight, new ones after a weight was modified; None if they cannot be one layer."""
    first = layers[0]
    weights: list[Any] = [layer._parameters["weight"] for layer in layers]
    if len({layer._parameters["bias"] is None for layer in layers}) > 1:
        return None
    made_from, forms = first._joint
    if len(made_from) != len(layers) or not all(
        tensor is known
        and tensor._version == version
        and tensor.data_ptr() == alias.data_ptr()
        and layer._repacks == count
        and layer.activation_bits == forms.bits
        for layer, tensor, (known, alias, version, count) in zip(layers, weights, made_from)
    ):
        if len({layer.activation_bits for layer in layers}) > 1 or first.outliers is not None:  # each has its own
            return None
        forms = Forms(first.activation_bits)
        made_from = [(each, each.detach(), each._version, layer._repacks) for layer, each in zip(layers, weights)]
        first._joint = made_from, forms
    return forms


def size_of_linear(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer that can be converted; None for another module."""
    if type(module) is nn.Linear:
        size = module.in_features, module.out_features
    elif type(module) is Conv1D:
        size = module.nx, module.nf
    else:
        return None
    return size if min(size) >= LEAST and module.weight.is_floating_point() else None


def is_embedding(module: nn.Module) -> bool:
    """Whether this is an embedding that can be converted."""
    return type(module) is nn.Embedding and module.max_norm is None and module.weight.is_floating_point()


def int8_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """The int8 modules with their names; one of two names is there twice."""
    named = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in named if isinstance(module, Int8Weight)]


def make_float(model: nn.Module, modules: dict[str, Any], values: dict[int, torch.Tensor] | None = None) -> None:
    """Put float modules in the place of int8 ones, in training again.

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


def replace(model: nn.Module, modules: dict[str, Any], bits: int) -> list[tuple[Any, Any]]:
    """Put empty int8 modules in the place of others. Returns each with the new one."""
    made: dict[int, tuple[Any, Any]] = {}  # a module may be there under several names
    for name, module in modules.items():
        if id(module) not in made:
            made[id(module)] = module, _int8_module(module, bits)
        elif size_of_linear(module):  # files share no tensors that the model's class does not declare as tied
            made[id(module)][1].outliers = None
        _set_submodule(model, name, made[id(module)][1])
    return list(made.values())


def _int8_module(module: Any, bits: int) -> nn.Module:
    like = {"dtype": module.weight.dtype, "device": module.weight.device}
    new: Any
    if size := size_of_linear(module):
        new = Int8Linear(*size, module.bias is not None, bits, **like)
        new.bias, new.was_conv1d = module.bias, type(module) is Conv1D
    else:
        new = Int8Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, **like)
    return new.train(module.training)


def _set_submodule(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)

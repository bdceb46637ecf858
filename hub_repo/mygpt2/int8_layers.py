"""Linear layers and embeddings with int8 weights.

On an x86 CPU without gradients, products are those of FBGEMM, torch's library of int8 products; elsewhere the weight is
converted to float for each product, which saves memory but no time.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import functools
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .compat import readable
from .products import LOCK, compiled

OUTLIERS = 8  # columns of states that are multiplied in float, see `Outliers`
OFTEN = 64  # products of few rows, after which it is worth while to move the weights into huge pages
ROWS = 512  # of states that are multiplied at once, so that the temporary tensors stay in the caches
POWERS = torch.tensor([2.0 ** max(n - 150, -149) for n in range(255)], device="cpu")  # of float32's exponents


@functools.cache
def top_level() -> int:
    """The largest quantised state: 127, or 63 on processors whose 16-bit sums would overflow; 0 without FBGEMM."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return 0
    try:
        like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
        packed = _pack(torch.full((64, 64), 127, dtype=torch.int8, device="cpu"), torch.ones(64, **like))
        product = packed_product(torch.full((2, 64), 127.0, **like), packed, None, levels_of(8, 127))
    except (AttributeError, RuntimeError):  # a torch without these operators
        return 0
    return 127 if bool((product == 127 * 127 * 64).all()) else 63


class Levels(NamedTuple):
    """How states are quantised.

    With 16 bits, a row is the sum of a rounded one and the quantised rest, which are multiplied in one call: the weight is
    read once.
    """

    top: int  # the largest quantised number
    of_parts: torch.Tensor  # the number in the rounded row, and in the rest, that stands for a row's largest, `[2, 1]`
    inverse: torch.Tensor  # `[1, 2]`
    bits: int


@functools.cache
def levels_of(bits: int, top: int) -> Levels:
    """`Levels` for states of 8 or 16 bits."""
    of_parts = torch.tensor([[1.0], [2.0 * top]], dtype=torch.float32, device="cpu") * top
    return Levels(top, of_parts, 1 / of_parts.view(1, 2), bits)


def _pack(weight: torch.Tensor, scale: torch.Tensor) -> Any:
    """FBGEMM's form of a weight `[outputs, inputs]`."""
    with LOCK:
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


class Outliers(NamedTuple):
    """A few columns of states that are multiplied in float, because they are so large that others would lose bits."""

    columns: torch.Tensor  # [outliers]
    others: torch.Tensor  # [inputs], 0 for these columns, 1 for the others
    weight: torch.Tensor  # [outliers, outputs], float32


def packed_product(
    rows: torch.Tensor,
    packed: "torch.classes.quantized.LinearPackedParamsBase",  # type: ignore[name-defined]
    bias: torch.Tensor | None,
    levels: Levels,
    into: torch.Tensor | None = None,
    outliers: Outliers | None = None,
) -> torch.Tensor:
    """The product of float32 `rows` `[rows, inputs]` with a packed weight, for TorchScript. Each row is quantised by itself."""
    top, given = levels.top, rows
    if outliers is not None:
        rows = rows * outliers.others
    if len(rows) < 64:
        largest = rows.abs().amax(-1, keepdim=True)
    else:  # no tensor of absolute values
        largest = torch.maximum(rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True).neg_())
    largest = largest.clamp_min_(1e-30)  # [rows, 1]; not 0 for a row of zeros
    # the product rounds to integers from `-top` to `top`
    if levels.bits == 8:
        scaled = rows * (top / largest) if outliers is None else rows.mul_(top / largest)  # in place if it is new
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(scaled, 1.0, top + 1, packed)
    elif len(rows) == 1 and into is None:  # fewer operations than below
        both = rows * (levels.of_parts / largest)  # [2, inputs]
        both[1].sub_(both[0].round_(), alpha=2.0 * top)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(both, 1.0, top + 1, packed)
        product = torch.mm(largest * levels.inverse, product)
        return product if bias is None else product.add_(bias)
    else:
        both = rows * (levels.of_parts[:, :, None] / largest)  # [2, rows, inputs]
        both[1].sub_(both[0].round_(), alpha=2.0 * top)
        both = both.flatten(0, 1)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(both, 1.0, top + 1, packed)
        product, rest = product.chunk(2)
        product.add_(rest, alpha=1 / (2 * top))
    result = product if into is None else into
    if bias is None:
        torch.mul(product, largest / top, out=result)
    else:
        torch.addcmul(bias, product, largest / top, out=result)
    if outliers is not None:
        result.addmm_(given.index_select(1, outliers.columns), outliers.weight)
    return result


def _multiply(
    rows: torch.Tensor,
    packed: Any,
    bias: torch.Tensor | None,
    bits: int,
    into: torch.Tensor | None = None,
    outliers: Outliers | None = None,
) -> torch.Tensor:
    """`packed_product` as fast as possible on this processor."""
    return compiled(packed_product)(rows, packed, bias, levels_of(bits, top_level()), into, outliers)


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
        return last.contiguous().view(torch.float32)[..., 0]
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

    Not a subclass of `nn.Linear`: what edits float weights in place, such as merging an adapter, must not accept it. A
    packed copy of the weight is made for the first product, and again after the weight was modified (only changes through
    `weight.data`, which torch does not count, are not noticed: call `repack()` after them).

    Args:
        activation_bits: 16 or 8, the precision of the states in a product on the CPU without gradients.

    Attributes:
        outliers: with 8 bits, the `OUTLIERS` columns of states that are multiplied in float, or -1 for none; any choice is
            right, but the columns of the largest states make the others more precise.
    """

    is_tokenwise = True
    bias: torch.Tensor | None
    _packed: tuple[Any, Any, int, Any, Outliers | None]

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
        rows, packed = states.reshape(-1, self.in_features).float(), self._pack()
        bias, outliers = None if self.bias is None else self.bias.float(), self._packed[4]
        if len(rows) <= ROWS:
            product = _multiply(rows, packed, bias, self.activation_bits, None, outliers)
        else:
            product = rows.new_empty(len(rows), self.out_features)
            for part, into in zip(rows.split(ROWS), product.split(ROWS)):
                _multiply(part, packed, bias, self.activation_bits, into, outliers)
        return product.view(*states.shape[:-1], self.out_features).to(states.dtype)

    def product_of_few(self, rows: torch.Tensor) -> torch.Tensor:
        """`forward` for float32 `rows` `[rows, in_features]` on the CPU, few and without gradients."""
        packed, own = self.pack_for_few(), self.__dict__  # for speed: `nn.Module` looks up and checks each attribute
        return _multiply(rows, packed, own["_parameters"]["bias"], own["activation_bits"], None, own["_packed"][4])

    def pack_for_few(self) -> Any:
        """The packed weight for a product of few rows. After `OFTEN`, the weights are moved into huge pages."""
        own = self.__dict__
        own["_products"] += 1
        if own["_products"] == OFTEN and "mymodels.huge_pages" in sys.modules:
            sys.modules["mymodels.huge_pages"].move_process()
        return self._pack()

    def _is_fast(self, states: torch.Tensor) -> bool:
        if type(states) is not torch.Tensor or not states.is_cpu or torch.is_grad_enabled():
            return False
        if states.numel() == 0 or states.shape[-1] != self.in_features or not self.packs():
            return False
        return readable() and not torch.is_autocast_enabled("cpu")

    def packs(self) -> bool:
        """Whether FBGEMM can multiply with this weight."""
        weight: Any = self._parameters["weight"]
        if not weight.is_cpu or weight.is_inference() or self.in_features > 1 << 16:  # longer sums exceed 32 bits
            return False
        return top_level() > 0

    def _pack(self) -> Any:
        weight, (packed_from, alias, version, packed, _) = self.weight, self._packed
        if weight is not packed_from or weight._version != version or weight.data_ptr() != alias.data_ptr():
            packed = _pack(self.values, self.scale)
            # references to the packed weight's parameter and memory: neither can be reused for another one
            self._packed = weight, weight.detach(), weight._version, packed, self._outliers()
        return packed

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
        """Drop the packed copy of the weight."""
        self._packed = (None, None, -1, None, None)
        self._joint: tuple[Any, ...] = ([], None)
        self._repacks = self.__dict__.get("_repacks", 0) + 1  # of a joint copy, another layer may be the owner

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.repack()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": (None, None, -1, None, None), "_joint": ([], None)}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.activation_bits} bits"


def joint_product_of_few(layers: Sequence[Int8Linear], rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """`product_of_few` of several layers for the same rows: one product with a joint copy of their weights."""
    packed = joint_pack(layers)
    if packed is None:
        return [layer.product_of_few(rows) for layer in layers]
    biases: list[Any] = [layer._parameters["bias"] for layer in layers]
    # joined at each call: a copy would miss changes through `bias.data`
    bias = None if biases[0] is None else torch.cat(biases)
    product = _multiply(rows, packed, bias, layers[0].activation_bits)
    return product.split([layer.out_features for layer in layers], -1)


def joint_pack(layers: Sequence[Int8Linear]) -> Any:
    """A packed joint copy of the layers' weights, made anew after one was modified; None if they cannot be one layer."""
    first = layers[0]
    weights: list[Any] = [layer._parameters["weight"] for layer in layers]
    if len({layer._parameters["bias"] is None for layer in layers}) > 1:
        return None
    made_from, packed = first._joint
    if len(made_from) != len(layers) or not all(
        tensor is known
        and tensor._version == version
        and tensor.data_ptr() == alias.data_ptr()
        and layer._repacks == count
        for layer, tensor, (known, alias, version, count) in zip(layers, weights, made_from)
    ):
        if len({layer.activation_bits for layer in layers}) > 1 or first.outliers is not None:  # each has its own
            return None
        packed = _pack(torch.cat([layer.values for layer in layers]), torch.cat([layer.scale for layer in layers]))
        made_from = [(each, each.detach(), each._version, layer._repacks) for layer, each in zip(layers, weights)]
        first._joint = made_from, packed
    return packed

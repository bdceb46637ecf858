"""Products with int8 weights on the CPU by FBGEMM, torch's library for them, and the states that these keep in float.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import functools
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from .products import LARGE, LOCK, compiled, least_seconds

logger = logging.get_logger(__name__)
OUTLIERS = 8  # columns of states that are multiplied in float, see `Outliers`
BLOCK = 192  # outputs that a `RowTable` computes at once: of 128 to 768, the fastest on an AMD EPYC


@functools.cache
def top_level() -> int:
    """The largest quantised state: 127, or 63 on processors whose 16-bit sums would overflow; 0 without FBGEMM."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return 0
    try:
        like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
        packed = pack(torch.full((64, 64), 127, dtype=torch.int8, device="cpu"), torch.ones(64, **like))
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


def pack(weight: torch.Tensor, scale: torch.Tensor) -> Any:
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
    elif len(rows) == 1 and into is None and outliers is None:  # fewer operations than below
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


def multiply(
    rows: torch.Tensor,
    packed: Any,
    bias: torch.Tensor | None,
    bits: int,
    into: torch.Tensor | None = None,
    outliers: Outliers | None = None,
) -> torch.Tensor:
    """`packed_product` as fast as possible on this processor."""
    return compiled(packed_product)(rows, packed, bias, levels_of(bits, top_level()), into, outliers)


class RowTable(NamedTuple):
    """A weight for products of one row.

    Such a product is the sum of the weight's columns, each times one of the states: what embedding bags compute. FBGEMM's
    kernel for these takes the states as they are, without rounding, and reads a weight that is not in the caches faster.
    The outputs are in blocks of equal height, the last one filled up. Row `block * inputs + i` of the table is column `i` of
    a block, plus 128, followed by the scale and the offset (float32) by which the kernel turns each byte into a number:
    1/128, so that large states do not overflow, and -1.
    """

    rows: torch.Tensor  # uint8 [blocks * inputs, height + 8]
    ids: torch.Tensor  # int32, 0 to blocks * inputs
    starts: torch.Tensor  # int32 [blocks + 1], of each block among the ids, and the end
    scale: torch.Tensor  # [outputs], 128 times that of the weight


def row_table(values: torch.Tensor, scale: torch.Tensor) -> RowTable:
    """The `RowTable` of int8 values `[outputs, inputs]`."""
    outputs, inputs = values.shape
    blocks = -(-outputs // BLOCK)
    height = -(-outputs // blocks // 16) * 16
    blocks = -(-outputs // height)
    if outputs < blocks * height:
        values = torch.nn.functional.pad(values, (0, 0, 0, blocks * height - outputs))
    rows = torch.empty(blocks, inputs, height + 8, dtype=torch.uint8, device="cpu")
    rows[..., :height] = values.reshape(blocks, height, inputs).transpose(1, 2).view(torch.uint8)
    rows[..., :height].bitwise_xor_(128)  # + 128
    rows[..., height:] = torch.tensor([1 / 128, -1.0], dtype=torch.float32, device="cpu").view(torch.uint8)
    return RowTable(rows.flatten(0, 1), *_ids_and_starts(blocks, inputs), scale * 128)


@functools.cache
def _ids_and_starts(blocks: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(blocks * inputs, dtype=torch.int32, device="cpu")
    return ids, torch.arange(0, len(ids) + 1, inputs, dtype=torch.int32, device="cpu")


def row_product(row: torch.Tensor, table: RowTable, bias: torch.Tensor | None) -> torch.Tensor:
    """The product `[1, outputs]` of float32 states `[1, inputs]`, for TorchScript."""
    states = row.expand(len(table.starts) - 1, -1).reshape(-1).contiguous()  # once for each block
    product = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        table.rows,
        table.ids,
        table.starts,
        False,  # not scaled by how often an id is there
        0,  # mode: sum
        False,  # not pruned
        states,  # the weights of the sum
        None,
        True,  # the last of the starts is the end
    ).view(1, -1)
    if product.size(1) > len(table.scale):
        product = product[:, : len(table.scale)]
    product = product.mul_(table.scale)
    return product if bias is None else product.add_(bias)


@functools.cache
def table_pays(inputs: int, threads: int) -> bool:
    """Whether a product of one row with a `RowTable` takes at most 0.95 of the time on this processor.

    Measured once, in about a third of a second, on 32 MB of weights in each form, which drive each other out of the caches:
    in generation, each weight comes from memory. `MYMODELS_INT8_TABLES=0` in the environment turns tables off.
    """
    if os.environ.get("MYMODELS_INT8_TABLES") == "0":
        return False
    like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    outputs = max(1, (1 << 21) // inputs // BLOCK) * BLOCK
    values, scale = torch.ones(outputs, inputs, dtype=torch.int8, device="cpu"), torch.ones(outputs, **like)
    row, levels, count = torch.ones(1, inputs, **like), levels_of(16, top_level()), -(-(1 << 25) // values.numel())
    by_packed, by_table = least_seconds(
        (
            lambda packed: compiled(packed_product)(row, packed, None, levels),
            [pack(values, scale) for _ in range(count)],
        ),
        (lambda table: compiled(row_product)(row, table, None), [row_table(values, scale) for _ in range(count)]),
    )
    return by_table <= 0.95 * by_packed


def largest_columns(model: Any, layers: Sequence[Any]) -> dict[int, torch.Tensor]:
    """By the id of a layer, the columns of its largest states in a forward pass of random tokens, if they stand out.

    They belong to the model: in BERT, the same few columns of a layer are large for every token of every text.
    """
    largest: dict[int, torch.Tensor] = {}

    def note(module: Any, states: tuple[Any, ...]) -> None:
        top = states[0].detach().flatten(0, -2).abs().amax(0)
        largest[id(module)] = torch.maximum(top, largest.get(id(module), top))

    hooks = [each.register_forward_pre_hook(note) for each in layers]
    training = [each for each in model.modules() if each.training]
    config, device = model.config, layers[0].weight.device
    limit = getattr(config, "max_position_embeddings", None) or 0
    size = 8, min(64, (limit + 1) // 2) if limit > 0 else 64  # RoBERTa's positions begin at 2; XLNet has -1
    try:
        model.eval()
        tokens = min(config.vocab_size, getattr(config, "decoder_vocab_size", None) or config.vocab_size)
        ids = torch.randint(tokens, size, generator=torch.Generator().manual_seed(0))
        end: Any = getattr(config, "eos_token_id", None)
        if end in range(tokens):  # BART's classifier needs one
            ids[ids == end] = (end + 1) % tokens
            ids[:, -1] = end
        names = ("input_ids", "decoder_input_ids")[: 1 + config.is_encoder_decoder]
        with torch.no_grad():
            for text in ids.to(device).split(1):  # GPT-2's classifier takes no batches without a padding token
                model(**dict.fromkeys(names, text))
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


class Forms:
    """The weight of a layer, or of some as one layer, for the kernels. Each form is made when it is first needed.

    Its methods are always given the same layers, which it does not keep: they keep it.
    """

    def __init__(self, bits: int, outliers: Outliers | None = None):
        self.bits, self.outliers = bits, outliers
        self._packed: Any = None
        self._table: RowTable | None = None

    def packed(self, layers: Sequence[Any]) -> Any:
        """FBGEMM's form for rows."""
        if self._packed is None:
            self._packed = pack(*_joined(layers))
        return self._packed

    def table(self, layers: Sequence[Any], rows: int) -> RowTable | None:
        """The form for one row; None for more rows, or where it is not faster."""
        inputs, outputs = layers[0].in_features, sum(layer.out_features for layer in layers)
        if rows != 1 or self.bits != 16 or inputs * outputs < LARGE:
            return None
        if not table_pays(inputs, torch.get_num_threads()):
            return None
        if self._table is None:
            self._table = row_table(*_joined(layers))
        return self._table


def _joined(layers: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The values `[outputs, inputs]` and scales `[outputs]` of all layers."""
    return torch.cat([layer.values for layer in layers]), torch.cat([layer.scale for layer in layers])


def product_of(
    layers: Sequence[Any],
    forms: Forms,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product of `rows` with the joint weight of layers, whose `forms` these are."""
    table = forms.table(layers, len(rows)) if into is None else None
    if table is not None:
        return compiled(row_product)(rows, table, bias)
    return multiply(rows, forms.packed(layers), bias, forms.bits, into, forms.outliers)

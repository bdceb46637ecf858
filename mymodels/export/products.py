"""Products of an exported decoder, in the form in which this processor reads a weight fastest for one token."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..models.products import LARGE, ONE_DNN, batched, least_seconds, parts_of
from .graphs import Graph


class _InBatches(TorchFunctionMode):
    """Within it, `nn.functional.linear` with a large weight of certain widths is a batch of products with parts of it.

    A graph has one form for any number of rows. With one row, MKL's kernel for batches reads a weight up to 1.8 times as
    fast as the one for a single product (torch 2.13, AMD EPYC); with many rows, both take about as long.
    """

    def __init__(self, widths: set[int]):
        super().__init__()
        self.widths = widths

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is not nn.functional.linear or kwargs:
            return function(*args, **kwargs or {})
        states, weight, bias = args if len(args) == 3 else (*args, None)
        height, width = weight.shape
        parts = parts_of(height, torch.get_num_threads())
        fits = weight.dtype is states.dtype is torch.float32 and weight.device.type == "cpu"
        if not (fits and parts and weight.numel() >= LARGE and width in self.widths and weight.is_contiguous()):
            return function(*args)
        rows = states.reshape(-1, width)
        count = rows.shape[0]  # not `len`, which fixes it
        columns = rows.t().expand(parts, width, count)
        product = torch.bmm(weight.view(parts, -1, width), columns).view(height, count).t()
        product = product.reshape(*states.shape[:-1], height)
        return product if bias is None else product + bias


@functools.cache
@torch.no_grad()
def batches_pay(width: int, threads: int) -> bool:
    """Whether one row times weights of this width takes at most 0.9 of the time in batches, on this processor.

    Measured on 64 MB of weights, against torch's own product: a graph has no other (`models.products.fastest` compares with
    oneDNN's, which is faster than that one).
    """
    like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    states = torch.ones(1, width, **like)
    weights = torch.ones(8, max(1, (1 << 21) // width // 64) * 64, width, **like)
    plain, in_batches = least_seconds(
        (functools.partial(nn.functional.linear, states), weights), (functools.partial(batched, states), weights)
    )
    return in_batches <= 0.9 * plain


@contextlib.contextmanager
def fast_for_one_token(graph: Graph) -> Iterator[None]:
    """Within it, a decoder with a cache is traced with the products that are fastest in generation on this processor."""
    linear = [part for part in graph.modules() if isinstance(part, nn.Linear) and part.weight.numel() >= LARGE]
    widths = {part.in_features for part in linear if part.weight.dtype is torch.float32 and part.weight.is_cpu}
    plain = all(type(part.weight.data) is torch.Tensor for part in linear)  # not quantised, distributed, …
    if not graph.past or not ONE_DNN or not plain:
        widths = set()
    widths = {width for width in widths if batches_pay(width, torch.get_num_threads())}
    with _InBatches(widths) if widths else contextlib.nullcontext():
        yield

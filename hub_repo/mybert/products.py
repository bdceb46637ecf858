"""float32 products with a weight on the CPU, each by the fastest of torch's kernels.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import functools
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

LARGE = 1 << 19  # elements of a weight; torch itself computes smaller ones
LOCK = threading.Lock()  # filters of warnings, and torch's choice of an engine, are one for all threads
ONE_DNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def one_dnn(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`nn.functional.linear` by oneDNN."""
    if not weight.is_contiguous() and not weight.t().is_contiguous():
        weight = weight.contiguous()  # oneDNN has no fast kernel for a slice: 600 times slower (torch 2.13)
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


def batched(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`nn.functional.linear` of at most 64 rows, as a batch of products with parts of the weight.

    MKL has another kernel for batches, which reads a weight that is not in the caches up to 1.8 times as fast as
    oneDNN (one row, torch 2.13, AMD EPYC). No copy of the weight is made.
    """
    parts = parts_of(weight.shape[0], torch.get_num_threads())
    if not parts or not weight.is_contiguous() or not states.is_contiguous():
        return one_dnn(states, weight, bias)
    return compiled(in_parts)(states, weight, bias, parts)


def in_parts(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: int) -> torch.Tensor:
    """`batched` in this number of parts, for TorchScript."""
    height, width = weight.shape
    rows = states.numel() // width
    columns = states.as_strided((parts, width, rows), (0, 1, width))  # with other strides, MKL is 30 times slower
    product = torch.bmm(weight.reshape(parts, -1, width), columns)
    if rows > 1:
        product = product.view(height, rows).t().contiguous()
    product = product.view(list(states.shape[:-1]) + [height])  # noqa: RUF005 - TorchScript
    return product if bias is None else product.add_(bias)


@functools.cache
def compiled(function: Callable) -> Callable:
    """A function of tensors as TorchScript: with one row, Python takes longer between its operations than they do.

    Without TorchScript's optimiser: it makes the first two calls of a step of MyGPT2 a fifth of a second longer, and the later
    ones no shorter (torch 2.13).
    """
    try:
        with LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            return torch.jit.optimized_execution(False)(torch.jit.script(function))
    except Exception:  # without the source, or in a torch without TorchScript: it raises errors of many classes
        return function


def turned(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`nn.functional.linear` of at most 64 rows, as the product of the weight with the states, turned.

    oneDNN copies its second factor into another layout for each product: here the states, which are small, and not the
    weight. In multiples of 16 rows it takes 0.75 to 0.92 of the time (16 to 64 rows, torch 2.13, AMD EPYC).
    """
    if not weight.is_contiguous():
        return one_dnn(states, weight, bias)
    product = one_dnn(weight, states.flatten(0, -2)).t().contiguous()
    product = product.view(*states.shape[:-1], -1)
    return product if bias is None else product.add_(bias)


@functools.cache
def parts_of(rows: int, threads: int) -> int:
    """In how many parts `batched` multiplies.

    The smallest divisor of a weight's rows that is at least 4 and gives every thread a part; 0 if there is none.
    """
    return next((parts for parts in range(max(4, threads), rows // 16) if rows % parts == 0), 0)


def product_of_few(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`nn.functional.linear` of few rows without gradients and a large weight, all float32 on the CPU."""
    count_product(weight)
    rows, width = states.numel() // weight.shape[1], weight.shape[1]
    product = fastest(rows, width, torch.get_num_threads())
    if bias is None or rows > 1:
        return product(states, weight, bias)
    return product(states, weight).add_(bias)  # one row: kernels with a bias are slower


def count_product(weight: torch.Tensor) -> None:
    """Count a product of few rows, after some of which a weight is moved into huge pages."""
    if "mymodels.huge_pages" in sys.modules:  # it calls the kernel, which a Hub folder's code should not
        sys.modules["mymodels.huge_pages"].count_product(weight)


@functools.cache
def fastest(rows: int, width: int, threads: int) -> Callable:
    """The fastest product of states `[rows, width]` without gradients and a large weight on this processor.

    oneDNN's, unless another one takes at most 0.9 of its time. Measured once, in about a tenth of a second, on 64 MB of
    weights: in generation, each weight comes from memory and not from the caches. `turned` takes as long for 9 rows as for
    16, the numbers in a vector of AVX-512, so only multiples of 16 are measured, for themselves and up to 7 rows fewer.
    """
    if rows <= 4:
        return _measured(rows, width, threads, (one_dnn, nn.functional.linear, batched))
    full = -(-rows // 16) * 16
    if rows > 64 or full - rows >= 8:
        return one_dnn
    return _measured(full, width, threads, (one_dnn, turned))


@functools.cache
def _measured(rows: int, width: int, threads: int, candidates: tuple[Callable, ...]) -> Callable:
    like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    states = torch.ones(rows, width, **like)
    weights = torch.ones(8, max(1, (1 << 21) // width // 64) * 64, width, **like)
    least = least_seconds(*((functools.partial(product, states), weights) for product in candidates))
    best = min(range(len(candidates)), key=least.__getitem__)
    return candidates[best] if least[best] <= 0.9 * least[candidates.index(one_dnn)] else one_dnn


def least_seconds(*work: tuple[Callable[[Any], Any], Iterable[Any]]) -> list[float]:
    """For each function and the weights that it is called with, the least time of all calls, of three rounds in turn."""
    least = [float("inf")] * len(work)
    for _ in range(3):
        for place, (function, weights) in enumerate(work):
            began = time.perf_counter()
            for weight in weights:
                function(weight)
            least[place] = min(least[place], time.perf_counter() - began)
    return least

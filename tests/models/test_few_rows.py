"""Products of few rows, as in a step of generation: torch's own numbers, whatever was made of the layer."""

import time
from collections.abc import Callable

import pytest
import torch
from tiny import largest_difference
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from mymodels.models import cpu_kernels, products
from mymodels.models.cpu_kernels import linear_by_onednn
from mymodels.models.products import ONE_DNN, batched, fastest, one_dnn, turned

pytestmark = pytest.mark.skipif(not ONE_DNN, reason="torch without oneDNN")


@pytest.fixture(autouse=True, params=[one_dnn, batched, turned], ids=lambda product: product.__name__)
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which product is the fastest depends on the processor; each must be right."""
    few = request.param is not turned
    for module in (cpu_kernels, products):
        monkeypatch.setattr(
            module, "fastest", lambda rows, *_: request.param if few == (rows <= 4) and rows <= 64 else one_dnn
        )


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.fast = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.fast |= "_linear_pointwise" in function.name() or "aten::bmm" in function.name()
        return function(*args, **(kwargs or {}))


@linear_by_onednn
def call(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    return layer(states)


def run(layer: nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, bool]:
    with Seen() as seen, torch.no_grad():
        return (layer(states) if isinstance(layer, Beside) else call(layer, states)), seen.fast


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 512), (8, 1, 512), (3, 512)])
def test_same_numbers(shape: tuple[int, ...], bias: bool) -> None:
    layer, states = nn.Linear(512, 4096, bias=bias), torch.randn(shape)
    result, fast = run(layer, states)
    assert fast and largest_difference(result, layer(states)) <= 1e-5


class Beside(nn.Module):
    """Calls one layer; the mode is active for another, which is large."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.large = layer, nn.Linear(512, 4096)

    @linear_by_onednn
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.layer(states)


def replaced(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda states: 2 * nn.functional.linear(states, layer.weight, layer.bias)
    return layer


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


def pruned(layer: nn.Linear) -> nn.Linear:
    return prune.l1_unstructured(layer, "weight", amount=0.5)


CHANGES = {
    "replaced": replaced,
    "hooked": hooked,
    "pruned": pruned,
    "parametrized": torch.nn.utils.parametrizations.orthogonal,
    "of a subclass": lambda layer: type("Mine", (nn.Linear,), {})(512, 1024),
    "in float64": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_does_what_it_does(change: str) -> None:
    layer = CHANGES[change](nn.Linear(512, 1024))
    states = torch.randn(2, 1, 512, dtype=torch.float64 if change == "in float64" else torch.float32)
    result, _ = run(Beside(layer), states)
    with torch.no_grad():
        assert largest_difference(result, layer(states)) <= 1e-5


class Around(nn.Module):
    """A module with a large layer, in one that has none of its own: only the inner one runs in the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(512, 4096))

    @linear_by_onednn
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return call(self.inner, states) if states.ndim == 3 else self.inner(states)


@pytest.mark.parametrize("shape, expected", [((2, 1, 512), True), ((2, 512), False), ((65, 512), True)])
def test_the_mode_is_active_only_where_it_pays(shape: tuple[int, ...], expected: bool) -> None:
    """With few rows around the large layer alone, with many around everything."""
    model, states = Around(), torch.randn(shape)
    with Seen() as seen, torch.no_grad():
        result = model(states)
        assert seen.fast == expected
    assert largest_difference(result, model.inner(states)) <= 1e-5


@pytest.mark.parametrize("case", ["float64", "small"])
def test_where_it_does_not_apply(case: str) -> None:
    layer, states = nn.Linear(512, 64 if case == "small" else 4096), torch.randn(1, 512)
    if case == "float64":
        layer, states = layer.double(), states.double()
    assert not run(layer, states)[1]


@pytest.mark.parametrize("rows", [1, 65])
def test_with_gradients_and_many_rows(rows: int) -> None:
    layer, states = nn.Linear(512, 4096), torch.randn(rows, 512)
    call(layer, states).square().sum().backward()
    found = layer.weight.grad.clone()
    layer.zero_grad()
    layer(states).square().sum().backward()
    assert largest_difference(found, layer.weight.grad) <= 1e-3 * found.abs().max()
    result, fast = run(layer, states)
    assert fast and largest_difference(result, layer(states)) <= 1e-5


class Weights(TorchDispatchMode):
    """The strides of each weight that oneDNN multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_linear_pointwise" in function.name():
            self.strides.append(args[1].stride())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sliced", ["states", "weight"])
def test_onednn_gets_no_slice(sliced: str) -> None:
    """As the first tokens of all rows are one, for a pooler: its weight's gradient took 600 times as long."""
    layer, states = nn.Linear(96, 80), torch.randn(4, 7, 96)
    if sliced == "weight":
        layer.weight = nn.Parameter(torch.randn(80, 200)[:, :96])
    given = states[:, 0] if sliced == "states" else states
    with Weights() as seen:
        output = call(layer, given)
        output.square().sum().backward()
    assert seen.strides
    for wide, narrow in (sorted(strides, reverse=True) for strides in seen.strides):
        assert narrow == 1 and wide in (4, 28, 80, 96)  # the other axis's length
    found, layer.weight.grad = layer.weight.grad.clone(), None
    layer(given).square().sum().backward()
    assert largest_difference(found, layer.weight.grad) <= 1e-3 * found.abs().max()


@pytest.mark.parametrize("height", [64, 80, 97, 50257 % 1009, 1009])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (1, 2), (5,), (4, 4)])
@pytest.mark.parametrize("product", [batched, turned])
def test_other_forms_are_the_same_product(product: Callable, shape: tuple[int, ...], height: int) -> None:
    """Also of states and weights that are slices, and where a weight cannot be divided into parts."""
    weight, bias = torch.randn(height, 33), torch.randn(height)
    for states in (torch.randn(*shape, 33), torch.randn(2, *shape, 33)[1], torch.randn(*shape, 66)[..., ::2]):
        for given in ((weight,), (weight, bias), (torch.randn(33, height).t(), bias)):
            with torch.no_grad():
                found, expected = product(states, *given), nn.functional.linear(states, *given)
            assert found.is_contiguous() and found.shape == expected.shape
            assert largest_difference(found, expected) <= 1e-4


def test_products_are_compiled_and_the_same_without(monkeypatch: pytest.MonkeyPatch) -> None:
    function = products.compiled(products.in_parts)
    assert isinstance(function.__wrapped__, torch.jit.ScriptFunction)
    states, weight, bias = torch.randn(2, 1, 33), torch.randn(80, 33), torch.randn(80)
    with torch.no_grad():
        assert torch.equal(function(states, weight, bias, 4), products.in_parts(states, weight, bias, 4))
    switched, switch = [], torch._C._set_graph_executor_optimize
    monkeypatch.setattr(torch._C, "_set_graph_executor_optimize", lambda on: (switched.append(on), switch(on)))
    function(states, weight, bias, 4)
    assert switched == [False, True], "the optimiser is off, for our functions only"

    def refuse(*args: object) -> None:
        raise torch.jit.frontend.NotSupportedError(None, "no source")  # an Exception, and no RuntimeError

    monkeypatch.setattr(torch.jit, "script", refuse)
    assert products.compiled.__wrapped__(products.in_parts) is products.in_parts


def test_states_of_another_width_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(nn.Linear(768, 1024), torch.randn(1, 1536))


def test_the_fastest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (5, 8, 17, 24, 65, 80):  # much of a vector would be empty, or many rows
        assert fastest(rows, 64, 1) is one_dnn
    measured: list[int] = []
    monkeypatch.setattr(products, "_measured", lambda rows, *_: measured.append(rows) or turned)
    assert all(fastest.__wrapped__(rows, 64, 1) is turned for rows in (9, 16, 25, 64))
    assert measured == [16, 16, 32, 64]
    monkeypatch.undo()
    for least in (0.02, 0.001):
        slow = [lambda *_, wait=wait: time.sleep(wait) for wait in (0.01, 0.01, least)]
        monkeypatch.setattr(products, "one_dnn", slow[0])
        monkeypatch.setattr(products, "batched", slow[2])
        monkeypatch.setattr(nn.functional, "linear", slow[1])
        assert fastest.__wrapped__(1, 64, 1) is (slow[2] if least < 0.01 else slow[0])


def test_it_can_be_turned_off() -> None:
    layer, states = nn.Linear(512, 4096), torch.randn(1, 1, 512)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not run(layer, states)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, fast = run(layer, states)
    assert not fast and result.dtype == torch.bfloat16

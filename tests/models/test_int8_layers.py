"""int8 layers against products of integers and against float layers with the same, rounded weights, both in float64."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from torch import nn

from mymodels.models import int8_layers, int8_products
from mymodels.models.int8_layers import Int8Embedding, Int8Linear, quantized

needs_fbgemm = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="this torch has no int8 products"
)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What int8 leaves of a weight, in float64."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).double()
    return torch.round(weight.double() / scale).nan_to_num() * scale


def linear(inputs: int = 96, outputs: int = 80, bits: int = 16, bias: bool = True) -> tuple[nn.Linear, Int8Linear]:
    """A float layer and the same in int8."""
    layer = nn.Linear(inputs, outputs, bias)
    return layer, as_int8(layer, bits)


def as_int8(layer: nn.Linear, bits: int = 16) -> Int8Linear:
    new = Int8Linear(layer.in_features, layer.out_features, layer.bias is not None, bits)
    new.weight = nn.Parameter(quantized(layer.weight, "layer"), requires_grad=False)
    new.bias = layer.bias
    return new


def truth(layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """The product with the rounded weight, in float64."""
    bias = None if layer.bias is None else layer.bias.detach().double()
    return nn.functional.linear(states.double(), rounded(layer.weight.detach()), bias)


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of `b`."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@needs_fbgemm
@pytest.mark.parametrize("levels", [127, 63])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_products_are_those_of_quantised_states(levels: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_products, "top_level", lambda: levels)
    states = torch.randn(3, 7, 96) * torch.logspace(-6, 6, 7)[:, None]
    layer, eight = linear(bits=8, bias=bias)
    outliers = [7, 90, 3, 50, 1, 0, 95, 2]  # columns that are not quantised
    eight.outliers.copy_(torch.tensor(outliers))
    weight, kept = rounded(layer.weight), states.double()
    kept[..., outliers] = 0
    step = kept.abs().amax(-1, keepdim=True) / levels
    product = nn.functional.linear(torch.round(kept / step) * step, weight)
    product += states[..., outliers].double() @ weight[:, outliers].t()
    expected = product + (layer.bias.double() if bias else 0)
    # states exactly between two steps may be rounded to either side
    size = product.abs().amax(-1, keepdim=True) + (layer.bias.abs().max() if bias else 0)
    assert (((eight(states) - expected) / size).abs() < 1e-5).double().mean() > 0.95
    assert ((eight(states) - expected) / size).abs().max() < 1 / levels
    # 16 bits: as good as exact states
    expected = truth(layer, states)
    assert ((as_int8(layer)(states) - expected) / size).abs().max() < 1.5 / levels**2
    assert ((eight(states) - expected) / size).abs().max() > 1e-3  # and 8 bits are not


@needs_fbgemm
@pytest.mark.parametrize("bits", [8, 16])
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = linear(bits=bits)
    states = torch.randn(130, 96) * torch.logspace(-3, 3, 130)[:, None]
    one_by_one = torch.cat([layer(row[None]) for row in states])
    size = one_by_one.abs().amax(-1, keepdim=True)

    def check_same(found: torch.Tensor) -> None:
        assert ((found - one_by_one[: len(found)]).abs() <= 1e-6 * size[: len(found)]).all()

    for rows in (2, 3, 7, 64, 129, 130):
        check_same(torch.cat([layer(part) for part in states.split(rows)]))
    assert torch.equal(layer(states.view(2, 65, 96)), layer(states).view(2, 65, 80))
    monkeypatch.setattr(int8_layers, "ROWS", 50)
    check_same(layer(states))
    check_same(layer(torch.cat((states[:1], torch.full((3, 96), 1e30))))[:1])


@torch.no_grad()
def test_rows_of_zeros_tiny_large_and_broken_states() -> None:
    layer, eight = linear()
    states = torch.randn(7, 96)
    states[0] = 0
    states[1] *= 1e-30
    states[2] *= 1e35
    states[3, 5] = torch.nan
    states[4, 5] = torch.inf
    states[5, 5] = -torch.inf
    found, expected = eight(states), truth(layer, states)
    assert torch.equal(found[0], layer.bias)
    for row in (1, 2, 6):
        assert largest(found[row], expected[row]) < 1e-4
    assert not found[3:6].isfinite().any()
    assert largest(eight(states[:, None].half())[6, 0], expected[6]) < 1e-3


@torch.no_grad()
def test_rows_of_weights_of_any_size() -> None:
    layer = nn.Linear(64, 40, bias=False)
    layer.weight[0] = 0
    layer.weight[1] *= 1e-42 / layer.weight[1].abs().max()  # so small that the scale has few bits
    layer.weight[2] *= 1e30
    layer.weight[3, 1:] = 0
    states = torch.randn(5, 64)
    found, expected = as_int8(layer)(states), truth(layer, states)
    assert not found[:, 0].any()
    assert found[:, 1].abs().max() < 1e-40
    for row in range(2, 40):
        assert (found[:, row] - expected[:, row]).abs().max() < 1e-3 * layer.weight[row].abs().max()
    layer.weight[4, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layer\.weight has values that are not finite"):
        as_int8(layer)


def test_scales_are_read_in_a_trace_as_they_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = torch.cat(
        (torch.arange(0, 255, dtype=torch.int32) << 23, torch.randint(1, 0x7F7FFFFF, (5000,), dtype=torch.int32))
    )
    scales = torch.cat((bits.view(torch.float32), torch.tensor([1e-45, 3e-39, 1.1754944e-38, 3.4028235e38])))
    weight = torch.cat((torch.zeros(len(scales), 3, dtype=torch.int8), scales[:, None].view(torch.int8)), 1)
    assert torch.equal(int8_layers._scale(weight), scales)
    monkeypatch.setattr(int8_layers, "readable", lambda: False)
    assert torch.equal(int8_layers._scale(weight), scales)


def fallbacks(layer: Int8Linear, states: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.enable_grad():
        found = {"gradients": layer(states)}
        inputs = states.clone().requires_grad_()
        layer(inputs).sum().backward()
        assert inputs.grad is not None
    found["vmap"] = torch.func.vmap(layer)(states)
    found["compiled"] = torch.compile(layer, backend="eager")(states)
    found["exported"] = torch.export.export(layer, (states,)).module()(states)
    found["traced"] = torch.jit.trace(layer, (states,))(states)
    with torch.inference_mode():
        found["inference"] = layer(states)
        found["loaded in inference mode"] = copy.deepcopy(layer)(states)
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_where_the_fast_product_steps_aside_the_result_is_the_same() -> None:
    layer, eight = linear()
    states = torch.randn(4, 5, 96)
    expected = truth(layer, states)
    for how, found in fallbacks(eight, states).items():
        assert largest(found, expected) < 1e-4, how
    with torch.autocast("cpu", torch.bfloat16):
        found = eight(states)
    assert found.dtype is torch.bfloat16 and largest(found, expected) < 2e-2
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-4)):
        model = copy.deepcopy(eight).to(dtype)
        assert torch.equal(model.weight, eight.weight)  # the scales too
        with torch.enable_grad():
            slow = model(states.to(dtype))
        fast = model(states.to(dtype))
        assert slow.dtype is fast.dtype is dtype
        assert largest(slow, expected) < tolerance and largest(fast, expected) < tolerance
    assert eight(states[:0]).shape == (0, 5, 80)
    with pytest.raises(RuntimeError):
        eight(states[..., :95])


@torch.no_grad()
def test_without_fbgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_layers, "top_level", lambda: 0)
    monkeypatch.setattr(int8_products, "pack", None)
    layer, eight = linear(bits=8)
    states = torch.randn(4, 96)
    assert largest(eight(states), truth(layer, states)) < 1e-6


@needs_fbgemm
@torch.no_grad()
def test_sums_that_32_bits_cannot_hold_are_not_products_of_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear((1 << 16) + 64, 32, bias=False)
    layer.weight.fill_(1.0)
    assert largest(as_int8(layer)(torch.ones(1, layer.in_features)), torch.tensor(float(layer.in_features))) < 1e-5


@needs_fbgemm
@torch.no_grad()
def test_any_outliers_are_right_if_they_are_columns() -> None:
    layer, eight = linear(bits=8)
    states = torch.randn(5, 96)
    states[:, 17] *= 1000
    expected = truth(layer, states)
    assert largest(eight(states), expected) > 1e-3
    eight.outliers.copy_(torch.tensor([1, 17, 95, 0, 2, 3, 4, 5]))
    eight.repack()
    assert largest(eight(states), expected) < 1e-4
    for wrong in (2, 96, -1):
        eight.outliers.copy_(torch.tensor([0, 1, 2, 3, 4, 5, 6, wrong]))
        eight.repack()
        with pytest.raises(ValueError, match=r"outliers=.* must be different columns below 96"):
            eight(states)


@needs_fbgemm
def test_the_levels_are_found_by_a_product() -> None:
    assert int8_layers.top_level() in (63, 127)
    engine = torch.backends.quantized.engine
    check(linear()[1], torch.randn(4, 96))
    assert torch.backends.quantized.engine == engine


@pytest.fixture(params=["rows", "one row", "one row and a table"])
def states(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """States that are multiplied with a packed weight, or with a table, as with large weights where this is faster."""
    monkeypatch.setattr(int8_products, "LARGE", 0)
    monkeypatch.setattr(int8_products, "table_pays", lambda *args: "table" in request.param)
    return torch.randn(4 if request.param == "rows" else 1, 96)


def check(layer: Int8Linear, states: torch.Tensor) -> torch.Tensor:
    """The layer's product, which must be that of the weight as it is now."""
    with torch.no_grad():
        found = layer(states)
        expected = nn.functional.linear(states, layer.dequantized(), layer.bias)
    assert largest(found, expected) < 1e-4
    return found


@needs_fbgemm
def test_a_packed_weight_is_never_stale(states: torch.Tensor) -> None:
    layer = linear()[1]
    seen = [check(layer, states)]

    def changed() -> None:
        seen.append(check(layer, states))
        assert not torch.equal(seen[-1], seen[-2])

    with torch.no_grad():
        layer.weight[:, :-4].neg_()
    changed()
    with torch.no_grad():
        layer.weight.copy_(quantized(layer.dequantized() * 2, ""))
    changed()
    with torch.inference_mode():
        layer.weight[3, :-4] = 5
    changed()
    layer.load_state_dict(linear()[1].state_dict())
    changed()
    for _ in range(6):  # memory that is freed is used again, at the same address
        layer.load_state_dict(linear()[1].state_dict(), assign=True)
        changed()
        layer.load_state_dict(linear()[1].state_dict(), assign=True)
        layer.load_state_dict(linear()[1].state_dict(), assign=True)
        changed()
        layer.weight = nn.Parameter(quantized(torch.randn(80, 96), ""), requires_grad=False)
        changed()
        layer.weight.data = quantized(torch.randn(80, 96), "")
        layer.weight.data = quantized(torch.randn(80, 96), "")
        changed()
    # a new parameter in the same memory, whose count of changes starts again
    again = nn.Parameter(layer.weight.detach(), requires_grad=False)
    layer.weight = again
    check(layer, states)
    with torch.no_grad():
        again[:, :-4].neg_()
    changed()
    with torch.no_grad():
        layer.bias.add_(1.0)
    changed()
    layer.weight.data[:, :-4].neg_()  # not noticed, as documented
    layer.repack()
    changed()


@needs_fbgemm
@torch.no_grad()
def test_precision_changed_after_a_product(states: torch.Tensor) -> None:
    layer, eight = linear(bits=8)
    eight.outliers.copy_(torch.tensor([7, 90, 3, 50, 1, 0, 95, 2]))
    states[:, [7, 90]] *= 100
    for bits, tolerance in ((8, 0.03), (16, 1e-3), (8, 0.03)):
        eight.activation_bits = bits
        assert largest(eight(states), truth(layer, states)) < tolerance


@needs_fbgemm
def test_a_pickle_of_another_release(states: torch.Tensor) -> None:
    layer = linear()[1]
    other = layer.__new__(Int8Linear)
    other.__setstate__({**layer.__getstate__(), "_packed": (None, None, -1, None, None)})
    assert torch.equal(check(other, states), check(layer, states))


@needs_fbgemm
def test_copies_have_weights_of_their_own(states: torch.Tensor) -> None:
    layer = linear()[1]
    before = check(layer, states)
    for copied in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer).to(torch.float64).float(),
    ):
        assert torch.equal(check(copied, states), before)
        with torch.no_grad():
            copied.weight[:, :-4].neg_()
        assert not torch.equal(check(copied, states), before)
    assert torch.equal(check(layer, states), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings(dtype: torch.dtype) -> None:
    table = nn.Embedding(50, 33)
    eight = Int8Embedding(50, 33, dtype=dtype)
    eight.weight = nn.Parameter(quantized(table.weight, "table"), requires_grad=False)
    ids = torch.randint(0, 50, (3, 4))
    expected = rounded(table.weight.detach())
    assert torch.equal(eight(ids), expected[ids].float().to(dtype))
    assert torch.equal(eight.double()(ids), expected.float()[ids].double())
    for wrong in (50, -1):
        with pytest.raises(IndexError):
            eight(torch.tensor([wrong]))


@pytest.mark.parametrize("width", [4, 50, 51, 64])
@torch.no_grad()
def test_one_row_of_any_width(width: int) -> None:
    values = torch.randn(6, width)
    embedding = Int8Embedding(6, width)
    embedding.weight.copy_(quantized(values, "embedding"))
    assert largest(embedding(torch.tensor([[3]])), rounded(values)[3:4]) < 1e-6
    layer = nn.Linear(width, 1)
    states = torch.randn(1, width)
    assert largest(as_int8(layer)(states), truth(layer, states)) < 1e-3


@torch.no_grad()
def test_it_compiles_as_one_graph() -> None:
    layer, eight = linear()
    states = torch.randn(4, 96)
    compiled = torch.compile(eight, fullgraph=True, backend="eager")
    assert largest(compiled(states), truth(layer, states)) < 1e-6


@needs_fbgemm
@pytest.mark.parametrize("bits", [8, 16])
@torch.no_grad()
def test_a_product_is_compiled_and_the_same_without(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, states = linear(bits=bits)[1], torch.randn(70, 96)
    assert isinstance(int8_products.compiled(int8_products.packed_product).__wrapped__, torch.jit.ScriptFunction)
    found = [layer(states[:rows]) for rows in (1, 70)]
    monkeypatch.setattr(int8_products, "compiled", lambda function: function)
    assert all(torch.equal(each, layer(states[: len(each)])) for each in found)


@needs_fbgemm
@pytest.mark.parametrize("others", [0.0, 1e-37, 1e-30])
@torch.no_grad()
def test_outliers_alone_in_a_row(others: float) -> None:
    """Whatever the others are divided by, the outliers are not."""
    float_layer, layer = linear(bits=8)
    layer.outliers.copy_(torch.arange(8) * 3)
    for rows in (2, 70):
        states = torch.full((rows, 96), others)
        states[:, 3] = torch.logspace(-6, 6, rows)
        assert largest(layer(states), truth(float_layer, states)) < 1e-5


@needs_fbgemm
def test_defaults_of_the_process_change_nothing() -> None:
    float_layer, layer = linear(bits=8)
    with torch.no_grad():
        layer.outliers.copy_(torch.arange(8))
    states = torch.randn(4, 96)
    int8_layers.top_level.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.device("meta"):
            assert largest(layer(states), truth(float_layer, states)) < 0.03
            assert int8_layers.top_level() > 0
    finally:
        torch.set_default_dtype(torch.float32)


def test_states_that_were_cast_to_integers_are_refused() -> None:
    layer = linear()[1]
    with pytest.raises(TypeError, match=r"of 96 inputs and 80 outputs was given states in torch.int8.*modules_to_not"):
        layer(torch.randn(4, 96).to(layer.weight.dtype))


@needs_fbgemm
def test_threads_pack_with_the_same_engine() -> None:
    layers = [linear()[1] for _ in range(200)]
    states, errors = torch.randn(2, 96), []
    before, interval = torch.backends.quantized.engine, sys.getswitchinterval()

    def run() -> None:
        try:
            with torch.no_grad():
                for layer in layers:
                    layer(states)
        except RuntimeError as error:
            errors.append(error)

    int8_layers.top_level()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and torch.backends.quantized.engine == before
    finally:
        sys.setswitchinterval(interval)
        torch.backends.quantized.engine = before

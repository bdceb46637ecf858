"""Products of one int8 row as sums of a table's rows, against float64; and where they are used."""

import itertools

import pytest
import torch
from torch import nn

from mymodels.models import int8_products
from mymodels.models.int8_layers import Int8Linear, joint_product_of_few, quantized
from mymodels.models.int8_products import compiled, row_product, row_table, table_pays, top_level

pytestmark = pytest.mark.skipif(not top_level(), reason="this torch has no int8 products")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 191, 192, 193, 385, 1000, 16_384, 16_399])
@pytest.mark.parametrize("inputs", [1, 7, 64, 770])
def test_products_are_those_of_the_integers(inputs: int, outputs: int, bias: bool) -> None:
    values = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    values[0], values[-1] = -128, 127
    scale, row = torch.rand(outputs) + 0.1, torch.randn(1, inputs) * torch.logspace(-4, 4, inputs)
    added = torch.randn(outputs) if bias else None
    table = row_table(values, scale)
    assert table.rows.numel() <= 1.15 * values.numel() + 32 * inputs, "little but the weight"
    expected = row.double() @ values.double().t() * scale.double() + (0 if added is None else added.double())
    # what float32 sums may lose
    size = row.double().abs() @ values.double().abs().t() * scale.double() + 128 * row.double().abs().sum() * scale
    for given in (row, row.repeat(2, 1)[1:], torch.stack([row, row], -1)[..., 0]):
        found = compiled(row_product)(given, table, added)
        assert found.shape == (1, outputs)
        assert ((found - expected).abs() <= 1e-6 * size + 1e-6 * expected.abs()).all()
        assert torch.equal(found, row_product(given, table, added)), "the same in Python"


@pytest.mark.parametrize("value", [0.0, 1e-37, 1e30, 1e35])
def test_states_of_any_size(value: float) -> None:
    values = torch.randint(-127, 128, (40, 64), dtype=torch.int8)
    row, bias = torch.full((1, 64), value), torch.ones(40, dtype=torch.float64)
    found = row_product(row, row_table(values, torch.full((40,), 0.01)), bias)
    assert found.dtype is torch.float32, "as of packed products, whatever the bias"
    assert ((found - 1 - 0.01 * row @ values.float().t()).abs() <= 1e-7 + 1e-5 * 64 * 127 * value).all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_states_that_are_no_numbers_give_none(value: float) -> None:
    table = row_table(torch.randint(1, 128, (40, 64), dtype=torch.int8), torch.ones(40))
    assert not row_product(torch.full((1, 64), value), table, None).isfinite().any()


def layers(bits: int = 16, count: int = 3) -> list[Int8Linear]:
    made = []
    for outputs in range(512, 512 + count):
        layer = Int8Linear(1024, outputs, activation_bits=bits)
        layer.weight = nn.Parameter(quantized(torch.randn(outputs, 1024), "layer"), requires_grad=False)
        nn.init.normal_(layer.bias)
        made.append(layer)
    return made


@torch.no_grad()
def test_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    one, few = torch.randn(1, 1024), torch.randn(2, 1024)
    large, small, eight = layers()[0], Int8Linear(96, 80), layers(bits=8)[0]
    small.weight = nn.Parameter(quantized(torch.randn(80, 96), "layer"), requires_grad=False)
    nn.init.normal_(small.bias)
    for pays, (layer, row) in itertools.product([True, False], [(large, one), (small, one[:, :96]), (eight, one)]):
        monkeypatch.setattr(int8_products, "table_pays", lambda *args, pays=pays: pays)
        layer.repack()
        expected = nn.functional.linear(row, layer.dequantized(), layer.bias)
        tolerance = (0.03 if layer is eight else 1e-4) * expected.abs().max()
        assert all((found - expected).abs().max() < tolerance for found in (layer(row), layer.product_of_few(row)))
        forms = layer.forms()
        is_table = layer is large and pays
        assert (forms._table is not None, forms._packed is not None) == (is_table, not is_table)
        layer(few[:, : row.shape[1]])
        assert forms._packed is not None


@torch.no_grad()
def test_layers_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_products, "table_pays", lambda *args: True)
    parts, row = layers(), torch.randn(1, 1024)

    def check(*tolerances: float) -> None:
        found = joint_product_of_few(parts, row)
        for layer, product, tolerance in zip(parts, found, tolerances or [1e-4] * 3, strict=True):
            expected = nn.functional.linear(row, layer.dequantized(), layer.bias)
            assert (product - expected).abs().max() < tolerance * expected.abs().max()

    check()
    joint = parts[0]._joint[1]
    assert joint._table is not None and joint._packed is None
    parts[1].weight[:, :-4].neg_()
    check()
    parts[2].bias.add_(1)
    check()
    parts[0].weight.data[:, :-4].neg_()  # not noticed, as documented
    parts[0].repack()
    check()
    parts[0].activation_bits = 8
    check(0.03, 1e-4, 1e-4)
    parts[0].activation_bits = 16
    check()


def test_it_is_measured_once_for_a_width_and_a_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYMODELS_INT8_TABLES", "0")
    table_pays.cache_clear()
    assert not table_pays(2048, 1), "turned off"
    monkeypatch.delenv("MYMODELS_INT8_TABLES")
    table_pays.cache_clear()
    found = [table_pays(2048, 1) for _ in range(3)]
    assert found[0] in (True, False) and table_pays.cache_info().misses == 1 and len(set(found)) == 1

"""Weights in huge pages: the same values at the same addresses; only often used weights; no memory that is not in use."""

import sys
from typing import Any

import pytest
import torch
from tiny import mygpt2_config

from mymodels import MyGPT2ForCausalLM, huge_pages, quantize

linux = pytest.mark.skipif(huge_pages._madvise() is None, reason="not Linux, or turned off")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda start, size, advice: seen.append((start, size)))
    monkeypatch.setattr(huge_pages, "_counts", {})
    return seen


@linux
def test_values_and_address_stay() -> None:
    weight = torch.randn(2048, 1024)
    copy, address = weight.clone(), weight.data_ptr()
    for _ in range(2 * huge_pages.PATIENCE):
        huge_pages.count_product(weight)
    huge_pages.move_process()
    assert weight.data_ptr() == address and torch.equal(weight, copy)


def test_each_weight_is_moved_once_and_in_turn(calls: list[Any]) -> None:
    weights = [torch.ones(1024, 1024) for _ in range(4)]
    moved = []
    for _ in range(3 * huge_pages.PATIENCE):
        before = len(calls)
        for weight in weights:
            huge_pages.count_product(weight)
        moved.append(len(calls) - before)
    assert moved[: huge_pages.PATIENCE - 1] == [0] * (huge_pages.PATIENCE - 1)
    assert sum(moved) == 4 and max(moved) == 1
    for weight, (start, size) in zip(weights, calls):
        assert start <= weight.data_ptr() and weight.data_ptr() + 4 * weight.numel() <= start + size
        assert start % huge_pages.HUGE_PAGE == size % huge_pages.HUGE_PAGE == 0


SMAPS = """\
55d000000000-55d000800000 rw-p 00000000 00:00 0                          [heap]
Size:               8192 kB
Rss:                8000 kB
VmFlags: rd wr mr
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Rss:                 100 kB
7f0001000000-7f0001400000 r--p 00000000 00:00 0
Rss:                4096 kB
7f0002000000-7f0002400000 rw-p 00000000 08:01 123                        /lib/a file.so
Rss:                4096 kB
7f0003000000-7f0003001000 rw-p 00000000 00:00 0
Rss:                   4 kB
7fff00000000-7fff00800000 rw-p 00000000 00:00 0                          [stack]
Rss:                8192 kB
"""


def test_regions_without_a_file() -> None:
    assert list(huge_pages._anonymous_regions(SMAPS.splitlines(keepends=True))) == [
        (0x55D000000000, 0x55D000800000, 8000 << 10),
        (0x7F0000000000, 0x7F0000400000, 100 << 10),
    ]


@linux
@pytest.mark.parametrize("limit, moved", [(1 << 40, True), (1 << 20, False)])
def test_a_large_process_is_left(limit: int, moved: bool, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    block = torch.ones(1 << 23)
    monkeypatch.setattr(huge_pages, "LARGEST_PROCESS", limit)
    monkeypatch.setattr(huge_pages, "_last_move", -100.0)
    huge_pages.move_process()
    inside = any(start <= block.data_ptr() < start + size for start, size in calls)
    assert inside == moved
    count = len(calls)
    huge_pages.move_process()  # at once again
    assert len(calls) == count


@pytest.mark.parametrize("int8", [False, True])
def test_the_weights_of_a_generation_are_moved(int8: bool, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Models find the module among the imported ones, so that only a generation shows whether they call it."""
    moves: list[None] = []
    monkeypatch.setattr(huge_pages, "move_process", lambda: moves.append(None))
    model = MyGPT2ForCausalLM(mygpt2_config(n_embd=512, intermediate_size=2048, n_layer=1)).eval()
    with torch.no_grad():
        model = quantize(model) if int8 else model
        cache = model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
        for _ in range(2 * huge_pages.PATIENCE - 2):
            model(torch.tensor([[7]]), position_ids=torch.tensor([[9]]), past_key_values=cache)
        assert not moves
        for _ in range(2):
            model(torch.tensor([[7]]), position_ids=torch.tensor([[9]]), past_key_values=cache)
    if int8:
        assert moves and not calls
    else:
        address = model.model.layers[0].mlp.up_proj.weight.data_ptr()
        assert any(start <= address < start + size for start, size in calls) and not moves


@pytest.mark.parametrize("change", ["environment", "platform"])
def test_turned_off(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if change == "environment":
        monkeypatch.setenv("MYMODELS_HUGE_PAGES", "0")
    else:
        monkeypatch.setattr(sys, "platform", "darwin")
    assert huge_pages._madvise.__wrapped__() is None

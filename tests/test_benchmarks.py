"""The benchmark scripts: each can be started, and what they share measures what it says."""

import ast
import importlib
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in SCRIPTS:  # another module of that name, from elsewhere
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("name", SCRIPTS)
def test_everything_a_script_imports_is_there(name):
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("mymodels", "transformers", *SCRIPTS):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_the_ratio_is_the_rivals_time_by_ours():
    pairs = importlib.import_module("pairs")
    row = pairs.compare("sleeping", lambda: time.sleep(0.01) or 1.0, lambda: time.sleep(0.03) or 1.0, repeats=3)
    assert 2 < row["ratio"] < 4 and row["difference"] == 0
    assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]


def test_nothing_is_timed_where_results_differ():
    pairs = importlib.import_module("pairs")
    calls = []
    with pytest.raises(SystemExit, match=r"work: the results differ by 0\.5, more than 0\.0001; nothing was timed"):
        pairs.compare("work", lambda: calls.append(1) or 1.0, lambda: 1.5)
    assert len(calls) == 1
    with pytest.raises(SystemExit, match="differ by nan"):
        pairs.compare("work", lambda: float("nan"), lambda: 1.0, tolerance=None)


def test_the_floor_holds_every_product_of_the_work():
    pairs = importlib.import_module("pairs")
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    with pairs._Products() as seen, torch.no_grad():
        model(torch.randn(3, 5, 16))
    assert [(shape, tuple(weight.shape)) for shape, weight in seen.found] == [((15, 16), (16, 64)), ((15, 64), (64, 8))]
    pairs.bare_products(lambda: model(torch.randn(3, 5, 16)))()


def test_peak_memory_counts_what_was_freed_again():
    memory = importlib.import_module("checkpoint_memory")
    size = 200 << 20
    everything, anonymous = memory.peak_of(lambda: torch.ones(size // 4).sum() and None)
    assert 0.95 * size < everything < 1.2 * size and 0.95 * size < anonymous < 1.2 * size


def test_exponents_of_scaling_are_those_of_the_curve():
    scaling = importlib.import_module("scaling")
    x = (1, 2, 4, 8)
    row = scaling.curve("panel", "name", x, [value**2 for value in x], x)
    assert scaling.exponent(x, row["y"]) == pytest.approx(2) and scaling.exponent(x, row["theory"]) == pytest.approx(1)
    assert row["ratio"] == pytest.approx(1 / 8)
    assert scaling.seen_pairs(4, None) == 10 and scaling.seen_pairs(4, 2) == 7


def test_the_speed_table_holds_what_was_measured(tmp_path):
    rows = [{"work": "a", "rival": "b", "ratio": 1.234, "quartiles": [1.2, 1.3], "share_of_floor": 0.87}]
    (tmp_path / "classify.json").write_text(json.dumps({"made_with": {"short": True}, "rows": rows}))
    table = importlib.import_module("speed_table").lines(tmp_path)
    assert table[2:] == ["| a | b | 1.23× (1.20–1.30) | 87% | `benchmarks/classify.py` (short form) |"]


def rows_of_rivals() -> list[dict]:
    shared = {"task": "generate", "threads": 1, "quartiles": [0.5, 1.5], "ours": "float32"}
    rows = [("A", "float32", 0.5), ("A", "int8", 1.25), ("B", "float32", 1.0)]
    return [shared | {"engine": engine, "precision": how, "ratio": ratio} for engine, how, ratio in rows]


def test_the_table_of_rivals_marks_where_they_are_faster(tmp_path):
    made_with = {"short": True, "notes": ["C: left out, not installed: c"]}
    (tmp_path / "rivals.json").write_text(json.dumps({"made_with": made_with, "rows": rows_of_rivals()}))
    table = importlib.import_module("speed_table").rivals(tmp_path)
    assert table[0] == "| work | threads | A float32 | A int8 (ours float32) | B float32 |"
    assert table[2] == "| generate | 1 | **0.50** (0.50–1.50) | 1.25 (0.50–1.50) | 1.00 (0.50–1.50) |"
    assert table[-1] == "- C: left out, not installed: c"


@pytest.mark.parametrize("short", [True, False])
def test_rivals_classify_batches_that_are_sorted_over_all_documents(monkeypatch, short):
    rivals = importlib.import_module("rivals")
    bench = rivals.Bench(SimpleNamespace(short=short, work=["classify"], repeats=None))
    timed = {}
    monkeypatch.setattr(bench, "compare", lambda work, ours, rival, method, batches: timed.update({work: batches}))
    documents = [[1] * length for length in torch.randperm(300).add(1).tolist()]
    bench.time_classification(None, None, documents)
    for work, batches in timed.items():
        count, size = (int(word) for word in re.fullmatch(r"classify (\d+) documents, .*, batch (\d+)", work).groups())
        assert sum(map(len, batches)) == count and all(len(batch) == size for batch in batches)
        lengths = [len(row) for batch in batches for row in batch]
        assert (lengths == sorted(lengths)) is ("sorted" in work)
    (sorted_32,) = (batches for work, batches in timed.items() if "sorted" in work and work.endswith("batch 32"))
    every = sorted(len(row) for row in documents[:192])
    assert [len(row) for row in sorted_32[0]] == (every[96:128] if short else every[:32])


def test_rivals_leave_out_an_engine_that_differs_and_say_so(capsys):
    rivals = importlib.import_module("rivals")
    bench = rivals.Bench(SimpleNamespace(short=True, work=[], repeats=None))
    worker = SimpleNamespace(start=SimpleNamespace(engine="OpenVINO", precision="float32"))
    with bench.leaving_out():
        rivals.check(worker, torch.ones(2), torch.zeros(2))
        raise AssertionError("it was timed")
    assert bench.notes == ["left out: OpenVINO, float32: the results differ by 1, more than 0.001; nothing was timed"]

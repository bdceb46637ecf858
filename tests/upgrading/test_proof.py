"""What counts as equal, as different, and as not compared."""

import io
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import PretrainedConfig

from mymodels.hub.isolated import numbers
from mymodels.hub.releases import PinnedRelease, install
from mymodels.hub.upgrading.proof import Proof
from mymodels.hub.upgrading.recording import Recorded, compare, properties_of
from mymodels.hub.upgrading.report import card_table, report_of, show_upgrade
from mymodels.hub.upgrading.rule import Edit
from mymodels.hub.upgrading.rules import all_rules
from mymodels.hub.upgrading.upgrade import Upgrade

LOAD = {"status": "recorded", "weights": {"a": "1", "b": "2", "c": "2"}, "buffers": {"t": "3"}, "second names": ["c"]}
CLASSES = {"AutoModel": {"load": LOAD, "outputs": {"status": "recorded"}, "one row": {"status": "recorded"}}}
TENSORS = {"AutoModel|outputs|logits": torch.tensor([1.0, 2.0]), "AutoModel|one row|logits": torch.tensor([3.0])}
OLD = Recorded("4.36.2", CLASSES, TENSORS)


def new(**tensors: torch.Tensor) -> Recorded:
    return Recorded("5.23.0", deepcopy(CLASSES), TENSORS | tensors)


def statuses(record: Recorded, old: Recorded = OLD) -> dict[str, str]:
    return {row.item: row.status for row in compare(old, record)}


def test_equal_within_the_tolerance() -> None:
    near = new(**{"AutoModel|outputs|logits": torch.tensor([1.0, 2.000008])})
    assert statuses(near) == {"load": "equal", "outputs": "equal", "one row": "equal"}
    proof = Proof("4.36.2", targets=["5.23.0"], rows=compare(OLD, near))
    assert proof.holds


def test_a_number_that_differs_is_named() -> None:
    far = new(**{"AutoModel|outputs|logits": torch.tensor([1.0, 2.5])})
    rows = compare(OLD, far)
    assert [row.what for row in rows if row.status == "differs"] == ["logits differs by up to 0.5, more than 2e-05"]
    assert not Proof("4.36.2", targets=["5.23.0"], rows=rows).holds


def test_nan_and_missing_outputs_differ() -> None:
    assert statuses(new(**{"AutoModel|outputs|logits": torch.tensor([1.0, float("nan")])}))["outputs"] == "differs"
    shorter = Recorded("5.23.0", CLASSES, {key: t for key, t in TENSORS.items() if "one row" not in key})
    assert statuses(shorter)["one row"] == "differs"


def test_a_parameter_that_was_frozen_and_gets_a_gradient_differs() -> None:
    """transformers 5 makes parameters anew at loading, and forgets `requires_grad = False`."""
    item = "loss and gradients"
    classes = {"AutoModel": {"load": LOAD, item: {"status": "recorded"}}}
    old = {f"AutoModel|{item}|loss": torch.tensor(1.0), f"AutoModel|{item}|a": torch.ones(3)}
    for gradient, status in ((torch.ones(3), "differs"), (torch.zeros(3), "equal")):
        anew = Recorded("5.23.0", classes, old | {f"AutoModel|{item}|positions": gradient})
        (row,) = (row for row in compare(Recorded("4.36.2", classes, old), anew) if row.item == item)
        assert row.status == status and (status == "equal" or row.what.startswith("positions gets a gradient"))


def test_weights_are_compared_bit_for_bit_by_name() -> None:
    for change, status in (
        ({"a": "9"}, "differs"),
        ({"a": None}, "differs"),
        ({"c": None}, "equal"),
        ({"d": "7"}, "equal"),
    ):
        record = new()
        weights = record.classes["AutoModel"]["load"]["weights"]
        for name, digest in change.items():
            weights.pop(name) if digest is None else weights.update({name: digest})
        assert statuses(record)["load"] == status, change
    other = new()
    other.classes["AutoModel"]["load"]["buffers"]["t"] = "4"
    assert statuses(other)["load"] == "differs"


def test_what_the_original_could_not_do_is_not_compared() -> None:
    old = Recorded("4.36.2", deepcopy(CLASSES), TENSORS)
    old.classes["AutoModel"]["one row"] = {"status": "failed", "what": "ValueError: no", "where": "m.py:3"}
    rows = compare(old, new())
    assert [(row.item, row.status, row.what) for row in rows][-1] == (
        "one row",
        "not compared",
        "the original raises ValueError: no (m.py:3)",
    )
    old.classes["AutoModel"]["outputs"] = {"status": "random"}
    assert not Proof("4.36.2", targets=["5.23.0"], rows=compare(old, new())).holds


def test_a_release_without_a_record_fails() -> None:
    gone = Recorded("5.23.0", {}, {}, "it crashed with SIGSEGV")
    rows = compare(OLD, gone)
    assert [row.status for row in rows] == ["failed"] and rows[0].what == "it crashed with SIGSEGV"
    proof = Proof("4.36.2", targets=["5.0.0", "5.23.0"], rows=compare(OLD, new()))
    assert proof.runs and not proof.holds  # nothing is known of 5.0.0
    assert not Proof(None, targets=["5.23.0"], rows=compare(OLD, new())).holds


def test_the_place_of_a_release_is_absolute(tmp_path: Path, monkeypatch) -> None:
    """A clean process has another current folder, where a relative place would silently be none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache" / "4.36.2" / "transformers").mkdir(parents=True)
    (tmp_path / "cache" / "4.36.2" / "transformers" / "__init__.py").touch()
    place = install(PinnedRelease("4.36.2", "0.36.2", "0.15.2"), "cache")
    assert place == tmp_path / "cache" / "4.36.2"


def beams_record(with_cache: list[float], without: list[float], tokens: list[int], what: str = "") -> Recorded:
    items: dict = {f"beams, {how} cache": {"status": "recorded"} for how in ("with", "without")}
    if what:
        items["beams, with cache"] = {"status": "failed", "what": what, "where": ""}
    tensors = {
        "AutoModel|beams, with cache|scores": torch.tensor(with_cache),
        "AutoModel|beams, without cache|scores": torch.tensor(without),
        "AutoModel|beams, with cache|tokens": torch.tensor(tokens),
        "AutoModel|beams, without cache|tokens": torch.tensor(tokens),
    }
    return Recorded("r", {"AutoModel": items}, tensors)


def test_beams_are_compared_by_score_and_by_tokens_unless_they_tie() -> None:
    old = beams_record([-2.0, -3.0], [-2.0, -3.0], [1, 2])
    assert set(statuses(beams_record([-2.0, -3.0], [-2.0, -3.0], [1, 2]), old).values()) == {"equal"}
    assert set(statuses(beams_record([-2.0, -3.1], [-2.0, -3.1], [1, 2]), old).values()) == {"differs"}
    assert set(statuses(beams_record([-2.0, -3.0], [-2.0, -3.0], [2, 1]), old).values()) == {"differs"}
    tie = beams_record([-2.0, -2.0], [-2.0, -2.0], [1, 2])
    assert set(statuses(beams_record([-2.0, -2.0], [-2.0, -2.0], [2, 1]), tie).values()) == {"equal"}


def test_beams_over_a_state_that_is_not_reordered_are_no_measure() -> None:
    wrong = beams_record([-2.5, -3.0], [-2.0, -3.0], [1, 2])
    found = statuses(beams_record([-2.0, -3.0], [-2.0, -3.0], [1, 2]), wrong)
    assert found == {"beams, with cache": "not compared", "beams, without cache": "equal"}
    old = beams_record([-2.0, -3.0], [-2.0, -3.0], [1, 2])
    raises = beams_record(
        [-2.0, -3.0], [-2.0, -3.0], [1, 2], "NotImplementedError: the state of this model cannot be reordered: pass"
    )
    assert statuses(raises, old)["beams, with cache"] == "not compared"
    other = beams_record([-2.0, -3.0], [-2.0, -3.0], [1, 2], "TypeError: no")
    assert statuses(other, old)["beams, with cache"] == "failed"


def greedy_record(with_cache: list[list[float]], without: list[list[float]], beams: list[float]) -> Recorded:
    """A record of two steps of greedy decoding over two tokens, and of beams that differ without the cache."""
    old = beams_record(beams, [-9.0, -9.5], [1, 2])
    tensors = {}
    for how, scores in (("with", with_cache), ("without", without)):
        old.classes["AutoModel"][f"greedy, {how} cache"] = {"status": "recorded"}
        steps = torch.tensor([scores])
        tensors[f"AutoModel|greedy, {how} cache|scores"] = steps
        tensors[f"AutoModel|greedy, {how} cache|tokens"] = torch.cat([torch.tensor([[5]]), steps.argmax(-1)], 1)
    return old._replace(tensors={**old.tensors, **tensors})


def test_beams_are_compared_as_they_are_where_the_cache_changes_greedy_decoding_too() -> None:
    scaled = greedy_record([[1.0, 2.0], [1.0, 3.0]], [[1.0, 2.0], [1.0, 4.0]], [-2.0, -3.0])
    assert statuses(scaled, scaled)["beams, with cache"] == "equal"
    other = greedy_record([[1.0, 2.0], [1.0, 3.0]], [[1.0, 2.0], [1.0, 4.0]], [-2.0, -3.5])
    assert statuses(other, scaled)["beams, with cache"] == "differs"
    same = greedy_record([[1.0, 2.0], [1.0, 3.0]], [[1.0, 2.0], [1.0, 3.0]], [-2.0, -3.0])
    assert statuses(same, same)["beams, with cache"] == "not compared"


def test_what_the_original_does_that_verify_reports_is_named_and_compared_with_nothing() -> None:
    old = greedy_record([[1.0, 2.0], [1.0, 3.0]], [[1.0, 2.0], [1.0, 4.0]], [-2.0, -3.0])
    old.classes["AutoModel"]["padding"] = {"status": "property", "what": "padding on the left changes the outputs"}
    assert properties_of(old) == [
        "padding on the left changes the outputs (padding of AutoModel)",
        "generation with the cache differs from generation without it: at token 2, scores differs by up to 1, "
        "more than 0.0004 (cached generation of AutoModel)",
    ]
    assert "padding" not in statuses(old, old)
    tie = greedy_record([[2.0, 2.0], [1.0, 3.0]], [[2.0, 2.00001], [9.0, 4.0]], [-2.0, -3.0])
    assert properties_of(tie) == properties_of(OLD) == []
    proof = Proof("4.36.2", targets=["5.23.0"], rows=compare(old, old), properties=properties_of(old))
    rules = {rule.name: rule for rule in all_rules()}
    result = Upgrade("old", edits=[Edit("imports", "modeling.py", 1, "moved")], proof=proof, rules=rules)
    named = "ot from the upgrade, the original under transformers 4.36.2 does it too, and verify reports it: padding on"
    assert named in card_table(result) and report_of(result)["proof"]["properties_of_the_original"] == proof.properties
    show_upgrade(result, console := Console(file=io.StringIO(), width=400))
    assert named in console.file.getvalue()


@pytest.mark.parametrize("counts", [False, True])
def test_padding_that_counts_is_recorded_of_the_original(counts: bool) -> None:
    """A model that sums what its mask shows, or what it does not show too."""

    class Sums(nn.Module):
        config, main_input_name = PretrainedConfig(vocab_size=20), "input_ids"

        def forward(self, input_ids, attention_mask=None):
            seen = torch.ones_like(input_ids) if counts or attention_mask is None else attention_mask
            return {"logits": ((input_ids + 1.0) * seen).cumsum(1)[..., None]}

        def can_generate(self):
            return True

    record = numbers._Record("AutoModel", {}, "")
    numbers._record_property(record, Sums(), {"input_ids": torch.arange(1, 5)[None]})
    assert list(record.items) == (["padding"] if counts else [])
    assert not counts or "padding on the left changes the outputs" in record.items["padding"]["what"]

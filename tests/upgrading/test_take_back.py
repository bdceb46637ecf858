"""A rule that changes numbers: it is taken back, or nothing is proven. The records are made by running the code here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mymodels.hub.releases import PinnedRelease
from mymodels.hub.static.repo_snapshot import read_folder
from mymodels.hub.upgrading import proof
from mymodels.hub.upgrading.edit_engine import apply_rules
from mymodels.hub.upgrading.proof import Proof, prove_all
from mymodels.hub.upgrading.recording import Recorded
from mymodels.hub.upgrading.rule import Rewriter, Rule, rewrites
from mymodels.hub.upgrading.upgrade import case_of

OLD = PinnedRelease("4.36.2", "0.36.2", "0.15.2")
NEW = PinnedRelease("5.23.0", "1.0.0", "0.22.0")
CODE = """
NEW_NAME = "forward"


def forward(x):
    y = x + 1
    return y * 2


gone = None
"""


class _Replace(Rewriter):
    def __init__(self, context: Any, old: str, new: str):
        super().__init__(context)
        self.old, self.new = old, new

    def leave_Integer(self, original_node: Any, updated_node: Any) -> Any:
        if original_node.value != self.old:
            return updated_node
        self.context.note(original_node, f"{self.old} is {self.new}")
        return updated_node.with_changes(value=self.new)

    def leave_Name(self, original_node: Any, updated_node: Any) -> Any:
        if original_node.value != self.old:
            return updated_node
        self.context.note(original_node, f"{self.old} is {self.new}")
        return updated_node.with_changes(value=self.new)


def rule(name: str, old: str, new: str) -> Rule:
    return Rule(name, "a reason", "5.0 and newer", apply=rewrites(lambda context: _Replace(context, old, new)))


GOOD, FAULTY, WORSE = rule("good", "gone", "here"), rule("faulty", "1", "3"), rule("worse", "2", "5")


def run_code(folders: Mapping[str, Path], release: Path | None, named: str, **how: Any) -> dict[str, Recorded]:
    """What the code in each folder computes; under the new release a name that is gone raises."""
    found = {}
    for key, folder in folders.items():
        text = (folder / "modeling_toy.py").read_text()
        space: dict[str, Any] = {}
        exec(compile(text, "modeling_toy.py", "exec"), space)
        classes: dict[str, Any] = {"AutoModel": {"outputs": {"status": "recorded"}}}
        if named == NEW.transformers and "here" not in space:
            classes["AutoModel"]["outputs"] = {
                "status": "failed",
                "what": "NameError: gone",
                "where": "modeling_toy.py:9",
            }
        found[key] = Recorded(named, classes, {"AutoModel|outputs|logits": space["forward"](torch.tensor([1.0, 2.0]))})
    return found


def prove(tmp_path: Path, rules: list[Rule], monkeypatch: pytest.MonkeyPatch) -> tuple[Proof, dict[str, str]]:
    source = tmp_path / "old"
    source.mkdir()
    (source / "modeling_toy.py").write_text(CODE)
    (source / "config.json").write_text('{"model_type": "toy", "transformers_version": "4.36.2"}')
    monkeypatch.setattr(proof, "record", run_code)
    folder = read_folder(source)
    case = case_of(source, folder, apply_rules(folder, rules), rules, [NEW], tmp_path, from_release="4.36")
    found, kept = prove_all({"toy": case}, [NEW], lambda release: None)["toy"]
    assert (source / "modeling_toy.py").read_text() == CODE
    return found, kept.texts


def test_a_rule_that_changes_numbers_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, texts = prove(tmp_path, [FAULTY, GOOD], monkeypatch)
    assert found.holds and list(found.undone) == ["faulty"]
    assert "logits differs" in found.undone["faulty"] and "5.23.0" in found.undone["faulty"]
    assert texts["modeling_toy.py"] == CODE.replace("gone", "here")


def test_without_a_faulty_rule_nothing_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, texts = prove(tmp_path, [GOOD], monkeypatch)
    assert found.holds and not found.undone and texts["modeling_toy.py"] == CODE.replace("gone", "here")


def test_two_faulty_rules_prove_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = prove(tmp_path, [FAULTY, GOOD, WORSE], monkeypatch)
    assert not found.holds and not found.undone
    assert [(row.item, row.status) for row in found.bad] == [("outputs", "differs")]


def test_a_rule_that_is_needed_is_not_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the good rule it raises, with it alone it differs: neither is a proof."""
    found, _ = prove(tmp_path, [rule("both", "1", "3"), rule("none", "absent", "still")], monkeypatch)
    assert not found.holds and found.bad[0].where == "modeling_toy.py:9"

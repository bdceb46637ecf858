"""Each rule by its own example: what it makes of the old form, and that it leaves its own result alone."""

from textwrap import dedent

import pytest

from mymodels.hub.upgrading.edit_engine import apply_to_source
from mymodels.hub.upgrading.rule import Rule
from mymodels.hub.upgrading.rules import all_rules

WITHOUT_EXAMPLE = {
    "second-level imports",
    "config class",
    "saved class",
    "parameters left empty",
}  # several files, or weights: see test_upgrade.py, test_original_faults.py, test_parameters_left_empty.py


def test_every_other_rule_has_an_example() -> None:
    assert {rule.name for rule in all_rules() if not rule.before and rule.config_after is None} == WITHOUT_EXAMPLE


@pytest.mark.parametrize(
    "rule", [rule for rule in all_rules() if rule.name not in WITHOUT_EXAMPLE], ids=lambda rule: rule.name
)
def test_example(rule: Rule) -> None:
    before, after = dedent(rule.before).lstrip("\n"), dedent(rule.after).lstrip("\n")
    edited = apply_to_source(rule, before, config=rule.config)
    assert edited.texts.get("modeling_example.py", before) == after
    assert edited.edits and not edited.refused
    assert all(edit.rule == rule.name and edit.what for edit in edited.edits)
    assert rule.reason and rule.releases
    if rule.config_after is not None:
        assert edited.config is not None
        assert {k: v for k, v in edited.config.items() if k != "auto_map"} == rule.config_after
    again = apply_to_source(rule, after, config=rule.config if rule.config_after is None else rule.config_after)
    assert not again.changes and not again.edits

"""Which buffers the static checks and the rule take for refilled: a class that `_init_weights` asks for may leave one out."""

import json
from pathlib import Path

import pytest

from mymodels.hub.static import static_checks
from mymodels.hub.upgrading import upgrade

CODE = """
import torch
from torch import nn
from transformers import PreTrainedModel, PretrainedConfig


class OldConfig(PretrainedConfig):
    model_type = "old"


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.ones(4))
        {registered}
        self.first = True

    def later(self):
        {later}

    def fill(self):
        self.curve.copy_(torch.arange(4.0))

    def forward(self, x):
        self.later()
        return x * self.curve * self.decay


class OldModel(PreTrainedModel):
    config_class = OldConfig

    def __init__(self, config):
        super().__init__(config)
        self.part = Part()
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, Part):
            {init}

    def forward(self, input_ids):
        return self.part(input_ids)
"""
REGISTER = "self.register_buffer('curve', torch.tensor([1.0 - 0.1 * i for i in range(4)]), persistent=False)"


@pytest.mark.parametrize(
    ("registered", "later", "init", "named"),
    [
        (REGISTER, "pass", "nn.init.ones_(module.decay)", True),
        (REGISTER, "pass", "module.fill()", False),
        (REGISTER, "pass", "module.curve.copy_(torch.arange(4.0))", False),
        ("pass", REGISTER, "nn.init.ones_(module.decay)", False),
    ],
)
def test_a_buffer_that_nothing_computes_again(
    registered: str, later: str, init: str, named: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "modeling_old.py").write_text(CODE.format(registered=registered, later=later, init=init))
    auto_map = {"AutoConfig": "modeling_old.OldConfig", "AutoModel": "modeling_old.OldModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "old", "auto_map": auto_map}))
    found = [c for c in static_checks(folder, releases=["5.23.0"]) if c.name == "buffers" and c.status == "failed"]
    assert bool(found) == named, found
    edits = [edit for edit in upgrade(folder, dry_run=True).edits if edit.rule == "buffers"]
    assert bool(edits) == named, edits

"""Parameters that a constructor freezes are frozen after loading, and stay as the user leaves them afterwards."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mymodels.hub.upgrading.edit_engine import apply_to_source
from mymodels.hub.upgrading.rules import frozen_parameters

HEAD = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class ToyConfig(PretrainedConfig):
    model_type = "frozen_toy"

    def __init__(self, vocab_size=11, hidden_size=8, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)


def freeze(module):
    for parameter in module.parameters():
        parameter.requires_grad = False


class Head(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.weight.requires_grad = False


class OwnHead(Head):
    pass


class ToyBase(PreTrainedModel):
    config_class = ToyConfig
{base}

class ToyModel(ToyBase):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        {freeze}

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, new):
        self.embed = new

    def _init_weights(self, module):
        pass
"""
WAYS = {
    "attribute": "self.head.weight.requires_grad = False\n        self.post_init()",
    "after post_init": "self.post_init()\n        for p in self.head.parameters():\n            p.requires_grad = False",
    "method": "self.post_init()\n        self.head.requires_grad_(False)",
    "parameter": "self.head.weight = nn.Parameter(torch.zeros(11, 8), requires_grad=False)\n        self.post_init()",
    "function": "freeze(self.head)\n        self.post_init()",
    "base class of a part": "self.head = OwnHead(8, 11)\n        self.post_init()",
    "own method": "self.freeze()\n        self.post_init()\n\n    def freeze(self):\n        self.head.requires_grad_(False)",
}
BASES = {
    "no tie_weights": "",
    "kwargs": "\n    def tie_weights(self, **kwargs):\n        super().tie_weights(**kwargs)\n",
    "missing_keys": (
        "\n    def tie_weights(self, missing_keys=None, recompute_mapping=True):"
        "\n        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)\n"
    ),
}


def module_of(source: str, name: str) -> Any:
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, name, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(
    "freeze, base", [*((way, "") for way in WAYS.values()), *((WAYS["method"], b) for b in BASES.values())]
)
def test_frozen_parameters_are_frozen_after_loading(freeze: str, base: str, tmp_path: Path) -> None:
    source = HEAD.format(freeze=freeze, base=base)
    edited = apply_to_source(frozen_parameters.RULE, source)
    (text,) = edited.texts.values()
    assert not apply_to_source(frozen_parameters.RULE, text).edits
    for kept, code in ((False, source), (True, text)):
        module = module_of(code, f"frozen_toy_{kept}")
        module.ToyModel(module.ToyConfig()).save_pretrained(tmp_path)
        model = module.ToyModel.from_pretrained(tmp_path)
        assert model.head.weight.requires_grad is not kept and model.embed.weight.requires_grad
    model.head.requires_grad_(True)
    model.resize_token_embeddings(13)
    assert model.head.weight.requires_grad


@pytest.mark.parametrize(
    "freeze", ["self.post_init()", "self.head.requires_grad_(True)", "self.embed.requires_grad = True"]
)
def test_a_model_that_freezes_nothing_is_left(freeze: str) -> None:
    assert not apply_to_source(frozen_parameters.RULE, HEAD.format(freeze=freeze, base="")).edits


def test_layers_that_no_model_makes_are_left() -> None:
    """As int8 layers, which take the place of others afterwards."""
    source = HEAD.format(freeze="self.post_init()", base="") + (
        "\n\nclass Frozen(nn.Module):\n    def __init__(self):\n        super().__init__()"
        "\n        self.weight = nn.Parameter(torch.ones(2), requires_grad=False)\n"
    )
    assert not apply_to_source(frozen_parameters.RULE, source).edits
    made = source.replace("self.post_init()", "self.scale = Frozen()\n        self.post_init()")
    assert apply_to_source(frozen_parameters.RULE, made).edits


def test_freezing_by_the_user_is_left_to_the_user() -> None:
    source = (
        HEAD.format(freeze="self.post_init()", base="")
        + "\n    def freeze(self):\n        self.embed.requires_grad_(False)\n"
    )
    assert not apply_to_source(frozen_parameters.RULE, source).edits

"""Folders whose checkpoint lacks parameters: a masked model on a base model, of which the file has the base."""

import json
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from safetensors.torch import save_file

from mymodels.hub.static.repo_snapshot import read_folder
from mymodels.hub.upgrading.edit_engine import Edited, apply_rules
from mymodels.hub.upgrading.rules import parameters_left_empty

CODE = """
import math

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PretrainedConfig
{imports}

class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, hidden_size=4, scale=0.25, use_gate=False, **kwargs):
        self.hidden_size, self.scale, self.use_gate = hidden_size, scale, use_gate
        super().__init__(**kwargs)


{classes}


class ToyPreTrainedModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"
{init}

class ToyModel(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(8, config.hidden_size)
        {model}
        self.post_init()

    def forward(self, input_ids):
        return self.embed(input_ids)


class ToyForMaskedLM(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.toy = ToyModel(config)
        {head}
        self.post_init()

    def forward(self, input_ids):
        return self.toy(input_ids)
"""
INIT = """
    def _init_weights(self, module):
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
"""
PART = """
class Head(nn.Module):
    def __init__(self, {arguments}):
        super().__init__()
{steps}
"""
AUTO = {
    "AutoConfig": "modeling_toy.ToyConfig",
    "AutoModel": "modeling_toy.ToyModel",
    "AutoModelForMaskedLM": "modeling_toy.ToyForMaskedLM",
}
KEYS = {"toy.embed.weight": (8, 4)}


def write(
    path: Path,
    *,
    steps: str = "self.x = nn.Parameter(torch.zeros(4))",
    arguments: str = "config",
    head: str = "self.head = Head(config)",
    model: str = "pass",
    init: str = INIT,
    keys: dict[str, tuple[int, ...]] = KEYS,
    classes: str | None = None,
    other_file: bool = False,
    **config: Any,
) -> Path:
    """A folder with a masked model: its base is in the checkpoint, and of its head what `keys` has."""
    path.mkdir()
    part = PART.format(arguments=arguments, steps=indent(steps, " " * 8)) if classes is None else classes
    imports = "from .heads import Head\n" if other_file else ""
    if other_file:
        (path / "heads.py").write_text(f"import torch\nfrom torch import nn\n\n{part}")
    code = CODE.format(imports=imports, classes="" if other_file else part, init=init, model=model, head=head)
    (path / "modeling_toy.py").write_text(code)
    values = {"model_type": "toy", "auto_map": AUTO, "architectures": ["ToyForMaskedLM"], **config}
    (path / "config.json").write_text(json.dumps(values))
    save_file(
        {key: torch.full(shape, 3.0) for key, shape in keys.items()}, path / "model.safetensors", {"format": "pt"}
    )
    return path


def repaired(path: Path) -> Edited:
    """The folder after the rule, which changes nothing a second time."""
    edited = apply_rules(read_folder(path), [parameters_left_empty.RULE])
    for name, text in edited.texts.items():
        (path / name).write_text(text)
    assert not apply_rules(read_folder(path), [parameters_left_empty.RULE]).changes
    return edited


def line_of(path: Path, text: str) -> int:
    return next(n for n, line in enumerate((path / "modeling_toy.py").read_text().splitlines(), 1) if text in line)

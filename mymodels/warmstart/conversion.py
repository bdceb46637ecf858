"""`Change`: a source on its way to a target, which the transforms rewrite."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from .key_mapping import kind_of
from .lazy_tensor import Value, Why

LAYER = {"mygpt2": "model.layers.{}.", "mybert": "bert.encoder.layer.{}."}
LAYER_NAME = re.compile(r"^(model\.layers|bert\.encoder\.layer)\.(\d+)\.(.*)$")
_LAYER_NUMBER = re.compile(r"\b(layers?)\.\d+\.")


class TokenVectors(NamedTuple):
    """Pretrained vectors for some tokens."""

    tokens: torch.Tensor  # their numbers
    table: torch.Tensor  # a row for each of them
    name: str  # where they come from
    size: int  # how many vectors there were


@dataclass
class Change:
    """A source on its way to a target."""

    tensors: dict[str, Value]  # under our names
    source: PretrainedConfig
    target: PretrainedConfig
    parameters: set[str]  # the target's parameters
    fresh: Callable[[str], Value]  # what a parameter of the target starts with when nothing is loaded
    why: dict[str, Why]  # the source's tensors that get lost
    layers: str | Sequence[int] = "every"
    widen: str = "pad"
    positions: str = "tile"
    token_rows: list[list[int]] | None = None  # per token of the target, the source's tokens it is the mean of
    vectors: TokenVectors | None = None
    pools: bool = False  # whether the target makes one vector of a text
    notes: list[str] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)  # the source's layer for each of the target's

    @property
    def kind(self) -> str:
        return kind_of(self.target)

    @property
    def is_pre_norm(self) -> bool:
        """Whether norms come before attention and MLP, so that a block which writes zeros changes nothing."""
        return self.kind == "mygpt2"

    def drop(self, name: str, why: str, kind: str = "approximate", *, requested: bool = False) -> None:
        """Take a tensor out. Where it is used nowhere else, the report will say why."""
        if name in self.tensors:
            for source in self.tensors.pop(name).sources:
                self.why.setdefault(source, Why(why, kind, requested=requested))

    def has_parameter(self, name: str) -> bool:
        """Whether the target has such a parameter, in whatever layer."""
        return _LAYER_NUMBER.sub(r"\1.0.", name) in self._patterns

    @cached_property
    def _patterns(self) -> set[str]:
        return {_LAYER_NUMBER.sub(r"\1.0.", name) for name in self.parameters}

    def each_layer(self) -> list[str]:
        return [LAYER[self.kind].format(i) for i in range(self.source.num_hidden_layers)]


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor

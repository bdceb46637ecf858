"""`Change`: the state of a conversion from source to target, which each transform updates."""

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

    tokens: torch.Tensor  # their ids
    table: torch.Tensor  # a row for each of them
    name: str  # of the file
    size: int  # number of vectors in the file


@dataclass
class Change:
    """The state of a conversion: the tensors so far, which the transforms turn from the source's into the target's."""

    tensors: dict[str, Value]  # under our names
    source: PretrainedConfig
    target: PretrainedConfig
    parameters: set[str]  # the target's parameters
    fresh: Callable[[str], Value]  # the initial value of a parameter of the target
    why: dict[str, Why]  # the source's tensors that are not used
    layers: str | Sequence[int] = "every"
    widen: str = "pad"
    positions: str = "tile"
    token_rows: list[list[int]] | None = None  # for each token of the target, the source's tokens whose mean it is
    vectors: TokenVectors | None = None
    pools: bool = False  # whether the target has a pooler
    notes: list[str] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)  # the source's layer for each of the target's

    @property
    def kind(self) -> str:
        return kind_of(self.target)

    @property
    def is_pre_norm(self) -> bool:
        """Whether norms come before attention and MLP, so that a block with zero outputs changes nothing."""
        return self.kind == "mygpt2"

    def drop(self, name: str, why: str, kind: str = "approximate", *, requested: bool = False) -> None:
        """Remove a tensor; the report gives the reason if it is used nowhere else."""
        if name in self.tensors:
            for source in self.tensors.pop(name).sources:
                self.why.setdefault(source, Why(why, kind, requested=requested))

    def has_parameter(self, name: str) -> bool:
        """Whether the target has such a parameter in any layer."""
        return _LAYER_NUMBER.sub(r"\1.0.", name) in self._patterns

    @cached_property
    def _patterns(self) -> set[str]:
        return {_LAYER_NUMBER.sub(r"\1.0.", name) for name in self.parameters}

    def each_layer(self) -> list[str]:
        return [LAYER[self.kind].format(i) for i in range(self.source.num_hidden_layers)]


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor

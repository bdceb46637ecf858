"""Freezing, layer-wise learning rates and LoRA, for any model with numbered layers."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .datasets_io import require_module

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte|wpe)(?:\.|$)")


def depth_of(name: str, num_layers: int) -> int:
    """The depth of a parameter or module: 0 for embeddings, 1 to `num_layers` for layers, `num_layers + 1` for the rest."""
    if found := _LAYER.search(name):
        return int(found[1]) + 1
    return 0 if _EMBEDDING.search(name) else num_layers + 1


def count_layers(model: nn.Module) -> int:
    """The number of a model's layers, by their numbered names.

    Raises:
        ValueError: there are none, or their numbers are not consecutive from 0.
    """
    numbers = {int(found[1]) for name, _ in model.named_parameters() if (found := _LAYER.search(name))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ValueError(
            f"{type(model).__name__} has no consecutively numbered layers: leave out freeze_layers, freeze_embeddings and "
            "layer_decay"
        )
    return len(numbers)


def freeze(model: nn.Module, *, embeddings: bool = False, layers: int = 0) -> list[str]:
    """Freeze the embeddings and the first `layers` layers; returns the names of the frozen parameters.

    A head that is tied to the embeddings is frozen with them.

    Raises:
        ValueError: the model has fewer layers, or nothing would be left to train.
    """
    if layers < 0 or layers > (total := count_layers(model) if layers else 0):
        raise ValueError(f"freeze_layers={layers}, but {type(model).__name__} has {total} layers")
    num_layers = count_layers(model)
    frozen = []
    for name, parameter in model.named_parameters():
        depth = depth_of(name, num_layers)
        if (embeddings and depth == 0) or 1 <= depth <= layers:
            parameter.requires_grad_(False)
            frozen.append(name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("every parameter would be frozen: lower freeze_layers")
    return frozen


def decayed_groups(
    model: nn.Module, decay_names: Iterable[str], *, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups whose learning rate falls by `layer_decay` with each layer down from the head (ELECTRA, arXiv 2003.10555).

    With n layers, the head has `learning_rate`, layer i of 1 … n `learning_rate * layer_decay ** (n + 1 - i)`, and the
    embeddings `learning_rate * layer_decay ** (n + 1)`. Only the parameters in `decay_names` have weight decay.
    """
    num_layers, decayed = count_layers(model), set(decay_names)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depth_of(name, num_layers)
        group = {
            "params": [],
            "lr": learning_rate * layer_decay ** (num_layers + 1 - depth),
            "weight_decay": weight_decay if name in decayed else 0.0,
        }
        groups.setdefault((-depth, name not in decayed), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]  # the head first: the Trainer logs the first group's rate


def add_lora(
    model: PreTrainedModel, *, r: int, alpha: int | None, target_modules: Sequence[str] | None, new: Iterable[str]
) -> Any:
    """Add LoRA adapters (arXiv 2106.09685) to a model through PEFT; all other parameters are frozen.

    Args:
        r: rank of the adapters.
        alpha: their scale is `alpha / r`. Default: `2 * r`.
        target_modules: suffixes of the names of the matrices to adapt. Default: every matrix of every layer.
        new: newly initialised parameters; their modules are trained fully.

    Returns:
        The `PeftModel`; its `merge_and_unload()` returns the model with the adapters merged.

    Raises:
        ValueError: PEFT is not installed, or no module has such a name.
    """
    peft = require_module("peft", "lora")
    matrices = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    if target_modules:
        targets = [name for name in matrices if any(f".{name}".endswith(f".{end}") for end in target_modules)]
        kinds = sorted({name.rsplit(".", 1)[-1] for name in matrices if _LAYER.search(f"{name}.")})
        if not targets:
            raise ValueError(
                f"lora_target_modules={list(target_modules)}: {type(model).__name__} has no such matrix, but {', '.join(kinds)}"
            )
    else:
        targets = [name for name in matrices if _LAYER.search(f"{name}.")]
    fully_trained = sorted({name.rpartition(".")[0] for name in new} - set(targets))
    config = peft.LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        target_modules=targets,
        modules_to_save=fully_trained or None,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
    )
    return peft.get_peft_model(model, config)

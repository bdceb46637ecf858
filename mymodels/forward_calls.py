"""Call any model's `forward`: with the arguments that it accepts, and with outputs of any form."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.utils import ModelOutput

from .messages import first_line
from .released import is_installed


def without_wrappers(model: nn.Module) -> Any:
    """The model inside DDP, FSDP, `torch.compile` and PEFT wrappers."""
    plain: Any = extract_model_from_parallel(model)
    return plain.get_base_model() if hasattr(plain, "get_base_model") else plain


def is_known(model: nn.Module) -> bool:
    """Whether a model's class is of transformers or mymodels, so that its `forward` needs no trial run."""
    cls = type(without_wrappers(model))
    return is_installed(cls) or cls.__module__.startswith("transformers.")


def takes(model: nn.Module, argument: str) -> bool:
    """Whether `forward` has this argument, or **kwargs."""
    parameters = inspect.signature(without_wrappers(model).forward).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def names_argument(model: nn.Module, argument: str) -> bool:
    """Whether `forward` has this argument by name; with **kwargs alone, it may ignore or refuse it."""
    return argument in inspect.signature(without_wrappers(model).forward).parameters


def accepted(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that `forward` accepts; a tokenizer may add others, such as `token_type_ids`."""
    return {name: value for name, value in batch.items() if takes(model, name)}


def as_mapping(outputs: Any) -> dict[str, Any]:
    """Outputs by name, whether they are a mapping, a dataclass, a tuple, or one tensor.

    In a tuple, the loss is the only scalar (a tensor without dimensions, or of shape [1]), and the logits are the first
    other tensor; the rest is named by its index.
    """
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return dict(zip(outputs._fields, outputs))
    parts = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    numbers = [i for i, part in enumerate(parts) if isinstance(part, torch.Tensor) and part.ndim == 0]
    numbers = numbers or [i for i, part in enumerate(parts) if isinstance(part, torch.Tensor) and part.shape == (1,)]
    named = {"loss": numbers[0]} if len(numbers) == 1 else {}
    others = [i for i, part in enumerate(parts) if isinstance(part, torch.Tensor) and i not in numbers]
    named |= {"logits": others[0]} if others else {}
    found = {name: parts[i] for name, i in named.items()}
    return found | {str(i): part for i, part in enumerate(parts) if i not in named.values()}


def loss_of(outputs: Any) -> torch.Tensor | None:
    """The loss in a model's outputs, or None."""
    loss = as_mapping(outputs).get("loss")
    return loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None


def logits_of(outputs: Any) -> torch.Tensor | None:
    """`logits` in a model's outputs, else the first floating-point tensor that is not the loss, or None."""
    found = as_mapping(outputs)
    tensors = [value for name, value in found.items() if name != "loss" and isinstance(value, torch.Tensor)]
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.ndim]
    return found["logits"] if isinstance(found.get("logits"), torch.Tensor) else next(iter(floating), None)


@contextmanager
def uniform_outputs(model: nn.Module) -> Iterator[None]:
    """A context in which the model returns a `ModelOutput`, as transformers' Trainer needs, for any form of outputs."""

    def convert(module: nn.Module, arguments: Any, outputs: Any) -> Any:
        return outputs if isinstance(outputs, Mapping) else ModelOutput(as_mapping(outputs))

    handle = model.register_forward_hook(convert)
    try:
        yield
    finally:
        handle.remove()


def fitting_collator(
    model: nn.Module, collator: Callable[[list], Mapping[str, Any]]
) -> Callable[[list], dict[str, Any]]:
    """A collator without the entries that `forward` does not accept."""
    return lambda examples: accepted(model, collator(examples))


def check_loss(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Run a small batch in eval mode before training, and return the outputs.

    It changes neither the model (including running statistics of norms) nor the random state.

    Raises:
        ValueError: `forward` fails, or returns no loss that can be trained on; the message says what to change.
    """
    name, training = type(without_wrappers(model)).__name__, model.training
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            outputs = model(**moved)
    except Exception as error:  # custom code can raise anything
        sizes = ", ".join(f"{key} {list(value.shape)}" for key, value in moved.items() if hasattr(value, "shape"))
        raise ValueError(f"{name}.forward fails on a batch of the data ({sizes}): {first_line(error)}") from error
    finally:
        model.train(training)
    loss = loss_of(outputs)
    if loss is None:
        returned = ", ".join(key for key, value in as_mapping(outputs).items() if isinstance(value, torch.Tensor))
        raise ValueError(
            f"{name}.forward returns no loss for {', '.join(moved)}, but {returned or 'no tensor'}: return a scalar as `loss`, "
            "in a mapping, a dataclass or a tuple"
        )
    if not loss.requires_grad:
        raise ValueError(f"the loss of {name}.forward does not depend on any parameter that is trained")
    return outputs

"""State dicts of pickled modules, taken from their pickled attributes, so that no class of them is needed."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .checkpoint import CheckpointError
from .plain_pickle import FIELDS, Unopened, UnopenedTensor

# Hooks that do not change names or values of a state dict; they only record a version.
_HARMLESS_HOOKS = {"torch.nn.utils.spectral_norm.SpectralNormStateDictHook"}
_QUANTISED = ("torch.ao.nn.", "torch.nn.quantized.", "torch.nn.intrinsic.quantized.", "torch.nn.quantizable.")


class NeedsClassCode(CheckpointError):
    """An object whose state dict depends on its code. The message does not name the file."""


class ModuleState(dict):
    """The state dict of a pickled module; `qualified` is the name of its class."""

    qualified = "?"


def with_state_dicts(node: Any) -> Any:
    """Replace each pickled module, optimizer and scheduler in a nested object by its state dict.

    Any other object that holds modules or tensors becomes the dict of its attributes.

    Raises:
        NeedsClassCode: a module has hooks that change its state dict, or holds something that is neither tensor nor module.
    """
    return _Converter().convert(node)


def fields_of(unopened: Unopened) -> dict[str, Any] | None:
    """The pickled attributes of an object; None if its class pickles them in another way."""
    states = unopened.state if isinstance(unopened.state, tuple) else (unopened.state,)  # a tuple where there are slots
    if not all(state is None or isinstance(state, dict) for state in states) or all(state is None for state in states):
        return None
    fields = {key: value for state in states if state for key, value in state.items()}
    return fields if all(isinstance(key, str) for key in fields) else None


def is_module(value: Any) -> bool:
    """Whether an unopened object is a `torch.nn.Module`, by its attributes."""
    fields = fields_of(value) if isinstance(value, Unopened) else None
    return fields is not None and all(
        isinstance(fields.get(key), dict) for key in ("_parameters", "_buffers", "_modules")
    )


def _wrapped(unopened: Unopened) -> Any:
    """The module that `torch.compile` wrapped, which is pickled as an argument of the wrapper's class."""
    first = unopened.args[0] if unopened.args else None
    return first if unopened.qualified.endswith(".OptimizedModule") and is_module(first) else None


class _Converter:
    def __init__(self) -> None:
        self.done: dict[int, Any] = {}  # by identity, so that shared objects are converted once
        self.open: set[int] = set()
        self.kept: list[Any] = []  # keeps the identities above from being used again

    def convert(self, node: Any) -> Any:
        if not isinstance(node, (dict, list, tuple, Unopened, *FIELDS)):
            return node
        if id(node) in self.open:  # a cycle, such as a trainer's callbacks
            return f"{_name(node)} that holds this"
        if id(node) not in self.done:
            self.open.add(id(node))
            self.kept.append(node)
            self.done[id(node)] = self._converted(node)
            self.open.discard(id(node))
        return self.done[id(node)]

    def _converted(self, node: Any) -> Any:
        if isinstance(node, Unopened):
            return self._object(node)
        if isinstance(node, dict):
            changed = {key: self.convert(value) for key, value in node.items()}
            return node if all(changed[key] is node[key] for key in node) else changed
        if isinstance(node, FIELDS):
            inner = self.convert(vars(node))
            return node if inner is vars(node) else inner
        items = [self.convert(value) for value in node]
        same = all(a is b for a, b in zip(items, node))
        return node if same else items

    def _object(self, node: Unopened) -> Any:
        if isinstance(node, UnopenedTensor):
            return node
        if is_module(node) or _wrapped(node) is not None:
            state = ModuleState(self._tensors(node, ""))
            state.qualified = node.qualified
            return state
        fields = fields_of(node)
        if fields is None:
            entries = dict(node.items)  # a subclass of dict, such as a state dict
            if entries and not node.state and not node.args and all(isinstance(key, str) for key in entries):
                return self._converted(entries) if _holds_tensors(entries) else node
            return node
        if {"state", "param_groups"} <= fields.keys():
            return _optimizer_state(fields)
        if "optimizer" in fields and "last_epoch" in fields:
            return self.convert(_scheduler_state(fields))
        return self.convert(fields) if _holds_tensors(fields) else node

    def _tensors(self, module: Unopened, prefix: str, within: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
        """The entries of a module's `state_dict()`: parameters, buffers that are saved, and those of its modules."""
        if (inner := _wrapped(module)) is not None:
            yield from self._tensors(inner, f"{prefix}_orig_mod.", within)
            return
        where = f"the module {prefix.rstrip('.')!r}" if prefix else "the module"
        fields = fields_of(module)
        if not is_module(module) or fields is None:
            raise NeedsClassCode(f"{where} is a {_name(module)}, which is not pickled like a module")
        if id(module) in within:
            raise CheckpointError(f"{where} of class {module.qualified} holds itself, so it has no state dict")
        if module.qualified.startswith(_QUANTISED) and "quantized" in module.qualified:
            raise CheckpointError(
                f"{where} is a {module.qualified}, whose weights are packed: save the model before quantising it"
            )
        for hooks in ("_state_dict_hooks", "_state_dict_pre_hooks"):
            for hook in (fields.get(hooks) or {}).values():
                if _name(hook) not in _HARMLESS_HOOKS:
                    raise NeedsClassCode(
                        f"{where} of class {module.qualified} has a hook that may change its state dict ({_name(hook)})"
                    )
        transient = fields.get("_non_persistent_buffers_set") or ()
        buffers = {name: value for name, value in fields["_buffers"].items() if name not in transient}
        for name, tensor in {**fields["_parameters"], **buffers}.items():
            if tensor is None:
                continue
            if not isinstance(tensor, (torch.Tensor, UnopenedTensor)):
                raise CheckpointError(
                    f"{where} of class {module.qualified}: {name!r} is a {_name(tensor)}, which is not a tensor"
                )
            yield f"{prefix}{name}", tensor
        for name, child in fields["_modules"].items():
            if child is not None:
                yield from self._tensors(child, f"{prefix}{name}.", (*within, id(module)))


def _name(value: Any) -> str:
    return value.qualified if isinstance(value, Unopened) else getattr(value, "qualified", type(value).__name__)


def _holds_tensors(node: Any) -> bool:
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (torch.Tensor, UnopenedTensor)):
            return True
        if id(value) in seen or not isinstance(value, (dict, list, tuple, Unopened, *FIELDS)):
            continue
        seen.add(id(value))
        if isinstance(value, Unopened):
            waiting += value.contents()
        elif isinstance(value, FIELDS):
            waiting.append(vars(value))
        else:
            waiting += value.values() if isinstance(value, dict) else value
    return False


def _optimizer_state(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `state_dict()` of a pickled optimizer, with parameters numbered in the order of its groups."""
    numbers: dict[int, int] = {}
    groups = []
    for group in fields["param_groups"]:
        keys = [numbers.setdefault(id(parameter), len(numbers)) for parameter in group["params"]]
        groups.append({**group, "params": keys})
    state = {numbers.get(id(key), key): value for key, value in fields["state"].items()}
    return {"state": state, "param_groups": groups}


def _scheduler_state(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `state_dict()` of a pickled scheduler: its attributes except the optimizer and functions."""
    state = {key: value for key, value in fields.items() if key != "optimizer"}
    for key in ("lr_lambdas", "lr_lambda"):
        if isinstance(state.get(key), list):
            state[key] = [fields_of(one) if isinstance(one, Unopened) else None for one in state[key]]
    return state

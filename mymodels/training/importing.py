"""Import training checkpoints that are one dict in one file into a model, an optimizer and a scheduler."""

import copy
import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoints import Checkpoint, CheckpointError, open_checkpoint
from ..checkpoints.dispatch import load_in_place, without_wrapper
from ..checkpoints.nested_objects import unread

_SHAPED = (  # values of an optimizer's state that have their parameter's shape
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "sum"),
    *("acc_delta", "ax", "prev", "step_size", "variance"),
)
_DECOUPLED = "decoupled_weight_decay"  # true of AdamW, false of Adam
_ADDED_LATER = {"maximize", "foreach", "capturable", "differentiable", "fused", _DECOUPLED}  # torch fills them in
_STATE_OF = {  # a value that each state of an optimizer has, where options do not tell the kinds apart
    torch.optim.Adam: "exp_avg_sq",
    torch.optim.RAdam: "exp_avg_sq",
    torch.optim.Adamax: "exp_inf",
}
_DISTINCTIVE_OPTIONS = {
    "amsgrad",
    "momentum",
    "momentum_decay",
    "alpha",
    "rho",
    "lr_decay",
    "etas",
}  # options by which kinds of optimizers are told apart
_KIND = re.compile(r"model|net(work)?|optim(izer)?|(lr_?)?sched(uler)?|state(_?dict)?|weights|opt|[_.-]", re.IGNORECASE)


def import_checkpoint(
    path: str | os.PathLike,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    *,
    section: str | None = None,
    allow_pickle: bool = False,
    strict: bool = True,
) -> dict[str, Any]:
    """Load a checkpoint that a training script wrote, such as `{'epoch', 'model_state_dict', 'optimizer_state_dict', …}`.

    If a part does not fit, nothing is changed. Optimizer and scheduler must be of the kind that was saved.

    Args:
        path: anything that `open_checkpoint` opens.
        model: receives the weights; prefixes of `DataParallel`, `torch.compile`, FSDP or DeepSpeed in names are removed.
        optimizer: receives its state. Optimizer states have no names, so parameters are matched by their order, and each
            state must have its parameter's shape.
        scheduler: receives its state.
        section: which model of a file with several (`Checkpoint.sections`), such as `"modelA_state_dict"`; the states
            of optimizer and scheduler are then those with the matching name, `"optimizerA_state_dict"`.
        allow_pickle: as for `open_checkpoint`.
        strict: raise for missing and unexpected names and for mismatched shapes. If false, they are warned of and
            returned.

    Returns:
        The rest of the file: `epoch`, `loss`, …; unless `strict`, also `loading_info`, with the lists `missing_keys`,
        `unexpected_keys` and `mismatched_keys`.

    Raises:
        CheckpointError: names, shapes, groups or kinds do not match, or a requested state is missing; the message names
            it.

    Examples:
        >>> rest = import_checkpoint("old.pt", model, optimizer)
        >>> rest["epoch"]
        7
    """
    opened = open_checkpoint(path, allow_pickle=allow_pickle)
    if section is None and len(opened.sections) > 1:
        raise CheckpointError(f"{path} holds several models: choose section={' or '.join(map(repr, opened.sections))}")
    checkpoint = opened if section is None else opened.section(section)
    ours = section if section is not None else next(iter(opened.sections))
    taken, states = [], []
    for kind, wanted in (("optim", optimizer), ("sched", scheduler)):
        if wanted is not None:
            key = _find_state_key(opened, kind, ours)
            state = copy.deepcopy(_single(opened.extras[key]))  # a copy, independent of the file's memory
            if wanted is optimizer:
                state = _fit_optimizer_state(f"{path}: {key}", state, model, optimizer)
            else:
                _check_scheduler(f"{path}: {key}", state, scheduler)
            taken.append(key)
            states.append((wanted, state))
    undo = [(wanted, wanted.state_dict()) for wanted, _ in states]
    try:
        for key, (wanted, state) in zip(taken, states):
            try:
                wanted.load_state_dict(state)
            except Exception as error:  # custom classes may raise anything
                kind = type(wanted).__name__
                raise CheckpointError(f"{path}: {key} is not a state of {kind}: {error!r}") from error
        account = load_in_place(model, checkpoint, strict=strict)
    except BaseException:
        for wanted, before in undo:
            wanted.load_state_dict(before)
        raise
    rest = {name: opened.extras[name] for name in opened.extras if name not in taken}
    return rest if strict else rest | {"loading_info": account}


def _single(value: Any) -> Any:
    """The only element of a list, as Lightning stores the state of a single optimizer; else the value itself."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()


def _is_scheduler(value: Any) -> bool:
    return isinstance(value, Mapping) and "last_epoch" in value


def _find_state_key(checkpoint: Checkpoint, kind: str, section: str) -> str:
    """The key of a model's optimizer or scheduler state: the one with the matching name, or the only one."""
    looks_like = {"optim": _is_optimizer, "sched": _is_scheduler}
    values = {key: _single(value) for key, value in unread(checkpoint.extras).items()}
    found = [key for key, value in values.items() if kind in key.lower() and isinstance(value, Mapping)]
    shaped = [key for key, value in values.items() if looks_like[kind](value)]
    found = [key for key in found if key in shaped] or found or shaped  # also under another name, `opt`
    alike = [key for key in found if _KIND.sub("", key).lower() == _KIND.sub("", section).lower()]
    chosen = alike or (found if len(checkpoint.sections) == 1 else [])
    if len(chosen) != 1:
        what = {"optim": "optimizer", "sched": "scheduler"}[kind]
        article = "an" if kind == "optim" else "a"
        has = ", ".join(map(repr, chosen or checkpoint.extras)) or "nothing"
        raise CheckpointError(
            f"{checkpoint.path} has {'several states' if chosen else 'no state'} of {article} {what} for the model {section!r}; "
            f"in addition to the weights it has {has}: import without {what}"
        )
    return chosen[0]


def _fit_optimizer_state(
    where: str, state: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The saved state in the order of the optimizer's parameters.

    Raises:
        CheckpointError: groups, names or shapes differ.
    """
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    _check_layout(where, state)
    saved, groups = state["param_groups"], optimizer.param_groups
    if len(saved) != len(groups):
        raise CheckpointError(
            f"{where} has {len(saved)} parameter groups, the optimizer has {len(groups)}: create it with the same groups"
        )
    fitted_groups = []
    by_names = {frozenset(_keys_by_name(group)): group for group in saved if _keys_by_name(group)}
    for number, now in enumerate(groups):
        names = [known.get(id(parameter), "?") for parameter in now["params"]]
        before = by_names.get(frozenset(names), saved[number])  # groups with names may come in another order
        if differ := _other_option(before, now, optimizer):
            raise CheckpointError(
                f"{where} is of another kind of optimizer than {type(optimizer).__name__}, {differ}: create the kind that "
                "was saved, or import without optimizer"
            )
        keys = list(before["params"])
        if len(keys) != len(now["params"]):
            raise CheckpointError(
                f"{where}: group {number} has {len(keys)} parameters, the optimizer's has {len(now['params'])}: pass it "
                "the parameters it was saved with (frozen ones too, if it had them)"
            )
        if by_name := _keys_by_name(before):
            if missing := [name for name in names if name not in by_name]:
                raise CheckpointError(f"{where}: group {number} has no state for parameter {missing[0]!r}")
            keys = [by_name[name] for name in names]
        for key, name, parameter in zip(keys, names, now["params"]):
            for kind, value in state["state"].get(key, {}).items():
                wanted = _state_shape(kind, parameter.shape)
                if wanted is not None and isinstance(value, torch.Tensor) and tuple(value.shape) != wanted:
                    raise CheckpointError(
                        f"{where}: {kind} of parameter {key} has shape {tuple(value.shape)}, but {name!r} has "
                        f"{tuple(parameter.shape)}: pass the optimizer its parameters in the saved order"
                    )
            _check_state_kind(where, state["state"].get(key, {}), optimizer)
        fitted_groups.append({**before, "params": keys} | ({"param_names": names} if "param_names" in before else {}))
    return {**state, "param_groups": fitted_groups}


def _check_layout(where: str, state: dict[str, Any]) -> None:
    """Raise unless this is what `Optimizer.state_dict` returns, with each value in `state` of a parameter of a group."""
    groups, values = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(values, Mapping):
        raise CheckpointError(f"{where} is not an optimizer's state: it has no 'state' and 'param_groups'")
    for number, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise CheckpointError(f"{where} is not an optimizer's state: group {number} has no list of 'params'")
    keys = {key for group in groups for key in group["params"]}
    for key, value in values.items():
        if key not in keys:
            raise CheckpointError(
                f"{where} has a state for parameter {key!r}, which is in none of its groups: the file is not as an "
                "optimizer wrote it, import without optimizer"
            )
        if not isinstance(value, Mapping):
            raise CheckpointError(
                f"{where}: the state of parameter {key!r} is of type {type(value).__name__}, not a dict"
            )


def _other_option(saved: Mapping[str, Any], now: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str:
    """How a saved group's options show that it is of another kind of optimizer; empty if they do not."""
    defaults = set(getattr(optimizer, "defaults", ()))
    if differ := (set(saved) ^ set(now)) & _DISTINCTIVE_OPTIONS | (defaults - set(saved) - _ADDED_LATER):
        return f"only one of them has {min(differ)!r}"
    # AdamW sets the option again after loading; Adam takes the saved value, and goes on as AdamW did
    if isinstance(optimizer, torch.optim.AdamW) and saved.get(_DECOUPLED) is False and saved.get("weight_decay"):
        return f"which decouples the weight decay, {saved['weight_decay']} in the file, as the saved one did not"
    return ""


def _state_shape(kind: str, shape: torch.Size) -> tuple[int, ...] | None:
    """The shape of a value of an optimizer's state for a parameter of this shape; None where it is not known."""
    if kind == "row_var":  # of Adafactor
        return (*shape[:-1], 1)
    if kind == "col_var":
        return (*shape[:-2], 1, *shape[-1:])
    return tuple(shape) if kind in _SHAPED else None


def _check_state_kind(where: str, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    needed = next((name for kind, name in _STATE_OF.items() if isinstance(optimizer, kind)), None)
    if state and needed is not None and needed not in state:
        raise CheckpointError(
            f"{where} is of another kind of optimizer than {type(optimizer).__name__}, it has no {needed!r}: create the "
            "kind that was saved, or import without optimizer"
        )


def _keys_by_name(group: Mapping[str, Any]) -> dict[str, Any]:
    """Name → key of a saved group's parameters; empty if it has no names."""
    keys = list(group["params"])
    names = group.get("param_names") or (keys if all(isinstance(key, str) for key in keys) else [])
    return {without_wrapper(name): key for name, key in zip(names, keys)}


def _check_scheduler(where: str, state: Mapping[str, Any], scheduler: Any) -> None:
    """Raise if the state has other fields than the scheduler's, except private ones, which vary by torch release."""
    now = scheduler.state_dict()
    differ = [name for name in sorted(set(state) ^ set(now)) if not name.startswith("_") and name != "verbose"]
    if differ:
        raise CheckpointError(
            f"{where} is of another kind of scheduler than {type(scheduler).__name__}, only one of them has {differ[0]!r}: "
            "create the kind that was saved, or import without scheduler"
        )
    if len(state.get("base_lrs", ())) != len(now.get("base_lrs", ())):
        raise CheckpointError(
            f"{where} is for {len(state['base_lrs'])} parameter groups, the scheduler's optimizer has "
            f"{len(now['base_lrs'])}: create it with the same groups"
        )

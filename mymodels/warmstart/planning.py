"""From a source and a target to a plan: what each parameter will be made of, and a row for everything."""

import copy
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..checkpoints import Checkpoint, CheckpointError, TensorInfo
from .change import Change
from .names import PREFIXES
from .report import Row, WarmStartReport
from .sources import Source
from .transforms import TRANSFORMS, tie
from .values import Value, constant, is_finite, worst

_PARTS = re.compile(r"^(lm_head|score|classifier|qa_outputs|cls)\.")


@dataclass
class Plan:
    """What a warm start will do: a value for each parameter, and the report's rows."""

    model: PreTrainedModel  # its parameters may be on the meta device
    source: Source
    values: dict[str, Value]  # the target's own names; of tied ones the first
    tied: dict[str, tuple[str, ...]]  # each of these names → all names of the parameter
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def report(self) -> WarmStartReport:
        notes = list(dict.fromkeys([*self.source.assumed, *self.notes]))
        total = sum(info.numel for info in self.source.info.values())
        name = type(self.model).__name__
        return WarmStartReport(self.source.where, name, self.rows, notes, source_parameters=total)

    def checkpoint(self, dtype: torch.dtype | None = None) -> Checkpoint:
        """The plan as a checkpoint of the target, each tensor computed when it is read."""
        info = {name: TensorInfo(value.shape, dtype or value.dtype, "") for name, value in self.values.items()}
        path: Any = self.source.where
        return Checkpoint(path, "warm start", info, lambda name: self.compute(name, info[name].dtype))

    def compute(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The new value of a parameter.

        Raises:
            CheckpointError: it is NaN or infinite.
        """
        value = self.values[name]
        tensor = value.compute().to(dtype).contiguous()
        if value.sources and not is_finite(tensor):
            raise _not_finite(self.source, value.sources, f"in {dtype}, as {name}")
        return tensor


def _not_finite(source: Source, names: tuple[str, ...], what: str) -> CheckpointError:
    return CheckpointError(
        f"{source.where}: {' and '.join(map(repr, names))} has NaN or infinite values {what}: take a checkpoint from "
        "before the training diverged, or leave it out with skip="
    )


def check_finite(source: Source, plan: Plan, dtype: torch.dtype) -> None:
    """Read what the plan will read, so that nothing is changed when something is wrong with it.

    Where `dtype` holds smaller numbers than the source, every value is computed too.

    Raises:
        CheckpointError: a tensor has NaN or infinite values, or cannot be read.
    """
    used = dict.fromkeys(name for value in plan.values.values() for name in value.sources)
    for name in tqdm([name for name in used if name in source.info], desc="checking", unit="tensor", disable=None):
        tensor = source.read(name)
        if not is_finite(tensor):
            raise _not_finite(source, (name,), "")
    largest = torch.finfo(dtype).max
    if any(value.sources and torch.finfo(value.dtype).max > largest for value in plan.values.values()):
        for name in tqdm(plan.values, desc="trying", unit="tensor", disable=None):
            plan.compute(name, dtype)


def make_plan(
    model: PreTrainedModel,
    source: Source,
    *,
    transform: bool = True,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    keep_new: bool = False,
    **options: Any,
) -> Plan:
    """Decide what each parameter of `model` is made of.

    Args:
        transform: fit what does not fit; without it, tensors are renamed, split and transposed only.
        skip, only: regexes over the names of parameters and tensors, see `warm_start`.
        keep_new: parameters that get nothing keep what they have, instead of starting anew.
        options: fields of `Change`.

    Raises:
        CheckpointError: the two have nothing in common, or a quantised tensor would be needed.
    """
    tied = _tied_names(model)
    prefix = "" if type(model).base_model_prefix in dict(model.named_children()) else PREFIXES[model.config.model_type]
    ours = {prefix + name: names[0] for names in tied.values() for name in names}  # in our form → the parameter
    if source.tensors and source.config.hidden_size != model.config.hidden_size:
        raise CheckpointError(
            f"{source.where} has hidden_size={source.config.hidden_size}, the target {model.config.hidden_size}: the "
            "width of the model is the one thing that cannot be changed; set hidden_size to the source's"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def fresh(name: str) -> Value:
        return _new(model, ours[name], parameters[ours[name]], keep_new)

    options["pools"] = getattr(model.base_model, "pooler", None) is not None
    change = Change(dict(source.tensors), source.config, model.config, set(ours), fresh, dict(source.why), **options)
    for step in TRANSFORMS if transform else (tie,):
        step(change)
    values: dict[str, Value] = {}
    refused: dict[str, str] = {}  # parameters that the source has something for, but nothing that serves
    for name, own in ours.items():
        value, shape = change.tensors.get(name), tuple(parameters[own].shape)
        if value is None:
            continue
        if value.shape != shape:
            refused[own] = f"the source's shape {_shown(value.shape)} is not {_shown(shape)}"
        elif not _chosen((own, *value.sources), skip, only):
            refused[own] = "left out on request"
        else:
            _check_dtype(source, value)
            values.setdefault(own, value)
            continue
        change.drop(name, refused[own])
    for name, own in ours.items():
        weight = ours.get(re.sub("bias$", "weight", name), "")
        if own in values:
            continue
        if own in refused:
            values[own] = fresh(name).then(refused[own], lambda tensor: tensor)
        elif name.endswith(".bias") and weight in values and values[weight].sources:  # the source computes without
            like = values[weight]
            values[own] = constant(tuple(parameters[own].shape), 0.0, like, "zeros, as the source has none")
        else:
            values[own] = fresh(name)
    return Plan(model, source, values, {names[0]: names for names in tied.values()}, _rows(model, source, change, values, tied), change.notes)  # fmt: skip


def _shown(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _chosen(names: tuple[str, ...], skip: Sequence[str], only: Sequence[str]) -> bool:
    if any(re.search(pattern, name) for pattern in skip for name in names):
        return False
    return not only or any(re.search(pattern, name) for pattern in only for name in names)


def _check_dtype(source: Source, value: Value) -> None:
    for name in value.sources:
        info = source.info.get(name)
        if info is not None and not info.dtype.is_floating_point:
            raise CheckpointError(
                f"{source.where}: tensor {name!r} is {info.dtype_name}, not floating point: the checkpoint is quantised, "
                "and its scales are needed to read it; take one that is not, or leave it out with skip="
            )


def _new(model: PreTrainedModel, name: str, parameter: torch.Tensor, keep: bool) -> Value:
    path, _, attribute = name.rpartition(".")
    module, shape = model.get_submodule(path), tuple(parameter.shape)
    if keep:
        return Value(
            shape, parameter.dtype, lambda: parameter.detach(), steps=("kept as the model had it",), kind="new"
        )
    return Value(
        shape, parameter.dtype, partial(_initialised, model, module, attribute), steps=(_start(model, module, attribute),), kind="new"
    )  # fmt: skip


def _initialised(model: PreTrainedModel, module: torch.nn.Module, attribute: str) -> torch.Tensor:
    """What the model's own `_init_weights` gives a parameter, without touching its module."""
    alone = copy.copy(module)
    alone._parameters = {
        name: torch.nn.Parameter(torch.empty(p.shape, dtype=torch.float32)) for name, p in module._parameters.items() if p is not None
    } | {name: None for name, p in module._parameters.items() if p is None}  # fmt: skip
    with torch.no_grad():
        model._init_weights(alone)
    made = alone._parameters[attribute]
    assert made is not None
    return made.detach()


def _start(model: PreTrainedModel, module: torch.nn.Module, attribute: str) -> str:
    value = _initialised(model, module, attribute)
    low, high = value.aminmax() if value.numel() else (value, value)
    if low == high:
        return {0.0: "zeros", 1.0: "ones"}.get(low.item(), f"{low.item():g}")
    std = model.config.initializer_range
    if getattr(module, "is_residual_projection", False):
        std /= (2 * model.config.num_hidden_layers) ** 0.5
    return f"random, normal with standard deviation {std:.3g}"


def _tied_names(model: PreTrainedModel) -> dict[int, tuple[str, ...]]:
    """The names of each parameter; those of a tied one together, the embeddings' first."""
    model.tie_weights()
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {key: tuple(names) for key, names in groups.items()}


def _rows(
    model: PreTrainedModel,
    source: Source,
    change: Change,
    values: dict[str, Value],
    tied: dict[int, tuple[str, ...]],
) -> list[Row]:
    """Parameters and tensors that belong together, however indirectly, share a row."""
    group = {name: name for name in (*values, *(f"\0{s}" for v in values.values() for s in v.sources))}

    def root(name: str) -> str:
        while group[name] != name:
            group[name] = group[group[name]]
            name = group[name]
        return name

    for name, value in values.items():
        for used in value.sources:
            group[root(f"\0{used}")] = root(name)
    members: dict[str, list[str]] = defaultdict(list)
    for name in values:
        members[root(name)].append(name)
    names_of = {names[0]: names for names in tied.values()}
    parameters = dict(model.named_parameters())
    rows = []
    for names in members.values():
        parts = [values[name] for name in names]
        sources = tuple(dict.fromkeys(s for value in parts for s in value.sources))
        targets = tuple(n for name in names for n in names_of[name])
        count = sum(parameters[name].numel() for name in names)
        steps = {n: values[name].steps for name in names for n in names_of[name]}
        how = "; ".join(dict.fromkeys(step for value in parts for step in value.steps))
        rows.append(Row(_status(parts), worst(v.kind for v in parts), targets, sources, how, count, steps))
    taken = {s for value in values.values() for s in value.sources}
    by_source = {s: name for name, value in reversed(source.tensors.items()) for s in value.sources}
    for name, info in source.info.items():
        if name not in taken:
            why, kind = change.why.get(name) or _no_place(model, by_source.get(name, name))
            constant = why.startswith("a constant")
            rows.append(Row("unused", kind, (), (name,), why, info.numel, {}, constant))
    return rows


def _no_place(model: PreTrainedModel, ours: str) -> tuple[str, str]:
    """Why nothing in the model took a tensor."""
    kind = type(model).__name__
    if ours.startswith("bert.pooler."):
        pooling = getattr(model.config, "pooling", "pooler")
        if pooling == "pooler":
            return f"{kind} has no pooler", "exact"
        return f"{kind} has pooling={pooling!r}", "approximate"
    if _PARTS.match(ours) is not None:
        return f"{kind} has another head", "exact"
    return f"{kind} has no {'.'.join(ours.split('.')[-2:])}", "approximate"


def _status(parts: list[Value]) -> str:
    if not any(value.sources for value in parts):
        return "new"
    if any(value.resized for value in parts):
        return "resized"
    return "transformed" if any(step for value in parts for step in value.steps) else "loaded"

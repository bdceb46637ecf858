"""Plan a warm start: what each parameter is computed from, and the rows of the report."""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoints import Checkpoint, CheckpointError, TensorInfo
from .conversion import Change
from .key_mapping import PREFIXES, is_chosen, kind_of
from .lazy_tensor import Value, Why, constant, is_finite, worst
from .report import Row, WarmStartReport
from .sources import Source
from .transforms import TRANSFORMS, tie, unequal_settings

_HEADS = re.compile(r"^(lm_head|score|classifier|qa_outputs|cls)\.")


@dataclass
class Plan:
    """A value for each parameter, and the report's rows."""

    model: PreTrainedModel  # its parameters may be on the meta device
    source: Source
    values: dict[str, Value]  # by the target's names; of tied ones the first
    tied: dict[str, tuple[str, ...]]  # each of these names → all names of the parameter
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    loaded: int = 0  # number of the source's elements that are used
    offered: int = 0  # number of its elements that are weights and were not excluded by the caller

    def report(self) -> WarmStartReport:
        notes = list(dict.fromkeys([*self.source.assumed, *self.notes]))
        total = sum(info.numel for info in self.source.info.values())
        name = type(self.model).__name__
        return WarmStartReport(self.source.where, name, self.rows, notes, source_parameters=total)

    def checkpoint(self, dtype: torch.dtype) -> Checkpoint:
        """The plan as a checkpoint of the target in `dtype`, each tensor computed when it is read."""
        buffers = {name: b for name, b in self.model.state_dict().items() if name in dict(self.model.named_buffers())}
        info = {name: TensorInfo(value.shape, dtype, "") for name, value in self.values.items()}
        info |= {name: TensorInfo(tuple(buffer.shape), buffer.dtype, "") for name, buffer in buffers.items()}
        path: Any = self.source.where

        def read(name: str) -> torch.Tensor:
            return buffers[name] if name in buffers else self.compute(name, dtype)

        return Checkpoint(path, "warm start", info, read)

    def compute(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The new value of a parameter.

        Raises:
            CheckpointError: it is NaN or infinite, or cannot be computed.
        """
        value = self.values[name]
        try:
            tensor = value.compute().to(dtype).contiguous()
        except (CheckpointError, MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            made_of = f" from {', '.join(map(repr, value.sources))}" if value.sources else ""
            raise CheckpointError(f"{self.source.where}: {name!r} cannot be computed{made_of}: {error}") from error
        if value.sources and not is_finite(tensor):
            names = " and ".join(map(repr, value.sources))
            raise CheckpointError(
                f"{self.source.where}: {names} has NaN or infinite values in {dtype}, as {name}: use a checkpoint from "
                "before the training diverged, or leave it out with warm_start's skip="
            )
        return tensor


def make_plan(
    model: PreTrainedModel,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    transform: bool = True,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    keep_new: bool = False,
    **options: Any,
) -> Plan:
    """Decide what each parameter of `model` is computed from.

    Args:
        model: the target; its parameters may be on the meta device.
        source: the opened source.
        dtype: dtype of the values; None: each parameter's own.
        transform: apply all transforms; otherwise tensors are only renamed, split and transposed.
        skip, only: regexes over the names of parameters and tensors, see `warm_start`.
        keep_new: parameters without a source keep their values, instead of being initialised.
        options: fields of `Change`.

    Raises:
        CheckpointError: the two have nothing in common, or a quantised tensor would be needed.
    """
    unwanted, wanted = compiled("skip", skip), compiled("only", only)
    tied = tied_names(model)
    prefix = "" if type(model).base_model_prefix in dict(model.named_children()) else PREFIXES[kind_of(model.config)]
    ours = {prefix + name: names[0] for names in tied.values() for name in names}  # our name → the parameter's
    if source.tensors and source.config.hidden_size != model.config.hidden_size:
        raise CheckpointError(
            f"{source.where} has hidden_size={source.config.hidden_size}, the target {model.config.hidden_size}: the "
            "width of a model cannot be changed; set hidden_size to the source's"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def fresh(name: str) -> Value:
        return _initial_value(model, ours[name], parameters[ours[name]], keep_new)

    if any(parameter.is_meta for parameter in model.parameters()) and keep_new:
        raise CheckpointError(
            f"the {type(model).__name__} has parameters without data (meta device, or offloaded): load it first"
        )
    options["pools"] = getattr(model.base_model, "pooler", None) is not None
    change = Change(dict(source.tensors), source.config, model.config, set(ours), fresh, dict(source.why), **options)
    for step in TRANSFORMS if transform else (tie, unequal_settings):
        step(change)
    values: dict[str, Value] = {}
    refused: dict[str, str] = {}  # parameter → why its tensor of the source is not used
    for name, own in ours.items():
        value, shape = change.tensors.get(name), tuple(parameters[own].shape)
        if value is None:
            continue
        if value.shape != shape:
            refused[own] = f"the source's shape {_shape_text(value.shape)} is not {_shape_text(shape)}"
        elif not is_chosen((own, *value.sources), unwanted, wanted):
            refused[own] = "left out on request"
            change.drop(name, refused[own], requested=True)
            continue
        else:
            check_dtype(source, value)
            values.setdefault(own, rounded(value, dtype or parameters[own].dtype))
            continue
        change.drop(name, refused[own])
    for name, own in ours.items():
        weight = ours.get(re.sub("bias$", "weight", name), "")
        if own in values:
            continue
        if own in refused:
            values[own] = fresh(name).then(refused[own], lambda tensor: tensor)
        elif (
            name.endswith(".bias")
            and weight in values
            and values[weight].sources
            and not _has_in_another_layer(source, name)
        ):
            like = values[weight]
            values[own] = constant(tuple(parameters[own].shape), 0.0, like, "zeros, as the source has none")
        else:
            values[own] = fresh(name)
    by_source = {s: name for name, value in reversed(source.tensors.items()) for s in value.sources}

    def why_unused(name: str) -> Why:
        return change.why.get(name) or _why_unused(model, by_source.get(name, name))

    all_names = {names[0]: names for names in tied.values()}
    rows = make_rows(values, all_names, {n: p.numel() for n, p in parameters.items()}, source.info, why_unused)
    share = loaded_share(source, change.why, values)
    return Plan(model, source, values, all_names, rows, change.notes, *share)


def loaded_share(source: Source, why_unused: Mapping[str, Why], values: Mapping[str, Value]) -> tuple[int, int]:
    """How many of the source's elements are used, and how many are weights that the caller did not exclude."""
    taken = {name for value in values.values() for name in value.sources}
    left_out = {name for name, why in why_unused.items() if why.constant or why.requested}
    offered = {name: info.numel for name, info in source.info.items() if name in taken or name not in left_out}
    return sum(count for name, count in offered.items() if name in taken), sum(offered.values())


def compiled(option: str, patterns: Sequence[str] | str) -> list[re.Pattern]:
    """The regular expressions of an option, one or several.

    Raises:
        CheckpointError: one is invalid.
    """
    try:
        return [re.compile(pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
    except (re.error, TypeError) as error:
        raise CheckpointError(f"{option}={patterns!r} has an invalid regular expression: {error}") from None


def rounded(value: Value, dtype: torch.dtype) -> Value:
    """The value, marked as approximate if `dtype` is less precise than its source."""
    if not value.dtype.is_floating_point or torch.finfo(dtype).eps <= torch.finfo(value.dtype).eps:
        return value
    return value.then(f"rounded to {str(dtype).removeprefix('torch.')}", lambda tensor: tensor, kind="approximate")


def _has_in_another_layer(source: Source, name: str) -> bool:
    """Whether the source has such a bias elsewhere, so that this one is missing from it and not absent by design."""
    layer = re.compile(r"\b(layers?)\.\d+\.")
    like = layer.sub("", name)
    if name.endswith(("norm.bias", "LayerNorm.bias")) and any(
        n.endswith(("norm.bias", "Norm.bias")) for n in source.tensors
    ):
        return True  # another norm has one
    return any(layer.sub("", other) == like for other in source.tensors)


def _shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def check_dtype(source: Source, value: Value) -> None:
    """Raise a `CheckpointError` if a tensor that a value is computed from is not floating point."""
    for name in value.sources:
        info = source.info.get(name)
        if info is not None and not info.dtype.is_floating_point:
            integer = not info.dtype.is_complex and info.dtype != torch.bool
            why = (
                "the checkpoint is quantised, which is not supported; use one that is not"
                if integer
                else "it is not a weight"
            )
            raise CheckpointError(
                f"{source.where}: tensor {name!r} is {info.dtype_name}, not floating point: {why}, or leave it out with skip="
            )


def _initial_value(model: PreTrainedModel, name: str, parameter: torch.Tensor, keep: bool) -> Value:
    path, _, attribute = name.rpartition(".")
    module, shape = model.get_submodule(path), tuple(parameter.shape)
    if keep:
        return Value(
            shape, parameter.dtype, lambda: parameter.detach(), steps=("kept as the model had it",), kind="new"
        )
    return Value(
        shape, parameter.dtype, partial(_initialised, model, module, attribute), steps=(_describe_initial(model, module, attribute),), kind="new"
    )  # fmt: skip


def _initialised(
    model: PreTrainedModel, module: torch.nn.Module, attribute: str, at_most: int | None = None
) -> torch.Tensor:
    """The initial value of a parameter by `_init_weights`, without changing its module.

    Args:
        at_most: initialise a parameter with at most this size in each dimension.
    """
    alone = copy.copy(module)
    if at_most is not None and hasattr(alone, "padding_idx"):
        alone.padding_idx = None  # type: ignore[assignment]
    alone._parameters = {
        name: torch.nn.Parameter(torch.empty([min(n, at_most or n) for n in p.shape], dtype=torch.float32))
        for name, p in module._parameters.items() if p is not None
    } | {name: None for name, p in module._parameters.items() if p is None}  # fmt: skip
    with torch.no_grad():
        model._init_weights(alone)
    made = alone._parameters[attribute]
    assert made is not None
    return made.detach()


def _describe_initial(model: PreTrainedModel, module: torch.nn.Module, attribute: str) -> str:
    value = _initialised(model, module, attribute, at_most=4)
    low, high = value.aminmax() if value.numel() else (value, value)
    if low == high:
        return {0.0: "zeros", 1.0: "ones"}.get(low.item(), f"{low.item():g}")
    std = model.config.initializer_range
    if getattr(module, "is_residual_projection", False):
        std /= (2 * model.config.num_hidden_layers) ** 0.5
    return f"random, normal with standard deviation {std:.3g}"


def tied_names(model: torch.nn.Module) -> dict[int, tuple[str, ...]]:
    """The names of each parameter, by identity; a tied one has several, the embeddings' first."""
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {key: tuple(names) for key, names in groups.items()}


def make_rows(
    values: Mapping[str, Value],
    tied: Mapping[str, tuple[str, ...]],
    counts: Mapping[str, int],
    info: Mapping[str, TensorInfo],
    why_unused: Callable[[str], Why],
) -> list[Row]:
    """The report's rows; parameters that share tensors of the source, also indirectly, share a row.

    Args:
        values: parameter → its value.
        tied: parameter → all its names.
        counts: parameter → number of elements.
        info: the source's tensors.
        why_unused: the reason why a tensor of the source is not used.
    """
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
    rows = []
    for names in members.values():
        parts = [values[name] for name in names]
        sources = tuple(dict.fromkeys(s for value in parts for s in value.sources))
        targets = tuple(n for name in names for n in tied[name])
        count = sum(counts[name] for name in names)
        steps = {n: values[name].steps for name in names for n in tied[name]}
        how = "; ".join(dict.fromkeys(step for value in parts for step in value.steps))
        rows.append(Row(_status(parts), worst(v.kind for v in parts), targets, sources, how, count, steps))
    taken = {s for value in values.values() for s in value.sources}
    for name, about in info.items():
        if name not in taken:
            why = why_unused(name)
            rows.append(Row("unused", why.kind, (), (name,), why.text, about.numel, {}, why.constant))
    return rows


def _why_unused(model: PreTrainedModel, ours: str) -> Why:
    """Why the model has no parameter for a tensor."""
    kind = type(model).__name__
    if ours.startswith("bert.pooler."):
        pooling = getattr(model.config, "pooling", "pooler")
        if getattr(model.base_model, "pooler", None) is None:
            return Why(f"{kind} has no pooler", "exact")
        return Why(f"{kind} has pooling={pooling!r}")
    head = _HEADS.match(ours)
    if head is not None and not any(
        name.startswith(head[0]) for name, _ in model.named_parameters(remove_duplicate=False)
    ):
        return Why(f"{kind} has another head", "exact")
    return Why(f"{kind} has no {'.'.join(ours.split('.')[-2:])}")


def _status(parts: list[Value]) -> str:
    if not any(value.sources for value in parts):
        return "new"
    if any(value.resized for value in parts):
        return "resized"
    return "transformed" if any(step for value in parts for step in value.steps) else "loaded"

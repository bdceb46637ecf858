"""Run source and target on the same inputs, the only proof of an assignment by structure."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ...checkpoints import CheckpointError
from ...forward_calls import names_argument
from ...messages import first_line
from ..checking import SMALL, Check, evaluating, largest
from ..opening import Opened
from ..reference import load_without_warnings

_OUTPUTS = ("logits", "start_logits", "end_logits", "prediction_logits", "last_hidden_state", "pooler_output")
_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    AssertionError,
    NotImplementedError,
)


@dataclass
class AnyChecker:
    """Compares outputs of a warm start's source and target, for models without a table in `key_mapping`.

    Attributes:
        opened: what was read.
        unproven: the target's parameters of which only a run can say that they are right.
        token_rows: which tokens go together, if the two have other tokenizers.
        unshown: what no tensor shows, and only a run that agrees can.
        until_proven: notes that hold until all of their tensors are proven.
        compared_all: whether the last run compared all that was loaded, and not only the models below their heads.
        proven: those of `unproven` that the last run that agreed depended on.
    """

    opened: Opened
    unproven: set[str]
    token_rows: Any = None
    unshown: str = ""
    until_proven: Mapping[str, set[str]] = field(default_factory=dict)
    proven: set[str] = field(default_factory=set)
    compared_all: bool = True

    def is_small(self, model: torch.nn.Module) -> bool:
        sizes = sum(info.numel for info in self.opened.info.values()), sum(p.numel() for p in model.parameters())
        return max(sizes) <= SMALL

    def run(self, model: torch.nn.Module, new: set[str], inputs: Any = None, *, exact: bool) -> tuple[Check, None]:
        """Compare the outputs; see `Checker.run`. Does not locate the first difference."""
        self.proven = set()
        try:
            if self.token_rows is not None:
                raise CheckpointError("source and target have other tokens")
            reference = self._reference(model)
            given = self._runnable(model, reference) if inputs is None else [_given(inputs)]
            theirs, ours = _same_parts(reference, model, new)
            front = "" if ours is model else f"{model.base_model_prefix}."
            self.compared_all = not front or all(n.startswith(front) or n in new for n, _ in model.named_parameters())
            check = self._compare(theirs, ours, given, torch.float32)
            if not check.agrees:  # repeat in float64, in case of rounding errors
                with contextlib.suppress(*_ERRORS):  # not every kernel takes float64
                    check = self._compare(theirs, ours, given, torch.float64)
            if check.agrees and self.unproven:
                self.proven = self.unproven & {
                    front + name for name in _depended_on(ours, given, set(check.differences))
                }
        except CheckpointError as error:
            return Check(what=str(error)), None
        except _ERRORS as error:  # of any forward
            if inputs is not None:
                raise CheckpointError(
                    f"source and target could not be run on these inputs: {first_line(error, 200)}"
                ) from error
            return Check(
                what=f"running them failed ({first_line(error, 200)}); report.check(inputs) takes others"
            ), None
        return check, None

    def _runnable(self, model: torch.nn.Module, reference: torch.nn.Module) -> list[Any]:
        """Made-up inputs that both take; of a model that does not say it, tokens or numbers, whichever runs."""
        first = made_up(model, reference)
        if isinstance(first[0], dict):
            return first
        with torch.no_grad():
            for inputs in (first, *_other_inputs(model, reference, first)):
                with contextlib.suppress(*_ERRORS), evaluating(reference, torch.float32) as theirs:
                    _call(theirs, inputs[0], torch.float32)
                    return inputs
        return first

    def _reference(self, model: torch.nn.Module) -> torch.nn.Module:
        if self.opened.module is not None:
            return self.opened.module
        raw = self.opened.raw
        name = (raw.get("architectures") or [""])[0]
        model_class = getattr(transformers, name, None)
        folder = self.opened.folder
        if (
            "model_type" not in raw
            or raw.get("auto_map")
            or model_class is None
            or folder is None
            or not folder.is_dir()
        ):
            raise CheckpointError("the source's class is not known, so it cannot be run: pass the model itself")
        fields = {key: value for key, value in raw.items() if key not in ("model_type", "architectures")}
        config = transformers.AutoConfig.for_model(raw["model_type"], **fields)
        floating = [n for n, info in self.opened.info.items() if info.dtype.is_floating_point]
        loaded, missing = load_without_warnings(
            model_class, config, {n: self.opened.tensors[n].float() for n in floating}
        )
        if missing:
            raise CheckpointError(f"the source has no {missing[0]}, which transformers' {name} has")
        return loaded

    def _compare(self, reference: Any, model: Any, batches: list[Any], dtype: torch.dtype) -> Check:
        differences: dict[str, float] = {}
        scales: dict[str, float] = {}
        with torch.no_grad(), evaluating(reference, dtype) as theirs, evaluating(model, dtype) as ours:
            for batch in batches:
                for name, (mine, other) in _outputs(_call(ours, batch, dtype), _call(theirs, batch, dtype)).items():
                    if name == "logits" and mine.shape[:-1] == other.shape[:-1] and mine.shape[-1] != other.shape[-1]:
                        both = min(mine.shape[-1], other.shape[-1])  # tokens of both vocabularies
                        mine, other = mine[..., :both], other[..., :both]
                    if mine.shape != other.shape:
                        raise CheckpointError(
                            f"{name} of source and target have the shapes {tuple(other.shape)} and {tuple(mine.shape)}"
                        )
                    scales[name] = max(scales.get(name, 0.0), largest(other))
                    differences[name] = max(differences.get(name, 0.0), largest(mine.double() - other.double()))
        if not differences:
            raise CheckpointError("source and target have no output in common")
        kind = str(dtype).removeprefix("torch.")
        what = f"{type(reference).__name__} and {type(model).__name__} in {kind}, on {_rows(batches)} rows without padding,"
        return Check(differences, scales, what=what)


def _rows(batches: list[Any]) -> int:
    return sum(len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0]) for batch in batches)


def _same_parts(reference: Any, model: Any, new: set[str]) -> tuple[Any, Any]:
    """Both models, or both without their heads if these differ in kind or are new."""
    if not (isinstance(reference, PreTrainedModel) and isinstance(model, PreTrainedModel)):
        return reference, model
    heads = [_head(side) for side in (reference, model)]
    front = f"{model.base_model_prefix}."
    new_head = bool(heads[1]) and any(not name.startswith(front) for name in new)
    if heads[0] != heads[1] or new_head:
        return reference.base_model, model.base_model
    return reference, model


def _head(model: PreTrainedModel) -> str:
    name = type(model).__name__
    if model.base_model is model:
        return ""
    return "CausalLM" if name.endswith("LMHeadModel") else name.partition("For")[2] or name


def _given(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: torch.as_tensor(value) for name, value in inputs.items() if name != "labels"}
    if isinstance(inputs, torch.Tensor):
        return (inputs,)
    if isinstance(inputs, (tuple, list)) and inputs:
        return tuple(torch.as_tensor(value) for value in inputs)
    raise CheckpointError("inputs= is a dict of tensors, as a tokenizer returns it, or what the models' forward takes")


def made_up(model: torch.nn.Module, reference: torch.nn.Module) -> list[Any]:
    """Inputs that both take: tokens that both have, else numbers as wide as the first layer."""
    made = torch.Generator().manual_seed(0)
    first = next((m for m in model.modules() if next(m.parameters(recurse=False), None) is not None), None)
    if isinstance(model, PreTrainedModel) or isinstance(first, torch.nn.Embedding):
        tables = [_vocabulary(side) for side in (model, reference)]
        if None in tables:
            raise CheckpointError("no inputs can be generated for these models: call report.check(inputs)")
        size = min(table for table in tables if table is not None)
        lengths = [
            getattr(getattr(side, "config", None), "max_position_embeddings", 16) or 16 for side in (model, reference)
        ]
        length = max(min(*lengths, 24) - 2, 1)
        pads = {getattr(getattr(side, "config", None), "pad_token_id", None) for side in (model, reference)} - {None}
        usable = torch.tensor([i for i in range(min(size, 50_000)) if i not in pads] or [0])
        ids = usable[torch.randint(len(usable), (3, length), generator=made)]
        if all(names_argument(side, "input_ids") for side in (model, reference)):
            made_up = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids.flip(1)}
            taken = [name for name in made_up if all(names_argument(side, name) for side in (model, reference))]
            return [{name: made_up[name] for name in taken}]
        return [(ids,)]
    if type(first).__name__ == "Conv1D":  # transformers' linear layer, stored [in, out]
        return [(torch.randn(4, next(p.shape[0] for p in first.parameters() if p.ndim == 2), generator=made),)]  # type: ignore[union-attr]
    if isinstance(first, torch.nn.Linear):
        return [
            (torch.randn(4, first.in_features, generator=made),),
            (torch.randn(2, 5, first.in_features, generator=made),),
        ][:1]
    if isinstance(first, torch.nn.Conv2d):
        return [(torch.randn(2, first.in_channels, 32, 32, generator=made),)]
    raise CheckpointError("no inputs can be generated for these models: call report.check(inputs)")


def _other_inputs(model: torch.nn.Module, reference: torch.nn.Module, first: list[Any]) -> list[list[Any]]:
    """Tokens for models whose first module takes numbers but which have embeddings behind it, such as a tied head's."""
    tables = [_vocabulary(side) for side in (model, reference)]
    if not first[0][0].is_floating_point() or None in tables:
        return []
    size = min(table for table in tables if table is not None)
    return [[(torch.randint(size, (3, 8), generator=torch.Generator().manual_seed(0)),)]]


def _vocabulary(model: torch.nn.Module) -> int | None:
    table = next((m for m in model.modules() if isinstance(m, torch.nn.Embedding)), None)
    if isinstance(model, PreTrainedModel):
        found = model.get_input_embeddings()
        table = found if isinstance(found, torch.nn.Embedding) else table
    return None if table is None else table.num_embeddings


def _call(model: torch.nn.Module, batch: Any, dtype: torch.dtype) -> Any:
    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    if isinstance(batch, dict):
        return model(**{name: cast(tensor) for name, tensor in batch.items()})
    return model(*(cast(tensor) for tensor in batch))


def _named(output: Any) -> dict[str, torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        found = {name: output[name] for name in _OUTPUTS if isinstance(output.get(name), torch.Tensor)}
        return found or {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    if isinstance(output, (tuple, list)):
        tensors = [value for value in output if isinstance(value, torch.Tensor) and value.ndim > 1]
        return {"output": tensors[0]} if tensors else {}
    return {}


def _outputs(ours: Any, theirs: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The outputs of both models by name; the first element of a tuple is compared with the other's first output."""
    mine, other = _named(ours), _named(theirs)
    shared = {name: (mine[name], other[name]) for name in mine if name in other}
    if not shared and mine and other and ("output" in mine or "output" in other):
        shared = {"output": (next(iter(mine.values())), next(iter(other.values())))}
    return shared


def _depended_on(model: torch.nn.Module, batches: list[Any], compared: set[str]) -> set[str]:
    """The parameters that affect the compared outputs on these inputs."""
    found: set[str] = set()
    with torch.enable_grad(), evaluating(model, torch.float64) as ours:
        copies = dict(ours.named_parameters(remove_duplicate=False))
        floating = {name: p for name, p in copies.items() if p.is_floating_point()}
        before = {name: p.requires_grad for name, p in floating.items()}
        try:
            for parameter in floating.values():
                parameter.requires_grad_(True)
            for batch in batches:
                named = _named(_call(ours, batch, torch.float64))
                named = {n: t for n, t in named.items() if n in compared} or dict(list(named.items())[:1])
                outputs = [t for t in named.values() if t.requires_grad]
                weights = torch.Generator().manual_seed(1)
                total = sum((t * torch.randn(t.shape, generator=weights, dtype=t.dtype)).sum() for t in outputs)
                if not isinstance(total, torch.Tensor):
                    continue
                names = list(floating)
                grads = torch.autograd.grad(total, [floating[n] for n in names], allow_unused=True)
                found |= {name for name, grad in zip(names, grads) if grad is not None and bool(grad.any())}
        finally:
            for name, parameter in floating.items():
                parameter.requires_grad_(before[name])
    return found

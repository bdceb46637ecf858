"""Run source and target on the same inputs and compare their outputs, to verify the report's `exact`."""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoints import CheckpointError
from ..messages import first_line
from .reference import make_reference
from .sources import Source

SMALL = 50_000_000  # `warm_start` runs the check itself for models of up to this many parameters
_TOLERANCE = 2e-5  # relative to an output's largest value; above float32 rounding in deep models
_OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
_TOKENS = 1_000_000_000  # limit of parameters × tokens in a generated row
_CELLS = 10_000_000  # limit of tokens × vocabulary size in a generated row


@dataclass(frozen=True)
class Check:
    """The result of running source and target on the same inputs.

    Attributes:
        differences: output → largest absolute difference; empty if the check did not run.
        scales: output → largest absolute value of the source's output.
        tolerance: the relative difference up to which outputs count as equal.
        what: what was run, or why the check did not run.
    """

    differences: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    tolerance: float = _TOLERANCE
    what: str = ""

    @property
    def ran(self) -> bool:
        return bool(self.differences)

    @property
    def agrees(self) -> bool:
        """Whether the check ran and all outputs are equal up to rounding."""
        return self.ran and all(d <= self.tolerance * self.scales[name] for name, d in self.differences.items())

    @property
    def difference(self) -> float | None:
        """The largest difference of all outputs; None if the check did not run."""
        return max(self.differences.values(), default=None)

    def to_dict(self) -> dict[str, Any]:
        return {"ran": self.ran, "agrees": self.agrees, "differences": self.differences, "what": self.what}

    def __str__(self) -> str:
        if not self.ran:
            return f"not run: {self.what}"
        shown = ", ".join(f"{n} by {d:.2g} (values up to {self.scales[n]:.2g})" for n, d in self.differences.items())
        return f"{self.what} differ at most in {shown}"


@dataclass
class Checker:
    """Runs a warm start's source and its target.

    Attributes:
        source: the opened source.
        token_rows: for each token of the target, the source's tokens it is made of; None: the same ids.
        unproven, proven, unshown, until_proven, compared_all: empty here, as the tables of names determine every parameter; see
            `any_model.running.AnyChecker`.
    """

    source: Source
    token_rows: Sequence[Sequence[int]] | None
    unproven: frozenset[str] = frozenset()
    proven: frozenset[str] = frozenset()
    unshown: str = ""
    until_proven: Mapping[str, set[str]] = field(default_factory=dict)
    compared_all: bool = True

    def is_small(self, model: PreTrainedModel) -> bool:
        sizes = sum(info.numel for info in self.source.info.values()), model.num_parameters()
        return max(sizes) <= SMALL

    def run(
        self, model: PreTrainedModel, new: set[str], inputs: Any = None, *, exact: bool
    ) -> "tuple[Check, int | None]":
        """Run both models and compare their outputs.

        Args:
            model: the target.
            new: its parameters that are newly initialised.
            inputs: see `WarmStartReport.check`.
            exact: whether the outputs should be equal; then a difference is checked again in float64.

        Returns:
            the check, and where the difference begins: 0 for the embeddings, `i` for layer `i - 1`, None if that was
            not found.
        """
        given = None if inputs is None else [self._given_batch(inputs)]
        try:
            outputs = _comparable(model, new)
            reference = make_reference(self.source, type(model), head=outputs[0] != "last_hidden_state")
            batches = self._batches(model, reference) if given is None else given
            check, where = self._compare(reference, model, batches, outputs, torch.float32, made_up=inputs is None)
            if exact and not check.agrees:  # the difference may be rounding
                check, where = self._compare(reference, model, batches, outputs, torch.float64, made_up=inputs is None)
        except CheckpointError as error:
            return Check(what=str(error)), None
        except (
            RuntimeError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            IndexError,
        ) as error:  # from any model's forward
            if inputs is not None:
                raise CheckpointError(f"source and target could not be run on these inputs: {error}") from error
            return Check(what=f"running them failed ({first_line(error, 200)})"), None
        return check, where

    def _compare(
        self,
        reference: PreTrainedModel,
        model: PreTrainedModel,
        batches: list[Any],
        outputs: Sequence[str],
        dtype: torch.dtype,
        *,
        made_up: bool,
    ) -> "tuple[Check, int | None]":
        differences: dict[str, float] = {}
        scales: dict[str, float] = {}
        where: list[int] = []
        with torch.no_grad(), evaluating(reference, dtype) as theirs, evaluating(model, dtype) as ours:
            for mine, stock in batches:
                a, b = (_run(m, batch, outputs) for m, batch in ((ours, mine), (theirs, stock)))
                for name in outputs:
                    if a.get(name) is None or b.get(name) is None:
                        continue
                    x, y = self._comparable_parts(model, name, a[name], b[name], mine)
                    scales[name] = max(scales.get(name, 0.0), y.abs().max().item())
                    differences[name] = max(differences.get(name, 0.0), largest(x - y))
                where += _first_difference(a.get("hidden_states"), b.get("hidden_states"), mine)
        if not differences:
            raise CheckpointError("source and target have no output in common")
        lengths = [mine["input_ids"].shape[1] for mine, _ in batches]
        rows = sum(len(mine["input_ids"]) for mine, _ in batches)
        name = str(getattr(reference, "described", type(reference).__name__))
        kind = str(dtype).removeprefix("torch.")
        what = f"{name} and {type(model).__name__} in {kind}, on {rows} rows of up to {max(lengths)} tokens"
        padded = any(not mine["attention_mask"].all() for mine, _ in batches)
        what += f", padded {self._padding_sides()}," if made_up and padded else ","
        return Check(differences, scales, what=what), min(where, default=None)

    def _padding_sides(self) -> str:
        if self.source.family.positions_after_padding:
            return "on the right (RoBERTa numbers rows that are padded on the left otherwise)"
        return "on the right and on the left"

    def _pairs(self, model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that both have: their ids in the target, and in the source."""
        ours, theirs = model.config.vocab_size, self.source.config.vocab_size
        if self.token_rows is None:
            both = torch.arange(min(ours, theirs))
            return both, both
        kept = [(i, rows[0]) for i, rows in enumerate(self.token_rows[:ours]) if len(rows) == 1]
        if not kept:
            raise CheckpointError("source and target have no token in common")
        return tuple(torch.tensor(kept).T)  # type: ignore[return-value]

    def _comparable_parts(
        self,
        model: PreTrainedModel,
        name: str,
        ours: torch.Tensor,
        theirs: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The comparable parts of two outputs: positions that are not padding, and logits of tokens that both have."""
        shown = batch["attention_mask"].bool()
        if ours.shape[:2] == shown.shape and name != "pooler_output":
            ours, theirs = ours[shown], theirs[shown]
        if name == "logits" and type(model).__name__.endswith(("ForCausalLM", "ForMaskedLM")):
            mine, other = self._pairs(model)
            ours, theirs = ours[..., mine], theirs[..., other]
        if ours.shape != theirs.shape:
            raise CheckpointError(
                f"{name} of source and target have the shapes {tuple(theirs.shape)} and {tuple(ours.shape)}"
            )
        return ours.double(), theirs.double()

    def _given_batch(self, inputs: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
            raise CheckpointError("inputs= needs input_ids, such as a tokenizer returns with return_tensors='pt'")
        batch = {name: torch.as_tensor(value) for name, value in inputs.items() if name != "labels"}
        if batch["input_ids"].dim() != 2 or not batch["input_ids"].numel():
            shape = tuple(batch["input_ids"].shape)
            raise CheckpointError(f"the input_ids of inputs= are [batch, tokens], but these have the shape {shape}")
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        if self.token_rows is None:
            return batch, batch
        ids = batch["input_ids"]
        rows = [self.token_rows[i] if i < len(self.token_rows) else [] for i in ids.flatten().tolist()]
        shown = batch["attention_mask"].flatten().tolist()
        if any(len(row) != 1 for row, seen in zip(rows, shown) if seen):
            raise CheckpointError("inputs= has tokens that the source does not have: leave them out")
        theirs = torch.tensor([row[0] if len(row) == 1 else 0 for row in rows]).view_as(ids)
        return batch, {**batch, "input_ids": theirs}

    def _batches(self, model: PreTrainedModel, reference: PreTrainedModel) -> list[Any]:
        """Generated inputs for target and source: rows of several lengths, padded on the right and on the left."""
        own, other = model.config, self.source.config
        mine, theirs = self._pairs(model)
        pads = [getattr(c, "pad_token_id", None) or 0 for c in (own, reference.config)]
        usable = (mine != pads[0]) & (theirs != pads[1])
        if not bool(usable.any()):
            raise CheckpointError("source and target have no token in common but padding")
        mine, theirs = mine[usable], theirs[usable]
        most = min(own.max_position_embeddings, other.max_position_embeddings, 1024)
        most = min(
            most,
            max(32, _TOKENS // max(model.num_parameters(), 1)),
            max(32, _CELLS // max(own.vocab_size, other.vocab_size)),
        )
        lengths = [most, max(most * 2 // 3, 1), max(most // 3, 1)]
        made = torch.Generator().manual_seed(0)
        picked = torch.randint(len(mine), (len(lengths), most), generator=made)
        batches = []
        sides = ["right"] if self.source.family.positions_after_padding else ["right", "left"]
        for side in sides:
            index = torch.arange(most).expand(len(lengths), most)
            length = torch.tensor(lengths)[:, None]
            shown = index < length if side == "right" else index >= most - length
            both: list[dict[str, torch.Tensor]] = [
                {"input_ids": ids[picked].where(shown, torch.tensor(pad)), "attention_mask": shown.long()}
                for ids, pad in ((mine, pads[0]), (theirs, pads[1]))
            ]
            types = min(getattr(own, "type_vocab_size", 0), getattr(reference.config, "type_vocab_size", 0))
            if types > 1:
                segments = torch.randint(types, picked.shape, generator=made) * shown
                for batch in both:
                    batch["token_type_ids"] = segments
            batches.append(tuple(both))
        one_by_one = type(model).__name__ == "MyGPT2ForSequenceClassification" and None in (
            own.pad_token_id,
            getattr(reference.config, "pad_token_id", 0),
        )
        if one_by_one:  # such a classifier needs a padding token for more than one row
            return [
                tuple({name: t[i : i + 1, :n] for name, t in b.items()} for b in batches[0])
                for i, n in enumerate(lengths)
            ]
        return batches


def _comparable(model: PreTrainedModel, new: set[str]) -> tuple[str, ...]:
    """The outputs that do not depend on newly initialised parameters.

    Raises:
        CheckpointError: there are none.
    """
    base = dict(model.named_children()).get(model.base_model_prefix)
    prefix = f"{model.base_model_prefix}." if base is not None else ""
    pooler = {name for name in new if name.startswith(f"{prefix}pooler.")}
    head = {name for name in new if not name.startswith(prefix)}
    if body := new - pooler - head:
        raise CheckpointError(
            f"{len(body)} parameters are newly initialised, such as {min(body)}, so there is nothing to compare"
        )
    pools = type(model).__name__.endswith("ForSequenceClassification")
    if base is not None and not head and not (pools and pooler):
        return ("logits", "start_logits", "end_logits")
    return ("last_hidden_state",) if pooler else ("last_hidden_state", "pooler_output")


def _run(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], outputs: Sequence[str]) -> Any:
    if outputs[0] == "last_hidden_state":
        model = model.base_model  # type: ignore[assignment]
    return model(**batch, output_hidden_states=True, return_dict=True)


def largest(difference: torch.Tensor) -> float:
    """The largest absolute value; infinity if there is a NaN, 0 if it is empty."""
    found = difference.abs().max().item() if difference.numel() else 0.0
    return math.inf if math.isnan(found) else found


def _first_difference(ours: Any, theirs: Any, batch: Mapping[str, torch.Tensor]) -> list[int]:
    """The index of the first hidden state that differs; one past the last if none does; empty if not comparable."""
    if not ours or not theirs or len(ours) != len(theirs):
        return []
    shown = batch["attention_mask"].bool()
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a.shape != b.shape:
            return []
        a, b = a[shown].double(), b[shown].double()
        if largest(a - b) > _TOLERANCE * b.abs().max().item():
            return [i]
    return [len(ours)]


@contextlib.contextmanager
def evaluating(model: Any, dtype: torch.dtype) -> Iterator[Any]:
    """The model in eval mode, on the CPU in `dtype`: the model itself if it is there already, else a copy."""
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    if any(tensor.is_meta for tensor in tensors):
        raise CheckpointError(f"the {type(model).__name__} has parameters without data")
    if any(tensor.device.type != "cpu" or tensor.dtype != dtype for tensor in tensors):
        model = copy.deepcopy(model).to(device="cpu", dtype=dtype)  # type: ignore[call-arg]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode

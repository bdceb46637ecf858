"""Make a `Plan` for any source and target: describe both, run the matchers, initialise the rest."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PretrainedConfig

from ...checkpoints import Checkpoint, CheckpointError
from ..conversion import same
from ..key_mapping import is_chosen, plain
from ..lazy_tensor import Value, Why, constant
from ..opening import Opened, read_tensor
from ..planning import Plan, check_dtype, compiled, loaded_share, make_rows, rounded
from ..report import AMBIGUOUS, short_names
from ..sources import Source
from .by_role import by_role
from .factors import by_factors
from .matching import Matching, by_name, by_new_name, by_prefix
from .placing import Ambiguity
from .sides import (
    Side,
    Tensor,
    holders,
    joined_pairs,
    made_by,
    names_in_order,
    norm_like,
    own_tensors,
    pairs_of,
    refuse_meta,
    second_names,
    settings_of,
)
from .structure import by_structure

_META_LLAMA = re.compile(r"(?:^|\.)layers\.\d+\.attention\.wq\.weight$")  # Meta's Llama checkpoints
MATCHERS = (by_new_name, by_role, by_name, by_prefix, by_factors, by_structure)


def describe_target(model: torch.nn.Module) -> Side:
    """The target as a side; tied tensors have their first name."""
    refuse_meta(model)
    config = getattr(model, "config", None)
    config = config if isinstance(config, PretrainedConfig) else None
    held, tensors = holders(model), {}
    for name, tensor in own_tensors(model).items():
        own = partial(torch.Tensor.detach, tensor)
        value = Value(tuple(tensor.shape), tensor.dtype, own, steps=("kept as the model had it",), kind="new")
        tensors[name] = Tensor(value, *held.get(name, ("", "")))
    return Side(tensors, config, type(model).__name__, True, settings_of(config, model), module=model)


def describe_source(opened: Opened, rename: Mapping[str, str]) -> tuple[Side, dict[str, Why]]:
    """The source as a side with `rename` applied, and its tensors that are not weights.

    Raises:
        CheckpointError: `rename` is not a valid regular expression, or gives two tensors the same name.
    """
    module, raw, empty = opened.module, opened.raw, None
    config = getattr(module, "config", None) if module is not None else None
    if isinstance(config, PretrainedConfig):
        known, kind = holders(module), type(module).__name__  # type: ignore[arg-type]
    elif module is not None:
        config, known, kind = None, holders(module), type(module).__name__
    else:
        config, known, empty = made_by(raw)
        kind = "" if empty is None else type(empty).__name__
    tensors: dict[str, Tensor] = {}
    why: dict[str, Why] = {}
    seen_as: dict[str, str] = {}
    for name, info in opened.info.items():
        seen = plain(name) if name.count("/") == 0 else name
        for pattern, replacement in rename.items():
            try:
                seen = re.sub(pattern, replacement, seen)
            except (re.error, IndexError) as error:
                raise CheckpointError(
                    f"rename={{{pattern!r}: {replacement!r}}} is not a regular expression: {error}"
                ) from None
        if seen in seen_as:
            raise CheckpointError(
                f"{opened.where}: {seen_as[seen]!r} and {name!r} are both {seen!r} once wrappers are taken off and rename= "
                "is applied: name one with section=, rename the other or leave it out with skip="
            )
        seen_as[seen] = name
        if info.dtype == torch.bool or re.search(r"(^|\.)(position_ids|token_type_ids|masked_bias|inv_freq)$", seen):
            why[name] = Why("a constant that the model computes itself", "exact", constant=True)
            continue
        renamed = seen != plain(name)
        holder = known.get(name, known.get(plain(name), ("", ""))) if not renamed else ("", "")
        value = Value(info.shape, info.dtype, partial(read_tensor, opened.tensors, name), (name,))
        tensors[seen] = Tensor(value, *holder, renamed)
    names = list(tensors)
    ordered = module is not None or (not isinstance(opened.tensors, Checkpoint) and names != sorted(names))
    shown = module if module is not None else empty
    settings = settings_of(config, shown) if config is not None or shown is not None else _settings_beside(raw)
    if shown is None and any(_META_LLAMA.search(name) for name in tensors):
        settings["rotary_pairs"] = "interleaved"
    seconds = second_names(opened.tensors)
    aliases = {seen: seconds[name] for seen, name in seen_as.items() if name in seconds}
    return Side(tensors, config, kind, ordered, settings, aliases, module), why


def _settings_beside(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Head settings from a config of unknown class."""
    if not raw:
        return {}
    return settings_of(
        SimpleNamespace(**{"model_type": "", **{k: v for k, v in raw.items() if k.isidentifier()}}), None
    )


def plan_any(
    model: torch.nn.Module,
    opened: Opened,
    *,
    rename: Mapping[str, str],
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    made_here: bool = False,
    **options: Any,
) -> tuple[Plan, set[str], dict[str, set[str]]]:
    """Decide what each tensor of `model` is made of; its own values stay where nothing is loaded.

    Args:
        made_here: whether the model was built from a config for this warm start.
        options: fields of `Change`.

    Returns:
        the plan; the tensors whose placement only a run can prove; and notes that hold until all of their tensors are
        proven.

    Raises:
        CheckpointError: the widths differ, a quantised tensor would be needed, or an option is invalid.
    """
    if not opened.info and options["vectors"] is None:
        raise CheckpointError(f"{opened.where} has no tensors, so there is nothing to load")
    unwanted, wanted = compiled("skip", skip), compiled("only", only)
    target = describe_target(model)
    source, why = describe_source(opened, rename)
    source.tensors = {n: t for n, t in source.tensors.items() if not _left_out(t, n, unwanted, wanted, why)}
    pairs = _common_pairs(source, target)
    tied = {names[0]: names for names in names_in_order(model).values()}
    _check_width(source, target, opened.where)
    matching = Matching(source, target, options, why=why)
    for matcher in MATCHERS:
        matcher(matching)
    matching.ambiguous += [d for d in matching.doubles if not matching.used & set(d.candidates)]
    values = _values(matching, tied, unwanted, wanted, opened)
    values, unproven = pairs.restored(values, matching.unproven)
    for name in list(tied):
        values.setdefault(name, target.tensors[name].value) if name in target.tensors else None
    if made_here:
        values = {n: _as_made(value) for n, value in values.items()}
    tensors = own_tensors(model)
    names = {name: tied.get(name, (name,)) for name in values}
    if matching.squares:
        shown = ", ".join(map(repr, matching.squares[:3])) + (" and others" if len(matching.squares) > 3 else "")
        matching.notes.append(
            f"nothing shows how the square matrices {shown} are stored: they are taken as nn.Linear has them, [out, in]; a "
            "model or a config as the source, or rename= to a name that ends in .kernel for [in, out], settles it"
        )
    described = [(_described(found), found.placed, own) for found, own in _collapsed(matching.ambiguous)]
    notes = [*matching.notes, *_assumed(matching), *(note for note, *_ in described)]
    used = _as_source(opened, source, matching)
    rows = make_rows(
        values,
        names,
        {n: tensors[n].numel() for n in values},
        opened.info,
        partial(_why_unused, matching, model, opened),
    )
    share = loaded_share(used, matching.why, values)
    plan: Any = Plan(model, used, values, names, rows, notes, *share)  # type: ignore[arg-type]
    until_proven = {
        note: {n for name in own for n in names.get(name, (name,))} for note, placed, own in described if placed
    }
    return plan, {n for name in unproven for n in names.get(name, (name,))}, until_proven


def _left_out(tensor: Tensor, name: str, skip: list[re.Pattern], only: list[re.Pattern], why: dict[str, Why]) -> bool:
    if not any(pattern.search(n) for pattern in skip for n in (name, *tensor.value.sources)):
        return False
    for own in tensor.value.sources:
        why[own] = Why("left out on request", requested=True)
    return True


def _values(
    matching: Matching,
    tied: Mapping[str, tuple[str, ...]],
    skip: list[re.Pattern],
    only: list[re.Pattern],
    opened: Opened,
) -> dict[str, Value]:
    """A value for every tensor of the target."""
    values: dict[str, Value] = {}
    for name, tensor in matching.target.tensors.items():
        value = matching.values.get(name)
        if value is not None and not is_chosen((*tied.get(name, (name,)), *value.sources), skip, only):
            for own in value.sources:
                matching.why[own] = Why("left out on request", requested=True)
            value = tensor.value.then("left out on request", same)
        if value is not None:
            if tensor.value.dtype.is_floating_point:
                check_dtype(_named(opened), value)
                value = rounded(value, tensor.value.dtype)
            values[name] = value
            continue
        weight = re.sub("bias$", "weight", name)
        placed = matching.values.get(weight)
        if (
            name.endswith(".bias")
            and name != weight
            and placed is not None
            and placed.sources
            and _no_bias(matching, weight)
        ):
            values[name] = constant(tensor.shape, 0.0, tensor.value, "zeros, as the source has none")
        else:
            values[name] = tensor.value
    return values


def _no_bias(matching: Matching, weight: str) -> bool:
    """Whether the source module of a weight has no bias."""
    origin = {
        name
        for name, t in matching.source.tensors.items()
        if set(t.value.sources) & set(matching.values[weight].sources)
    }
    return not any(
        re.sub("(weight|kernel|gamma)$", "bias", name) in matching.source.tensors for name in origin
    ) and bool(origin)


def _named(opened: Opened) -> Any:
    return SimpleNamespace(where=opened.where, info=opened.info)


def _as_made(value: Value) -> Value:
    steps = tuple(step.replace("kept as the model had it", "as the class initialises it") for step in value.steps)
    return Value(
        value.shape, value.dtype, value.compute, value.sources, steps, value.kind, value.resized, value.partly_new
    )


def _why_unused(matching: Matching, model: torch.nn.Module, opened: Opened, name: str) -> Why:
    if name in matching.why:
        return matching.why[name]
    seen = next((n for n, tensor in matching.source.tensors.items() if name in tensor.value.sources), name)
    buffer = dict(model.named_buffers()).get(seen)
    if buffer is not None:
        stored = opened.tensors[name]
        if buffer.shape == stored.shape and torch.equal(buffer, stored.to(buffer)):
            return Why("a buffer that already has these values", "exact", constant=True)
        return Why("a buffer that keeps the target's values")
    kind = matching.target.kind
    if seen in matching.source.aliases:
        return Why(f"{matching.source.aliases[seen]} is the same tensor", "exact", constant=True)
    if any(name in found.names or seen in found.names or seen in found.candidates for found in matching.ambiguous):
        return Why("several target tensors are possible, see the notes")
    if seen in matching.undecided:
        return Why("its place is unknown, see the notes")
    return Why(f"{kind} has no tensor for it")


def _assumed(matching: Matching) -> list[str]:
    """Notes on what is assumed for a source without config or class."""
    source, target = matching.source, matching.target
    if source.kind or source.config is not None:
        return []
    open_settings = [name for name in target.settings if name not in source.settings and name != "position_offset"]
    heads = [
        n for n in ("num_attention_heads", "activation", "norm_eps", "positions", "rope_theta") if n in open_settings
    ]
    if not heads:
        return ["the source has no config and no class: it is assumed to compute what the target does"]
    shown = ", ".join(f"{name} {target.settings[name]!r}" for name in heads)
    return [
        f"the source has no config that says it: {shown} {'are' if len(heads) > 1 else 'is'} assumed; config= settles it"
    ]


def _collapsed(ambiguous: list[Ambiguity]) -> list[tuple[Ambiguity, set[str]]]:
    """Layers that are ambiguous in one way, as one; and the names of all."""
    number = re.compile(r"(?<=[.^])\d+(?=\\?\.)")
    groups: dict[tuple, list[Ambiguity]] = {}
    for found in ambiguous:
        key = (found.placed, *(number.sub("*", text) for text in (*found.rename, *found.candidates, found.why)))
        groups.setdefault(key, []).append(found)
    made = []
    for members in groups.values():
        all_names = {name for found in members for name in found.names}
        if len(members) == 1:
            made.append((members[0], all_names))
            continue
        rename = {}
        for pattern, replacement in members[0].rename.items():
            digits = re.search(r"(?<=\\\.)\d+(?=\\\.)|(?<=\^)\d+(?=\\\.)", pattern)
            digit_out = number.search("." + replacement)
            if digits and digit_out and digits[0] == digit_out[0]:
                pattern = f"{pattern[: digits.start()]}(\\d+){pattern[digits.end() :]}"
                at = digit_out.start() - 1
                replacement = f"{replacement[:at]}\\1{replacement[at + len(digit_out[0]) :]}"
            rename[pattern] = replacement
        names = tuple(short_names([found.names for found in members]).split(", "))
        candidates = tuple(short_names([(c,) for found in members for c in found.candidates]).split(", "))
        why = number.sub("*", members[0].why)
        made.append((Ambiguity(names, why, candidates, rename, members[0].placed), all_names))
    return made


def _described(found: Ambiguity) -> str:
    names = ", ".join(found.names[:4]) + (f" and {len(found.names) - 4} more" if len(found.names) > 4 else "")
    candidates = ", ".join(found.candidates[:8])
    how = found.placed or AMBIGUOUS
    decide = f"; decide with rename={found.rename!r}" if found.rename else ""
    return f"{how}: {names}: {found.why}; candidates: {candidates}{decide}"


def _check_width(source: Side, target: Side, where: str) -> None:
    """Check that both models have the same width.

    Raises:
        CheckpointError: the hidden_size of the configs differs.
    """
    widths = [getattr(side.config, "hidden_size", None) for side in (source, target)]
    if all(isinstance(width, int) for width in widths) and widths[0] != widths[1]:
        raise CheckpointError(
            f"{where} has hidden_size={widths[0]}, the target {widths[1]}: a warm start cannot change the width "
            "of a model; set hidden_size to the source's"
        )


def _as_source(opened: Opened, side: Side, matching: Matching) -> Source:
    tensors = {name: tensor.value for name, tensor in side.tensors.items()}
    nothing: Any = None
    return Source(
        opened.where, opened.folder, opened.info, nothing, side.config or nothing, opened.raw, tensors, matching.why, []
    )


def _norms(weight: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return norm_like(weight.double(), shape).to(weight)


class _Pairs:
    """Weight-norm pairs of the target, which are matched as the weight that they represent."""

    def __init__(self, pairs: dict[str, tuple[str, str]], names: dict[str, str], tensors: dict[str, Tensor]):
        self.pairs, self.names, self.tensors = pairs, names, tensors

    def restored(self, values: dict[str, Value], unproven: set[str]) -> tuple[dict[str, Value], set[str]]:
        """The values under the target's names, with weights converted back to pairs."""
        made: dict[str, Value] = {}
        unsure = set()
        for name, value in values.items():
            if name not in self.pairs:
                own = self.names.get(name, name)
                made[own] = value
                unsure |= {own} if name in unproven else set()
                continue
            length, direction = self.pairs[name]
            for own in (length, direction):
                unsure |= {own} if name in unproven else set()
            shape = self.tensors[length].shape
            if not value.sources:
                made[length], made[direction] = self.tensors[length].value, self.tensors[direction].value
                continue
            made[length] = value.then("its norms, for weight_norm", partial(_norms, shape=shape), shape)
            made[direction] = value
        return made, unsure


def _common_pairs(source: Side, target: Side) -> _Pairs:
    """Convert weight-norm pairs to weights, unless both sides have the pair."""
    original = dict(target.tensors)
    found = [pairs_of(side.tensors) for side in (source, target)]
    for side, pairs in zip((source, target), found):
        side.tensors = {pairs.get(name, name): tensor for name, tensor in side.tensors.items()}
    keep = set(found[0].values()) & set(found[1].values())
    back = {seen: own for own, seen in found[1].items()}
    made: dict[str, tuple[str, str]] = {}
    for name in list(back):
        front = name[: -len("weight_g")]
        if name.endswith("weight_g") and name not in keep:
            made[f"{front}weight"] = (back[name], back[f"{front}weight_v"])
    source.tensors, target.tensors = joined_pairs(source.tensors, keep), joined_pairs(target.tensors, keep)
    return _Pairs(made, back, original)

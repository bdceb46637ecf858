"""A source of weights: its tensors under our names, unfused, and its config as one of our classes."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from ..checkpoints import Checkpoint, CheckpointError, TensorInfo
from .configs import config_mismatch, source_config
from .families import Family
from .key_mapping import Renamed, family_of, inside, is_chosen, plain, position_offset, recognise, translate
from .lazy_tensor import Value, Why, constant
from .opening import Opened, open_tensors, read_tensor

HEAD_AND_EMBEDDINGS = {
    "mygpt2": ("lm_head.weight", "model.embed_tokens.weight"),
    "mybert": ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
}


@dataclass
class Source:
    """A source, of which no data has been read."""

    where: str  # its name in messages
    folder: Path | None  # folder that may hold its tokenizer
    info: dict[str, TensorInfo]  # every tensor, under its own name
    family: Family
    config: PretrainedConfig  # as a config of ours
    raw_config: dict[str, Any]  # its `config.json`
    tensors: dict[str, Value]  # under our names
    why: dict[str, Why]  # its tensors that our model does not have
    assumed: list[str]  # notes on assumptions
    stock: "Stock | None" = None  # what is needed to run it


class Stock(NamedTuple):
    """A source under the names of its original class, to run it."""

    module: torch.nn.Module | None  # the source itself, if it is a model
    names: dict[str, str]  # name in that class → name in the source
    transposed: str  # regex of names whose matrices are stored transposed
    read: Callable[[str], torch.Tensor]  # by the name in the source


def open_source(
    source: Any,
    *,
    target: str,
    config: PretrainedConfig | Mapping[str, Any] | None = None,
    like: PretrainedConfig | None = None,
    section: str | None = None,
    rename: Mapping[str, str] | None = None,
    skip: Sequence[re.Pattern] = (),
    only: Sequence[re.Pattern] = (),
    settled: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Open any source of `warm_start`.

    Args:
        target: our model type whose architecture it must have.
        config: its config, if it has no `config.json`.
        like: the target's config, whose values are assumed for unknown fields.
        skip, only: decide which of two tensors with the same name is used.
        settled: values of unknown fields, see `source_config`.
        trust_remote_code: read a folder with custom code as if its weights had the meaning they have in its family.

    Raises:
        CheckpointError: it cannot be read, is of another architecture, quantised, an adapter, a part of a checkpoint,
            has custom code, or two tensors with the same name.
    """
    opened = open_tensors(
        source, config=config, section=section, allow_pickle=allow_pickle, revision=revision, token=token,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return describe_source(opened, target=target, like=like, rename=rename, skip=skip, only=only, settled=settled)


def describe_source(
    opened: Opened,
    *,
    target: str,
    like: PretrainedConfig | None = None,
    rename: Mapping[str, str] | None = None,
    skip: Sequence[re.Pattern] = (),
    only: Sequence[re.Pattern] = (),
    settled: Mapping[str, Any] | None = None,
) -> Source:
    """What `open_source` returns, for an opened source."""
    source, info, where, folder, module = opened.tensors, opened.info, opened.where, opened.folder, opened.module
    given, beside, usual, own_code = opened.given, opened.beside, opened.usual, opened.own_code
    raw = {**beside, **given}
    if settled and "model_type" not in raw and "pad_token_id" in settled:
        raw = {"pad_token_id": settled["pad_token_id"], **raw}  # RoBERTa's first position depends on it
    named = _rename(source, info, raw, target, rename or {}, where, skip, only)
    notes = []
    if beside and (wrong := config_mismatch(beside, {n: v.shape for n, v in named.ours.items()}, named.family)):
        raw, usual = given, {}
        notes.append(f"the config in the source's file belongs to another model ({wrong}) and is not used")
    head, embeddings = HEAD_AND_EMBEDDINGS[named.family.target]
    if head in named.ours and embeddings not in named.ours and raw.get("tie_word_embeddings") is not False:
        named.ours[embeddings] = named.ours.pop(head)  # tied, and stored under the head's name
    shapes = {name: value.shape for name, value in named.ours.items()}
    if not usual and named.linear and not any(name.endswith("norm.bias") for name in shapes):
        usual = {"activation_function": "gelu"}  # nanoGPT's
    found_config, assumed = source_config(raw, shapes, named.family, like, where, settled=settled, usual=usual)
    assumed += notes
    _tie(source, raw, found_config, named, assumed)
    assumed += _other_heads(named, found_config)
    if own_code:
        name = named.family.name
        assumed.append(
            f"the source is {own_code}: its weights are read as {name}'s, but its own code may use them differently"
        )
    stock = Stock(
        module, named.stock, "(c_attn|c_proj|c_fc)\\.weight$" if named.linear else "$^", partial(read_tensor, source)
    )
    return Source(where, folder, info, named.family, found_config, raw, named.ours, named.why, assumed, stock)


def _other_heads(named: "Named", config: PretrainedConfig) -> list[str]:
    """Notes on how the source's heads differ from MyBert's."""
    notes = []
    if named.own_bias and config.tie_word_embeddings:
        notes.append("the head has two biases that differ: the decoder's is used, as in transformers 5")
    head = "cls.predictions.transform.dense.weight" in named.ours
    if named.family.name == "roberta" and head and config.hidden_act != "gelu":
        act = config.hidden_act
        notes.append(f"RoBERTa's masked-LM head always uses gelu, MyBert's uses hidden_act={act!r}")
    pooler, classifier = (named.ours.get(name) for name in ("bert.pooler.dense.weight", "classifier.weight"))
    if named.family.name != "roberta" or pooler is None or classifier is None:
        return notes
    if pooler.sources[0].endswith("pooler.dense.weight"):  # RoBERTa's own has classifier.dense
        notes.append(f"{classifier.sources[0]} is not RoBERTa's head: its input is assumed to be the pooler's output")
    return notes


def _tie(
    source: Mapping[str, torch.Tensor],
    raw: Mapping[str, Any],
    config: PretrainedConfig,
    named: "Named",
    notes: list[str],
) -> None:
    """Set `tie_word_embeddings` from the config and the stored tensors."""
    head, embeddings = HEAD_AND_EMBEDDINGS[named.family.target]
    declared = raw.get("tie_word_embeddings", True if "model_type" in raw else None)
    stored, shared = named.ours.get(head), named.ours.get(embeddings)
    if stored is None:
        config.tie_word_embeddings = declared is not False
        return
    if shared is None:
        config.tie_word_embeddings = False
        return
    same = stored.shape == shared.shape and (
        _aliases(source, stored, shared) or torch.equal(stored.compute(), shared.compute())
    )
    if declared and not same:
        notes.append(
            f"the source's config ties {stored.sources[0]} to {shared.sources[0]}, but both are stored with different "
            "values: the head is taken as its own matrix, as transformers 5 does (4 drops it)"
        )
    config.tie_word_embeddings = same if declared is None else bool(declared) and same


def _aliases(source: Mapping[str, torch.Tensor], a: Value, b: Value) -> bool:
    """Whether two tensors are recorded as tied, so that they need not be read."""
    if not isinstance(source, Checkpoint) or a.steps or b.steps:
        return False
    first, second = (source.aliases.get(value.sources[0], value.sources[0]) for value in (a, b))
    return first == second


class Named(NamedTuple):
    """A source's tensors under our names."""

    family: Family
    ours: dict[str, Value]
    why: dict[str, Why]
    stock: dict[str, str]  # see `Stock`
    linear: bool  # whether GPT-2's matrices have the layout of nn.Linear
    own_bias: bool  # whether the biases of the head and its decoder differ


def _rename(
    source: Mapping[str, torch.Tensor],
    info: Mapping[str, TensorInfo],
    raw: Mapping[str, Any],
    target: str,
    rename: Mapping[str, str],
    where: str,
    skip: Sequence[re.Pattern],
    only: Sequence[re.Pattern],
) -> Named:
    def left_out(name: str) -> bool:
        return not is_chosen((name,), skip, only)

    names: dict[str, str] = {}  # name for the tables → name in the source
    why: dict[str, Why] = {}
    for name in info:
        seen = plain(name)
        for pattern, replacement in rename.items():
            try:
                seen = re.sub(pattern, replacement, seen)
            except (re.error, IndexError) as error:
                raise CheckpointError(
                    f"rename={{{pattern!r}: {replacement!r}}} is not a valid regular expression: {error}"
                ) from None
        if seen in names and left_out(name) != left_out(names[seen]):
            why[name if left_out(name) else names[seen]] = Why("left out on request", requested=True)
            names[seen] = names[seen] if left_out(name) else name
            continue
        if seen in names:
            raise CheckpointError(
                f"{where}: {names[seen]!r} and {name!r} are both {seen!r} without wrappers and with rename= "
                "applied: name one with section=, rename the other or leave it out with skip="
            )
        names[seen] = name
    model_type = raw.get("model_type")
    family = family_of(model_type)
    if family is None and isinstance(model_type, str) and not rename and raw.get("auto_map") is None:
        raise _wrong_architecture(where, model_type, target)
    if family is not None and family.target != target:
        raise _wrong_architecture(where, family.name, target)
    family, outer = recognise({seen: info[name].shape for seen, name in names.items()}, family, where)
    if family.target != target:
        raise _wrong_architecture(where, family.name, target)
    ours: dict[str, Value] = {}
    # nanoGPT and forks have stock GPT-2's names, but the layout of nn.Linear
    fused = next((info[name].shape for seen, name in names.items() if seen.endswith("attn.c_attn.weight")), ())
    linear = len(fused) == 2 and fused[0] == 3 * fused[1]
    own_bias = _has_own_bias(source, names)
    seen_left_out = {seen for seen, name in names.items() if left_out(name)}
    for seen, renamed in translate(
        names, family, outer, own_bias=own_bias, left_out=seen_left_out.__contains__
    ).items():
        name = names[seen]
        if renamed.why is not None:
            why[name] = renamed.why
            continue
        value = Value(info[name].shape, info[name].dtype, partial(read_tensor, source, name), (name,))
        ours |= _unfuse(name, value, renamed, renamed.transposed and not linear)
    table = "bert.embeddings.position_embeddings.weight"
    if table in ours and (offset := position_offset(family, raw)):
        ours[table] = ours[table].rows("rows before position 0 cut", slice(offset, None))
    for name in family.zeros:
        if name not in ours and "bert.embeddings.word_embeddings.weight" in ours:
            width = ours["bert.embeddings.word_embeddings.weight"].shape[1]
            like = Value((2, width), torch.float32, torch.empty)
            ours[name] = constant((2, width), 0.0, like, f"zeros, as {family.name} has none")
    return Named(family, ours, why, {inside(seen, outer): name for seen, name in names.items()}, linear, own_bias)


def _has_own_bias(source: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> bool:
    """Whether the bias of a masked-LM head's decoder differs from the head's, to which most files tie it."""
    for seen, name in names.items():
        beside = names.get(seen.removesuffix("decoder.bias") + "bias")
        if seen.endswith("decoder.bias") and beside is not None:
            aliases = source.aliases if isinstance(source, Checkpoint) else {}
            if aliases.get(name, name) != aliases.get(beside, beside):
                return not torch.equal(source[name], source[beside])
    return False


def _wrong_architecture(where: str, family: str, target: str) -> CheckpointError:
    fits = {"mygpt2": "GPT-2", "mybert": "BERT, RoBERTa or DistilBERT"}[target]
    other = {"mygpt2": "MyBert", "mybert": "MyGPT2"}[target]
    this = {"mygpt2": "MyGPT2", "mybert": "MyBert"}[target]
    known = family_of(family)
    hint = f"use it for {other}" if known and known.target != target else f"{this} starts from {fits} weights"
    return CheckpointError(f"{where} is a {family} checkpoint, and {this} has another architecture: {hint}")


def _unfuse(name: str, value: Value, renamed: Renamed, transposed: bool) -> dict[str, Value]:
    if len(value.shape) == 3 and value.shape[0] == 1:  # TensorFlow's GPT-2 has convolutions of width 1
        value = value.then("", lambda tensor: tensor[0], value.shape[1:])
    if transposed:
        value = value.then("transposed", torch.t, value.shape[::-1])
    parts = len(renamed.ours)
    if parts == 1:
        return {renamed.ours[0]: value}
    if not value.shape or value.shape[0] % parts:
        raise CheckpointError(
            f"tensor {name!r} of shape {value.shape} cannot be split into {parts}: it belongs to another model, or is damaged"
        )
    step = value.shape[0] // parts
    return {
        ours: value.rows(f"split in {parts}", slice(i * step, (i + 1) * step), resized=False)
        for i, ours in enumerate(renamed.ours)
    }

"""Find the family of a checkpoint, and map its tensor names to ours by that family's table."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from ..checkpoints import CheckpointError
from ..models.configuration_mybert import MyBertConfig
from ..models.configuration_mygpt2 import MyGPT2Config
from .families import BERT_ANCHOR, FAMILIES, Family
from .lazy_tensor import Why


class UnknownNamesError(CheckpointError):
    """No known family has the tensor names of a source."""


def kind_of(config: PretrainedConfig) -> str:
    """`"mygpt2"` or `"mybert"`, also for a subclass of their config classes.

    Raises:
        CheckpointError: the config is of neither.
    """
    for kind, config_class in CONFIGS.items():
        if isinstance(config, config_class):
            return kind
    name = getattr(config, "model_type", type(config).__name__)
    if name in CONFIGS:
        raise CheckpointError(
            f"this {type(config).__name__} comes from a folder with its own copy of the code, which warm_start cannot "
            f"use: pass mymodels.{CONFIGS[name].__name__}, or a subclass of it"
        )
    raise CheckpointError(f"{name!r} is not a model of mymodels: warm_start supports {' and '.join(CONFIGS)}")


CONFIGS: dict[str, type[PretrainedConfig]] = {c.model_type: c for c in (MyGPT2Config, MyBertConfig)}
PREFIXES = {"mygpt2": "model.", "mybert": "bert."}
# parts of names added by DistributedDataParallel, torch.compile, FSDP and activation checkpointing
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def is_chosen(names: tuple[str, ...], skip: Sequence[re.Pattern], only: Sequence[re.Pattern]) -> bool:
    """Whether something with these names is to be loaded, by `warm_start`'s `skip` and `only`."""
    if any(pattern.search(name) for pattern in skip for name in names):
        return False
    return not only or any(pattern.search(name) for pattern in only for name in names)


class Renamed(NamedTuple):
    """Our names of a source's tensor (several for a fused one), or why it is not used."""

    ours: tuple[str, ...]
    transposed: bool = False
    why: Why | None = None


def position_offset(family: Family, raw: Mapping[str, Any]) -> int:
    """The number of rows before position 0 in a family's position table; `raw` is the source's config."""
    if not family.positions_after_padding:
        return 0
    padding = raw.get("pad_token_id")
    return (family.implied["pad_token_id"] if padding is None else padding) + 1


def family_of(model_type: str | None) -> Family | None:
    """The family of a `model_type`; None if it is not known."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def plain(name: str) -> str:
    """A tensor's name without wrappers' parts, and with dots for TensorFlow's slashes."""
    return _WRAPPERS.sub("", name.removesuffix(":0").replace("/", "."))


def recognise(shapes: Mapping[str, tuple[int, ...]], family: Family | None, where: str) -> tuple[Family, str]:
    """The family of a checkpoint, and the prefix of its names before that family's own prefix.

    Args:
        shapes: names, as `plain` returns them, and shapes of the tensors.
        family: the family by `config.json`, if it is known.
        where: name of the checkpoint, for messages.

    Raises:
        CheckpointError: it is of no known family, or holds several models.
    """
    names = list(shapes)
    candidates = FAMILIES if family is None else [f for f in FAMILIES if f.target == family.target]
    # TensorFlow files have other names, with the same config
    for candidate in sorted(candidates, key=lambda f: f is not family):
        bases = {f.prefix for f in FAMILIES if f.anchor == candidate.anchor} if family is None else {candidate.prefix}
        anchor = re.compile(rf"^(.*?\.)??(?:({'|'.join(sorted(bases))})\.)?{candidate.anchor}$")
        outer = {(found[1] or "", found[2]) for name in names if (found := anchor.match(name))}
        if len(outer) > 1:
            short = (
                {a for a, _ in outer}
                if len({a for a, _ in outer}) == len(outer)
                else {f"{a}{b or ''}" for a, b in outer}
            )
            models = ", ".join(repr(prefix.rstrip(".") or "(top)") for prefix in sorted(short))
            raise CheckpointError(f"{where} holds several models: {models}: name one with section=, or --section")
        if outer:
            prefix, base = outer.pop()
            if family is None and candidate.anchor == BERT_ANCHOR:
                candidate = _family_of_bert_names({inside(name, prefix): shape for name, shape in shapes.items()})
            if base is not None and base != candidate.prefix:  # such as a RoBERTa in an attribute `bert`
                prefix = f"{prefix}{base}."
            if any(re.fullmatch(rf"{re.escape(prefix)}(transformer\.)?tokens_embed\.weight", name) for name in names):
                raise CheckpointError(
                    f"{where} is a GPT-1 checkpoint (openai-gpt), whose norms come after the sum: MyGPT2 has another "
                    "architecture, so its weights do not carry over"
                )
            return candidate, prefix
    known = ", ".join(f.name for f in FAMILIES)
    example = f", such as {names[0]!r}" if names else ""
    raise UnknownNamesError(f"{where} has tensor names of no known family ({known}){example}: map them with rename=")


_HEAD_NAMES = re.compile(
    r"^(classifier|qa_outputs|score|lm_head|cls|pre_classifier|vocab_transform|vocab_layer_norm|vocab_projector|"
    r"multiple_choice_head)\."
)


def inside(name: str, outer: str) -> str:
    """A name without the prefix `outer` of the model, or, for a head next to the model, without their common prefix."""
    if name.startswith(outer):
        return name.removeprefix(outer)
    parts, wrappers = name.split("."), outer.split(".")
    shared = 0
    while shared < min(len(parts), len(wrappers)) and parts[shared] == wrappers[shared]:
        shared += 1
    rest = ".".join(parts[shared:])
    return rest if _HEAD_NAMES.match(rest) else name


def _family_of_bert_names(shapes: Mapping[str, tuple[int, ...]]) -> Family:
    """MyBert, RoBERTa or BERT, which have the same names in the encoder; `shapes` has names without wrappers."""
    types = [shape for name, shape in shapes.items() if name.endswith("embeddings.token_type_embeddings.weight")]
    if any(re.search(r"pooler\.score\.|layer_mix\.", name) for name in shapes):
        name = "mybert"
    elif (types and types[0][0] == 1) or any(re.match(r"(roberta|lm_head)\.", name) for name in shapes):
        name = "roberta"
    else:
        name = "bert"
    return next(family for family in FAMILIES if family.name == name)


def translate(
    names: Iterable[str], family: Family, outer: str, *, own_bias: bool, left_out: Callable[[str], bool]
) -> dict[str, Renamed]:
    """Map each name of a source, as `plain` returns it.

    Args:
        own_bias: whether to use the bias of the head's decoder, and not the one next to it; most files tie the two.
        left_out: whether a name is excluded, so that another tensor with the same name of ours is used.

    Raises:
        CheckpointError: two names map to the same name of ours.
    """
    stripped = {name: inside(name, outer).removeprefix(f"{family.prefix}.") for name in names}
    orphaned = any(re.match(r"pre_classifier\.", inner) for inner in stripped.values())
    rows = sorted(family.names, key=lambda entry: own_bias != entry[0].endswith("decoder.bias"))
    table = [(i, _pattern(theirs, family.parameters), ours) for i, (theirs, ours) in enumerate(rows)]
    found: dict[str, Renamed] = {}
    taken: dict[str, tuple[int, str]] = {}  # ours → the table's row and the source's name
    ranked = []
    for name, inner in stripped.items():
        ranked.append((*_look_up(inner, table, family), name, inner))
    # excluded names last; names in the model before those of a head next to it
    for row, renamed, name, inner in sorted(ranked, key=lambda e: (left_out(e[2]), e[0], not e[2].startswith(outer))):
        if orphaned and inner.startswith("classifier."):
            renamed = Renamed((), why=Why("its input is pre_classifier's output, which is not used"))
        for ours in renamed.ours:
            if ours in taken and left_out(name):
                renamed = Renamed((), why=Why("left out on request", requested=True))
            elif ours in taken and taken[ours][0] == row:
                raise CheckpointError(
                    f"the tensors {taken[ours][1]!r} and {name!r} both map to {ours!r} without their "
                    f"prefixes: leave one of them out with skip=, or name a section"
                )
            elif ours in taken:
                renamed = Renamed((), why=Why(f"{taken[ours][1]} is used instead", "exact", constant=True))
        taken.update(dict.fromkeys(renamed.ours, (row, name)))
        found[name] = renamed
    return {name: found[name] for name in stripped}


def _look_up(inner: str, table: list[tuple[int, re.Pattern, str]], family: Family) -> tuple[int, Renamed]:
    if re.search(family.constants, inner):
        return -1, Renamed((), why=Why("a constant that the model computes itself", "exact", constant=True))
    for unused, why in family.not_used.items():
        if re.search(unused, inner):
            return -1, Renamed((), why=why)
    for row, pattern, ours in table:
        if match := pattern.fullmatch(inner):
            *layers, parameter = match.groups()
            for layer in layers:
                ours = ours.replace("*", layer, 1)
            if parameter is not None and not ours.endswith((".weight", ".bias", ".weights")):
                ours = f"{ours}.{family.parameters[parameter]}"
            return row, Renamed(tuple(_parts(ours)), bool(re.search(family.transposed, inner)))
    return -1, Renamed((), why=Why(f"no tensor of {family.name} has this name"))


def _pattern(theirs: str, parameters: Mapping[str, str]) -> re.Pattern:
    return re.compile(re.escape(theirs).replace(r"\*", r"(\d+)") + rf"(?:\.({'|'.join(parameters)}))?")


def _parts(ours: str) -> list[str]:
    """`a.{b,c}.d` → `a.b.d`, `a.c.d`."""
    braces = re.search(r"\{(.*)\}", ours)
    return [ours.replace(braces[0], part) for part in braces[1].split(",")] if braces else [ours]

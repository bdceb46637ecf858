"""How each family of checkpoints names its tensors and config fields, as tables, and which family a checkpoint is of.

A name is brought into *our* form, that of `MyGPT2For…` and `MyBertFor…` with the base model's prefix. In a table, `*` is
a layer's number; `{a,b,c}` on our side says that the tensor holds several of ours, stacked along its output; a pattern
without a parameter's name stands for all parameters of a module.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from ..checkpoints import CheckpointError
from ..models.configuration_mybert import MyBertConfig
from ..models.configuration_mygpt2 import MyGPT2Config
from .lazy_tensor import Why


class Family(NamedTuple):
    """One kind of checkpoint."""

    name: str
    target: str  # our model type that has its architecture
    model_types: tuple[str, ...]  # what `config.json` calls it
    anchor: str  # regex of a tensor's name that gives the family away
    prefix: str  # of the base model, when a head is saved too
    names: tuple[tuple[str, str], ...]  # theirs → ours; of several that give one name, the first counts
    parameters: Mapping[str, str] = {
        "weight": "weight",
        "bias": "bias",
    }  # a parameter's own name; "" is a bare module's
    transposed: str = "$^"  # regex of names whose matrices are stored [in, out]
    fields: Mapping[str, str] = {}  # config fields named otherwise: theirs → ours
    implied: Mapping[str, Any] = {}  # config fields that only its code knows
    constants: str = "$^"  # regex of tensors that are no weights: masks, position numbers
    not_used: Mapping[str, Why] = {}  # regex → why a tensor has no place in our model
    zeros: tuple[str, ...] = ()  # ours that it lacks, and that change nothing when they are 0
    positions_after_padding: bool = False  # the table's first position is row `pad_token_id + 1`


_BERT_ANCHOR = r"encoder\.layer\.0\.attention\.self\.query\.weight"
_OPTIMIZER = Why("it belongs to the optimizer", "exact", constant=True)
_LAYER = "bert.encoder.layer.*"
_BERT_LAYER = (
    ("attention.self.query", "attention.self.query"),
    ("attention.self.key", "attention.self.key"),
    ("attention.self.value", "attention.self.value"),
    ("attention.output.dense", "attention.output.dense"),
    ("attention.output.LayerNorm", "attention.output.LayerNorm"),
    ("intermediate.dense", "intermediate.dense"),
    ("output.dense", "output.dense"),
    ("output.LayerNorm", "output.LayerNorm"),
)
_EMBEDDINGS = tuple(
    (f"embeddings.{name}", f"bert.embeddings.{name}")
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
)
_BERT = (*_EMBEDDINGS, *((f"encoder.layer.*.{theirs}", f"{_LAYER}.{ours}") for theirs, ours in _BERT_LAYER))
_HEADS = (("classifier", "classifier"), ("qa_outputs", "qa_outputs"))
_TRANSFORM = "cls.predictions.transform"
_NEXT_SENTENCE = Why("MyBert has no head for the next sentence", "exact")
_BERT_HEADS = (
    ("pooler.dense", "bert.pooler.dense"),
    (f"{_TRANSFORM}.dense", f"{_TRANSFORM}.dense"),
    (f"{_TRANSFORM}.LayerNorm", f"{_TRANSFORM}.LayerNorm"),
    ("cls.predictions.decoder.weight", "cls.predictions.decoder.weight"),
    ("cls.predictions.bias", "cls.predictions.bias"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
)
_OLD_NORMS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}

FAMILIES = (
    Family(
        name="mygpt2",
        target="mygpt2",
        model_types=("mygpt2",),
        anchor=r"layers\.0\.self_attn\.q_proj\.weight",
        prefix="model",
        names=(
            ("embed_tokens", "model.embed_tokens"),
            ("embed_positions", "model.embed_positions"),
            ("norm", "model.norm"),
            ("lm_head", "lm_head"),
            ("score", "score"),
            *(
                (f"layers.*.{norm}", f"model.layers.*.{norm}")
                for norm in ("input_layernorm", "post_attention_layernorm")
            ),
            *(
                (f"layers.*.self_attn.{part}", f"model.layers.*.self_attn.{part}")
                for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
            ),
            *((f"layers.*.mlp.{part}", f"model.layers.*.mlp.{part}") for part in ("gate_proj", "up_proj", "down_proj")),
        ),
    ),
    Family(
        name="gpt2",
        target="mygpt2",
        model_types=("gpt2",),
        anchor=r"h\.0\.attn\.c_attn\.weight",
        prefix="transformer",
        names=(
            ("wte", "model.embed_tokens"),
            ("wpe", "model.embed_positions"),
            ("h.*.ln_1", "model.layers.*.input_layernorm"),
            ("h.*.attn.c_attn", "model.layers.*.self_attn.{q_proj,k_proj,v_proj}"),
            ("h.*.attn.c_proj", "model.layers.*.self_attn.o_proj"),
            ("h.*.ln_2", "model.layers.*.post_attention_layernorm"),
            ("h.*.mlp.c_fc", "model.layers.*.mlp.up_proj"),
            ("h.*.mlp.c_proj", "model.layers.*.mlp.down_proj"),
            ("ln_f", "model.norm"),
            ("lm_head", "lm_head"),
            ("score", "score"),
        ),
        transposed=r"(c_attn|c_proj|c_fc)\.weight$",
        constants=r"h\.\d+\.attn\.(bias|masked_bias)$",
        not_used={r"multiple_choice_head\.": Why("MyGPT2 has no head for multiple choice", "exact")},
    ),
    Family(
        name="gpt2 (TensorFlow)",
        target="mygpt2",
        model_types=(),
        anchor=r"h0\.attn\.c_attn\.w",
        prefix="model",
        names=(
            ("wte", "model.embed_tokens.weight"),
            ("wpe", "model.embed_positions.weight"),
            ("h*.ln_1", "model.layers.*.input_layernorm"),
            ("h*.attn.c_attn", "model.layers.*.self_attn.{q_proj,k_proj,v_proj}"),
            ("h*.attn.c_proj", "model.layers.*.self_attn.o_proj"),
            ("h*.ln_2", "model.layers.*.post_attention_layernorm"),
            ("h*.mlp.c_fc", "model.layers.*.mlp.up_proj"),
            ("h*.mlp.c_proj", "model.layers.*.mlp.down_proj"),
            ("ln_f", "model.norm"),
        ),
        parameters={"w": "weight", "g": "weight", "b": "bias"},
        transposed=r"\.w$",
        not_used={r"(^|\.)(Adam(_1)?|adam_[mv]|beta\d_power|global_step)$": _OPTIMIZER},
    ),
    Family(
        name="mybert",
        target="mybert",
        model_types=("mybert",),
        anchor=_BERT_ANCHOR,
        prefix="bert",
        names=(
            *_BERT,
            *_BERT_HEADS,
            *_HEADS,
            ("pooler.score", "bert.pooler.score"),
            ("layer_mix.weights", "bert.layer_mix.weights"),
        ),
    ),
    Family(
        name="roberta",
        target="mybert",
        model_types=("roberta", "xlm-roberta", "camembert"),
        anchor=_BERT_ANCHOR,
        prefix="roberta",
        names=(
            *_BERT,
            ("classifier.dense", "bert.pooler.dense"),  # its classifier begins with what is BERT's pooler
            ("classifier.out_proj", "classifier"),
            ("pooler.dense", "bert.pooler.dense"),
            ("lm_head.dense", f"{_TRANSFORM}.dense"),
            ("lm_head.layer_norm", f"{_TRANSFORM}.LayerNorm"),
            ("lm_head.decoder.weight", "cls.predictions.decoder.weight"),
            ("lm_head.bias", "cls.predictions.bias"),
            ("lm_head.decoder.bias", "cls.predictions.bias"),
            *_HEADS,
        ),
        implied={"layer_norm_eps": 1e-5, "pad_token_id": 1},
        constants=r"embeddings\.(position_ids|token_type_ids)$",
        positions_after_padding=True,  # they count tokens only, so padding on the left is not as in MyBert
    ),
    Family(
        name="distilbert",
        target="mybert",
        model_types=("distilbert",),
        anchor=r"transformer\.layer\.0\.attention\.q_lin\.weight",
        prefix="distilbert",
        names=(
            *_EMBEDDINGS,
            ("transformer.layer.*.attention.q_lin", f"{_LAYER}.attention.self.query"),
            ("transformer.layer.*.attention.k_lin", f"{_LAYER}.attention.self.key"),
            ("transformer.layer.*.attention.v_lin", f"{_LAYER}.attention.self.value"),
            ("transformer.layer.*.attention.out_lin", f"{_LAYER}.attention.output.dense"),
            ("transformer.layer.*.sa_layer_norm", f"{_LAYER}.attention.output.LayerNorm"),
            ("transformer.layer.*.ffn.lin1", f"{_LAYER}.intermediate.dense"),
            ("transformer.layer.*.ffn.lin2", f"{_LAYER}.output.dense"),
            ("transformer.layer.*.output_layer_norm", f"{_LAYER}.output.LayerNorm"),
            ("vocab_transform", f"{_TRANSFORM}.dense"),
            ("vocab_layer_norm", f"{_TRANSFORM}.LayerNorm"),
            ("vocab_projector.weight", "cls.predictions.decoder.weight"),
            ("vocab_projector.bias", "cls.predictions.bias"),
            *_HEADS,
        ),
        fields={
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "hidden_dim": "intermediate_size",
            "activation": "hidden_act",
            "dropout": "hidden_dropout_prob",
            "attention_dropout": "attention_probs_dropout_prob",
            "seq_classif_dropout": "classifier_dropout",
        },
        implied={"layer_norm_eps": 1e-12},
        constants=r"embeddings\.position_ids$",
        not_used={r"^pre_classifier\.": Why("it is followed by ReLU, MyBert's pooler by tanh")},
        zeros=("bert.embeddings.token_type_embeddings.weight",),
    ),
    Family(
        name="bert (TensorFlow)",
        target="mybert",
        model_types=(),
        anchor=r"encoder\.layer_0\.attention\.self\.query\.kernel",
        prefix="bert",
        names=(
            *((f"embeddings.{n}", f"bert.embeddings.{n}.weight") for n in ("word_embeddings", "position_embeddings")),
            ("embeddings.token_type_embeddings", "bert.embeddings.token_type_embeddings.weight"),
            ("embeddings.LayerNorm", "bert.embeddings.LayerNorm"),
            *((f"encoder.layer_*.{theirs}", f"{_LAYER}.{ours}") for theirs, ours in _BERT_LAYER),
            ("pooler.dense", "bert.pooler.dense"),
            (f"{_TRANSFORM}.dense", f"{_TRANSFORM}.dense"),
            (f"{_TRANSFORM}.LayerNorm", f"{_TRANSFORM}.LayerNorm"),
            ("cls.predictions.output_bias", "cls.predictions.bias"),
            ("output_weights", "classifier.weight"),
            ("output_bias", "classifier.bias"),
            ("cls.squad.output_weights", "qa_outputs.weight"),
            ("cls.squad.output_bias", "qa_outputs.bias"),
        ),
        parameters={"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"},
        transposed=r"\.kernel$",
        not_used={
            r"(^|\.)(adam_[mv]|beta\d_power|global_step)$": _OPTIMIZER,
            r"^cls\.seq_relationship\.": _NEXT_SENTENCE,
        },
    ),
    Family(
        name="bert",
        target="mybert",
        model_types=("bert",),
        anchor=_BERT_ANCHOR,
        prefix="bert",
        names=(*_BERT, *_BERT_HEADS, *_HEADS),
        parameters=_OLD_NORMS,
        constants=r"embeddings\.position_ids$",
        not_used={r"^cls\.seq_relationship\.": _NEXT_SENTENCE},
    ),
)


class UnknownNamesError(CheckpointError):
    """The names of a source's tensors are those of no family."""


def kind_of(config: PretrainedConfig) -> str:
    """`"mygpt2"` or `"mybert"`, also for a subclass's config, or one that was read from a stock folder.

    Raises:
        CheckpointError: it is neither.
    """
    for kind, config_class in CONFIGS.items():
        if isinstance(config, config_class):
            return kind
    name = getattr(config, "model_type", type(config).__name__)
    if name in CONFIGS:
        raise CheckpointError(
            f"this {type(config).__name__} is that of a folder with its own copy of the code, which warm_start does not "
            f"know: take mymodels.{CONFIGS[name].__name__}, or a subclass of it"
        )
    raise CheckpointError(f"{name!r} is no model of mymodels: warm_start fills {' and '.join(CONFIGS)}")


CONFIGS: dict[str, type[PretrainedConfig]] = {c.model_type: c for c in (MyGPT2Config, MyBertConfig)}
PREFIXES = {"mygpt2": "model.", "mybert": "bert."}
# what DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def is_chosen(names: tuple[str, ...], skip: Sequence[re.Pattern], only: Sequence[re.Pattern]) -> bool:
    """Whether something with these names is to be loaded, by `warm_start`'s `skip` and `only`."""
    if any(pattern.search(name) for pattern in skip for name in names):
        return False
    return not only or any(pattern.search(name) for pattern in only for name in names)


class Renamed(NamedTuple):
    """Where a tensor of a source goes: its names in our form (several: a fused tensor), or why nowhere."""

    ours: tuple[str, ...]
    transposed: bool = False
    why: Why | None = None


def position_offset(family: Family, raw: Mapping[str, Any]) -> int:
    """How many rows of a family's position table stand before position 0; `raw` is the source's config."""
    if not family.positions_after_padding:
        return 0
    padding = raw.get("pad_token_id")
    return (family.implied["pad_token_id"] if padding is None else padding) + 1


def family_of(model_type: str | None) -> Family | None:
    """The family that `config.json` names, if it is one of ours to read."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def plain(name: str) -> str:
    """A tensor's name without the wrappers of training, TensorFlow's slashes as dots."""
    return _WRAPPERS.sub("", name.removesuffix(":0").replace("/", "."))


def recognise(shapes: Mapping[str, tuple[int, ...]], family: Family | None, where: str) -> tuple[Family, str]:
    """The family of a checkpoint, and what its names have in front beyond that family's own prefix.

    Args:
        shapes: the tensors' names, as `plain` gives them, and shapes.
        family: what `config.json` says, if it does.
        where: what to call the checkpoint in an error.

    Raises:
        CheckpointError: it is of no family that is known, or holds several models.
    """
    names = list(shapes)
    candidates = FAMILIES if family is None else [f for f in FAMILIES if f.target == family.target]
    # a config names the family, but TensorFlow's files beside the same config have names of their own
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
            if family is None and candidate.anchor == _BERT_ANCHOR:
                candidate = _told_apart({inside(name, prefix): shape for name, shape in shapes.items()})
            if base is not None and base != candidate.prefix:  # such as RoBERTa that someone's module calls bert
                prefix = f"{prefix}{base}."
            if any(re.fullmatch(rf"{re.escape(prefix)}(transformer\.)?tokens_embed\.weight", name) for name in names):
                raise CheckpointError(
                    f"{where} is a GPT-1 checkpoint (openai-gpt), whose norms come after the sum: MyGPT2 has another "
                    "architecture, so its weights do not carry over"
                )
            return candidate, prefix
    known = ", ".join(f.name for f in FAMILIES)
    example = f", such as {names[0]!r}" if names else ""
    raise UnknownNamesError(
        f"{where} has the tensor names of no family that is known ({known}){example}: map them with rename="
    )


_HEAD_NAMES = re.compile(
    r"^(classifier|qa_outputs|score|lm_head|cls|pre_classifier|vocab_transform|vocab_layer_norm|vocab_projector|"
    r"multiple_choice_head)\."
)


def inside(name: str, outer: str) -> str:
    """A name without what wraps the model: `outer`, or, of a head beside the model, what both have in front."""
    if name.startswith(outer):
        return name.removeprefix(outer)
    parts, wrappers = name.split("."), outer.split(".")
    shared = 0
    while shared < min(len(parts), len(wrappers)) and parts[shared] == wrappers[shared]:
        shared += 1
    rest = ".".join(parts[shared:])
    return rest if _HEAD_NAMES.match(rest) else name


def _told_apart(shapes: Mapping[str, tuple[int, ...]]) -> Family:
    """Without a config: MyBert, RoBERTa and BERT have the same names in the encoder. `shapes` has names without wrappers."""
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
    """Each name of a source (as `plain` gives it) → where it goes.

    Args:
        own_bias: whether the bias of the head's decoder counts, and not the one beside it; they are tied in most files.
        left_out: whether a name is not to be loaded, which settles which of two counts.

    Raises:
        CheckpointError: two names are the same one.
    """
    stripped = {name: inside(name, outer).removeprefix(f"{family.prefix}.") for name in names}
    orphaned = any(re.match(r"pre_classifier\.", inner) for inner in stripped.values())
    rows = sorted(family.names, key=lambda entry: own_bias != entry[0].endswith("decoder.bias"))
    table = [(i, _pattern(theirs, family.parameters), ours) for i, (theirs, ours) in enumerate(rows)]
    found: dict[str, Renamed] = {}
    taken: dict[str, tuple[int, str]] = {}  # ours → the table's row and the name that gave it
    ranked = []
    for name, inner in stripped.items():
        ranked.append((*_look_up(inner, table, family), name, inner))
    # what is left out comes last, and whatever stands inside the model before a head beside it
    for row, renamed, name, inner in sorted(ranked, key=lambda e: (left_out(e[2]), e[0], not e[2].startswith(outer))):
        if orphaned and inner.startswith("classifier."):
            renamed = Renamed((), why=Why("it reads pre_classifier's output, which is not used"))
        for ours in renamed.ours:
            if ours in taken and left_out(name):
                renamed = Renamed((), why=Why("left out on request", requested=True))
            elif ours in taken and taken[ours][0] == row:
                raise CheckpointError(
                    f"the tensors {taken[ours][1]!r} and {name!r} are the same one, {ours!r}, once prefixes are taken "
                    f"off: leave one of them out with skip=, or name a section"
                )
            elif ours in taken:
                renamed = Renamed((), why=Why(f"{taken[ours][1]} stands for it", "exact", constant=True))
        taken.update(dict.fromkeys(renamed.ours, (row, name)))
        found[name] = renamed
    return {name: found[name] for name in stripped}


def _look_up(inner: str, table: list[tuple[int, re.Pattern, str]], family: Family) -> tuple[int, Renamed]:
    if re.search(family.constants, inner):
        return -1, Renamed((), why=Why("a constant, which the model computes itself", "exact", constant=True))
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

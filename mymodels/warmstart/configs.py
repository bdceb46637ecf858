"""The config of a source as one of our config classes, and the config of a target made from it."""

import copy
import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from ..checkpoints import CheckpointError
from .families import Family
from .key_mapping import CONFIGS, family_of, kind_of, position_offset

# fields of foreign configs that are read besides our own: those of every config, and those `check_consistency` uses
_COMMON = {
    "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "num_labels", "problem_type",
    "position_embedding_type", "is_decoder", "add_cross_attention", "output_attentions", "output_hidden_states",
}  # fmt: skip
# fields that change the outputs and cannot be inferred from tensors
UNSEEN = {
    "mygpt2": ("activation_function", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
    "mybert": ("hidden_act", "layer_norm_eps"),
}
_LAYERS = re.compile(r"\.layers?\.(\d+)\.")


def fields_of(config_class: type[PretrainedConfig]) -> set[str]:
    """The names of the fields of one of our config classes."""
    named = set(inspect.signature(config_class.__init__).parameters) - {"self", "kwargs", "auto_map"}
    return named | _COMMON


def translate_config(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of a `config.json` of `family` that our config class has, under our names."""
    config_class = CONFIGS[family.target]
    known, renamed = fields_of(config_class), {**config_class.attribute_map, **family.fields}
    # foreign names last, as they override a field of ours with its default
    entries = sorted(raw.items(), key=lambda entry: entry[0] in renamed)
    ours = {renamed.get(name, name): value for name, value in entries if value is not None or name not in renamed}
    fields = {name: value for name, value in ours.items() if name in known}
    if "id2label" in fields:  # JSON has no integer keys
        fields["id2label"] = {int(number): label for number, label in fields["id2label"].items()}
        fields.pop("num_labels", None)
    if "max_position_embeddings" in fields:
        fields["max_position_embeddings"] -= position_offset(family, raw)
    return {**family.implied, **fields}


def from_shapes(shapes: Mapping[str, tuple[int, ...]], family: Family) -> dict[str, Any]:
    """The config fields that follow from shapes. `shapes` has our names, with fused and transposed tensors resolved."""
    layers = [int(found[1]) for name in shapes if (found := _LAYERS.search(name))]
    fields: dict[str, Any] = {"num_hidden_layers": max(layers) + 1} if layers else {}

    def first(pattern: str) -> tuple[int, ...] | None:
        return next((shape for name, shape in shapes.items() if re.search(pattern, name)), None)

    sizes = {
        "vocab_size": r"\.(embed_tokens|word_embeddings)\.weight$",
        "max_position_embeddings": r"\.(embed_positions|position_embeddings)\.weight$",
        "type_vocab_size": r"\.token_type_embeddings\.weight$",
        "intermediate_size": r"\.(up_proj|intermediate\.dense)\.weight$",
        "num_labels": r"^(score|classifier)\.weight$",
        "layer_mix": r"\.layer_mix\.weights$",
        "head_dim": r"\.q_norm\.weight$",
    }
    fields |= {field: shape[0] for field, pattern in sizes.items() if (shape := first(pattern))}
    if width := first(r"\.(embed_tokens|word_embeddings)\.weight$"):
        fields["hidden_size"] = width[1]
    if family.target == "mygpt2":
        learned = "max_position_embeddings" in fields
        # our LayerNorm always has a bias; nanoGPT's has none if bias=False
        if first(r"layernorm\.bias$") or family.name == "mygpt2":
            fields["norm_type"] = "layernorm" if first(r"layernorm\.bias$") else "rmsnorm"
        fields |= {
            "mlp_type": "gated" if first(r"\.gate_proj\.") else "dense",
            "qk_norm": bool(first(r"\.q_norm\.")),
            "attention_bias": bool(first(r"\.q_proj\.bias$")),
            "mlp_bias": bool(first(r"\.up_proj\.bias$")),
            "lm_head_bias": bool(first(r"^lm_head\.bias$")),
            **({"position_embedding_type": "learned"} if learned else {}),
        }
    return fields


def config_mismatch(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], family: Family) -> str | None:
    """A phrase for a field that contradicts the tensors, so the config belongs to another model; None if there is none."""
    found, declared = from_shapes(shapes, family), translate_config(raw, family)
    names = [name for name in ("num_hidden_layers", "hidden_size") if name in declared and name in found]
    wrong = next((name for name in names if declared[name] != found[name]), None)
    return f"{wrong}={declared[wrong]}, where the tensors have {found[wrong]}" if wrong else None


def source_config(
    raw: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    family: Family,
    like: PretrainedConfig | None,
    where: str,
    *,
    settled: Mapping[str, Any] | None = None,
    usual: Mapping[str, Any] | None = None,
) -> tuple[PretrainedConfig, list[str]]:
    """The source's config as one of our config classes, and notes on what had to be assumed.

    Args:
        raw: its `config.json`, or the fields that are known; complete if it has `model_type`.
        shapes: shapes of its tensors, under our names.
        like: the target's config, whose values are assumed for fields that are known from neither.
        where: name of the source, for messages.
        settled: the caller's overrides: values for fields that are known from neither, which are not an assumption.
        usual: values to assume otherwise.

    Raises:
        CheckpointError: the width or the number of heads is not known, or the fields contradict each other.
    """
    try:
        return _source_config(raw, shapes, family, like, where, settled or {}, usual or {})
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{where}: no model can be built from its config and tensors ({error}): correct config.json if it is wrong"
        ) from error


def _source_config(
    raw: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    family: Family,
    like: PretrainedConfig | None,
    where: str,
    settled: Mapping[str, Any],
    usual: Mapping[str, Any],
) -> tuple[PretrainedConfig, list[str]]:
    config_class = CONFIGS[family.target]
    found, declared = from_shapes(shapes, family), translate_config(raw, family)
    assumed = _contradictions(shapes, found, declared, where)
    fields = {**declared, **found}
    if "num_labels" in found and len(fields.get("id2label", ())) not in (0, found["num_labels"]):
        fields.pop("id2label"), fields.pop("label2id", None)
    if "id2label" in fields:
        fields.pop("num_labels", None)
    if "model_type" in raw:
        if family.target == "mygpt2" and family.name != "mygpt2":
            fields.setdefault("norm_type", "layernorm")
        return config_class(**_with_head_sizes(fields, shapes, family)), assumed
    # not a complete config, in which missing fields would have defaults
    if shapes and "hidden_size" not in fields:
        raise CheckpointError(
            f"{where} has tensors such as {next(iter(shapes))!r}, but no token embeddings under a name of {family.name}: "
            "it belongs to another model, or name them with rename="
        )
    known = {config_class.attribute_map.get(name, name) for name in raw} | family.implied.keys() - {"pad_token_id"}
    known |= {family.fields[name] for name in raw if name in family.fields}
    settled = {config_class.attribute_map.get(name, name): value for name, value in settled.items()}
    guessed = []
    for name in _undetermined_fields(shapes, family, found):
        if name in known:
            continue
        if name in settled:
            fields[name] = settled[name]
            continue
        guess = _assumed_value(name, fields, like, usual, where)
        if guess is not None:
            fields[name] = guess
        guessed.append(name)
    if family.target == "mygpt2" and "position_embedding_type" not in fields and like is not None:
        fields["position_embedding_type"] = _assumed_value("position_embedding_type", fields, like, usual, where)
    config = config_class(**_with_head_sizes(fields, shapes, family))
    if guessed:
        shown = ", ".join(f"{name}={getattr(config, name)!r}" for name in guessed)
        assumed.append(
            f"not in a config of the source: {shown} {'are' if len(guessed) > 1 else 'is'} assumed; "
            f"set them with config= or overrides="
        )
    return config, assumed


def _contradictions(
    shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Any], declared: Mapping[str, Any], where: str
) -> list[str]:
    """Notes on fields in which a source's config and tensors differ, where the tensors can be used.

    Raises:
        CheckpointError: they differ in depth or width, or layers are missing.
    """
    layers = {int(number) for name in shapes for number in _LAYERS.findall(name)[:1]}
    if missing := set(range(min(max(layers, default=0), len(layers)))) - layers:
        raise CheckpointError(
            f"{where} has no tensors of layer {min(missing)}: it is incomplete, copy or download it again"
        )
    if max(layers, default=0) >= len(layers) > 0:
        raise CheckpointError(
            f"{where} has a tensor of layer {max(layers)}, but only {len(layers)} layers: it is damaged"
        )
    for name in ("num_hidden_layers", "hidden_size"):
        if name in declared and name in found and declared[name] != found[name]:
            raise CheckpointError(
                f"{where}: its config says {name}={declared[name]}, its tensors {found[name]}: it is incomplete, or the config "
                "belongs to another model"
            )
    return [
        f"the source's config says {name}={declared[name]}, its tensors {found[name]}, which is used"
        for name in ("vocab_size", "max_position_embeddings", "intermediate_size", "type_vocab_size")
        if declared.get(name) is not None and name in found and declared[name] != found[name]
    ]


def _undetermined_fields(shapes: Mapping[str, tuple[int, ...]], family: Family, found: Mapping[str, Any]) -> list[str]:
    """The fields that change the outputs and that these tensors do not determine."""
    names = ["num_attention_heads", *UNSEEN[family.target]]
    if family.target == "mygpt2" and "norm_type" not in found and any("norm" in name for name in shapes):
        names.append("norm_type")
    if family.name == "mygpt2":
        names += ["final_logit_softcapping", "sliding_window"]
        names += [] if "max_position_embeddings" in found else ["position_embedding_type", "rope_theta"]
    if family.positions_after_padding and any("position_embeddings" in name for name in shapes):
        names.append("pad_token_id")
    return names


def _assumed_value(
    name: str, fields: Mapping[str, Any], like: PretrainedConfig | None, usual: Mapping[str, Any], where: str
) -> Any:
    """The value to assume for a field: the target's, or the usual one; None means the config class's default."""
    width = fields.get("hidden_size")
    if name == "num_attention_heads":
        if like is not None and like.hidden_size == width:
            return like.num_attention_heads
        if width and width % 64 == 0:
            return width // 64
        raise CheckpointError(
            f"{where} has no config.json, and its num_attention_heads is not known: pass config=, or set it with overrides="
        )
    if name == "norm_type":
        return "layernorm"
    if name == "pad_token_id":
        return 1
    if name == "position_embedding_type":  # the target's, unless that is a table, which the source does not have
        return "rope" if like is None else like.position_embedding_type.replace("learned", "none")
    if name in usual:
        return usual[name]
    return None if like is None else getattr(like, name)


def _with_head_sizes(fields: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], family: Family) -> dict[str, Any]:
    if family.target == "mygpt2" and (rows := _rows(shapes, "q_proj")) and fields.get("num_attention_heads"):
        fields["head_dim"] = rows // fields["num_attention_heads"]
        if kv_rows := _rows(shapes, "k_proj"):
            fields["num_key_value_heads"] = kv_rows // fields["head_dim"]
    return fields


def _rows(shapes: Mapping[str, tuple[int, ...]], projection: str) -> int | None:
    return next((shape[0] for name, shape in shapes.items() if name.endswith(f"{projection}.weight")), None)


def make_config(model_type: str, base: Mapping[str, Any], overrides: Mapping[str, Any]) -> PretrainedConfig:
    """A config of ours with the fields `base` and `overrides`; fields derived from an overridden one are derived again.

    Raises:
        CheckpointError: there is no such field, or a value is of another type.
        ValueError: a value is impossible.
    """
    config_class = CONFIGS[model_type]
    standard = config_class()
    known = {name for name in vars(standard) if not name.startswith("_")} | fields_of(config_class)
    overrides = {config_class.attribute_map.get(name, name): value for name, value in overrides.items()}
    for name in overrides.keys() - known:
        close = difflib.get_close_matches(name, [*known, *config_class.attribute_map], n=1)
        hint = f": did you mean {close[0]}?" if close else f"; it has {', '.join(sorted(known))}"
        raise CheckpointError(f"{config_class.__name__} has no field {name!r}{hint}")
    for name, value in overrides.items():
        usual = getattr(standard, name, None)
        if isinstance(usual, (bool, int, float)) and isinstance(usual, bool) != isinstance(value, bool):
            raise CheckpointError(f"{config_class.__name__}: {name}={value!r} should be like {usual!r}")
    fields = dict(base)
    heads, width = fields.get("num_attention_heads") or 1, fields.get("hidden_size") or 0
    derived = {"num_key_value_heads": heads, "head_dim": width // heads, "intermediate_size": 4 * width}
    for name, value in derived.items() if model_type == "mygpt2" else ():
        if fields.get(name) == value:
            del fields[name]
    if len(set(fields.get("layer_types") or ())) == 1 and (
        "sliding_window" in overrides or "layer_types" not in overrides
    ):
        del fields["layer_types"]
    if "num_labels" in overrides or "id2label" in overrides:
        for name in ("id2label", "label2id", "num_labels"):
            fields.pop(name, None)
    try:
        return config_class(**{**fields, **overrides})
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{config_class.__name__}: {overrides} is not possible: {error}") from error


def own_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a config as one of our classes; a stock model's config is translated.

    Raises:
        CheckpointError: it is of another architecture.
    """
    family = family_of(vars(config).get("model_type", type(config).model_type))
    if family is not None and family.name not in CONFIGS:
        return make_config(family.target, translate_config(config.to_dict(), family), {})
    kind_of(config)
    return copy.deepcopy(config)

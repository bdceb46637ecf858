"""The closest config of MyGPT2 or MyBert for a source of another family: `warm_start("mygpt2", LLAMA_FOLDER)`."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from ...checkpoints import CheckpointError
from ..configs import make_config
from ..opening import Opened
from .fitting import terms
from .placing import Places, places_of
from .planning import describe_source
from .sides import Side

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_HEADS = ("id2label", "label2id", "problem_type")


def nearest_config(
    opened: Opened, own: str, rename: Mapping[str, str], overrides: Mapping[str, Any]
) -> PretrainedConfig:
    """A config with the sizes and settings of the source that MyGPT2 or MyBert supports.

    Raises:
        CheckpointError: the source's config is of no class of transformers, or `overrides` has an impossible field.
    """
    source, _ = describe_source(opened, rename)
    places = places_of(source)
    known = source.config
    if known is None or "model.embed_tokens.weight" not in places.of or not places.width:
        raise CheckpointError(
            f"{opened.where}: its config and tensors do not show the sizes for {own!r}: pass a config of "
            f"{own!r} instead of its name"
        )
    sizes = terms(source, places, source, places)
    fields: dict[str, Any] = {
        "vocab_size": sizes.vocab_size, "hidden_size": sizes.hidden_size, "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_hidden_layers, "num_attention_heads": sizes.num_attention_heads,
    }  # fmt: skip
    longest = sizes.max_position_embeddings or getattr(known, "max_position_embeddings", None)
    fields |= {"max_position_embeddings": longest} if longest else {}
    fields |= {name: getattr(known, name) for name in (*_TOKENS, *_HEADS) if getattr(known, name, None) is not None}
    fields |= _of_mygpt2(source, places, sizes) if own == "mygpt2" else _of_mybert(source, places)
    try:
        return make_config(own, fields, overrides)
    except ValueError as error:
        raise CheckpointError(f"{opened.where}: {own!r} cannot have its sizes ({error}): pass a config") from error


def _of_mygpt2(source: Side, places: Places, sizes: Any) -> dict[str, Any]:
    known, settings = source.config, source.settings

    def has(ending: str) -> bool:
        return any(role.endswith(ending) for role in places.of)

    found: dict[str, Any] = {
        "num_key_value_heads": sizes.num_key_value_heads, "head_dim": sizes.head_dim, "mlp_type": sizes.mlp_type,
        "norm_type": sizes.norm_type, "layer_norm_epsilon": settings.get("norm_eps"),
        "activation_function": settings.get("activation"), "rope_theta": settings.get("rope_theta"),
        "tie_word_embeddings": getattr(known, "tie_word_embeddings", None), "lm_head_bias": has("lm_head.bias"),
        "attention_bias": has(".self_attn.q_proj.bias") or has(".self_attn.o_proj.bias"),
        "mlp_bias": has(".up_proj.bias") or has(".down_proj.bias"),
        "qk_norm": _normed_by_head(source, places, sizes.head_dim),
        "sliding_window": settings.get("sliding_window"),
        "final_logit_softcapping": getattr(known, "final_logit_softcapping", None),
    }  # fmt: skip
    positions = sizes.position_embedding_type
    found["position_embedding_type"] = positions if positions in ("learned", "rope") else "none"
    kinds = getattr(known, "layer_types", None)
    if kinds and set(kinds) <= {"full_attention", "sliding_attention"} and found["sliding_window"]:
        found["layer_types"] = list(kinds)
    elif kinds:
        found["sliding_window"] = None
    return {name: value for name, value in found.items() if value is not None}


def _normed_by_head(source: Side, places: Places, head_dim: int | None) -> bool:
    norms = [p.tensor for role, p in places.of.items() if role.endswith(".self_attn.q_norm.weight")]
    return bool(norms) and source.tensors[norms[0]].shape == (head_dim,)


def _of_mybert(source: Side, places: Places) -> dict[str, Any]:
    types = places.of.get("model.embed_types.weight")
    found = {
        "hidden_act": source.settings.get("activation"),
        "layer_norm_eps": source.settings.get("norm_eps"),
        "type_vocab_size": source.tensors[types.tensor].shape[0] if types is not None else None,
    }
    return {name: value for name, value in found.items() if value is not None}

"""The source as a model of its original class, to compare the target with."""

import re
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..checkpoints import CheckpointError
from ..library_logging import only_errors_logged, without_progress_bars
from ..models import modeling_mybert, modeling_mygpt2
from .key_mapping import CONFIGS, position_offset
from .sources import Source

# what our classes' names end with → what transformers calls the same head
_AUTO = {
    "Model": "AutoModel",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}
_OURS = {"mygpt2": modeling_mygpt2, "mybert": modeling_mybert}
_TF_GPT2 = ((r"^h(\d+)\.", r"h.\1."), (r"\.[wg]$", ".weight"), (r"\.b$", ".bias"), (r"^(wte|wpe)$", r"\1.weight"))


def make_reference(source: Source, target: type[PreTrainedModel], *, head: bool) -> PreTrainedModel:
    """The source as a model with the head of `target` or without one; the source itself if it is such a model.

    Raises:
        CheckpointError: transformers has no class for it, or tensors of that class are missing.
    """
    found = re.search("|".join(f"{name}$" for name in _AUTO), next(c.__name__ for c in target.__mro__ if _is_ours(c)))
    kind = found[0] if found is not None and head else "Model"
    own = source.family.name in CONFIGS
    config = source.config if own else _stock_config(source)
    if own:
        names = {"mygpt2": "MyGPT2", "mybert": "MyBert"}
        model_class = getattr(_OURS[source.family.target], names[source.family.target] + kind)
    else:
        try:
            model_class = getattr(transformers, _AUTO[kind])._model_mapping[type(config)]
        except KeyError:
            raise CheckpointError(f"transformers has no {_AUTO[kind]} for {config.model_type}") from None
    assert source.stock is not None
    if isinstance(source.stock.module, model_class):
        module: Any = source.stock.module
        return module
    model, missing = load_without_warnings(model_class, config, _state_dict(source))
    lost = [name for name in missing if not name.endswith(".bias") and not (kind == "Model" and "pooler." in name)]
    if lost:
        raise CheckpointError(f"the source has no {lost[0]}, which transformers' {model_class.__name__} has")
    model.described = f"transformers' {model_class.__name__}" if not own else model_class.__name__  # type: ignore[assignment]
    return model


def _is_ours(found: type) -> bool:
    return found.__module__.rpartition(".")[2] in ("modeling_mygpt2", "modeling_mybert")


def _stock_config(source: Source) -> PretrainedConfig:
    """The config for transformers' class: the source's own, or one made from what is known of the source."""
    raw, config, family = source.raw_config, source.config, source.family
    if "model_type" in raw and raw["model_type"] not in CONFIGS:
        fields = {name: value for name, value in raw.items() if name not in ("model_type", "auto_map", "architectures")}
        return AutoConfig.for_model(raw["model_type"], **fields)
    plain = {"norm_type": "layernorm", "mlp_type": "dense", "qk_norm": False, "position_embedding_type": "learned"}
    if family.target == "mygpt2":
        if any(getattr(config, name) != value for name, value in plain.items()):
            raise CheckpointError("transformers has no class for a GPT-2 with these changes")
        fields = {name: getattr(config, name) for name in ("vocab_size", "activation_function", "layer_norm_epsilon")}
        fields |= {name: getattr(config, name) for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx")}
        fields |= {old: getattr(config, new) for old, new in config.attribute_map.items()}
        return transformers.GPT2Config(  # type: ignore[call-arg]
            **fields, tie_word_embeddings=config.tie_word_embeddings, num_labels=config.num_labels,
            pad_token_id=config.pad_token_id, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
    model_type = family.model_types[0] if family.model_types else "bert"
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id", "tie_word_embeddings", "num_labels",
    )  # fmt: skip
    theirs = {ours: name for name, ours in family.fields.items()}
    fields = {theirs.get(name, name): getattr(config, name) for name in names}
    fields["max_position_embeddings"] += position_offset(family, raw)
    return AutoConfig.for_model(model_type, **fields)


def _state_dict(source: Source) -> dict[str, torch.Tensor]:
    """The source's tensors in float32, under the names of its original class."""
    if source.family.name in CONFIGS or source.family.name == "bert (TensorFlow)":  # these classes have our names
        return {name: value.compute().float() for name, value in source.tensors.items()}
    assert source.stock is not None
    tensors: dict[str, torch.Tensor] = {}
    for seen, name in source.stock.names.items():
        if not source.info[name].dtype.is_floating_point:
            continue
        tensor = source.stock.read(name).float()
        if source.family.name == "gpt2 (TensorFlow)":
            seen = seen.removeprefix("model.")
            for pattern, replacement in _TF_GPT2:
                seen = re.sub(pattern, replacement, seen)
            tensor = tensor[0] if tensor.ndim == 3 else tensor
        tensors[seen] = tensor.t().contiguous() if re.search(source.stock.transposed, seen) else tensor
    for seen in list(tensors):  # older releases tie it to the bias next to it
        if re.search(r"(^cls\.predictions|^lm_head)\.bias$", seen):
            tensors.setdefault(f"{seen.removesuffix('bias')}decoder.bias", tensors[seen])
    return tensors


def load_without_warnings(
    model_class: type[PreTrainedModel], config: PretrainedConfig, tensors: dict[str, torch.Tensor]
) -> tuple[PreTrainedModel, list[str]]:
    config._name_or_path = ""
    with only_errors_logged(), without_progress_bars(), torch.random.fork_rng(devices=[]):
        loaded: Any = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
        )
    model, info = loaded
    return model.eval(), list(info["missing_keys"])

"""Whether classes and settings show that source and target compute the same with the same weights."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from ..opening import Opened

# config fields on training, tokens and origin, which do not change the outputs of a forward
_WITHOUT_EFFECT = re.compile(
    r"^_|drop|^init|initializer|_token_id$|^(?:id2label|label2id|num_labels|architectures|transformers_version|dtype|"
    r"torch_dtype|name_or_path|use_cache|return_dict|output_\w+|problem_type|gradient_checkpointing|auto_map|chunk_size\w*|"
    r"pretraining_tp|router_aux_loss_coef|aux_loss_\w+|router_jitter_noise|tokenizer_class|task_specific_params|keys_to_ignore\w*|"
    r"summary_\w+|model_type|is_encoder_decoder|classifier_\w+|bos|eos|training)$"
)
# sizes that shapes show, and settings that the report covers elsewhere
_SHOWN = re.compile(
    r"^(?:vocab_size|max_position_embeddings|n_positions|n_ctx|type_vocab_size|hidden_size|embedding_size|n_embd|d_model|dim|"
    r"intermediate_size|n_inner|ffn_dim|hidden_dim|d_ff|num_key_value_heads|num_kv_heads|num_local_experts|num_experts|"
    r"tie_word_embeddings|activation_function|hidden_act|hidden_activation|activation|rms_norm_eps|layer_norm_epsilon|"
    r"layer_norm_eps|norm_eps|sliding_window|in_features|out_features|num_embeddings|embedding_dim|normalized_shape|nx|nf)$"
)
_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)


def not_shown(opened: Opened, model: torch.nn.Module) -> str:
    """Why only a run can show that source and target compute the same; "" if their code shows it."""
    config: Any = getattr(model, "config", None)
    own = type(model).__name__
    source_type = opened.raw.get("model_type")
    if opened.module is not None:
        theirs = type(opened.module).__name__
        if type(opened.module) is type(model):
            theirs_config: Any = getattr(opened.module, "config", None)
            if isinstance(config, PretrainedConfig) and isinstance(theirs_config, PretrainedConfig):
                return _differing(own, _of_config(theirs_config), _of_config(config), model)
            return _differing(own, dict(_of_modules(opened.module)), dict(_of_modules(model)), model)
    elif source_type:
        theirs = (opened.raw.get("architectures") or [source_type])[0]
    else:
        return ""
    stock = type(model).__module__.startswith("transformers.") and not opened.own_code
    if source_type and source_type == getattr(config, "model_type", None) and stock:
        return _differing(own, _of_raw(opened.raw), _of_config(config), model)
    return f"{theirs} and {own} are different classes, and no run has shown that they compute the same"


def _differing(own: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], model: torch.nn.Module) -> str:
    names = [
        name
        for name in ours
        if name in theirs and theirs[name] != ours[name]
        if not _SHOWN.match(name.rpartition(".")[2]) and not _layers_shown(name, (theirs[name], ours[name]), model)
    ]
    only = [name for name in {**theirs, **ours} if (name in theirs) != (name in ours)]
    names += [n for n in only if not _SHOWN.match(n.rpartition(".")[2]) and {**theirs, **ours}[n] not in (None, False)]
    if not names:
        return ""
    shown = [
        f"{n}: {_text(theirs.get(n))} in the source, {_text(ours.get(n))} in the target" for n in sorted(names)[:4]
    ]
    more = f", and {len(names) - 4} more" if len(names) > 4 else ""
    return (
        f"two {own} with different settings ({'; '.join(shown)}{more}), and no run has shown that they compute the same"
    )


def _text(value: Any) -> str:
    return "nothing" if value is None else re.sub(r"\s+", " ", str(value))[:60]


def _layers_shown(name: str, values: tuple[Any, Any], model: torch.nn.Module) -> bool:
    """Whether a number of layers is one of modules, so that report rows show each; ALBERT repeats one module."""
    return name in _LAYERS and any(f".{values[1] - 1}." in f".{own}" for own, _ in model.named_parameters())


def _of_config(config: PretrainedConfig) -> dict[str, Any]:
    return dict(_flat(config.to_dict()))


def _of_raw(raw: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in raw.items() if name not in ("model_type", "architectures")}
    try:
        return _of_config(AutoConfig.for_model(raw["model_type"], **given))
    except Exception:  # fields that the class of this release rejects
        return dict(_flat(given))


def _flat(values: Mapping[str, Any], front: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if _WITHOUT_EFFECT.search(str(name)):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{front}{name}.")
        else:
            yield f"{front}{name}", list(value) if isinstance(value, tuple) else value


def _of_modules(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Class and plain attributes of every module, and non-persistent buffers."""
    saved = model.state_dict()
    for path, module in model.named_modules():
        front = f"{path}." if path else ""
        if "dropout" in type(module).__name__.lower():
            continue
        yield f"{front}class", f"{type(module).__module__}.{type(module).__qualname__}"
        yield from _attributes(vars(module), front)
        for name, buffer in module.named_buffers(recurse=False):
            if f"{front}{name}" not in saved:
                yield f"{front}{name}", (tuple(buffer.shape), buffer.double().sum().item())


def _attributes(values: Mapping[str, Any], front: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if not isinstance(name, str) or _WITHOUT_EFFECT.search(name):
            continue
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
            yield f"{front}{name}", value
        elif isinstance(value, (tuple, list)) and all(isinstance(v, (bool, int, float, str)) for v in value):
            yield f"{front}{name}", tuple(value)
        elif isinstance(value, Mapping) and depth < 2:
            yield from _attributes(value, f"{front}{name}.", depth + 1)
        elif is_dataclass(value) and depth < 2:
            held = {f.name: getattr(value, f.name) for f in fields(value)}
            yield from _attributes(held, f"{front}{name}.", depth + 1)
        elif callable(value) and hasattr(value, "__qualname__"):
            yield f"{front}{name}", value.__qualname__
        elif type(value).__name__ in ("SimpleNamespace", "Namespace") or (
            hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module) and depth < 1
        ):
            yield from _attributes(vars(value), f"{front}{name}.", depth + 1)

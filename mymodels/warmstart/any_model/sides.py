"""Describes a source or target: its tensors, their modules, and settings from its config."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig

from ...checkpoints import Checkpoint, CheckpointError
from ..lazy_tensor import Value
from ..planning import tied_names
from .conventions import norm_offset, rotary_pairs, scales, source_of

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nheads", "nhead", "heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
_PAIR = re.compile(r"^(.*?)(?:weight_([gv])|parametrizations\.weight\.original([01]))$")
_POSITIONS = {
    "learned": ("gpt2", "opt", "bert", "roberta", "distilbert", "electra", "mybert", "xlm-roberta", "camembert", "biogpt"),
    "rope": (
        "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi", "phi3", "modernbert", "mixtral", "gemma", "gemma2",
        "gemma3_text", "stablelm", "olmo", "olmo2", "starcoder2", "cohere", "qwen2_moe", "qwen3_moe", "smollm3",
    ),
    "alibi": ("bloom", "mpt"),
}  # fmt: skip
_ROTARY_DIM = {"gptj", "codegen"}
_PARALLEL = {"phi", "gptj", "cohere", "codegen"}
_POST_NORM = {"bert", "roberta", "distilbert", "electra", "mybert", "xlm-roberta", "camembert", "openai-gpt", "bart",
              "marian", "albert", "deberta", "deberta-v2", "mpnet", "roformer", "blenderbot-small"}  # fmt: skip
_PRE_NORM = {
    "t5",
    "mt5",
    "umt5",
    "mbart",
    "pegasus",
    "m2m_100",
    "gptj",
    "codegen",
    "gpt_neo",
    "falcon",
    "glm",
    "gpt_bigcode",
}
# tables of learned positions whose first rows are no positions
_OFFSETS = {
    "opt": 2, "biogpt": 2, "bart": 2, "mbart": 2, "mvp": 2, "plbart": 2, "trocr": 2, "nystromformer": 2, "yoso": 2, "mra": 2,
    "pp_formulanet": 2,
}  # fmt: skip
_AFTER_PADDING = {
    "roberta", "xlm-roberta", "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "mpnet",
    "markuplm", "roberta-prelayernorm", "xlm-roberta-xl", "xmod", "bridgetower_text_model", "altclip_text_model",
    "clap_text_model",
}  # fmt: skip
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu", "gelu_python": "gelu"}


@dataclass
class Tensor:
    """A tensor of a side.

    Attributes:
        value: its value; for a target, before the warm start.
        holder: the class of its module; "" if unknown.
        code: source code of the modules around it, if available.
        renamed: whether its name is from `rename=`.
    """

    value: Value
    holder: str = ""
    code: str = ""
    renamed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


@dataclass
class Side:
    """A source or a target.

    Attributes:
        tensors: name → tensor; in the order of registration if `ordered`.
        config: its config, if known.
        kind: its class in reports; sides of one kind compute the same with the same weights and settings.
        settings: name → value of settings that change the outputs and that no tensor shows.
        aliases: second names of a tensor → the first.
        module: the model itself, if there is one that can run.
        probes: what running it showed of its fused projections, see `probing`.
    """

    tensors: dict[str, Tensor]
    config: Any = None
    kind: str = ""
    ordered: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    module: torch.nn.Module | None = None
    probes: dict[Any, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        return getattr(self.config, "model_type", "") or ""


def names_in_order(model: torch.nn.Module) -> dict[int, tuple[str, ...]]:
    """`tied_names`; of a parameter that is tied, the name in an embedding first, as it says what the parameter is for."""
    modules = dict(model.named_modules(remove_duplicate=False))

    def elsewhere(name: str) -> bool:
        return not isinstance(modules.get(name.rpartition(".")[0]), torch.nn.Embedding)

    return {key: tuple(sorted(names, key=elsewhere)) for key, names in tied_names(model).items()}


def own_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a warm start fills: parameters and persistent buffers without constants; tied ones once."""
    saved = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {
        names[0]: parameters[names[0]]
        for names in names_in_order(model).values()
        if parameters[names[0]].is_floating_point()
    }
    norms = ("running_mean", "running_var", "num_batches_tracked")
    return found | {name: b for name, b in model.named_buffers() if name in saved and name.rpartition(".")[2] in norms}


def holders(model: torch.nn.Module) -> dict[str, tuple[str, str]]:
    """Tensor → class of its module, and source code of that module's parent."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name in model.state_dict(keep_vars=True):
        path = name.rpartition(".")[0]
        parent = modules.get(path.rpartition(".")[0])
        found[name] = (
            type(modules[path]).__name__ if path in modules else "",
            source_of(type(parent)) if isinstance(parent, torch.nn.Module) and path else "",
        )
    return found


def made_by(raw: Mapping[str, Any]) -> tuple[Any, dict[str, tuple[str, str]], torch.nn.Module | None]:
    """Config, holders and a model on meta of the transformers class in a `config.json`; empty if there is none."""
    if not isinstance(raw.get("model_type"), str) or raw.get("auto_map"):
        return None, {}, None
    fields = {name: value for name, value in raw.items() if name not in ("model_type", "architectures")}
    try:
        config = AutoConfig.for_model(raw["model_type"], **fields)
        name = (raw.get("architectures") or [""])[0]
        model_class: Any = getattr(transformers, name, None) or transformers.AutoModel._model_mapping[type(config)]
        with init_empty_weights():
            model = model_class(config)
    except Exception:  # a type of another release, or rejected fields: matched by names only
        return None, {}, None
    base = f"{model.base_model_prefix}."
    known = holders(model)
    for seen, held in list(known.items()):  # names in a base model's folder have no prefix, names in a head's have one
        known.setdefault(seen.removeprefix(base), held)
        known.setdefault(base + seen, held)
    return config, known, model


def settings_of(config: Any, model: torch.nn.Module | None) -> dict[str, Any]:
    """Settings from config or modules that change the outputs and that no tensor shows."""
    found: dict[str, Any] = {}

    def first(names: tuple[str, ...]) -> Any:
        for name in names:
            value = getattr(config, name, None)
            if value is not None:
                return value
        for module in model.modules() if model is not None and config is None else ():
            for name in names:
                value = getattr(module, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return None

    found["num_attention_heads"] = first(_HEADS)
    found["num_key_value_heads"] = first(_KV_HEADS) or found["num_attention_heads"]
    found["head_dim"] = first(("head_dim",))
    if model is not None:
        found["rotary_pairs"], found["norm_offset"] = rotary_pairs(model), norm_offset(model)
    if config is None:
        return {name: value for name, value in found.items() if value is not None}
    kind = config.model_type
    stock = type(config).__module__.startswith("transformers.") or kind == "mygpt2"
    found |= scales(config) if stock else {}
    if kind == "falcon" and not config.new_decoder_architecture:
        found["num_key_value_heads"] = 1 if config.multi_query else found["num_attention_heads"]
    if kind == "gpt_bigcode":
        found["num_key_value_heads"] = 1 if config.multi_query else found["num_attention_heads"]
    act = first(("activation_function", "hidden_act", "hidden_activation", "activation"))
    found["activation"] = _ACTIVATIONS.get(act, act)
    found["norm_eps"] = first(("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps"))
    found["positions"] = next((p for p, kinds in _POSITIONS.items() if kind in kinds), None)
    if kind == "mygpt2":
        found["positions"] = config.position_embedding_type
    listed = found["positions"] is not None
    if found.get("rotary_pairs") and not listed and stock:
        found["positions"] = "rope"
    if found["positions"] == "rope" or found.get("rotary_pairs"):
        rope = getattr(config, "rope_parameters", None) or {}
        theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
        found["rope_theta"] = theta or first(("rope_theta", "rotary_emb_base"))
        partial = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
        share = partial or first(("partial_rotary_factor", "rotary_pct"))
        if kind in _ROTARY_DIM and found["num_attention_heads"]:
            share = config.rotary_dim * found["num_attention_heads"] / config.hidden_size if config.rotary_dim else None
        found["rotary_share"] = share or 1.0
    if found["positions"] is not None:
        found["parallel_residual"] = kind in _PARALLEL or bool(getattr(config, "use_parallel_residual", False))
    if kind == "falcon":
        found["parallel_residual"] = bool(config.parallel_attn or config.new_decoder_architecture)
    if listed or kind in _PRE_NORM or kind in _POST_NORM:
        found["norm_place"] = "after the sum" if kind in _POST_NORM else "before"
    if kind == "opt" and not config.do_layer_norm_before:
        found["norm_place"] = "after the sum"
    if kind == "falcon" and config.alibi:
        found |= {"positions": "alibi", "rotary_pairs": None}
    found["sliding_window"] = first(("sliding_window",)) if getattr(config, "use_sliding_window", True) else None
    if stock or kind == "mybert":
        found["position_offset"] = _OFFSETS.get(kind, 0)
    if kind in _AFTER_PADDING:
        found["position_offset"] = (config.pad_token_id or 0) + 1
    found["normalised_top_k"] = True if kind == "mixtral" else getattr(config, "norm_topk_prob", None)
    return {name: value for name, value in found.items() if value is not None}


def second_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name → an earlier name of a tensor that shares its memory."""
    if isinstance(tensors, Checkpoint):
        return {name: first for name, first in tensors.aliases.items() if name != first}
    first: dict[tuple, str] = {}
    found = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(key, name) != name:
            found[name] = first[key]
    return found


def pairs_of(names: Mapping[str, Any]) -> dict[str, str]:
    """Names of weight-norm tensors → their names as `weight_g` and `weight_v`."""
    named = {}
    for name in names:
        found = _PAIR.match(name)
        if found is None:
            continue
        letter = found[2] or "gv"[int(found[3])]
        other = {
            "g": f"{found[1]}weight_v" if found[2] else f"{found[1]}parametrizations.weight.original1",
            "v": f"{found[1]}weight_g" if found[2] else f"{found[1]}parametrizations.weight.original0",
        }[letter]
        if other in names:
            named[name] = f"{found[1]}weight_{letter}"
    return named


def joined_pairs(tensors: dict[str, Tensor], keep: set[str]) -> dict[str, Tensor]:
    """Replace weight-norm pairs by their weight, g · v / |v|, except for those in `keep`."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        front = name[: -len("weight_g")]
        if name in keep or not name.endswith(("weight_g", "weight_v")) or f"{front}weight_v" not in tensors:
            made[name] = tensor
        elif name.endswith("weight_v"):
            length = tensors[f"{front}weight_g"].value
            weight = tensor.value.then("weight_norm resolved", partial(_weight, length=length), using=(length,))
            made[f"{front}weight"] = Tensor(weight, tensor.holder, tensor.code, tensor.renamed)
    return made


def _weight(v: torch.Tensor, length: Value) -> torch.Tensor:
    g = length.compute().double()
    return (g * v.double() / norm_like(v.double(), g.shape)).to(v.dtype)


def norm_like(v: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The norms of `v` over the dimensions where `shape` is 1."""
    over = [i for i, size in enumerate(shape) if size == 1] or list(range(v.ndim))
    return v.norm(dim=over, keepdim=True).view(shape)


def refuse_meta(model: torch.nn.Module) -> None:
    """Check that a model has data.

    Raises:
        CheckpointError: it has parameters without data.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CheckpointError(
            f"the {type(model).__name__} has parameters without data (meta device, or offloaded): load it first"
        )

"""Base classes of configs and models, and checks of a model's inputs.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

import inspect
import os
from collections.abc import Callable
from itertools import islice
from operator import is_
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules import module as module_globals
from transformers import PretrainedConfig
from transformers.utils import logging

from .compat import BridgedModel, make_importable, readable

logger = logging.get_logger(__name__)


class Plan:
    """A parallel plan computed from a config's fields. It reads like an attribute and is never saved with the config.

    A plan that is set on the config itself, for example by its `config.json`, takes precedence.
    """

    def __init__(self, make: Callable[[Any], dict[str, Any]]):
        self.make, self.__doc__ = make, make.__doc__

    def __get__(self, config: Any, owner: Any = None) -> Any:
        return self if config is None else self.make(config)


def is_placeholder(module: nn.Module) -> bool:
    """Whether this is a placeholder (a subclass of `Identity`) of pipeline parallelism for a module on another stage."""
    return isinstance(module, nn.Identity) and type(module) is not nn.Identity


class MyPretrainedConfig(PretrainedConfig):
    """Base class of both configs: a complete `auto_map`, and checks of the fields that both have.

    `AUTO_MAP` names the class for every Auto class that the model supports. It is written to each saved `config.json`,
    so that every one of these Auto classes loads the folder, whichever head was saved. Subclasses do not inherit it:
    the named classes accept only the config that declares it.
    """

    AUTO_MAP: ClassVar[dict[str, str]] = {}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}  # field: its allowed values

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # 5.4 and newer turn a config into a dataclass, whose generated `__init__` would replace an inherited one
        cls.__init__ = cls.__init__
        super().__init_subclass__(**kwargs)
        make_importable(cls)

    def _finish_init(self, auto_map: dict[str, Any] | None, **fields: Any) -> None:
        # Called after `PretrainedConfig.__init__`, which sets or drops some of these fields, depending on the release.
        for name, value in fields.items():
            setattr(self, name, value)
        self.auto_map = {**vars(type(self)).get("AUTO_MAP", {}), **(auto_map or {})}
        self.check_consistency()

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # The code is saved in the same folder, so entries name a file there instead of the repo the code came from.
        auto_map = output.pop("auto_map", None) or {}
        if auto_map:
            output["auto_map"] = {k: v.split("--")[-1] if isinstance(v, str) else v for k, v in auto_map.items()}
        return output

    def _require(self, condition: bool, field: str, need: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {field}={getattr(self, field)!r}, but it must be {need}")

    def _require_heads_per_process(self, *fields: str) -> None:
        # set by `from_pretrained`; its tp_plan is a dict if the caller passed a plan
        distributed = getattr(self, "distributed_config", None)
        size = getattr(distributed, "tp_size", None) or 1
        if not isinstance(getattr(distributed, "tp_plan", None), dict):
            for field in fields:
                need = f"a multiple of tp_size={size}: each process gets the same number of heads"
                self._require(getattr(self, field) % size == 0, field, need)

    def check_consistency(self) -> None:
        """Raise a `ValueError` for the first invalid field, with its value and what it must be."""
        for field, choices in self.CHOICES.items():
            self._require(getattr(self, field) in choices, field, f"one of {', '.join(map(repr, choices))}")
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            value = getattr(self, field)
            self._require(isinstance(value, int) and value > 0, field, "a positive integer")
        self._require(self.max_position_embeddings > 0, "max_position_embeddings", "a positive integer")


class MyPreTrainedModel(BridgedModel):
    """Base class of all models here: supported features and weight initialisation."""

    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        make_importable(cls)

    adapt_outputs: Callable | None = None  # set under vLLM only, see vllm_adapter.py
    shifts_labels = False  # whether the output at a token predicts the label of the next token

    def _get_name(self) -> str:
        # With `label_smoothing_factor`, transformers' Trainer shifts labels only for models whose name is in its list
        # of causal models.
        return "GPT2LMHeadModel" if self.shifts_labels else super()._get_name()

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def _init_weights(self, module: nn.Module) -> None:
        # Leaf modules only, with `nn.init` on the parameter itself: the loader guards exactly these calls, so that
        # they never overwrite a weight from a checkpoint.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = self.config.initializer_range
            if getattr(module, "is_residual_projection", False):
                # GPT-2 report, section 2.3: 1/√N for the N projections that write to the residual stream
                std /= (2 * self.config.num_hidden_layers) ** 0.5
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            padding_idx = getattr(module, "padding_idx", None)
            if padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.zeros_(module.weight[padding_idx])
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def _cache_wanted(self, use_cache: bool | None, past_key_values: Any) -> tuple[bool, Any]:
        """Resolve `use_cache` against the config; training with gradient checkpointing uses no cache."""
        if self.gradient_checkpointing and self.training:
            return False, None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return bool(use_cache), past_key_values

    def _outputs_wanted(self, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
        """Resolve both flags against the config; raise if attentions are requested and eager cannot compute them."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        implementation = self.config._attn_implementation
        if output_attentions and implementation != "eager":
            if implementation not in ("sdpa", "flex_attention") and not implementation.startswith("flash_attention"):
                raise ValueError(
                    f"output_attentions=True needs attn_implementation='eager', but this model runs {implementation!r}: "
                    "call model.set_attn_implementation('eager') first"
                )
            logger.warning_once(
                f"attn_implementation={implementation!r} returns no attentions: calls with output_attentions=True run "
                "eager attention instead; model.set_attn_implementation('eager') does so for all calls"
            )
        return bool(output_attentions), bool(output_hidden_states)


NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def make_norm(kind: str, width: int, epsilon: float) -> nn.Module:
    return NORMS[kind](width, eps=epsilon)


def own_layers(layers: Any, depth: int | None = None) -> list[Any]:
    """The first `depth` layers, without the placeholders of other pipeline stages."""
    return [
        layer for layer in islice(layers, depth) if not is_placeholder(layer)
    ]  # `layers[:depth]` would create a ModuleList


def keep_last(count: int, states: list[torch.Tensor], state: torch.Tensor) -> list[torch.Tensor]:
    """`states` with `state` appended, then only the last `count` of them; 0 keeps all."""
    return [*states, state][-count:]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_global_hooks() -> bool:
    """Whether a global hook is registered (`torch.nn.modules.module.register_module_forward_hook`, …)."""
    return bool(
        module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    )


def _is_torchs(function: Any) -> bool:
    """Whether a function was defined in torch: one that was replaced before this file is imported was not."""
    return not inspect.isfunction(function) or inspect.getfile(function).startswith(_TORCH)


_TORCH = os.path.join(torch.__path__[0], "")
_PLACES: list[tuple[Any, str]] = [(nn.functional, name) for name in dir(nn.functional)]
_PLACES = [(owner, name) for owner, name in _PLACES if inspect.isroutine(getattr(owner, name))]
_LAYERS = (nn.Linear, nn.Dropout, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
_PLACES += [(kind, name) for kind in _LAYERS for name in ("forward", "__call__", "_call_impl")]
_OWNERS, _NAMES = zip(*_PLACES)
_FUNCTIONS = tuple(map(getattr, _OWNERS, _NAMES))
_PATCHED_BEFORE = not all(map(_is_torchs, _FUNCTIONS))


def torch_is_patched() -> bool:
    """Whether a function of `torch.nn.functional`, or a layer's `forward`, was replaced, as for Monte Carlo dropout.

    What computes the same as these without calling them, or calls them in a mode, where torch calls a replaced function
    twice, must not be used then.
    """
    return _PATCHED_BEFORE or not all(map(is_, map(getattr, _OWNERS, _NAMES), _FUNCTIONS))


def is_hooked(module: nn.Module) -> bool:
    """Whether calling this module runs more than its class's `forward`: it has hooks, or a replaced `forward`."""
    own = vars(module)  # the HOOKS by name, for speed: this runs for every module at each call
    hooks = own.get("_forward_hooks") or own.get("_forward_pre_hooks")
    return bool("forward" in own or hooks or own.get("_backward_hooks") or own.get("_backward_pre_hooks"))


def check_ids(name: str, ids: torch.Tensor, limit: int, field: str) -> None:
    """Raise a `ValueError` if `ids` leave `[0, limit)`, where `limit` is the config's `field`.

    Checks on the CPU and outside compilation only: elsewhere, reading a value would stall the device or break the graph.
    """
    if ids.device.type != "cpu" or ids.numel() == 0 or not readable():
        return
    low, high = (bound.item() for bound in torch.aminmax(ids))
    if name == "position_ids" and high == ids.shape[-1] - 1:  # probably made by `generate`: report the length
        check_length(high + 1, limit)
    if low < 0 or high >= limit:
        remedy = "; in generate(), shorten the prompt or max_new_tokens" if name == "position_ids" else ""
        raise ValueError(
            f"{name} contains {low if low < 0 else high}, but this model has {field}={limit}: "
            f"valid values are 0 to {limit - 1}{remedy}"
        )


def check_inputs(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Raise a `ValueError` unless exactly one is given, with at least one row of one token."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    given: Any = input_ids if inputs_embeds is None else inputs_embeds
    if readable() and given.numel() == 0:
        raise ValueError(f"the input is empty, of shape {list(given.shape)}: give at least one row of one token")


def check_length(length: int, limit: int) -> None:
    """Raise a `ValueError` if an input of `length` tokens does not fit into a learned table of `limit` positions."""
    if not torch.compiler.is_compiling() and length > limit:
        raise ValueError(
            f"the input is {length} tokens long, but this model's learned position table ends at "
            f"max_position_embeddings={limit}: shorten the input (truncation=True, max_length={limit} in the tokenizer)"
        )

"""What MyGPT2 and MyBert share: the bridge over transformers releases, base classes, norms, checks.

This file is copied as it is into Hub repos and runs there without mymodels. It imports the standard library, torch
and transformers only.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from torch.nn.modules import module as module_globals

# ---- bridge over transformers 4.56 … 5.23: everything that differs between releases is here, and only here ----------

TRANSFORMERS_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if TRANSFORMERS_VERSION < (4, 56):
    raise ImportError(
        f"this model needs transformers 4.56 or newer (tested from 4.56 to 5.23), but transformers "
        f"{transformers.__version__} is installed: run `pip install --upgrade transformers`"
    )

from transformers import PretrainedConfig, PreTrainedModel, masking_utils  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as _ATTENTION_FUNCTIONS  # noqa: E402
from transformers.utils import logging  # noqa: E402


def _bridge_mask(create_mask: Callable) -> Callable:
    """Give a mask builder of transformers one signature, whatever the release.

    Before 5.2 the keyword is `input_embeds`; `cache_position` is needed through 5.3, then ignored, then gone.
    """
    accepted = inspect.signature(create_mask).parameters

    def create(
        config, inputs_embeds, attention_mask, past_key_values=None, position_ids=None, cache_position=None, **kw
    ):
        kw.update(config=config, attention_mask=attention_mask, past_key_values=past_key_values)
        kw.update(position_ids=position_ids, cache_position=cache_position)
        if attention_mask is not None and _under_transform():  # where transformers would read whether it masks anything
            kw.setdefault("and_mask_function", lambda batch, head, query, key: query >= 0)
        kw["inputs_embeds" if "inputs_embeds" in accepted else "input_embeds"] = inputs_embeds
        return create_mask(**{name: value for name, value in kw.items() if name in accepted})

    return create


create_causal_mask = _bridge_mask(masking_utils.create_causal_mask)
create_sliding_window_causal_mask = _bridge_mask(masking_utils.create_sliding_window_causal_mask)

if hasattr(masking_utils, "create_bidirectional_mask"):  # 5.0 and newer
    create_bidirectional_mask = _bridge_mask(masking_utils.create_bidirectional_mask)
else:  # 4.56, 4.57: a causal mask opened in the forward direction too; padding is still taken out

    def create_bidirectional_mask(config, inputs_embeds, attention_mask, **kwargs):
        if attention_mask is None and not kwargs:
            return None
        return create_causal_mask(
            config,
            inputs_embeds,
            attention_mask,
            cache_position=torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device),
            or_mask_function=lambda batch, head, query, key: query >= 0,
            **kwargs,
        )


class _AttentionFunctions50:
    """4.56 … 5.0: the attention functions without `get_interface`, which later releases have."""

    @staticmethod
    def get_interface(name: str, default: Callable) -> Callable:
        return default if name == "eager" else _ATTENTION_FUNCTIONS[name]


# what is registered ("sdpa", "flash_attention_2", an engine's own, …); "eager" is the default that is given
ALL_ATTENTION_FUNCTIONS = (
    _ATTENTION_FUNCTIONS if hasattr(_ATTENTION_FUNCTIONS, "get_interface") else _AttentionFunctions50
)


class _TieWeights53(PreTrainedModel):
    """5.3 only: it forgets, for remote code, that a tied head is absent from the checkpoint, and then leaves it empty."""

    def tie_weights(self, missing_keys: set[str] | None = None, **kwargs: Any) -> None:
        if missing_keys is not None:
            missing_keys.update(name for name in self.all_tied_weights_keys if self.get_parameter(name).is_meta)
        super().tie_weights(missing_keys=missing_keys, **kwargs)


def make_importable(cls: type) -> None:
    """Make the file of a class an attribute of its package, as an import does.

    transformers loads remote code past the import system. Without this, dill does not find the class where its name says,
    and cannot pickle it: `datasets.map` then loses its cache.
    """
    package, _, name = cls.__module__.rpartition(".")
    module, parent = sys.modules.get(cls.__module__), sys.modules.get(package)
    if module is not None and parent is not None and not hasattr(parent, name):
        setattr(parent, name, module)


def rename_while_loading(class_name: str, pattern: str, name: str) -> None:
    """Let checkpoints' tensors have another name in models of this class: for vLLM, which asks for a release that can."""
    try:
        from transformers import conversion_mapping, core_model_loading
    except ImportError:  # before 5.0
        return
    renaming = core_model_loading.WeightRenaming(pattern, name)
    conversion_mapping.register_checkpoint_conversion_mapping(class_name, [renaming], overwrite=True)


# names of tensor-parallel styles; the second one is needed to train, and not known before 5.3
SHARED_OUT_AND_GATHERED = "colwise_gather_output" if TRANSFORMERS_VERSION >= (5, 1) else "colwise_rep"
SHARED_OUT_BY_ROWS = "embedding_rowwise" if TRANSFORMERS_VERSION >= (5, 1) else None
WHOLE_BUT_SEES_A_SHARE = "replicated_with_grad_allreduce" if TRANSFORMERS_VERSION >= (5, 3) else None

_Bridge = _TieWeights53 if TRANSFORMERS_VERSION == (5, 3) else PreTrainedModel

logger = logging.get_logger(__name__)

# ---- end of the bridge -----------------------------------------------------------------------------------------------

# torch 2.13 with MKL, seen here: the first exp or tanh of a process, if it is split over threads, is now and then off
# by up to 2e-3 (the threads race to pick a kernel). Making it once on one element first takes the race away.
for _function in (torch.exp, torch.tanh):
    _function(torch.zeros(1, device="cpu"))


class Plan:
    """A parallel plan that depends on a config's switches: read like an attribute, never saved with the config.

    One that is set on a config, by its `config.json` for example, goes before it.
    """

    def __init__(self, make: Callable[[Any], dict[str, Any]]):
        self.make, self.__doc__ = make, make.__doc__

    def __get__(self, config: Any, owner: Any = None) -> Any:
        return self if config is None else self.make(config)


def is_elsewhere(module: nn.Module) -> bool:
    """Whether pipeline parallelism has put a placeholder here (a kind of `Identity`): the module is on another stage."""
    return isinstance(module, nn.Identity) and type(module) is not nn.Identity


class MyPretrainedConfig(PretrainedConfig):
    """Base of both configs: a complete `auto_map`, GPT-2's and BERT's usual fields checked in one place.

    `AUTO_MAP` names the class behind every Auto class that the model serves. It goes into each saved `config.json`, so
    that any of them loads the folder, whichever head was saved. It is not inherited: these classes take the config that
    declares it, and no other.
    """

    AUTO_MAP: ClassVar[dict[str, str]] = {}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}  # field: its allowed values

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # 5.4 and newer make a dataclass of a config, whose `__init__` would take the place of an inherited one
        cls.__init__ = cls.__init__
        super().__init_subclass__(**kwargs)
        make_importable(cls)

    def _finish_init(self, auto_map: dict[str, Any] | None, **fields: Any) -> None:
        # Called after `PretrainedConfig.__init__`, which sets or drops some of these itself, differently by release.
        for name, value in fields.items():
            setattr(self, name, value)
        self.auto_map = {**vars(type(self)).get("AUTO_MAP", {}), **(auto_map or {})}
        self.check_consistency()

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # The code is saved beside the config, so a class is named by its file there, not by the repo it came from.
        auto_map = output.pop("auto_map", None) or {}
        if auto_map:
            output["auto_map"] = {k: v.split("--")[-1] if isinstance(v, str) else v for k, v in auto_map.items()}
        return output

    def _require(self, condition: bool, field: str, need: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {field}={getattr(self, field)!r}, but it must be {need}")

    def _require_whole_heads(self, *fields: str) -> None:
        # set by `from_pretrained`; None: the plan of this config, a dict: the caller's own
        distributed = getattr(self, "distributed_config", None)
        size = getattr(distributed, "tp_size", None) or 1
        if not isinstance(getattr(distributed, "tp_plan", None), dict):
            for field in fields:
                need = f"a multiple of tp_size={size}: each of these processes takes whole heads"
                self._require(getattr(self, field) % size == 0, field, need)

    def check_consistency(self) -> None:
        """Raise a `ValueError` that names the first field whose value is impossible, with the value and the remedy."""
        for field, choices in self.CHOICES.items():
            self._require(getattr(self, field) in choices, field, f"one of {', '.join(map(repr, choices))}")
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            value = getattr(self, field)
            self._require(isinstance(value, int) and value > 0, field, "a positive integer")
        self._require(self.max_position_embeddings > 0, "max_position_embeddings", "a positive integer")


class MyPreTrainedModel(_Bridge):
    """Base of every model here: what it supports, and how its weights start."""

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

    shifts_labels = False  # whether the output at a token is for the label of the next one

    def _get_name(self) -> str:
        # transformers' Trainer asks for this name when it smooths labels (`label_smoothing_factor`), and shifts them by
        # one for the causal models of its own only.
        return "GPT2LMHeadModel" if self.shifts_labels else super()._get_name()

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def _init_weights(self, module: nn.Module) -> None:
        # `nn.init` on the parameter itself, leaf modules only: the loader guards exactly these calls, so that they
        # never touch a weight that came from a checkpoint.
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

    def _outputs_wanted(self, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
        """Resolve the two flags against the config; refuse attentions under a function that eager cannot stand in for."""
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


def with_eager_attention(config: PretrainedConfig) -> PretrainedConfig:
    """A copy for the making of masks as eager attention wants them."""
    config = copy.copy(config)
    config._attn_implementation_internal = "eager"
    return config


NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def readable() -> bool:
    """Whether values of tensors may be looked at: not while a graph is captured, nor under `torch.func`'s transforms."""
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing() and not _under_transform()


# within `vmap`, `grad`, … of torch.func there is a level; in `vmap` a value cannot be read
_under_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_everywhere() -> bool:
    """Whether a hook is registered for all modules (`torch.nn.modules.module.register_module_forward_hook`, …)."""
    return any(getattr(module_globals, f"_global{hooks}", None) for hooks in HOOKS)


# whose hooks move, gather or cast tensors, whatever their shape; accelerate's replace `forward` for that
NOT_LOOKING = ("accelerate.", "deepspeed.", "torch.distributed.", "transformers.distributed.")
NOT_LOOKING += ("transformers.integrations.tensor_parallel",)


def _made_by(function: Any) -> str:
    function = function.func if isinstance(function, partial) else getattr(function, "__func__", function)
    return str(getattr(function, "__module__", ""))


def is_hooked(module: nn.Module) -> bool:
    """Whether calling this module does more than its class's `forward`: hooks of its own, a replaced `forward`."""
    own = vars(module)
    return "forward" in own or any(own.get(hooks) for hooks in HOOKS)


def is_watched(module: nn.Module) -> bool:
    """Whether it `is_hooked` by others than `NOT_LOOKING`, who might see how tokens are laid out."""
    own = vars(module)
    for hooks in HOOKS:
        if own.get(hooks) and not all(_made_by(hook).startswith(NOT_LOOKING) for hook in own[hooks].values()):
            return True
    forward = own.get("forward")
    if forward is None:
        return False
    if not _made_by(forward).startswith(NOT_LOOKING):
        return True
    hook, before = (
        own.get("_hf_hook"),
        own.get("_old_forward"),
    )  # accelerate's: a caller's own may be among them, or below
    replaced_before = before is not None and getattr(before, "__func__", None) is not type(module).forward
    parts = getattr(hook, "hooks", (hook,))
    return replaced_before or any(not type(part).__module__.startswith("accelerate.") for part in parts if part)


def served_class(config: PretrainedConfig) -> str | None:
    """Under vLLM, which builds the base model alone and does a head's work itself: the class that was saved, by name."""
    if config._attn_implementation != "vllm":
        return None
    return config.architectures[0] if config.architectures else ""


class _FirstTokenLinear(nn.Linear):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states[:, 0])


def make_classifier(config: PretrainedConfig, bias: bool = True) -> nn.Linear:
    """A head from the hidden states to the labels.

    To vLLM's, pooled vectors come as `[sequences, 1, width]`: it is made for heads that pick the first token themselves.
    """
    head = nn.Linear if served_class(config) is None else _FirstTokenLinear
    return head(config.hidden_size, config.num_labels, bias=bias)


def check_ids(name: str, ids: torch.Tensor, limit: int, field: str) -> None:
    """Raise a `ValueError` if `ids` leave `[0, limit)`, where `limit` is the config's `field`.

    On the CPU and outside compilation only: elsewhere reading a value would stall the device or break the graph.
    """
    if ids.device.type != "cpu" or ids.numel() == 0 or not readable():
        return
    low, high = (bound.item() for bound in torch.aminmax(ids))
    if name == "position_ids" and high == ids.shape[-1] - 1:  # made by `generate` perhaps, and not by its caller
        check_length(high + 1, limit)
    if low < 0 or high >= limit:
        remedy = "; in generate(), shorten the prompt or max_new_tokens" if name == "position_ids" else ""
        raise ValueError(
            f"{name} contains {low if low < 0 else high}, but this model has {field}={limit}: "
            f"valid values are 0 to {limit - 1}{remedy}"
        )


def check_not_empty(given: torch.Tensor) -> None:
    """Raise a `ValueError` if an input `[batch, length, …]` has no rows or no tokens."""
    if readable() and given.numel() == 0:
        raise ValueError(f"the input is empty, of shape {list(given.shape)}: give at least one row of one token")


def check_length(length: int, limit: int) -> None:
    """Raise a `ValueError` if an input of `length` tokens does not fit into a learned table of `limit` positions."""
    if not torch.compiler.is_compiling() and length > limit:
        raise ValueError(
            f"the input is {length} tokens long, but this model's learned position table ends at "
            f"max_position_embeddings={limit}: shorten the input (truncation=True, max_length={limit} in the tokenizer)"
        )

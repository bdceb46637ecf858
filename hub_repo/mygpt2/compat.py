"""The bridge over transformers 4.56 … 5.23: everything that differs between releases is here, and only here.

This file is copied as it is into Hub repos and runs there without mymodels. It imports the standard library, torch
and transformers only.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers

TRANSFORMERS_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if TRANSFORMERS_VERSION < (4, 56):
    raise ImportError(
        f"this model needs transformers 4.56 or newer (tested from 4.56 to 5.23), but transformers "
        f"{transformers.__version__} is installed: run `pip install --upgrade transformers`"
    )

from transformers import PreTrainedModel, masking_utils  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as _ATTENTION_FUNCTIONS  # noqa: E402


def readable() -> bool:
    """Whether values of tensors may be looked at: not while a graph is captured, nor under `torch.func`'s transforms."""
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing() and _interpreter() is None


def under_transform() -> bool:
    """Whether this runs within `vmap`, `grad`, … of torch.func, where a value cannot be read."""
    return not torch.compiler.is_compiling() and _interpreter() is not None


_interpreter = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


# not `is_compiling`, where a graph may break to look at a value; the first: torch 2.7 and newer
EXPORTING = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


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
        if attention_mask is not None and under_transform():  # where transformers would read whether it masks anything
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
TRANSFORMERS_ATTENTION = (
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

BridgedModel = _TieWeights53 if TRANSFORMERS_VERSION == (5, 3) else PreTrainedModel

# torch 2.13 with MKL, seen here: the first exp or tanh of a process, if it is split over threads, is now and then off
# by up to 2e-3 (the threads race to pick a kernel). Making it once on one element first takes the race away.
for _function in (torch.exp, torch.tanh):
    _function(torch.zeros(1, device="cpu"))

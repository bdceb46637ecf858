"""Compatibility with transformers 4.56 to 5.23: the only file whose code depends on the release.

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
    """Whether tensor values can be read: not during graph capture, nor inside a `torch.func` transform."""
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing() and _interpreter() is None


def under_transform() -> bool:
    """Whether this runs inside a `torch.func` transform (`vmap`, `grad`, …), where values cannot be read."""
    return not torch.compiler.is_compiling() and _interpreter() is not None


_interpreter = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


# `is_exporting` (torch 2.7 and newer) is false under torch.compile, whose graph may break to read a value
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
        if attention_mask is not None and under_transform():  # a mask function keeps transformers from reading the mask
            kw.setdefault("and_mask_function", lambda batch, head, query, key: query >= 0)
        kw["inputs_embeds" if "inputs_embeds" in accepted else "input_embeds"] = inputs_embeds
        return create_mask(**{name: value for name, value in kw.items() if name in accepted})

    return create


create_causal_mask = _bridge_mask(masking_utils.create_causal_mask)
create_sliding_window_causal_mask = _bridge_mask(masking_utils.create_sliding_window_causal_mask)

if hasattr(masking_utils, "create_bidirectional_mask"):  # 5.0 and newer
    create_bidirectional_mask = _bridge_mask(masking_utils.create_bidirectional_mask)
else:  # 4.56, 4.57: a causal mask that also allows later tokens; padding stays masked

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
    """4.56 to 5.0: adds `get_interface`, which later releases have."""

    @staticmethod
    def get_interface(name: str, default: Callable) -> Callable:
        return default if name == "eager" else _ATTENTION_FUNCTIONS[name]


# all registered functions ("sdpa", "flash_attention_2", …); "eager" is not registered: it is `default`
TRANSFORMERS_ATTENTION = (
    _ATTENTION_FUNCTIONS if hasattr(_ATTENTION_FUNCTIONS, "get_interface") else _AttentionFunctions50
)


class BridgedModel(PreTrainedModel):
    """`PreTrainedModel`; for remote code, 5.3 alone does not list a tied head as missing, and leaves it uninitialised."""

    if TRANSFORMERS_VERSION == (5, 3):

        def tie_weights(self, missing_keys: set[str] | None = None, *args: Any, **kwargs: Any) -> None:
            if missing_keys is not None:
                missing_keys.update(name for name in self.all_tied_weights_keys if self.get_parameter(name).is_meta)
            super().tie_weights(missing_keys, *args, **kwargs)


def make_importable(cls: type) -> None:
    """Set the module of a class as an attribute of its package, as an import does.

    transformers loads remote code without the import system. Without this attribute, dill cannot look up the class by
    its name, and so cannot pickle it: `datasets.map` then loses its cache.
    """
    package, _, name = cls.__module__.rpartition(".")
    module, parent = sys.modules.get(cls.__module__), sys.modules.get(package)
    if module is not None and parent is not None and not hasattr(parent, name):
        setattr(parent, name, module)


def rename_while_loading(class_name: str, pattern: str, name: str) -> None:
    """When a model of this class is loaded, rename checkpoint tensors that match `pattern`. Does nothing before 5.0."""
    try:
        from transformers import conversion_mapping, core_model_loading
    except ImportError:  # before 5.0
        return
    renaming = core_model_loading.WeightRenaming(pattern, name)
    conversion_mapping.register_checkpoint_conversion_mapping(class_name, [renaming], overwrite=True)


# tensor-parallel styles, whose names differ by release; None: the release has no such style
TP_COLWISE_GATHERED = "colwise_gather_output" if TRANSFORMERS_VERSION >= (5, 1) else "colwise_rep"
TP_EMBEDDING_ROWWISE = "embedding_rowwise" if TRANSFORMERS_VERSION >= (5, 1) else None
TP_REPLICATED = "replicated_with_grad_allreduce" if TRANSFORMERS_VERSION >= (5, 3) else None

# torch 2.13 with MKL: the first multi-threaded exp or tanh of a process is sometimes wrong by up to 2e-3, because its
# threads race to select a kernel. One call on a single element selects it without a race.
for _function in (torch.exp, torch.tanh):
    _function(torch.zeros(1, device="cpu"))

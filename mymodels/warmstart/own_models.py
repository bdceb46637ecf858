"""The class of MyGPT2 or MyBert that a warm start creates, and config fields from a tokenizer."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import CheckpointError
from ..models import modeling_mybert, modeling_mygpt2
from .lazy_tensor import Value
from .sources import Source

_MODULES = {"mygpt2": modeling_mygpt2, "mybert": modeling_mybert}
_NAMES = {"mygpt2": "MyGPT2", "mybert": "MyBert"}
_HEADS = {
    "mygpt2": ("Model", "ForCausalLM", "ForSequenceClassification"),
    "mybert": ("Model", "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering"),
}
_STOCK_HEADS = {"LMHeadModel": "ForCausalLM", "DoubleHeadsModel": "ForCausalLM", "ForPreTraining": "ForMaskedLM"}


def token_fields(tokenizer: PreTrainedTokenizerBase, model_type: str) -> dict[str, Any]:
    """The config fields that follow from a tokenizer."""
    fields: dict[str, Any] = {"vocab_size": len(tokenizer)}
    names = ("bos_token_id", "eos_token_id", "pad_token_id") if model_type == "mygpt2" else ("pad_token_id",)
    return fields | {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None) is not None}


def model_class_of(model_type: str, head: str | None, source: Source) -> type[PreTrainedModel]:
    """The class with the given head, or with that of the source."""
    known = _HEADS[model_type]
    if head is not None and head not in known:
        raise CheckpointError(f"head={head!r}: {_NAMES[model_type]} has {', '.join(known)}")
    if head is None:
        stock = "|".join(map(re.escape, _STOCK_HEADS))
        name = (source.raw_config.get("architectures") or [""])[0]
        found = re.search(rf"(For[A-Z]\w+|{stock}|Model)$", name)
        head = _STOCK_HEADS.get(found[1], found[1]) if found else _head_of(source.tensors)
    return getattr(_MODULES[model_type], _NAMES[model_type] + (head if head in known else "Model"))


def _head_of(tensors: Mapping[str, Value]) -> str:
    """The head shown by tensors, if no config names it; a language model's head may be tied and so not stored."""
    if "score.weight" in tensors:
        return "ForSequenceClassification"
    if "model.embed_tokens.weight" in tensors:
        return "ForCausalLM"
    if "cls.predictions.transform.dense.weight" in tensors:
        return "ForMaskedLM"
    if "qa_outputs.weight" in tensors:
        return "ForQuestionAnswering"
    pooled = "classifier.weight" in tensors and "bert.pooler.dense.weight" in tensors
    return "ForSequenceClassification" if pooled else "Model"

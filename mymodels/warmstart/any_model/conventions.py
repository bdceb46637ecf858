"""Conventions in a model's code that its tensors do not show: rotary pairs, norms of 1 + weight, scales."""

import inspect
import re
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch

# code that pairs the dimensions of a head for rotary positions
_INTERLEAVED = re.compile(
    r"view_as_complex|rotate_every_two|\[\.\.\., *[01]?::2\]|unflatten\(-1, *\(-1, *2\)\)|repeat_interleave\(2\b|"
    r"(?:reshape|view)\([^()]*\.shape\[:-1\], *-1, *2\)"
)
_HALVES = re.compile(r"\[\.\.\., *: *[^\]:,]+// *2 *\]|\[\.\.\., *: *(?:half|d2|mid)\w*\]|rotate_half")
_SPLIT = re.compile(
    r"\.(?:chunk|split)\(|\[\.\.\., *: *\w+ *\]"
)  # in a function that rotates, not in a forward that splits q, k and v
_ROTARY = re.compile(r"\b(?:cos|sin|freqs\w*|rotate_half|rotate_every_two)\b|rotary|rope", re.IGNORECASE)
_ROTARY_NAME = re.compile(r"rot|rope", re.IGNORECASE)
_PLUS_ONE = re.compile(r"\b1(?:\.0)? *\+ *self\.(?:weight|scale|gamma)\b|self\.(?:weight|scale|gamma)[\w.()]* *\+ *1\b")
_SOURCES: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_SCALED_BY_WIDTH = {"gemma", "gemma2", "gemma3_text", "recurrent_gemma", "vaultgemma", "t5gemma"}


def rotary_pairs(model: torch.nn.Module) -> str | None:
    """How a model pairs the dimensions of a head for rotary positions, from its source code.

    Returns:
        `"halves"`: i with i + d/2 (GPT-NeoX, Llama in transformers); `"interleaved"`: 2i with 2i + 1 (GPT-J, Meta's
        Llama); None: no rotary positions, no source code, or both ways in it.

    Example:
        >>> rotary_pairs(LlamaForCausalLM(config))
        'halves'
    """
    functions: set[str] = set()
    forwards: set[str] = set()
    for name, text in _rotary_code({type(module) for module in model.modules()}):
        found = forwards if name == "forward" else functions
        if _INTERLEAVED.search(text):
            found.add("interleaved")
        elif _HALVES.search(text) or (name != "forward" and _SPLIT.search(text)):
            found.add("halves")
    found = functions or forwards
    return next(iter(found)) if len(found) == 1 else None


def _rotary_code(classes: Iterable[type]) -> Iterator[tuple[str, str]]:
    """Source of functions that rotate queries and keys, or of a `forward` that does it inline."""
    pending: list[Any] = [
        function for cls in classes if not cls.__module__.startswith("torch.") for function in _methods(cls)
    ]
    done: set[CodeType] = set()
    while pending:
        function = pending.pop()
        if function.__code__ in done:
            continue
        done.add(function.__code__)
        owner = function.__qualname__.rpartition(".")[0].rpartition(".")[2]
        for name in _names(function.__code__):
            called = function.__globals__.get(name)
            near = isinstance(called, FunctionType) and called.__module__ == function.__module__
            if isinstance(called, FunctionType) and (near or _ROTARY_NAME.search(name)):
                pending.append(called)
        named = any(_ROTARY_NAME.search(name) for name in (function.__name__, owner))
        text = source_of(function)
        # code that only computes or passes on angles pairs nothing
        if "view_as_complex" in text or (_ROTARY.search(text) and _turns(text)):
            yield "" if named else "forward", text


def _turns(text: str) -> bool:
    return bool(re.search(r"\bcos\w*\b|\bfreqs\w*\b|rotate_half|rotate_every_two|def \w*rot\w*", text)) and bool(
        re.search(r"stack\(|cat\(", text)
    )


def _methods(cls: type) -> Iterator[FunctionType]:
    for owner in cls.__mro__:
        if owner.__module__.startswith("torch.") or owner is object:
            continue
        for member in vars(owner).values():
            member = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
            member = inspect.unwrap(member) if callable(member) else member
            if isinstance(member, FunctionType):
                yield member


def _names(code: CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*(_names(const) for const in inner))


def source_of(thing: Any) -> str:
    """The source text of a function or class, "" if there is none.

    Read once: to find it takes a millisecond or two, and a model has hundreds of functions.
    """
    if thing not in _SOURCES:
        try:
            _SOURCES[thing] = inspect.getsource(thing)
        except (OSError, TypeError):
            _SOURCES[thing] = ""
    return _SOURCES[thing]


def norm_offset(model: torch.nn.Module) -> float | None:
    """What a model's norms add to their weights (1 in Gemma); None if they differ or there are none."""
    kinds = {type(module) for module in model.modules() if "Norm" in type(module).__name__}
    found = {1.0 if _PLUS_ONE.search("" if k.__module__.startswith("torch.") else source_of(k)) else 0.0 for k in kinds}
    return next(iter(found)) if len(found) == 1 else None


def scales(config: Any) -> dict[str, float]:
    """Factors of a transformers config that stand between the weights; a cap of 0 is none."""
    kind = config.model_type
    width = float(getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 1)
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or width // heads
    embedding = getattr(config, "embedding_multiplier", None) or 1.0
    if kind in _SCALED_BY_WIDTH or getattr(config, "scale_embedding", False):
        embedding = width**0.5
    attention = getattr(config, "attention_multiplier", None)
    if getattr(config, "query_pre_attn_scalar", None):
        attention = config.query_pre_attn_scalar**-0.5
    own = getattr(config, "attn_config", None)
    attention = attention or getattr(own, "softmax_scale", None)
    if kind in ("gpt_neo", "t5", "mt5", "umt5") or getattr(config, "scale_attn_weights", True) is False:
        attention = 1.0
    logits = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    if kind in ("t5", "mt5", "umt5", "longt5", "switch_transformers") and config.tie_word_embeddings:
        logits = width**-0.5
    return {
        "embedding_scale": float(embedding),
        "attention_scale": float(attention or head_dim**-0.5),
        "logit_scale": float(logits),
        "residual_scale": float(getattr(config, "residual_multiplier", None) or 1.0),
        "logit_cap": float(getattr(config, "final_logit_softcapping", None) or 0.0),
        "attention_cap": float(getattr(config, "attn_logit_softcapping", None) or 0.0),
    }


def permutation(dim: int, rotated: int, *, to: str) -> list[int]:
    """The order of a head's `dim` rows for the other pairing; only the first `rotated` rows change.

    Example:
        >>> permutation(6, 4, to="interleaved")
        [0, 2, 1, 3, 4, 5]
    """
    half = rotated // 2
    if to == "interleaved":
        front = [i // 2 + (i % 2) * half for i in range(rotated)]
    else:
        front = [2 * (i % half) + i // half for i in range(rotated)]
    return [*front, *range(rotated, dim)]

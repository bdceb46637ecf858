"""Errors of transformers' loaders as one sentence, and checks of what they loaded."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..messages import first_line


@contextlib.contextmanager
def clear_load_errors(source: Any) -> Iterator[None]:
    """Around `from_pretrained`: errors other than `OSError` become a `ValueError` of one line.

    Raises:
        ValueError: the weights are damaged, a package is missing, or transformers does not know the folder's format.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{source} has damaged weights ({error}): `mymodels check {source}` lists the files"
        ) from error
    except ImportError as error:  # of a quantiser, or of the folder's code
        raise ValueError(f"{source} needs a package that is not installed: {first_line(error)}") from error
    except ValueError as error:
        raise (
            remote_code_error(source) if needs_trust_remote_code(error) else ValueError(first_line(error))
        ) from error
    except (RuntimeError, TypeError, AttributeError, LookupError, NameError, AssertionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{source} cannot be loaded, its class or config raises {reason}") from error


def needs_trust_remote_code(error: Exception) -> bool:
    """Whether transformers refused to run remote code without `trust_remote_code=True`."""
    return "trust_remote_code" in str(error)


def remote_code_error(source: Any) -> ValueError:
    """The error for a model with remote code that is not trusted."""
    return ValueError(
        f"{source} has code of its own, which would run: read it, then pass --trust-remote-code "
        "(trust_remote_code=True)"
    )


def refuse_plain_module(model: Any, verb: str) -> None:
    """Refuse an `nn.Module` that is not a transformers model, so has no config, tokenizer or Auto class.

    Raises:
        ValueError: `model` is one; `verb` is named in the message.
    """
    if isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{verb} needs a transformers model, but {type(model).__name__} is a plain nn.Module: convert it with `mymodels adopt`"
        )


def refuse_other_class(model: PreTrainedModel, auto_map: Any, auto_class: str, source: Any) -> None:
    """Refuse a class of transformers that was loaded because a folder's own code has none for this Auto class.

    Raises:
        ValueError: the folder's `auto_map` names models, but `model` is of a class of transformers.
    """
    own = {auto: target for auto, target in auto_map.items() if str(auto).startswith("AutoModel")} if auto_map else {}
    if own and type(model).__module__.startswith("transformers.models."):
        raise ValueError(
            f"{source} has code of its own, for {', '.join(sorted(own))}, but none for {auto_class}: transformers' "
            f"{type(model).__name__} would be used instead, so choose another --task"
        )


def refuse_mismatched(info: Mapping[str, Any], source: Any) -> None:
    """Refuse a model of which a tensor has another shape than its config says.

    Args:
        info: the loading info of `from_pretrained(…, ignore_mismatched_sizes=True, output_loading_info=True)`.
        source: what was loaded, for the message.

    Raises:
        ValueError: a tensor has another shape.
    """
    if not info["mismatched_keys"]:
        return
    first, *others = sorted(info["mismatched_keys"])
    name, *shapes = [first] if isinstance(first, str) else first  # 4.x: only the name
    reason = " has the shape {}, but {} by config.json".format(*map(list, shapes)) if shapes else " has another shape"
    more = f" (and {len(others)} more)" if others else ""
    raise ValueError(f"{source}: {name}{reason}{more}: config.json or the weights belong to another model")


def embedded_tokens(model: PreTrainedModel) -> int | None:
    """The number of tokens that a model has embeddings for; None if neither the model nor its config shows it."""
    with contextlib.suppress(NotImplementedError, AttributeError, StopIteration):  # a custom class need not have it
        return next(model.get_input_embeddings().parameters()).shape[0]
    return getattr(model.config, "vocab_size", None)


def fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Any, remedy: str) -> None:
    """Check that the tokenizer fits the model; let it pad with its end-of-text token if it has no padding token.

    Raises:
        ValueError: the tokenizer has more tokens than the model embeddings (`remedy` says what to do), or no token can pad.
    """
    rows = embedded_tokens(model)
    if rows is not None and len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but {type(model).__name__} has embeddings for {rows}: {remedy}"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {source} has no token to pad with: set its pad_token and save it")
        tokenizer.pad_token = tokenizer.eos_token

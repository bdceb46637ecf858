"""What transformers says of a folder that it cannot load, in one sentence."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..messages import first_line


@contextlib.contextmanager
def clear_load_errors(source: Any) -> Iterator[None]:
    """Around `from_pretrained`: errors of other kinds than `OSError` become a `ValueError` of one line.

    Raises:
        ValueError: the weights are broken, a package is missing, or the folder is none that transformers knows.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{source} has broken weights ({error}): `mymodels check {source}` says which") from error
    except ImportError as error:  # of a quantiser, or of code that the folder brings
        raise ValueError(f"{source} needs a package that is not here: {first_line(error)}") from error
    except ValueError as error:
        raise (
            remote_code_error(source) if needs_trust_remote_code(error) else ValueError(first_line(error))
        ) from error
    except (RuntimeError, TypeError, AttributeError, LookupError, NameError, AssertionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{source} cannot be loaded, its class or its config fails with {reason}") from error


def needs_trust_remote_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def remote_code_error(source: Any) -> ValueError:
    return ValueError(
        f"{source} brings code of its own, which would be run: read it, then pass --trust-remote-code "
        "(trust_remote_code=True)"
    )


def refuse_plain_module(model: Any, verb: str) -> None:
    """Raises:
    ValueError: `model` is a module that is no transformers model, which has no config, no tokenizer and no Auto class.
    """
    if isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{verb} takes a transformers model, and {type(model).__name__} is a plain nn.Module: `mymodels adopt` makes one of it"
        )


def refuse_other_class(model: PreTrainedModel, auto_map: Any, auto_class: str, source: Any) -> None:
    """Refuse a class of transformers that stands in for a folder's own code, which has none for this Auto class.

    Raises:
        ValueError: the folder's `auto_map` names models of its own, but `model` is transformers' own class.
    """
    own = {auto: target for auto, target in auto_map.items() if str(auto).startswith("AutoModel")} if auto_map else {}
    if own and type(model).__module__.startswith("transformers.models."):
        raise ValueError(
            f"{source} has code of its own, for {', '.join(sorted(own))}, and none for {auto_class}: transformers' "
            f"{type(model).__name__} would take its place, so choose another --task"
        )


def refuse_mismatched(info: Mapping[str, Any], source: Any) -> None:
    """Raises:
    ValueError: by the loading info of `from_pretrained(…, ignore_mismatched_sizes=True)`, a tensor has another shape.
    """
    if not info["mismatched_keys"]:
        return
    first, *others = sorted(info["mismatched_keys"])
    name, *shapes = [first] if isinstance(first, str) else first  # 4.x: the name alone
    reason = (
        " is saved as {}, but by config.json it is {}".format(*map(list, shapes)) if shapes else " has another shape"
    )
    more = f" (and {len(others)} more)" if others else ""
    raise ValueError(f"{source}: {name}{reason}{more}: config.json or the weights are another model's")


@contextlib.contextmanager
def only_errors_logged(*, progress_bars: bool = True) -> Iterator[None]:
    """Around `from_pretrained`: transformers logs errors only, no table of new weights; the caller reports these.

    Args:
        progress_bars: whether transformers may show them.
    """
    before, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if shown and not progress_bars:
            logging.enable_progress_bar()


def _embedded_tokens(model: PreTrainedModel) -> int | None:
    """How many tokens a model has embeddings for; None if it does not show them and its config does not say."""
    with contextlib.suppress(NotImplementedError, AttributeError, StopIteration):  # a class of one's own need not say
        return next(model.get_input_embeddings().parameters()).shape[0]
    return getattr(model.config, "vocab_size", None)


def fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Any, remedy: str) -> None:
    """Give the tokenizer a token to pad with: the end of text, if it has none, as GPT-2's.

    Raises:
        ValueError: the model has fewer embeddings than the tokenizer tokens (`remedy` says what to do), or no token can pad.
    """
    rows = _embedded_tokens(model)
    if rows is not None and len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but {type(model).__name__} has embeddings for {rows}: {remedy}"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {source} has no token to pad with: set its pad_token and save it")
        tokenizer.pad_token = tokenizer.eos_token

"""The check of the tokenizer: the ids it returns, its special ids, its chat template."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import transformers

from .load_repo import text_config

SENTENCE = "Hello, world! How are you?"
# upper and lower case, digits, punctuation, spaces, other scripts: two tokenizers differ on at least one of them
RECORDED = "Hello, World! It's 2024: naïve café №7,  twoSpaces — 東京 привет\tEnd."
NEEDLE, LATER = "needle", "haystack"


def load_tokenizer(job: dict[str, Any]) -> Any:
    return transformers.AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=True)


def record(job: dict[str, Any]) -> dict[str, Any]:
    """A text and its token ids, for the golden file; empty without a tokenizer."""
    if not job["tokenizer"]:
        return {}
    try:
        tokenizer = load_tokenizer(job)
    except ImportError:  # it needs a package that is not installed
        return {}
    tokens: dict[str, Any] = {"text": RECORDED, "ids": [int(i) for i in tokenizer(RECORDED).input_ids]}
    with contextlib.suppress(Exception):  # a custom tokenizer need not list its tokens
        tokens |= {"size": len(tokenizer), "vocabulary": _digest(tokenizer, len(tokenizer))}
    return {"tokens": tokens}


def run(job: dict[str, Any], events: Any, model: Any, recorded: dict[str, Any] | None = None) -> bool:
    """Check the tokenizer against the loaded model.

    Args:
        recorded: the golden file's `made`, whose `tokens` are compared with the tokenizer's.

    Returns:
        Whether there is a tokenizer and its check passed.
    """
    if not job["tokenizer"]:
        return False
    with events.check("tokenizer") as check:
        check_tokenizer(check, job, model, recorded or {})
    return not check.failed


def check_tokenizer(check: Any, job: dict[str, Any], model: Any, recorded: dict[str, Any]) -> None:
    """Its ids have rows in the embeddings, its special ids are those of the config, its ids are as recorded."""
    tokenizer = load_tokenizer(job)
    ids = tokenizer(SENTENCE).input_ids
    size = embedding_rows(model)
    if not ids:
        check.fail("the tokenizer returns no tokens for an English sentence")
    elif size is not None and max(ids) >= size:
        check.fail(f"the tokenizer returns the token id {max(ids)}, but the model has only {size} embeddings")
    elif size is not None and len(tokenizer) > size:
        check.fail(f"the tokenizer has {len(tokenizer)} tokens, the model's vocab_size is {size}")
    if wrong := _difference_from_recorded(tokenizer, recorded):
        check.fail(wrong)
    for serious, wrong in mismatched_special_ids(model, tokenizer):
        check.fail(wrong) if serious else check.warn(wrong)
    if getattr(tokenizer, "chat_template", None):
        check.fail_if(chat_template_problem(tokenizer))
    if recorded and not isinstance(recorded.get("tokens"), dict):
        check.skip("the golden file has no tokens of a text, so the tokenizer was not compared: record it again")


def embedding_rows(model: Any) -> int | None:
    """The number of input embeddings, or else the config's `vocab_size`."""
    try:
        weight = model.get_input_embeddings().weight
        if weight.dim() == 2:
            return int(weight.shape[0])
    except (AttributeError, NotImplementedError):
        pass
    size = getattr(text_config(model.config), "vocab_size", None)
    return size if isinstance(size, int) else None


def _difference_from_recorded(tokenizer: Any, recorded: dict[str, Any]) -> str:
    tokens = recorded.get("tokens")
    if not isinstance(tokens, dict):
        return ""
    want, got = list(tokens["ids"]), [int(i) for i in tokenizer(tokens["text"]).input_ids]
    if got == want:
        return _other_vocabulary(tokenizer, tokens)
    place = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
    return (
        f"this is not the tokenizer that the golden outputs were recorded with: for the same text it returns {len(got)} "
        f"tokens instead of {len(want)}, the first difference is at position {place}"
    )


def _digest(tokenizer: Any, size: int) -> str:
    """SHA-256 of the tokens with ids below `size`: tokens added later do not change it."""
    held = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i < size)
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def _other_vocabulary(tokenizer: Any, tokens: dict[str, Any]) -> str:
    if "vocabulary" not in tokens or _digest(tokenizer, int(tokens["size"])) == tokens["vocabulary"]:
        return ""
    return (
        "this is not the tokenizer that the golden outputs were recorded with: the ids of the "
        f"{tokens['size']} recorded tokens differ"
    )


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def mismatched_special_ids(model: Any, tokenizer: Any) -> Iterator[tuple[bool, str]]:
    """Special ids in the configs that differ from the tokenizer's: (whether that is a failure, sentence)."""
    config, generation = text_config(model.config), getattr(model, "generation_config", None)
    generates, size = bool(getattr(model, "can_generate", bool)()), embedding_rows(model)

    def outside(number: int) -> bool:
        """Whether there is no such token at all, which `token ids` says by reading."""
        return size is not None and number >= size

    for kind in ("eos", "pad", "bos"):
        own = getattr(tokenizer, f"{kind}_token_id", None)
        named = _ids(getattr(config, f"{kind}_token_id", None))
        more = _ids(getattr(generation, f"{kind}_token_id", None)) if generates else []
        if own is None or not (named or more) or own in [*named, *more]:
            continue
        theirs = (named or more)[0]
        if outside(theirs):
            continue
        file = "config.json" if named else "generation_config.json"
        serious = generates if kind != "pad" else bool(named)  # padding of generation is hidden by the mask
        yield (
            serious,
            f"{kind}_token_id in {file} is {theirs} ({_token_repr(tokenizer, theirs)}), but the {kind} token of the tokenizer "
            f"is {own} ({_token_repr(tokenizer, own)})",
        )
    if getattr(model.config, "is_encoder_decoder", False):
        start = _ids(getattr(generation, "decoder_start_token_id", None)) or _ids(
            getattr(config, "decoder_start_token_id", None)
        )
        special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        if start and special and start[0] not in special and not outside(start[0]):
            what = f"decoder_start_token_id is {start[0]} ({_token_repr(tokenizer, start[0])}), which is not a special token of the tokenizer"
            yield True, what


def _token_repr(tokenizer: Any, number: int) -> str:
    try:
        return repr(tokenizer.convert_ids_to_tokens(number))[:40]
    except Exception:  # beyond the vocabulary
        return "no token"


def chat_template_problem(tokenizer: Any) -> str:
    """A sentence on a chat template that raises, or whose prompt lacks the content of the messages; else ""."""
    import jinja2

    errors: list[Any] = []
    rendered: list[list[bool]] = []  # for each chat: whether each of the user's messages is in the prompt
    last: list[bool] = []  # of a chat of several messages: whether the last one is in the prompt
    for wrap in (str, lambda text: [{"type": "text", "text": text}]):
        for roles in (["user"], ["user", "assistant", "user"], ["system", "user"]):
            words = [NEEDLE, "between", LATER][: len(roles)] if len(roles) != 2 else ["between", NEEDLE]
            chat = [{"role": role, "content": wrap(word)} for role, word in zip(roles, words)]
            try:
                text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
                errors.append(error)
                continue
            if len(roles) == 3:
                last.append(LATER in text)
            rendered.append([word in text for role, word in zip(roles, words) if role == "user"])
    if last and not any(last) and any(map(any, rendered)):
        return "the chat template leaves out the user's last message: the prompt has only the beginning of a chat"
    if any(all(seen) for seen in rendered):
        return ""
    if rendered:
        return "the chat template leaves out the user's message: the prompt does not depend on it"
    first = errors[0]
    line = f" in line {first.lineno}" if getattr(first, "lineno", None) else ""
    return f"the chat template fails on a user's message{line}: {type(first).__name__}: {str(first)[:150]}"

"""Tokenize texts, and choose the collator that makes batches of them."""

from collections.abc import Callable
from typing import Any

from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from .data import Data
from .datasets_io import DataError

_BLOCK = 1024  # the longest block of a language model


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    """The longest example, in tokens.

    Raises:
        ValueError: `max_length` exceeds the limit of the model or its tokenizer.
    """
    config = model.config
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    if getattr(config, "position_embedding_type", "learned") not in ("learned", "absolute"):
        limits[1] = None  # there is no table of positions
    limit = min((n for n in limits if n is not None and n < 10**9), default=_BLOCK)
    if max_length is not None and not 2 < max_length <= limit:
        raise ValueError(f"max_length={max_length}, but this model takes 3 to {limit} tokens")
    return max_length or limit


def _map_splits(data: Data, encode: Callable[[dict[str, list]], dict[str, list]]) -> dict[str, Any]:
    """Split → its rows, encoded in batches and without their own columns."""
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    options: dict[str, Any] = {"batched": True, "load_from_cache_file": False}
    return {
        split: rows.map(encode, remove_columns=rows.column_names, desc=f"encoding {split}", **options)
        for split, rows in splits.items()
        if rows is not None
    }


def encode_classification(data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """Split → unpadded examples with `input_ids`, `labels` and the tokenizer's other outputs."""
    cut = 0

    def encode(rows: dict[str, list]) -> dict[str, list]:
        nonlocal cut
        encoded = tokenizer(rows["text"], truncation=True, max_length=max_length)
        full = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) >= max_length]
        if full:  # of the maximum length: truncated, or exactly that long
            longer = tokenizer([rows["text"][i] for i in full], verbose=False)["input_ids"]
            cut += sum(len(ids) > max_length for ids in longer)
        return {**encoded, "labels": rows["label"]}

    found = _map_splits(data, encode)
    if cut:
        total = sum(len(rows) for rows in found.values())
        data.notes.append(f"{cut} of {total} texts are longer than max_length={max_length} tokens and are truncated")
    return found


def encode_pairs(data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """Split → unpadded examples with `input_ids` and `attention_mask` of the text and `labels` of the target."""
    cut = {"text": 0, "target": 0}

    def encode(rows: dict[str, list]) -> dict[str, list]:
        options = {"truncation": True, "max_length": max_length, "return_token_type_ids": False}
        encoded = tokenizer(rows["text"], **options)
        targets = tokenizer(text_target=rows["target"], **options)["input_ids"]
        for name, found in (("text", encoded["input_ids"]), ("target", targets)):
            full = [row for row, ids in zip(rows[name], found) if len(ids) >= max_length]
            given = {"text" if name == "text" else "text_target": full}
            cut[name] += (
                sum(len(ids) > max_length for ids in tokenizer(**given, verbose=False)["input_ids"]) if full else 0
            )
        return {**encoded, "labels": targets}

    found = _map_splits(data, encode)
    total = sum(len(rows) for rows in found.values())
    for name, count in cut.items():
        if count:
            data.notes.append(
                f"{count} of {total} {name}s are longer than max_length={max_length} tokens and are truncated"
            )
    return found


def encode_blocks(
    data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, *, masked: bool, seed: int
) -> dict[str, Any]:
    """Split → blocks of `max_length` tokens from the concatenated texts; a last incomplete block is dropped.

    Each text ends with the end token, or for a masked model has its special tokens. The validation and test blocks of a
    masked model are masked here, so that every evaluation has the same masks.
    """
    block = min(max_length, _BLOCK)
    end = [] if masked or data.is_running_text or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    between = "\n\n" if data.is_running_text else ""

    def encode(rows: dict[str, list]) -> dict[str, list]:
        texts = [text + between for text in rows["text"]]
        if masked:
            return dict(
                tokenizer(
                    texts,
                    return_special_tokens_mask=True,
                    return_token_type_ids=False,
                    return_attention_mask=False,
                    verbose=False,
                )
            )
        return {
            "input_ids": [ids + end for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
        }

    def join(rows: dict[str, list]) -> dict[str, list]:
        joined = {name: [item for row in column for item in row] for name, column in rows.items()}
        count = len(joined["input_ids"]) // block
        blocks = {name: [items[i * block : (i + 1) * block] for i in range(count)] for name, items in joined.items()}
        if masked:
            return blocks
        # a block's first token is not predicted, but the Trainer would count it in the denominator of the loss
        labels = [[-100, *ids[1:]] for ids in blocks["input_ids"]]
        return blocks | {"attention_mask": [[1] * block] * count, "labels": labels}

    found = {}
    for split, ids in _map_splits(data, encode).items():
        blocks = ids.map(
            join,
            batched=True,
            batch_size=10_000,
            remove_columns=ids.column_names,
            load_from_cache_file=False,
            desc="cutting blocks",
        )
        if not len(blocks):
            tokens = sum(map(len, ids["input_ids"]))
            raise DataError(
                f"{data.name}, {split}: {tokens} tokens do not fill a block of {block}: set a shorter max_length, or add text"
            )
        found[split] = blocks
    if masked:
        for split in found.keys() - {"train"}:
            set_seed(seed)  # the same masks in every run
            found[split] = found[split].map(
                lambda rows: _masked_once(rows, tokenizer),
                batched=True,
                remove_columns=["special_tokens_mask"],
                load_from_cache_file=False,
                desc="masking",
            )
    return found


def _masked_once(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    examples = [{name: column[i] for name, column in rows.items()} for i in range(len(rows["input_ids"]))]
    batch = DataCollatorForLanguageModeling(tokenizer)(examples)
    return {name: batch[name].tolist() for name in ("input_ids", "labels")}


def choose_collator(
    kind: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """The collator of a task: it pads texts (and targets), stacks blocks, or stacks and masks blocks.

    Args:
        kind: a key of `load_base.CLASS_SUFFIXES`.
    """
    if kind == "tokens":
        return DataCollatorForTokenClassification(tokenizer)
    if kind in ("classification", "span"):
        return DataCollatorWithPadding(tokenizer)
    if kind == "seq2seq":  # pads labels with -100 and adds decoder_input_ids
        return DataCollatorForSeq2Seq(tokenizer, model=model)
    if kind == "causal":
        return default_data_collator
    mask = DataCollatorForLanguageModeling(tokenizer)
    return lambda examples: default_data_collator(examples) if "labels" in examples[0] else mask(examples)

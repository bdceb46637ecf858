"""Batches without padding: the examples of a batch concatenated into one row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_KINDS = ("next_token", "token", "sequence")
_NAMES = {"label": "labels", "label_ids": "labels"}


@dataclass
class DataCollatorForPacking:
    """Concatenate the examples of a batch; `position_ids` restart at 0 where an example begins.

    MyGPT2 and MyBert compute the same as for the padded batch: each example attends only to itself, and is pooled and
    classified separately. (transformers' `DataCollatorWithFlattening` does this for causal language models.)

    Args:
        labels: `"next_token"`: a token predicted from the one before it; the first label of an example becomes -100,
            because it would be predicted from the previous example. `"token"`: for masked language models and token
            classification. `"sequence"`: for classifiers.

    Returns (called with a list of examples, each a mapping with `input_ids`, padded or not, and with `labels`, or as
    transformers' collators take it `label` or `label_ids`):
        `input_ids` and `position_ids` `[1, tokens]`, `token_type_ids` alike if the examples have them, and `labels`:
        `[1, tokens]`, or for sequences `[examples, …]`.

    Raises:
        ValueError: an unknown kind of labels; no examples, an example without tokens, or with different numbers of
            labels and tokens.
        KeyError: an example lacks a field of the first one.
    """

    labels: str = "next_token"

    def __post_init__(self) -> None:
        if self.labels not in _KINDS:
            raise ValueError(f"labels={self.labels!r}, but it must be one of {', '.join(map(repr, _KINDS))}")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if not features:
            raise ValueError("there are no examples to pack")
        features = [{_NAMES.get(name, name): value for name, value in example.items()} for example in features]
        per_token = ["input_ids", *(name for name in ("token_type_ids", "labels") if name in features[0])]
        if self.labels == "sequence" and "labels" in per_token:
            per_token.remove("labels")
        pieces: dict[str, list[torch.Tensor]] = {name: [] for name in (*per_token, "position_ids")}
        for number, example in enumerate(features):
            row = {name: torch.as_tensor(example[name]) for name in per_token}
            if "attention_mask" in example:
                kept = torch.as_tensor(example["attention_mask"]).bool()
                row = {name: values[kept] for name, values in row.items()}
            for name, values in row.items():
                if not len(values) or len(values) != len(row["input_ids"]):
                    raise ValueError(
                        f"example {number} of the batch has {len(values)} {name} for {len(row['input_ids'])} tokens: "
                        "leave out empty examples, and pass one for each token"
                    )
                pieces[name].append(values)
            if self.labels == "next_token" and "labels" in row:
                pieces["labels"][-1] = torch.cat((row["labels"].new_tensor([-100]), row["labels"][1:]))
            pieces["position_ids"].append(torch.arange(len(row["input_ids"])))
        batch = {name: torch.cat(values)[None] for name, values in pieces.items()}
        if self.labels == "sequence" and "labels" in features[0]:
            batch["labels"] = torch.stack([torch.as_tensor(example["labels"]) for example in features])
        return batch

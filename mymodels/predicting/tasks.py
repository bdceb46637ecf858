"""What a model is asked for: one class per task, each from a batch of texts to one answer per text."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Texts = Sequence[tuple[str, str | None]]  # each with the second one of its pair
Answer = dict[str, Any]


class Task(ABC):
    """How one kind of head answers.

    Args:
        top_k: how many labels with their scores; 0 for all.
        max_length: tokens that a text is cut to.
        max_new_tokens: of a continuation.
    """

    auto_class = "AutoModel"
    heads: tuple[str, ...] = ()  # ends of the class names in `architectures` that this task is the natural one for
    padding_side = "right"  # positions count from the first token
    takes_pairs = True
    needs_offsets = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        top_k: int | None = None,
        max_new_tokens: int = 50,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.top_k, self.max_new_tokens = max_length, top_k, max_new_tokens
        self.cut = 0  # texts that were longer

    def encode(self, texts: Texts) -> dict[str, Any]:
        """Lists of token ids and what else the tokenizer makes, cut but not padded."""
        firsts, seconds = [text for text, _ in texts], [pair for _, pair in texts]
        options = {"truncation": True, "max_length": self.max_length, "return_offsets_mapping": self.needs_offsets}
        if not any(pair is not None for pair in seconds):
            encoded = dict(self.tokenizer(firsts, **options))
        else:  # a batch may mix texts and pairs, which the tokenizer takes apart only
            rows = [
                dict(self.tokenizer(*([text] if pair is None else [text, pair]), **options)) for text, pair in texts
            ]
            names = sorted(set().union(*rows))
            encoded = {name: [row[name] for row in rows] for name in names}
        full = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) >= self.max_length]
        for i in full:  # as long as can be: cut, or just so long
            whole = self.tokenizer(*(text for text in texts[i] if text is not None), verbose=False)["input_ids"]
            self.cut += len(whole) > self.max_length
        return encoded

    def __call__(self, encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        """Answers to a batch of `encode`'s rows."""
        fill = {
            "input_ids": self.tokenizer.pad_token_id,
            "token_type_ids": self.tokenizer.pad_token_type_id,
            "attention_mask": 0,
        }
        fed = {"attention_mask": [[1] * len(ids) for ids in encoded["input_ids"]], **encoded}
        batch = {
            name: pad_sequence([torch.tensor(row) for row in fed[name]], True, value, self.padding_side)
            for name, value in fill.items()
            if name in fed
        }
        return self.answers({name: tensor.to(self.model.device) for name, tensor in batch.items()}, encoded, texts)

    @abstractmethod
    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        """One to each text, of a batch that is on the model's device."""

    def label(self, number: int) -> str:
        return self.model.config.id2label[number]  # type: ignore[index]


class Classification(Task):
    """`label` and `score` of the best label, and with `top_k` as `scores` so many, the best first.

    Scores are probabilities: a softmax, or for `problem_type="multi_label_classification"` a sigmoid for each label,
    all of which are given. Regression gives the bare `score`.
    """

    auto_class = "AutoModelForSequenceClassification"
    heads = ("ForSequenceClassification",)

    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        logits, config = self.model(**batch).logits.float().cpu(), self.model.config
        if config.problem_type == "regression":
            return [{"score": row[0]} if len(row) == 1 else {"scores": row} for row in logits.tolist()]
        several = config.problem_type == "multi_label_classification" or config.num_labels == 1
        scores = logits.sigmoid() if several else logits.softmax(dim=-1)
        count = min(self.top_k or scores.shape[-1], scores.shape[-1])
        best = scores.topk(count, dim=-1)
        found = []
        for values, numbers in zip(best.values.tolist(), best.indices.tolist()):
            ranked = [{"label": self.label(number), "score": value} for number, value in zip(numbers, values)]
            found.append({**ranked[0], "scores": ranked} if several or self.top_k is not None else ranked[0])
        return found


class TokenClassification(Task):
    """`tokens`: each with its place in the text (`start`, `end`, in characters), `label` and `score`."""

    auto_class = "AutoModelForTokenClassification"
    heads = ("ForTokenClassification",)
    takes_pairs = False
    needs_offsets = True

    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        best = self.model(**batch).logits.float().softmax(dim=-1).cpu().max(dim=-1)
        found = []
        for i, (text, _) in enumerate(texts):
            places = encoded["offset_mapping"][i]
            rows = zip(places, best.indices[i].tolist(), best.values[i].tolist())
            tokens = [
                {"text": text[a:b], "start": a, "end": b, "label": self.label(number), "score": score}
                for (a, b), number, score in rows
                if b > a  # special tokens stand nowhere
            ]
            found.append({"tokens": tokens})
        return found


class Embedding(Task):
    """`embedding`: the model's `pooler_output`, or where it has none the mean of its last hidden states over the tokens."""

    heads = ("Model",)
    pooled = True  # whether the weights of the pooling are the checkpoint's

    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        outputs = self.model(**batch)
        vectors = getattr(outputs, "pooler_output", None) if self.pooled else None
        if vectors is None:
            share = batch["attention_mask"][..., None].float()
            vectors = (outputs.last_hidden_state.float() * share).sum(dim=1) / share.sum(dim=1)
        return [{"embedding": vector} for vector in vectors.float().tolist()]


class Generation(Task):
    """`continuation`: what the model writes after the text, greedily, by the folder's other generation settings."""

    auto_class = "AutoModelForCausalLM"
    heads = ("ForCausalLM", "LMHeadModel")
    padding_side = "left"
    takes_pairs = False

    def encode(self, texts: Texts) -> dict[str, Any]:
        self.tokenizer.truncation_side = "left"  # what is continued is the end
        return super().encode(texts)

    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        batch.pop("token_type_ids", None)
        options = {"max_new_tokens": self.max_new_tokens, "pad_token_id": self.tokenizer.pad_token_id}
        tokens = self.model.generate(**batch, do_sample=False, **options)  # type: ignore[operator]
        tokens = tokens[:, batch["input_ids"].shape[1] :]
        return [{"continuation": text} for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


class Loss(Task):
    """`loss`: the mean cross-entropy of a text's tokens but the first, in nats, and the number of `tokens` it is over."""

    auto_class = "AutoModelForCausalLM"
    takes_pairs = False

    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        batch.pop("token_type_ids", None)
        logits = self.model(**batch, use_cache=False).logits[:, :-1]
        counted = batch["attention_mask"][:, 1:].bool()
        losses = torch.zeros(counted.shape, device=counted.device)
        for row, into, ids, is_token in zip(
            logits, losses, batch["input_ids"][:, 1:], counted
        ):  # one float32 row at a time
            into[is_token] = torch.nn.functional.cross_entropy(row[is_token].float(), ids[is_token], reduction="none")
        counts = counted.sum(dim=1)
        means = losses.sum(dim=1) / counts
        return [
            {"loss": loss if count else None, "tokens": count} for loss, count in zip(means.tolist(), counts.tolist())
        ]


TASKS: dict[str, type[Task]] = {
    "text-classification": Classification,
    "token-classification": TokenClassification,
    "feature-extraction": Embedding,
    "text-generation": Generation,
    "loss": Loss,
}

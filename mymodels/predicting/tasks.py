"""Tasks: one class for each, which answers batches of texts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..forward_calls import accepted, as_mapping, logits_of, takes_padding

Texts = Sequence[tuple[str, str | None]]  # (text, second text of a pair or None)
Answer = dict[str, Any]


class Task(ABC):
    """Base class of the tasks.

    Args:
        top_k: number of labels to return with scores; 0 for all.
        max_length: texts are truncated to this many tokens.
        max_new_tokens: for generated texts.
    """

    auto_class = "AutoModel"
    heads: tuple[str, ...] = ()  # suffixes of classes for which this is the default task
    padding_side = "right"
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
        self.cut = 0  # number of truncated texts

    def encode(self, texts: Texts) -> dict[str, Any]:
        """Lists of token ids and the tokenizer's other outputs, truncated but not padded."""
        firsts, seconds = [text for text, _ in texts], [pair for _, pair in texts]
        options = {"truncation": True, "max_length": self.max_length, "return_offsets_mapping": self.needs_offsets}
        if not any(pair is not None for pair in seconds):
            encoded = dict(self.tokenizer(firsts, **options))
        else:  # a batch may mix texts and pairs, which the tokenizer takes only separately
            rows = [
                dict(self.tokenizer(*([text] if pair is None else [text, pair]), **options)) for text, pair in texts
            ]
            names = sorted(set().union(*rows))
            encoded = {name: [row[name] for row in rows] for name in names}
        full = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) >= self.max_length]
        for i in full:  # of the maximum length: truncated, or exactly that long
            complete = self.tokenizer(*(text for text in texts[i] if text is not None), verbose=False)["input_ids"]
            self.cut += len(complete) > self.max_length
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

    @cached_property
    def pads(self) -> bool:
        """Whether texts of different lengths may be in one batch: `forward` takes an attention mask."""
        return takes_padding(self.model)

    def run(self, batch: dict[str, torch.Tensor], **options: Any) -> Any:
        """The model's outputs for those tensors of the batch, and options, that its `forward` takes."""
        return self.model(**accepted(self.model, {**batch, **options}))

    def logits(self, batch: dict[str, torch.Tensor], dimensions: int, **options: Any) -> torch.Tensor:
        """The logits of a batch, float32.

        Raises:
            ValueError: the model returns none, or with another number of dimensions.
        """
        logits = logits_of(self.run(batch, **options))
        if logits is None or logits.ndim != dimensions:
            shape = "none" if logits is None else f"some of the shape {list(logits.shape)}"
            raise ValueError(
                f"{type(self.model).__name__}.forward returns no logits of {dimensions} dimensions, but {shape}: choose "
                "another --task"
            )
        return logits

    @abstractmethod
    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        """One answer for each text of a batch on the model's device."""

    def generate(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Greedily generated tokens."""
        batch.pop("token_type_ids", None)
        if not self.pads:
            batch.pop("attention_mask", None)
        options = {"max_new_tokens": self.max_new_tokens, "pad_token_id": self.tokenizer.pad_token_id}
        return self.model.generate(**batch, do_sample=False, **options)  # type: ignore[operator]

    def label(self, number: int) -> str:
        return self.model.config.id2label[number]  # type: ignore[index]


class Classification(Task):
    """`label` and `score` of the best label, and with `top_k` the `scores` of that many labels, the best first.

    Scores are probabilities: a softmax, or for `problem_type="multi_label_classification"` the sigmoids of all labels.
    Regression returns only `score`.
    """

    auto_class = "AutoModelForSequenceClassification"
    heads = ("ForSequenceClassification",)

    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        logits, config = self.logits(batch, 2).float().cpu(), self.model.config
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
    """`tokens`: each with `text`, its `start` and `end` in characters, `label` and `score`."""

    auto_class = "AutoModelForTokenClassification"
    heads = ("ForTokenClassification",)
    takes_pairs = False
    needs_offsets = True

    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        best = self.logits(batch, 3).float().softmax(dim=-1).cpu().max(dim=-1)
        found = []
        for i, (text, _) in enumerate(texts):
            places = encoded["offset_mapping"][i]
            rows = zip(places, best.indices[i].tolist(), best.values[i].tolist())
            tokens = [
                {"text": text[a:b], "start": a, "end": b, "label": self.label(number), "score": score}
                for (a, b), number, score in rows
                if b > a  # special tokens have no position in the text
            ]
            found.append({"tokens": tokens})
        return found


class Embedding(Task):
    """`embedding`: the model's `pooler_output`, or else the mean of its last hidden states over the tokens."""

    heads = ("Model",)
    pooled = True  # whether the checkpoint has the pooler's weights

    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        outputs = as_mapping(self.run(batch))
        vectors = outputs.get("pooler_output") if self.pooled else None
        if vectors is None:
            states = outputs.get("last_hidden_state", logits_of(outputs))
            if states is None or states.ndim != 3 or states.shape[:2] != batch["attention_mask"].shape:
                raise ValueError(
                    f"{type(self.model).__name__}.forward returns no hidden state for each token: choose another --task"
                )
            share = batch["attention_mask"][..., None].float()
            vectors = (states.float() * share).sum(dim=1) / share.sum(dim=1)
        return [{"embedding": vector} for vector in vectors.float().tolist()]


class Generation(Task):
    """`continuation`: the text that follows, generated greedily with the folder's other generation settings."""

    auto_class = "AutoModelForCausalLM"
    heads = ("ForCausalLM", "LMHeadModel")
    padding_side = "left"
    takes_pairs = False

    def encode(self, texts: Texts) -> dict[str, Any]:
        self.tokenizer.truncation_side = "left"  # keep the end, which is continued
        return super().encode(texts)

    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        tokens = self.generate(batch)[:, batch["input_ids"].shape[1] :]
        return [{"continuation": text} for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


class TextToText(Task):
    """`generated`: an encoder-decoder's text, generated greedily with the folder's other generation settings."""

    auto_class = "AutoModelForSeq2SeqLM"
    heads = ("ForConditionalGeneration", "ForSeq2SeqLM")
    takes_pairs = False

    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        tokens = self.generate(batch)
        return [{"generated": text} for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


class Span(Task):
    """`answer` to the question `text` in the context `text_pair`, its `start` and `end` there in characters, and `score`.

    The answer is the span of at most `LONGEST` tokens with the largest product of the probabilities of start and end, a
    softmax over the tokens of the context. A context that is too long is truncated, and counted in `cut`.
    """

    auto_class = "AutoModelForQuestionAnswering"
    heads = ("ForQuestionAnswering",)
    LONGEST = 30

    def encode(self, texts: Texts) -> dict[str, Any]:
        rows = []
        for question, context in texts:
            if context is None:
                raise ValueError("a question needs a context: add it as text_pair, or name its field by --pair-column")
            options = {"truncation": "only_second", "max_length": self.max_length, "return_offsets_mapping": True}
            row = self.tokenizer(question, context, **options)
            rows.append({**row, "in_context": [part == 1 for part in row.sequence_ids(0)]})
            if len(row["input_ids"]) >= self.max_length:
                self.cut += len(self.tokenizer(question, context, verbose=False)["input_ids"]) > self.max_length
        return {name: [row[name] for row in rows] for name in rows[0]}

    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        outputs = as_mapping(self.run(batch))
        tensors = [value for value in outputs.values() if isinstance(value, torch.Tensor) and value.ndim == 2]
        named: list[Any] = [outputs.get("start_logits"), outputs.get("end_logits")]
        ends: list[torch.Tensor] = named if "start_logits" in outputs else tensors[:2]
        if len(ends) != 2 or any(end is None or end.shape != batch["input_ids"].shape for end in ends):
            raise ValueError(
                f"{type(self.model).__name__}.forward returns no start_logits and end_logits: choose another --task"
            )
        found: list[Answer] = []
        for i, (_, context) in enumerate(texts):
            hidden = ~torch.tensor(encoded["in_context"][i])
            starts, stops = (end[i, : len(hidden)].float().cpu().masked_fill(hidden, -torch.inf) for end in ends)
            scores = (starts.softmax(0)[:, None] * stops.softmax(0)[None]).triu().tril(self.LONGEST - 1)
            first, last = divmod(int(scores.argmax()), len(hidden))
            start, end = encoded["offset_mapping"][i][first][0], encoded["offset_mapping"][i][last][1]
            score = float(scores[first, last])
            found.append({"answer": str(context)[start:end], "start": start, "end": end, "score": score})
        return found


class Loss(Task):
    """`loss`: the mean cross-entropy of a text's tokens except the first, in nats, and the number of these `tokens`."""

    auto_class = "AutoModelForCausalLM"
    takes_pairs = False

    def answers(self, batch: dict[str, torch.Tensor], encoded: dict[str, Any], texts: Texts) -> list[Answer]:
        batch.pop("token_type_ids", None)
        logits = self.logits(batch, 3, use_cache=False)[:, :-1]
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
    "text2text-generation": TextToText,
    "question-answering": Span,
    "loss": Loss,
}

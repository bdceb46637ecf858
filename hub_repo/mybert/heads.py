"""Task heads as mixins: arguments, losses and outputs. The base model is at `self.base_model`.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from .cpu_kernels import linear_by_onednn, make_activation
from .losses import check_loss_fields, classification_loss
from .padding import may_skip_padding, packed_lengths, unpacked
from .vllm_adapter import FirstTokenLinear, served_class


def make_classifier(config: PretrainedConfig, bias: bool = True) -> nn.Linear:
    """A linear layer from the hidden states to the labels; under vLLM, one that accepts vLLM's pooled vectors."""
    head = nn.Linear if served_class(config) is None else FirstTokenLinear
    return head(config.hidden_size, config.num_labels, bias=bias)


class MyBertPredictionHeadTransform(nn.Module):
    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = make_activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @linear_by_onednn
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


class MyBertLMPredictionHead(nn.Module):
    """The bias is a parameter of this module and not of `decoder`, as in stock checkpoints."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.transform = MyBertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    @linear_by_onednn
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden_states)) + self.bias


class MyBertOnlyMLMHead(nn.Module):
    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.predictions = MyBertLMPredictionHead(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.predictions(hidden_states)


class EncoderHead:
    """The call of an encoder, for a mixin's `forward`."""

    base_model: Any
    config: Any
    training: bool
    loss_function: Any

    def _run_encoder(self, labels: Any, attention_mask: Any, kwargs: dict[str, Any], **inputs: Any) -> Any:
        """The base model's outputs for a head that reads every token. `kwargs`: further arguments of `forward`."""
        skip_padding = may_skip_padding(self, labels, attention_mask, kwargs.pop("skip_padding", None))
        return self.base_model(
            attention_mask=attention_mask, skip_padding=skip_padding, return_dict=True, **inputs, **kwargs
        )


class TokenHead(EncoderHead):
    """A prediction for each token. Subclasses define `logits_of` and, where it differs, `output_class`."""

    output_class: Any = TokenClassifierOutput

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @can_return_tuple
    @linear_by_onednn
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Predict a label, or a token of the vocabulary, for each token. Arguments beyond the base model's:

        Args:
            labels: `[batch, length]` numbers of labels or tokens, -100 is ignored.

        Returns:
            `logits` `[batch, length, labels or vocabulary]`, with `labels` the mean cross-entropy in nats as `loss`.
        """
        outputs = self._run_encoder(
            labels,
            attention_mask,
            kwargs,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        logits = self.logits_of(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            kwargs |= {"vocab_size": self.config.vocab_size, "config": self.config}  # each loss needs one of these
            loss = self.loss_function(logits=logits, labels=labels, **kwargs)
        return self.output_class(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SpanHead(EncoderHead):
    """The start and end of an answer in the text. Subclasses have `qa_outputs`, a linear layer to two numbers."""

    qa_outputs: nn.Module

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Find the answer span. Arguments beyond the base model's:

        Args:
            start_positions, end_positions: `[batch]` token indices of the true answer.

        Returns:
            `start_logits` and `end_logits` `[batch, length]`, with positions the mean of both losses as `loss`.
        """
        kwargs["skip_padding"] = False  # as in stock models, every position can be an answer
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class PooledHead:
    """A classifier or regressor on an encoder's pooled vector. Subclasses have `dropout` and `classifier`."""

    accepts_loss_kwargs = False  # the loss is a mean over examples; the Trainer scales it for gradient accumulation
    base_model: Any
    config: Any
    training: bool
    dropout: nn.Module
    classifier: nn.Module

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify each sequence. Arguments beyond the base model's:

        Args:
            labels: `[batch]` class numbers, `[batch, num_labels]` 0/1 floats (multi-label), or floats (regression),
                depending on `config.problem_type`, which is inferred at the first call if unset, as in transformers.

        Returns:
            `logits` `[batch, num_labels]`, with `labels` the mean `loss`.

        Raises:
            ValueError: in training, `labels` is missing although the config has settings for the loss.
        """
        if labels is None and self.training and torch.is_grad_enabled():
            check_loss_fields(self.config)
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        samples = self.config.multi_sample_dropout if self.training else 1
        all_logits = [self.classifier(self.dropout(outputs.pooler_output)) for _ in range(samples)]
        loss: Any = None
        if labels is not None:
            loss = sum(classification_loss(self.config, logits, labels) for logits in all_logits) / samples
        return SequenceClassifierOutput(
            loss=loss,
            logits=sum(all_logits) / samples if samples > 1 else all_logits[0],
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LastTokenHead:
    """A classifier on the last token of each sequence of a decoder. Subclasses have `score`, a linear layer."""

    accepts_loss_kwargs = False  # as in `PooledHead`
    base_model: Any
    config: Any
    loss_function: Any
    score: nn.Module

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Classify each sequence. Arguments beyond the base model's:

        Args:
            labels: as for `PooledHead`.

        Returns:
            `logits` `[batch, num_labels]` (packed rows: `[sequences, num_labels]`), with `labels` the `loss`.

        Raises:
            ValueError: several rows, and neither `config.pad_token_id` nor `attention_mask` is there to find their ends.
        """
        outputs = self.base_model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        lengths = packed_lengths(position_ids, attention_mask) if past_key_values is None else None
        if lengths is not None:  # packed rows: each sequence in a row of its own
            hidden_states = unpacked(hidden_states, lengths)
            attention_mask = unpacked(torch.ones_like(position_ids), lengths)
            if input_ids is not None:
                input_ids = unpacked(input_ids, lengths, self.config.pad_token_id or 0)
        rows, length = hidden_states.shape[:2]
        last = last_token(input_ids, attention_mask, rows, length, self.config.pad_token_id)
        last = last.to(hidden_states.device) if isinstance(last, torch.Tensor) else last
        logits = self.score(hidden_states[torch.arange(rows, device=hidden_states.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def last_token(
    input_ids: torch.Tensor | None, attention_mask: Any, rows: int, length: int, pad_token_id: int | None
) -> torch.Tensor | int:
    """Index of each row's last token, padded on either side, `[batch]`."""
    if input_ids is not None and pad_token_id is not None:
        is_token = input_ids != pad_token_id
    elif isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        is_token = attention_mask[:, -length:].bool()
    elif rows == 1 or input_ids is None:
        return -1
    else:
        raise ValueError(
            f"cannot tell padding from tokens in a batch of {rows}: set config.pad_token_id or pass attention_mask"
        )
    return (is_token * torch.arange(length, device=is_token.device)).argmax(-1)

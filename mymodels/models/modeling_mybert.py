"""MyBert: BERT with switches. Copied as it is into Hub repos: imports torch, transformers and its siblings only.

Modules and parameters have stock BERT's own names, so that a stock checkpoint loads by itself.

    tokens ─ embeddings ─ N × [ attention ─ + ─ norm ─ MLP ─ + ─ norm ] ─ (layer mix) ─ pooling ─ head

Shapes in comments: B batch, T tokens, H heads, D head width, C hidden_size, L labels.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple, logging

from .attention import (
    Packing,
    attend_apart,
    eager_attention_forward,
    find_packing,
    lengths_for_engine,
    may_skip_padding,
    packed_lengths,
    packed_sequence_ids,
    spread,
    unpacked,
)
from .configuration_mybert import MyBertConfig
from .kernels import fast_products, in_cache, make_activation
from .layers import (
    ALL_ATTENTION_FUNCTIONS,
    SHARED_OUT_AND_GATHERED,
    SHARED_OUT_BY_ROWS,
    MyPreTrainedModel,
    check_ids,
    check_length,
    check_not_empty,
    create_bidirectional_mask,
    is_elsewhere,
    make_classifier,
    readable,
    served_class,
    with_eager_attention,
)

logger = logging.get_logger(__name__)


class MyBertEmbeddings(nn.Module):
    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            check_ids("input_ids", input_ids, self.config.vocab_size, "vocab_size")
            inputs_embeds = self.word_embeddings(input_ids)  # [B, T, C]
        check_ids("position_ids", position_ids, self.config.max_position_embeddings, "max_position_embeddings")
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        check_ids("token_type_ids", token_type_ids, self.config.type_vocab_size, "type_vocab_size")
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))


# `set_attn_implementation` looks for texts in this file: `eager_attention_forward`, and after 5.0
# `ALL_ATTENTION_FUNCTIONS.get_interface(`, before that `ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]`.
# vLLM reads the source of `forward` too: the function has to be looked up there and called once, with `scaling=`, and
# each projection to be called plainly, once.
class MyBertSelfAttention(nn.Module):
    def __init__(self, config: MyBertConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = False
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.query(hidden_states).view(heads).transpose(1, 2)  # [B, H, T, D]
        key = self.key(hidden_states).view(heads).transpose(1, 2)
        value = self.value(hidden_states).view(heads).transpose(1, 2)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if kwargs.get("output_attentions"):
            attention = eager_attention_forward
        elif isinstance(packing, Packing):
            attention = partial(attend_apart, attention, packing)
        mixed, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=False,  # said twice: sdpa without a mask goes by this argument, other functions by the attribute
            **kwargs,
        )  # [B, T, H, D]
        return mixed.reshape(*hidden_states.shape[:-1], -1), weights


class MyBertOutput(nn.Module):
    """Project back to the residual stream, add, normalise."""

    def __init__(self, config: MyBertConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class MyBertAttention(nn.Module):
    def __init__(self, config: MyBertConfig, layer_idx: int):
        super().__init__()
        self.self = MyBertSelfAttention(config, layer_idx)
        self.output = MyBertOutput(config, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.self(hidden_states, **kwargs)
        return self.output(attended, hidden_states), weights


class MyBertIntermediate(nn.Module):
    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = make_activation(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class MyBertLayer(GradientCheckpointingLayer):
    def __init__(self, config: MyBertConfig, layer_idx: int):
        super().__init__()
        self.attention = MyBertAttention(config, layer_idx)
        self.intermediate = MyBertIntermediate(config)
        self.output = MyBertOutput(config, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        with fast_products(hidden_states):
            attended, weights = self.attention(hidden_states, **kwargs)
            parts = (attended,)
            if type(self.intermediate) is MyBertIntermediate and type(self.output) is MyBertOutput:  # not replaced
                parts = in_cache(attended, self.intermediate.dense, self.intermediate, self.output)
            outputs = [self.output(self.intermediate(part), part) for part in parts]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs).view_as(attended), weights


class MyBertEncoder(nn.Module):
    """Holds the layers under stock BERT's name; `MyBertModel` runs them."""

    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.layer = nn.ModuleList(MyBertLayer(config, i) for i in range(config.num_hidden_layers))


class MyBertLayerMix(nn.Module):
    """Softmax-weighted mean of layers (ELMo's scalar mix, arXiv 1802.05365, without its overall scale)."""

    def __init__(self, num_layers: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_layers))

    def forward(self, layers: list[torch.Tensor]) -> torch.Tensor:
        shares = self.weights.softmax(dim=0)
        return sum(share * layer for share, layer in zip(shares, layers))


class MyBertPooler(nn.Module):
    """`pooling="pooler"`, stock BERT's: the first token through a dense layer and tanh."""

    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class MyBertClsPooling(nn.Module):
    """`pooling="cls"`: the first token as it is."""

    def __init__(self, config: MyBertConfig):
        super().__init__()

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        return hidden_states[:, 0]


class MyBertMeanPooling(MyBertClsPooling):
    """`pooling="mean"`: the mean over the tokens, padding left out."""

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        share = token_mask.to(hidden_states.dtype)
        share = share / share.sum(dim=1, keepdim=True).clamp(min=1)  # [B, T, 1]
        return (hidden_states * share).sum(dim=1)


class MyBertMaxPooling(MyBertClsPooling):
    """`pooling="max"`: the largest value of each feature over the tokens, padding left out."""

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        largest = hidden_states.masked_fill(~token_mask, torch.finfo(hidden_states.dtype).min).amax(dim=1)
        return largest.masked_fill(~token_mask.any(dim=1), 0.0)  # a row of nothing but padding: 0, as for the mean


class MyBertAttentionPooling(nn.Module):
    """`pooling="attention"`: a mean weighted by a learned score per token (after arXiv 1703.03130: one hop, a linear score)."""

    def __init__(self, config: MyBertConfig):
        super().__init__()
        # softmax does not see the bias, which stays in the weights; vLLM drops whatever is called `score.bias`
        self.score = nn.Linear(config.hidden_size, 1, bias=served_class(config) is None)

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        scores = self.score(hidden_states)  # narrower than the hidden states under autocast
        scores = scores.masked_fill(~token_mask, torch.finfo(scores.dtype).min)
        return (hidden_states * scores.softmax(dim=1)).sum(dim=1)


POOLINGS = {
    "pooler": MyBertPooler,
    "cls": MyBertClsPooling,
    "mean": MyBertMeanPooling,
    "max": MyBertMaxPooling,
    "attention": MyBertAttentionPooling,
}


OLD_POSITION_IDS = r"embeddings\.position_ids$"  # in older stock checkpoints: a table of 0, 1, 2, …


class MyBertPreTrainedModel(MyPreTrainedModel):
    config_class = MyBertConfig
    base_model_prefix = "bert"
    _no_split_modules = ["MyBertEmbeddings", "MyBertLayer"]
    _keys_to_ignore_on_load_unexpected = [OLD_POSITION_IDS]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MyBertLayerMix):
            nn.init.zeros_(module.weights)
        elif isinstance(module, MyBertLMPredictionHead):
            nn.init.zeros_(module.bias)


class MyBertModel(MyBertPreTrainedModel):
    """The encoder with its pooling, without a head."""

    def __init__(self, config: MyBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        config.check_consistency()  # fields may have changed since the config was made
        self.embeddings = MyBertEmbeddings(config)
        self.encoder = MyBertEncoder(config)
        self.layer_mix = MyBertLayerMix(config.layer_mix) if config.layer_mix else None
        self.pooler = POOLINGS[config.pooling](config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.served = served_class(config)
        if self.served is not None:
            self._prepare_for_engine(self.served)
        self.post_init()

    def _prepare_for_engine(self, served: str) -> None:
        if served.endswith("ForTokenClassification"):
            self.pooler = None  # which its weights do not have
        elif not served.endswith(("ForSequenceClassification", "Model")):
            raise ValueError(
                f"vLLM cannot serve {served}: it has no such head. Load the folder with AutoModel, "
                "AutoModelForSequenceClassification or AutoModelForTokenClassification, save it, and serve that"
            )
        elif served.endswith("Model") and self.config.pooling == "pooler":
            logger.warning_once(
                "vLLM pools the last hidden states itself, as it does for a stock BERT: the dense layer of "
                "pooling='pooler' is not applied to embeddings"
            )

    def _for_engine(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """What vLLM shall find: at each token its sequence's pooled vector, so that it may pick or mix any of them."""
        pooling = self.config.pooling
        if self.pooler is None or (pooling == "pooler" and str(self.served).endswith("Model")):
            return hidden_states
        if pooling in ("pooler", "cls"):
            first = torch.arange(position_ids.shape[1], device=position_ids.device) - position_ids[0]
            return self.pooler(hidden_states[0, first.clamp(min=0)][:, None], None)[None]
        lengths = lengths_for_engine(position_ids)
        return spread(self._pool(hidden_states, None, lengths), lengths)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        skip_padding: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode.

        Args:
            input_ids: `[batch, length]` tokens.
            attention_mask: `[batch, length]`, 1 for tokens and 0 for padding, or an additive
                `[batch, 1, length, length]` mask.
            token_type_ids: `[batch, length]` segment ids, default 0.
            position_ids: `[batch, length]`. Without `attention_mask`, positions that start over mark sequences packed
                in one row, which then do not see each other, and are pooled each by itself.
            inputs_embeds: `[batch, length, hidden_size]` instead of `input_ids`.
            output_attentions, output_hidden_states: also return them; for attentions, `eager` computes this call.
            skip_padding: where it is faster, compute nothing for padding on the right; its hidden states are then 0.

        Returns:
            `last_hidden_state` `[batch, length, hidden_size]`,
            `pooler_output` `[batch, hidden_size]` or, for packed rows, `[sequences, hidden_size]` (None without a
            pooling layer), and what was asked for; `hidden_states` are the embeddings and each layer's output.

        Raises:
            ValueError: none or both of `input_ids` and `inputs_embeds` given; a token, segment or position out of
                range; a mask that does not tell tokens from padding where the pooling needs to know.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        output_attentions, output_hidden_states = self._outputs_wanted(output_attentions, output_hidden_states)
        kwargs.pop("use_cache", None)  # asked of every model by generic callers; an encoder has none

        given: torch.Tensor = input_ids if inputs_embeds is None else inputs_embeds
        check_not_empty(given)
        rows, length = given.shape[:2]
        if position_ids is not None:
            position_ids = position_ids.expand(rows, -1)
        lengths = None if self.served is not None else packed_lengths(position_ids, attention_mask)
        wanted = (output_attentions, output_hidden_states)
        packing = find_packing(self, __name__, given, attention_mask, lengths, wanted, skip_padding, right_padded=True)
        maybe_packed = attention_mask is None and position_ids is not None and (lengths is not None or not readable())
        if position_ids is None:
            check_length(length, self.config.max_position_embeddings)
            position_ids = torch.arange(length, device=given.device)[None]
        if packing is not None:
            input_ids, inputs_embeds = packing.take(input_ids), packing.take(inputs_embeds)
            token_type_ids, position_ids = packing.take(token_type_ids), packing.take(position_ids)

        own_layers = [layer for layer in self.encoder.layer if not is_elsewhere(layer)]
        if is_elsewhere(self.encoder.layer[0]):  # a pipeline's stages after the first get hidden states
            hidden_states = inputs_embeds
        else:
            hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        mask = None
        if packing is None:
            apart = {}
            if maybe_packed:
                packed = packed_sequence_ids(position_ids)
                apart["and_mask_function"] = lambda batch, head, q, kv: packed[batch, q] == packed[batch, kv]
            config = with_eager_attention(self.config) if output_attentions else self.config
            mask = create_bidirectional_mask(config, hidden_states, attention_mask, **apart)

        all_hidden_states, all_attentions = [hidden_states], []
        for layer in own_layers:
            hidden_states, weights = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                packing=packing,
                output_attentions=output_attentions,
                **kwargs,
            )
            all_hidden_states.append(hidden_states)
            if not output_hidden_states:  # keep only what the mix will read
                del all_hidden_states[: -(self.config.layer_mix or 1)]
            if output_attentions:
                all_attentions.append(weights)
        if self.layer_mix is not None and not is_elsewhere(self.layer_mix):
            if self.config.layer_mix > len(all_hidden_states):
                raise ValueError(
                    f"layer_mix={self.config.layer_mix} reads layers of an earlier pipeline stage, and this one has only "
                    f"{len(own_layers)}: use fewer stages"
                )
            hidden_states = self.layer_mix(all_hidden_states[-self.config.layer_mix :])
        if packing is not None:
            hidden_states = packing.put(hidden_states)
        pooled = None
        if self.served is not None:
            hidden_states = self._for_engine(hidden_states, position_ids)
        elif self.pooler is not None:
            pooled = self._pool(hidden_states, attention_mask, lengths)

        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )

    def _pool(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, lengths: list[int] | None
    ) -> torch.Tensor:
        if lengths is not None:  # packed rows: a vector for each sequence
            attention_mask = unpacked(hidden_states.new_ones(hidden_states.shape[:2]), lengths)
            hidden_states = unpacked(hidden_states, lengths)
        if attention_mask is None:
            token_mask = hidden_states.new_ones(1, hidden_states.shape[1], 1, dtype=torch.bool)
        elif attention_mask.ndim == 2:
            token_mask = attention_mask.to(hidden_states.device, torch.bool)[..., None]  # [B, T, 1]
        elif self.config.pooling in ("pooler", "cls"):
            token_mask = None
        else:
            raise ValueError(
                f"pooling={self.config.pooling!r} needs attention_mask of shape [batch, length] to leave padding out, "
                f"but got {list(attention_mask.shape)}"
            )
        return self.pooler(hidden_states, token_mask)


def classification_loss(config: MyBertConfig, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss of `logits` `[B, L]`, by `config.problem_type`, with the config's smoothing, weights and focus.

    With these switches off it is the loss of every stock sequence classifier.
    """
    if config.problem_type is None:  # inferred once and kept, as stock models do: pipelines read it
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    labels = labels.to(logits.device)
    logits = logits.float()
    if config.problem_type == "regression":
        return nn.functional.mse_loss(logits.view(-1), labels.view(-1).float())

    weights = None if config.class_weights is None else logits.new_tensor(config.class_weights)
    if config.problem_type == "multi_label_classification":
        targets = labels.float() * (1 - config.label_smoothing) + config.label_smoothing / 2
        losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
        total: int | torch.Tensor = losses.numel()
        truth = torch.where(labels > 0.5, logits, -logits).sigmoid()  # probability given to what is true
    else:
        labels = labels.view(-1).long()
        losses = nn.functional.cross_entropy(
            logits, labels, weight=weights, label_smoothing=config.label_smoothing, reduction="none"
        )
        counted, label_or_0 = labels != -100, labels.clamp(min=0)
        total = (counted if weights is None else counted * weights[label_or_0]).sum()
        truth = logits.softmax(dim=-1).gather(1, label_or_0[:, None])[:, 0]
    if config.focal_gamma:
        losses = losses * (1 - truth) ** config.focal_gamma
    return losses.sum() / total


LOSS_FIELDS = {"label_smoothing": 0, "class_weights": None, "focal_gamma": 0, "multi_sample_dropout": 1}  # off


def check_loss_is_ours(config: MyBertConfig) -> None:
    """Raise a `ValueError` if the config asks for a loss that nobody computes: in training, and no labels given.

    transformers' Trainer keeps labels to itself, and takes another loss, with `label_smoothing_factor` or
    `compute_loss_func`.
    """
    on = [f"{name}={getattr(config, name)}" for name, off in LOSS_FIELDS.items() if getattr(config, name) != off]
    if on:
        raise ValueError(
            f"config.{', config.'.join(on)} would have no effect: they are for the loss that this model computes, but in "
            "training it was given no labels. The Trainer takes them away for label_smoothing_factor (set "
            "config.label_smoothing instead) and for compute_loss_func (leave one of the two out)"
        )


class MyBertForSequenceClassification(MyBertPreTrainedModel):
    """MyBert with a classification or regression head on the pooled vector."""

    accepts_loss_kwargs = False  # the loss is a mean over examples; the Trainer scales it for gradient accumulation

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MyBertModel(config)
        self.dropout = make_classifier_dropout(config)
        self.classifier = make_classifier(config)
        self.post_init()

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
        """Classify each sequence. Arguments beyond `MyBertModel`'s:

        Args:
            labels: `[batch]` class numbers, `[batch, num_labels]` 0/1 floats (multi-label), or floats (regression),
                by `config.problem_type`, which is inferred at the first call as everywhere in transformers.

        Returns:
            `logits` `[batch, num_labels]`, with `labels` the mean `loss`.

        Raises:
            ValueError: in training, no `labels`, although the config has fields for the loss.
        """
        if labels is None and self.training and torch.is_grad_enabled():
            check_loss_is_ours(self.config)
        outputs = self.bert(
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
        loss = None
        if labels is not None:
            loss = sum(classification_loss(self.config, logits, labels) for logits in all_logits) / samples
        return SequenceClassifierOutput(
            loss=loss,
            logits=sum(all_logits) / samples if samples > 1 else all_logits[0],
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def make_classifier_dropout(config: MyBertConfig) -> nn.Dropout:
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class MyBertPredictionHeadTransform(nn.Module):
    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = make_activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


class MyBertLMPredictionHead(nn.Module):
    """The bias stands beside the tied matrix, not in it: one parameter, under the name stock checkpoints use."""

    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.transform = MyBertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden_states)) + self.bias


class MyBertOnlyMLMHead(nn.Module):
    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.predictions = MyBertLMPredictionHead(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.predictions(hidden_states)


class MyBertForMaskedLM(MyBertPreTrainedModel):
    """MyBert with a masked-language-model head."""

    _tied_weights_keys = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    _tp_plan = {"cls.predictions.decoder": SHARED_OUT_AND_GATHERED} if SHARED_OUT_BY_ROWS else {}
    _fsdp_plan = {"cls.predictions.decoder": "keep_full_weight"}

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # by name, a subclass called otherwise would get another loss
        if config.tie_word_embeddings:  # a second name of the bias; untied it may be another one, and is reported
            self._keys_to_ignore_on_load_unexpected = [OLD_POSITION_IDS, r"cls\.predictions\.decoder\.bias$"]
        self.bert = MyBertModel(config, add_pooling_layer=False)
        self.cls = MyBertOnlyMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.cls.predictions.decoder = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers; the bias follows, new entries 0."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        bias = self.cls.predictions.bias
        grown = nn.functional.pad(bias.detach(), (0, self.config.vocab_size - bias.shape[0]))
        self.cls.predictions.bias = nn.Parameter(grown, requires_grad=bias.requires_grad)
        return embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Predict each token. `labels`: `[batch, length]`, -100 where no prediction counts.

        Returns `logits` `[batch, length, vocab_size]`, with `labels` the mean cross-entropy in nats as `loss`.
        """
        skip_padding = may_skip_padding(self, labels, attention_mask, kwargs.pop("skip_padding", None))
        outputs = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            skip_padding=skip_padding,
            return_dict=True,
            **kwargs,
        )
        with fast_products(outputs.last_hidden_state):
            logits = self.cls(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MyBertForTokenClassification(MyBertPreTrainedModel):
    """MyBert with a label per token."""

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.loss_type = "ForTokenClassification"
        self.num_labels = config.num_labels
        self.bert = MyBertModel(config, add_pooling_layer=False)
        self.dropout = make_classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Label each token. `labels`: `[batch, length]` class numbers, -100 where none counts.

        Returns `logits` `[batch, length, num_labels]`, with `labels` the mean cross-entropy as `loss`.
        """
        skip_padding = may_skip_padding(self, labels, attention_mask, kwargs.pop("skip_padding", None))
        outputs = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            skip_padding=skip_padding,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MyBertForQuestionAnswering(MyBertPreTrainedModel):
    """MyBert that marks where in the text an answer starts and ends."""

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.loss_type = "ForQuestionAnswering"
        self.bert = MyBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

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
        """Find the answer span. `start_positions`, `end_positions`: `[batch]` token indices of the true answer.

        Returns `start_logits` and `end_logits` `[batch, length]`, with positions the mean of both losses as `loss`.
        """
        outputs = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            skip_padding=False,  # an answer is looked for among all positions, as in stock
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


MyBertModel.register_for_auto_class("AutoModel")
MyBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MyBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
MyBertForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
MyBertForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")

"""MyBert: BERT with switches. Copied as it is into Hub repos: imports torch, transformers and its siblings only.

Modules and parameters have stock BERT's names, so that a stock checkpoint loads without conversion.

    tokens ─ embeddings ─ N × [ attention ─ + ─ norm ─ MLP ─ + ─ norm ] ─ (layer mix) ─ pooling ─ head

Shapes in comments: B batch, T tokens, H heads, D head width, C hidden_size, L labels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, MaskedLMOutput
from transformers.utils import can_return_tuple

from .attention import ALL_ATTENTION_FUNCTIONS, bidirectional_mask, eager_attention_forward
from .base import MyPreTrainedModel, check_ids, check_inputs, check_length, is_placeholder, keep_last, own_layers
from .compat import TP_COLWISE_GATHERED, TP_EMBEDDING_ROWWISE
from .configuration_mybert import MyBertConfig
from .cpu_kernels import in_row_chunks, linear_by_onednn, make_activation
from .heads import MyBertLMPredictionHead, MyBertOnlyMLMHead, PooledHead, SpanHead, TokenHead, make_classifier
from .int8 import METHOD  # noqa: F401  registers the method; releases up to 5.6 fetch only files that are imported here
from .int8_layers import Int8Linear  # noqa: F401
from .int8_products import multiply  # noqa: F401
from .losses import classification_loss  # noqa: F401
from .padding import lengths_in_rows, sequence_ids_in_rows, skips_padding
from .pooling import POOLINGS, MyBertLayerMix, pool
from .products import one_dnn  # noqa: F401
from .tokenwise import calls_of_class  # noqa: F401
from .vllm_adapter import adapt_encoder, pools_for_vllm, served_class


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


# `set_attn_implementation` searches this file for `eager_attention_forward`, and for
# `ALL_ATTENTION_FUNCTIONS.get_interface(` (after 5.0) or `ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]`.
# vLLM reads the source of `forward`: it must look up the attention function and call it once with `scaling=`, and call
# each projection once.
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

    @linear_by_onednn
    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.query(hidden_states).view(heads).transpose(1, 2)  # [B, H, T, D]
        key = self.key(hidden_states).view(heads).transpose(1, 2)
        value = self.value(hidden_states).view(heads).transpose(1, 2)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        rate = self.attention_dropout if self.training else 0.0
        # sdpa reads the argument `is_causal` if there is no mask; other functions read the attribute
        mixed, weights = attention(
            self, query, key, value, attention_mask, dropout=rate, scaling=self.scaling, is_causal=False, **kwargs
        )  # [B, T, H, D]
        return mixed.reshape(*hidden_states.shape[:-1], -1), weights


class MyBertOutput(nn.Module):
    """Project back to the residual stream, add, normalise."""

    def __init__(self, config: MyBertConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    @linear_by_onednn
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

    @linear_by_onednn
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class MyBertLayer(GradientCheckpointingLayer):
    def __init__(self, config: MyBertConfig, layer_idx: int):
        super().__init__()
        self.attention = MyBertAttention(config, layer_idx)
        self.intermediate = MyBertIntermediate(config)
        self.output = MyBertOutput(config, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.attention(hidden_states, **kwargs)
        return self.feed_forward(attended), weights

    @in_row_chunks
    def feed_forward(self, attended: torch.Tensor) -> torch.Tensor:
        return self.output(self.intermediate(attended), attended)


class MyBertEncoder(nn.Module):
    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.kept = config.layer_mix or 1  # number of states that the mix reads
        self.layer = nn.ModuleList(MyBertLayer(config, i) for i in range(config.num_hidden_layers))

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool, output_hidden_states: bool, **kwargs: Any
    ) -> BaseModelOutput:
        all_hidden_states, all_attentions = [hidden_states], []
        for layer in own_layers(self.layer):
            hidden_states, weights = layer(hidden_states, output_attentions=output_attentions, **kwargs)
            all_hidden_states = keep_last(0 if output_hidden_states else self.kept, all_hidden_states, hidden_states)
            if output_attentions:
                all_attentions.append(weights)
        return BaseModelOutput(hidden_states, tuple(all_hidden_states), tuple(all_attentions))


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
        adapt_encoder(self, pool)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def mix(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """The last layer's states, or the mix of the last `config.layer_mix`."""
        if self.layer_mix is None or is_placeholder(self.layer_mix):
            return layers[-1]
        if self.config.layer_mix > len(layers):
            raise ValueError(
                f"layer_mix={self.config.layer_mix} reads layers of an earlier pipeline stage, and this one has only "
                f"{len(own_layers(self.encoder.layer))}: use fewer stages"
            )
        return self.layer_mix(layers[-self.config.layer_mix :])

    @can_return_tuple
    @pools_for_vllm
    @linear_by_onednn
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode.

        Args:
            input_ids: `[batch, length]` tokens.
            attention_mask: `[batch, length]`, 1 for tokens and 0 for padding, or an additive
                `[batch, 1, length, length]` mask.
            token_type_ids: `[batch, length]` segment ids, default 0.
            position_ids: `[batch, length]`. Without `attention_mask`, positions that start over mark packed
                sequences, which do not attend to each other and are pooled separately.
            inputs_embeds: `[batch, length, hidden_size]` instead of `input_ids`.
            output_attentions, output_hidden_states: also return these; attentions are computed by `eager` attention.
            skip_padding: skip padding on the right where that is faster; hidden states at padding are then 0.

        Returns:
            `last_hidden_state` `[batch, length, hidden_size]`,
            `pooler_output` `[batch, hidden_size]` or, for packed rows, `[sequences, hidden_size]` (None without a
            pooling layer), and what was requested; `hidden_states` are the embeddings and each layer's output.

        Raises:
            ValueError: none or both of `input_ids` and `inputs_embeds` given; a token, segment or position out of
                range; the pooling needs to know the padding, and the mask does not show it.
        """
        check_inputs(input_ids, inputs_embeds)
        kwargs.pop("use_cache", None)  # generic callers pass it to every model; an encoder has no cache
        kwargs |= {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        outputs = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        if self.pooler is not None and self.served is None:
            states = outputs.last_hidden_state
            lengths = lengths_in_rows(states, position_ids, attention_mask)
            pooled = pool(self.pooler, self.config, states, attention_mask, lengths)
            # set as an attribute it would be no item up to 5.2, and the last one from 5.3
            outputs = BaseModelOutputWithPooling(**{**outputs, "pooler_output": pooled})
        return outputs

    @skips_padding(right_padded=True)
    def encode(
        self,
        input_ids: Any,
        attention_mask: Any,
        token_type_ids: Any,
        position_ids: Any,
        inputs_embeds: Any,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Run embeddings, layers and their mix. Arguments and outputs as for `forward`, without pooling."""
        wanted = (kwargs.pop("output_attentions", None), kwargs.pop("output_hidden_states", None))
        output_attentions, output_hidden_states = self._outputs_wanted(*wanted)
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        sequence_ids = sequence_ids_in_rows(given, position_ids, attention_mask, read=self.served is None)
        if position_ids is None:
            check_length(given.shape[1], self.config.max_position_embeddings)
            position_ids = torch.arange(given.shape[1], device=given.device)[None]
        hidden_states = inputs_embeds
        if not is_placeholder(self.encoder.layer[0]):  # later pipeline stages receive hidden states
            hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        mask = bidirectional_mask(self.config, hidden_states, attention_mask, sequence_ids, output_attentions)

        kwargs |= {"attention_mask": mask, "position_ids": position_ids}
        encoded = self.encoder(hidden_states, output_attentions, output_hidden_states, **kwargs)
        states = (*encoded.hidden_states[:-1], encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=self.mix(states),
            hidden_states=states if output_hidden_states else None,
            attentions=encoded.attentions if output_attentions else None,
        )


class MyBertForSequenceClassification(PooledHead, MyBertPreTrainedModel):
    """MyBert with a classification or regression head on the pooled vector."""

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MyBertModel(config)
        self.dropout = make_classifier_dropout(config)
        self.classifier = make_classifier(config)
        self.post_init()


def make_classifier_dropout(config: MyBertConfig) -> nn.Dropout:
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class MyBertForMaskedLM(TokenHead, MyBertPreTrainedModel):
    """MyBert with a masked-language-model head."""

    output_class = MaskedLMOutput
    _tied_weights_keys = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    _tp_plan = {"cls.predictions.decoder": TP_COLWISE_GATHERED} if TP_EMBEDDING_ROWWISE else {}
    _fsdp_plan = {"cls.predictions.decoder": "keep_full_weight"}

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # otherwise derived from the class name, which a subclass may change
        if config.tie_word_embeddings:  # a second name of the bias; if untied, it may differ and is reported
            self._keys_to_ignore_on_load_unexpected = [OLD_POSITION_IDS, r"cls\.predictions\.decoder\.bias$"]
        self.bert = MyBertModel(config, add_pooling_layer=False)
        self.cls = MyBertOnlyMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.cls.predictions.decoder = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the bias is resized too, new entries are 0."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        bias = self.cls.predictions.bias
        grown = nn.functional.pad(bias.detach(), (0, self.config.vocab_size - bias.shape[0]))
        self.cls.predictions.bias = nn.Parameter(grown, requires_grad=bias.requires_grad)
        return embeddings

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.cls(hidden_states)


class MyBertForTokenClassification(TokenHead, MyBertPreTrainedModel):
    """MyBert with a classification head on each token."""

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.loss_type = "ForTokenClassification"
        self.num_labels = config.num_labels
        self.bert = MyBertModel(config, add_pooling_layer=False)
        self.dropout = make_classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(hidden_states))


class MyBertForQuestionAnswering(SpanHead, MyBertPreTrainedModel):
    """MyBert with a head that predicts the start and end of an answer in the text."""

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.loss_type = "ForQuestionAnswering"
        self.bert = MyBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


MyBertModel.register_for_auto_class("AutoModel")
MyBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MyBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
MyBertForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
MyBertForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")

"""One key and one value head for all queries; attention and MLP side by side; rotary tables kept as plain attributes."""

from typing import Optional, Tuple, Union

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import CrossEntropyLoss, LayerNorm
from torch.nn import functional as F
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_rw import RWConfig

logger = logging.get_logger(__name__)


class Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        ret = input @ self.weight.T
        return ret if self.bias is None else ret + self.bias


class RotaryEmbedding(torch.nn.Module):
    """Works on [batch * heads, length, head_dim]."""

    def __init__(self, head_dim: int, base=10000):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, head_dim, 2).float() / head_dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.seq_len_cached = None
        self.cos_cached: Optional[torch.Tensor] = None
        self.sin_cached: Optional[torch.Tensor] = None

    def cos_sin(self, seq_len: int, device="cpu", dtype=torch.float32):
        if self.seq_len_cached is None or seq_len > self.seq_len_cached:
            self.seq_len_cached = seq_len
            t = torch.arange(seq_len, device=device).type_as(self.inv_freq)
            angles = torch.cat([torch.outer(t, self.inv_freq)] * 2, dim=-1)[None]
            self.cos_cached = angles.cos().type(dtype)
            self.sin_cached = angles.sin().type(dtype)
        return self.cos_cached, self.sin_cached

    def forward(self, q, k, past=0):
        length = past + q.shape[1]
        cos, sin = (t[:, past:length] for t in self.cos_sin(length, q.device, q.dtype))

        def turn(x):
            return x * cos + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1) * sin

        return turn(q), turn(k)


class Attention(nn.Module):
    def __init__(self, config: RWConfig):
        super().__init__()
        self.num_heads, self.head_dim = config.n_head, config.head_dim
        self.maybe_rotary = RotaryEmbedding(config.head_dim) if config.rotary else (lambda q, k, past: (q, k))
        self.query_key_value = Linear(config.hidden_size, config.hidden_size + 2 * self.head_dim, bias=config.bias)
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.attention_dropout = nn.Dropout(config.attention_dropout)

    def forward(self, hidden_states, alibi, attention_mask, layer_past=None, head_mask=None, use_cache=False, output_attentions=False):
        fused = self.query_key_value(hidden_states)
        batch, length, _ = fused.shape
        fused = fused.view(batch, length, self.num_heads + 2, self.head_dim)
        query = fused[:, :, :-2].transpose(1, 2).reshape(batch * self.num_heads, length, self.head_dim)
        key, value = fused[:, :, -2], fused[:, :, -1]
        past = 0
        if layer_past is not None:
            past = layer_past[0].shape[1]
        query, _ = self.maybe_rotary(query, query, past)
        _, key = self.maybe_rotary(key, key, past)
        if layer_past is not None:
            # [batch, length, head_dim]
            key = torch.cat((layer_past[0], key), dim=1)
            value = torch.cat((layer_past[1], value), dim=1)
        present = (key, value) if use_cache is True else None
        query = query.view(batch, self.num_heads, length, self.head_dim)
        scores = query @ key.unsqueeze(1).transpose(2, 3) / self.head_dim**0.5
        weights = self.attention_dropout(F.softmax(scores.masked_fill(attention_mask, -1e9), dim=-1))
        if head_mask is not None:
            weights = weights * head_mask
        context = (weights @ value.unsqueeze(1)).transpose(1, 2).reshape(batch, length, -1)
        outputs = (self.dense(context), present)
        return outputs + (weights,) if output_attentions else outputs


class DecoderLayer(nn.Module):
    def __init__(self, config: RWConfig):
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attention = Attention(config)
        self.up = Linear(config.hidden_size, 4 * config.hidden_size, bias=config.bias)
        self.down = Linear(4 * config.hidden_size, config.hidden_size, bias=config.bias)
        self.config = config

    def forward(self, hidden_states, alibi, attention_mask, layer_past=None, head_mask=None, use_cache=False, output_attentions=False):
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attention(normed, alibi, attention_mask, layer_past, head_mask, use_cache, output_attentions)
        output = attended[0] + self.down(F.gelu(self.up(normed))) + hidden_states
        return (output,) + attended[1:]


class RWPreTrainedModel(PreTrainedModel):
    _keys_to_ignore_on_load_missing = [r"h.*.self_attention.scale_mask_softmax.causal_mask", r"lm_head.weight"]
    config_class = RWConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]

    def __init__(self, *inputs, **kwargs):
        super().__init__(*inputs, **kwargs)

    def _init_weights(self, module: nn.Module):
        """Initialize the weights."""
        if isinstance(module, nn.Linear) or isinstance(module, Linear):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, LayerNorm):
            module.bias.data.zero_()
            module.weight.data.fill_(1.0)

    @staticmethod
    def _convert_to_standard_cache(past_key_value, batch_size):
        """[batch, length, width] to [batch, 1, length, width]"""
        return tuple((layer_past[0].unsqueeze(1), layer_past[1].unsqueeze(1)) for layer_past in past_key_value)

    @staticmethod
    def _convert_to_rw_cache(past_key_value):
        return tuple((layer_past[0].flatten(0, 1), layer_past[1].flatten(0, 1)) for layer_past in past_key_value)


class RWModel(RWPreTrainedModel):
    def __init__(self, config: RWConfig):
        super().__init__(config)
        self.embed_dim = config.hidden_size
        self.num_heads = config.n_head
        self.word_embeddings = nn.Embedding(config.vocab_size, self.embed_dim)
        self.h = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = LayerNorm(self.embed_dim, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def set_input_embeddings(self, new_embeddings: torch.Tensor):
        self.word_embeddings = new_embeddings

    def _prepare_attn_mask(self, attention_mask, input_shape, past_key_values_length):
        batch, length = input_shape
        kept = length + past_key_values_length
        hidden = torch.ones(length, kept, dtype=torch.bool, device=attention_mask.device).triu(past_key_values_length + 1)
        return hidden[None, None] | (attention_mask == 0)[:, None, None, :]

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Tuple[Tuple[torch.Tensor, torch.Tensor], ...]] = None,
        attention_mask: Optional[torch.Tensor] = None,
        head_mask: Optional[torch.LongTensor] = None,
        inputs_embeds: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        **deprecated_arguments,
    ) -> Union[Tuple[torch.Tensor, ...], BaseModelOutputWithPastAndCrossAttentions]:
        if deprecated_arguments.pop("position_ids", False) is not False:
            logger.warning("`position_ids` have no functionality and will be removed.")
        if len(deprecated_arguments) > 0:
            raise ValueError(f"Got unexpected arguments: {deprecated_arguments}")
        output_attentions = output_attentions if output_attentions is not None else self.config.output_attentions
        output_hidden_states = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        if past_key_values is None:
            past_key_values = tuple([None] * len(self.h))
        head_mask = self.get_head_mask(head_mask, self.config.n_layer)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        hidden_states = inputs_embeds
        batch_size, seq_length, _ = hidden_states.shape
        past_key_values_length = 0
        if past_key_values[0] is not None:
            past_key_values_length = past_key_values[0][0].shape[1]
        if attention_mask is None:
            attention_mask = torch.ones((batch_size, seq_length + past_key_values_length), device=hidden_states.device)
        hidden = self._prepare_attn_mask(attention_mask, (batch_size, seq_length), past_key_values_length)
        presents = () if use_cache else None
        all_self_attentions = () if output_attentions else None
        all_hidden_states = () if output_hidden_states else None
        for i, (block, layer_past) in enumerate(zip(self.h, past_key_values)):
            if output_hidden_states:
                all_hidden_states = all_hidden_states + (hidden_states,)
            outputs = block(
                hidden_states,
                alibi=None,
                attention_mask=hidden,
                layer_past=layer_past,
                head_mask=head_mask[i],
                use_cache=use_cache,
                output_attentions=output_attentions,
            )
            hidden_states = outputs[0]
            if use_cache is True:
                presents = presents + (outputs[1],)
            if output_attentions:
                all_self_attentions = all_self_attentions + (outputs[2],)
        hidden_states = self.ln_f(hidden_states)
        if output_hidden_states:
            all_hidden_states = all_hidden_states + (hidden_states,)
        if not return_dict:
            return tuple(v for v in [hidden_states, presents, all_hidden_states, all_self_attentions] if v is not None)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            past_key_values=presents,
            hidden_states=all_hidden_states,
            attentions=all_self_attentions,
        )


class RWForCausalLM(RWPreTrainedModel):
    _keys_to_ignore_on_load_missing = [r"lm_head.weight"]
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config: RWConfig):
        super().__init__(config)
        self.transformer = RWModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: torch.Tensor):
        self.lm_head = new_embeddings

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        **kwargs,
    ) -> dict:
        # only last token for input_ids if past is not None
        if past_key_values:
            input_ids = input_ids[:, -1].unsqueeze(-1)
            # the cache may be in the standard format
            if len(past_key_values[0][0].shape) == 4:
                past_key_values = self._convert_to_rw_cache(past_key_values)
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": attention_mask,
        }

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, head_mask=None, inputs_embeds=None,
                labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None, **deprecated_arguments):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        transformer_outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        lm_logits = self.lm_head(transformer_outputs[0])
        loss = None
        if labels is not None:
            loss = CrossEntropyLoss()(lm_logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if not return_dict:
            output = (lm_logits,) + transformer_outputs[1:]
            return ((loss,) + output) if loss is not None else output
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=lm_logits,
            past_key_values=transformer_outputs.past_key_values,
            hidden_states=transformer_outputs.hidden_states,
            attentions=transformer_outputs.attentions,
        )

    def _reorder_cache(self, past: Tuple[Tuple[torch.Tensor, torch.Tensor], ...], beam_idx: torch.LongTensor):
        return tuple((kept[0].index_select(0, beam_idx), kept[1].index_select(0, beam_idx)) for kept in past)


class RWForSequenceClassification(RWPreTrainedModel):
    def __init__(self, config: RWConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = RWModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=None):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        logits = self.score(self.transformer(input_ids, attention_mask=attention_mask, use_cache=False)[0])
        if self.config.pad_token_id is None:
            last = -1
        else:
            last = torch.ne(input_ids, self.config.pad_token_id).sum(dim=-1) - 1
        pooled_logits = logits[torch.arange(len(input_ids)), last]
        loss = None if labels is None else CrossEntropyLoss()(pooled_logits, labels)
        return SequenceClassifierOutputWithPast(loss=loss, logits=pooled_logits)

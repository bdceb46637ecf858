"""Biases from the mask; keys kept as [batch * heads, head_dim, length]."""

import math
from typing import Optional, Tuple

import torch
from torch import nn
from torch.nn import CrossEntropyLoss, LayerNorm
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.models.bloom.modeling_bloom import _prepare_4d_causal_attention_mask
from transformers.utils import logging

from .configuration_telechat import TelechatConfig

logger = logging.get_logger(__name__)


def alibi_from(attention_mask, heads, dtype):
    slopes = torch.tensor([2.0 ** (-8.0 * (i + 1) / heads) for i in range(heads)], device=attention_mask.device)
    places = ((attention_mask.cumsum(dim=-1) - 1) * attention_mask)[:, None, :]
    return (slopes[None, :, None] * places).reshape(-1, 1, attention_mask.shape[1]).to(dtype)


class TelechatAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.n_head, config.hidden_size // config.n_head
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, alibi, attention_mask, layer_past=None, head_mask=None, use_cache=False):
        b, n, _ = x.shape
        q, k, v = (
            self.query_key_value(x).view(b, n, self.num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4).flatten(1, 2)
        )
        k = k.transpose(1, 2)
        if layer_past is not None:
            past_key, past_value = layer_past
            k = torch.cat((past_key, k), dim=2)
            v = torch.cat((past_value, v), dim=1)
        present = (k, v) if use_cache is True else None
        scores = alibi.baddbmm(q, k, beta=1.0, alpha=1 / math.sqrt(self.head_dim)).view(b, self.num_heads, n, -1)
        weights = F.softmax(torch.masked_fill(scores, attention_mask, torch.finfo(scores.dtype).min), dim=-1)
        if head_mask is not None:
            weights = weights * head_mask
        mixed = (
            torch.bmm(weights.view(b * self.num_heads, n, -1), v)
            .view(b, self.num_heads, n, -1)
            .transpose(1, 2)
            .flatten(2)
        )
        return self.dense(mixed), present


class TelechatBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln1, self.ln2 = LayerNorm(config.hidden_size), LayerNorm(config.hidden_size)
        self.attn = TelechatAttention(config)
        self.fc, self.out = nn.Linear(config.hidden_size, 48), nn.Linear(48, config.hidden_size)

    def forward(self, x, **kwargs):
        mixed, present = self.attn(self.ln1(x), **kwargs)
        x = x + mixed
        return x + self.out(F.gelu(self.fc(self.ln2(x)))), present


class TelechatPreTrainedModel(PreTrainedModel):
    config_class = TelechatConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TelechatBlock"]

    def __init__(self, *inputs, **kwargs):
        super().__init__(*inputs, **kwargs)

    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
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
        return tuple(
            (k.view(batch_size, -1, *k.shape[1:]), v.view(batch_size, -1, *v.shape[1:])) for k, v in past_key_value
        )

    @staticmethod
    def _convert_to_telechat_cache(past_key_value):
        return tuple((k.flatten(0, 1), v.flatten(0, 1)) for k, v in past_key_value)


class TelechatModel(TelechatPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([TelechatBlock(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def set_input_embeddings(self, value):
        self.word_embeddings = value

    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        head_mask=None,
        inputs_embeds=None,
        use_cache=None,
        return_dict=None,
    ):
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        batch_size, seq_length = input_ids.shape
        if past_key_values is None:
            past_key_values = tuple([None] * len(self.h))
        head_mask = self.get_head_mask(head_mask, self.config.n_layer)
        hidden_states = self.word_embeddings(input_ids)
        past = 0
        if past_key_values[0] is not None:
            past = past_key_values[0][0].shape[2]
        if attention_mask is None:
            attention_mask = torch.ones((batch_size, seq_length + past), device=hidden_states.device)
        alibi = alibi_from(attention_mask, self.config.n_head, hidden_states.dtype)
        causal_mask = _prepare_4d_causal_attention_mask(
            attention_mask, (batch_size, seq_length), hidden_states, past
        ).bool()
        presents = () if use_cache else None
        for i, (block, layer_past) in enumerate(zip(self.h, past_key_values)):
            hidden_states, present = block(
                hidden_states,
                alibi=alibi,
                attention_mask=causal_mask,
                layer_past=layer_past,
                head_mask=head_mask[i],
                use_cache=use_cache,
            )
            if use_cache is True:
                presents = presents + (present,)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.ln_f(hidden_states), past_key_values=presents
        )


class TelechatForCausalLM(TelechatPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.transformer = TelechatModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ) -> dict:
        if past_key_values:
            input_ids = input_ids[:, -1].unsqueeze(-1)
            if past_key_values[0][0].shape[0] == input_ids.shape[0]:
                past_key_values = self._convert_to_telechat_cache(past_key_values)
        model_inputs = {"input_ids": input_ids}
        model_inputs.update(
            {"past_key_values": past_key_values, "use_cache": kwargs.get("use_cache"), "attention_mask": attention_mask}
        )
        return model_inputs

    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        head_mask=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        outputs = self.transformer(input_ids, past_key_values, attention_mask, head_mask, use_cache=use_cache)
        logits = self.lm_head(outputs[0])
        loss = None
        if labels is not None:
            loss = CrossEntropyLoss()(logits[..., :-1, :].flatten(0, 1), labels[..., 1:].flatten())
        return CausalLMOutputWithCrossAttentions(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def _reorder_cache(self, past, beam_idx) -> Tuple[Tuple[torch.Tensor, torch.Tensor], ...]:
        standardized = self._convert_to_standard_cache(past, batch_size=len(beam_idx))
        return self._convert_to_telechat_cache(
            tuple((k.index_select(0, beam_idx), v.index_select(0, beam_idx)) for k, v in standardized)
        )

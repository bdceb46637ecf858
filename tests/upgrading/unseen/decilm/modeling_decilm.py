"""LLaMA with another number of key and value heads in each layer."""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import (
    LLAMA_INPUTS_DOCSTRING,
    LlamaMLP,
    LlamaRMSNorm,
    repeat_kv,
    rotate_half,
)
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import add_start_docstrings_to_model_forward

from .configuration_decilm import DeciLMConfig


class DeciLMRotary(nn.Module):
    """Tables made when they are first needed."""

    def __init__(self, dim, base, limit, factor):
        super().__init__()
        self.dim, self.base, self.limit, self.factor = dim, base, limit, factor
        self.inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
        self._length = 0
        self._cos = self._sin = None

    def forward(self, x, length):
        if length > self._length or self._cos.device != x.device:
            inv_freq = self.inv_freq.to(x.device)
            if length > self.limit:
                base = self.base * ((self.factor * length / self.limit) - (self.factor - 1)) ** (self.dim / (self.dim - 2))
                inv_freq = 1.0 / (base ** (torch.arange(0, self.dim, 2, device=x.device).float() / self.dim))
            emb = torch.einsum("i,j->ij", torch.arange(length, device=x.device).float(), inv_freq).repeat(1, 2)
            self._length, self._cos, self._sin = length, emb.cos(), emb.sin()
        return self._cos[:length].to(x.dtype), self._sin[:length].to(x.dtype)


class DeciLMAttention(nn.Module):
    def __init__(self, config: DeciLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.layer_idx = layer_idx
        self.num_key_value_heads = config.num_key_value_heads_per_layer[layer_idx]
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.pretraining_tp = config.pretraining_tp
        self.q_proj = nn.Linear(self.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(self.hidden_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(self.hidden_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, self.hidden_size, bias=False)
        self._init_rope()

    def _init_rope(self):
        if self.config.rope_scaling is None:
            factor = 1.0
        else:
            if self.config.rope_scaling["type"] != "dynamic":
                raise ValueError("Unknown RoPE scaling type")
            factor = self.config.rope_scaling["factor"]
        self.rotary_emb = DeciLMRotary(self.head_dim, self.config.rope_theta, self.config.max_position_embeddings, factor)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value: Optional[Tuple] = None, use_cache=False):
        bsz, q_len, _ = hidden_states.size()
        query, key, value = (
            proj(hidden_states).view(bsz, q_len, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        kv_seq_len = key.shape[-2] + (past_key_value[0].shape[-2] if past_key_value is not None else 0)
        cos, sin = (t[position_ids].unsqueeze(1) for t in self.rotary_emb(value, kv_seq_len))
        query, key = (query * cos) + (rotate_half(query) * sin), (key * cos) + (rotate_half(key) * sin)
        if past_key_value is not None:
            key, value = torch.cat([past_key_value[0], key], dim=2), torch.cat([past_key_value[1], value], dim=2)
        past_key_value = (key, value) if use_cache else None
        key, value = repeat_kv(key, self.num_key_value_groups), repeat_kv(value, self.num_key_value_groups)
        attn_output = F.scaled_dot_product_attention(query, key, value, is_causal=False, attn_mask=attention_mask)
        attn_output = attn_output.transpose(1, 2).contiguous().view(bsz, q_len, self.hidden_size)
        return self.o_proj(attn_output), past_key_value


class DeciLMDecoderLayer(nn.Module):
    def __init__(self, config: DeciLMConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DeciLMAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, use_cache=False):
        mixed, present = self.self_attn(self.input_layernorm(hidden_states), attention_mask, position_ids, past_key_value, use_cache)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), present


class DeciLMPreTrainedModel(PreTrainedModel):
    config_class = DeciLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["DeciLMDecoderLayer"]
    _skip_keys_device_placement = "past_key_values"
    _keys_to_ignore_on_load_missing = ["self_attn.rotary_emb.inv_freq"]

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=std)
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()


class DeciLMModel(DeciLMPreTrainedModel):
    def __init__(self, config: DeciLMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DeciLMDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    @add_start_docstrings_to_model_forward(LLAMA_INPUTS_DOCSTRING)
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, use_cache=None,
                output_hidden_states=None, return_dict=None):
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        past = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, length + past, dtype=torch.long, device=inputs_embeds.device).unsqueeze(0)
        hidden = torch.ones(length, past + length, dtype=torch.bool, device=inputs_embeds.device).triu(past + 1)[None, None]
        if attention_mask is not None:
            hidden = hidden | (attention_mask[:, None, None, :] == 0)
        mask = torch.zeros(hidden.shape, dtype=inputs_embeds.dtype, device=hidden.device).masked_fill(hidden, torch.finfo(inputs_embeds.dtype).min)
        hidden_states, presents, states = inputs_embeds, (), ()
        for idx, layer in enumerate(self.layers):
            states += (hidden_states,)
            hidden_states, present = layer(
                hidden_states, mask, position_ids, past_key_values[idx] if past_key_values is not None else None, use_cache)
            presents += (present,)
        hidden_states = self.norm(hidden_states)
        if not return_dict:
            return (hidden_states, presents) if use_cache else (hidden_states,)
        return BaseModelOutputWithPast(hidden_states, presents if use_cache else None, states + (hidden_states,) if output_hidden_states else None)


class DeciLMForCausalLM(DeciLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new):
        self.lm_head = new

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, labels=None,
                use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states, True)
        logits = self.lm_head(outputs[0]).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs):
        if past_key_values is not None:
            input_ids = input_ids[:, past_key_values[0][0].shape[2] :]
        position_ids = kwargs.get("position_ids", None)
        if attention_mask is not None and position_ids is None:
            position_ids = attention_mask.long().cumsum(-1) - 1
            position_ids.masked_fill_(attention_mask == 0, 1)
            if past_key_values:
                position_ids = position_ids[:, -input_ids.shape[1] :]
        return {"input_ids": input_ids, "position_ids": position_ids, "past_key_values": past_key_values,
                "use_cache": kwargs.get("use_cache"), "attention_mask": attention_mask}

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(tuple(state.index_select(0, beam_idx) for state in layer) for layer in past_key_values)

"""Parallel attention and MLP, rotary positions on a part of each head, transformers' Cache."""
import math
from typing import List, Optional, Tuple, Union

import torch
import torch.nn as nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, logging

from .configuration_mini_phi import MiniPhiConfig

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

logger = logging.get_logger(__name__)


class PartialRotary(nn.Module):
    """Tables of cosines and sines, made at once and made anew when a text is longer."""

    def __init__(self, dim, length, base, factor=1.0):
        super().__init__()
        self.dim, self.factor = dim, factor
        inv_freq = base ** (-torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._set_cos_sin_cache(length, torch.get_default_dtype())

    def _set_cos_sin_cache(self, seq_len, dtype):
        self.max_seq_len_cached = seq_len
        places = torch.arange(seq_len, device=self.inv_freq.device).type_as(self.inv_freq) / self.factor
        angles = torch.outer(places, self.inv_freq).repeat(1, 2)
        self.register_buffer("cos_cached", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin_cached", angles.sin().to(dtype), persistent=False)

    def forward(self, x, seq_len=None):
        if seq_len > self.max_seq_len_cached:
            self._set_cos_sin_cache(seq_len, x.dtype)
        return self.cos_cached[:seq_len], self.sin_cached[:seq_len]


def turn_part(x, cos, sin):
    """Rotates the first `cos.shape[-1]` channels of each head; the rest passes."""
    turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-b, a), dim=-1) * sin, passed), dim=-1)


class PhiAttention(nn.Module):
    def __init__(self, config: MiniPhiConfig, layer_idx: Optional[int] = None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)
        if self.config.rope_scaling is None:
            self.rotary_emb = PartialRotary(config.rotary_dim, config.n_positions, config.rope_theta)
        else:
            scaling_type = self.config.rope_scaling["type"]
            scaling_factor = self.config.rope_scaling["factor"]
            if scaling_type != "linear":
                raise ValueError(f"Unknown RoPE scaling type {scaling_type}")
            self.rotary_emb = PartialRotary(config.rotary_dim, config.n_positions, config.rope_theta, scaling_factor)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value: Optional[Cache] = None):
        bsz, q_len, _ = hidden_states.size()
        qkv = self.Wqkv(hidden_states).view(bsz, q_len, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        kv_seq_len = key.shape[-2]
        if past_key_value is not None:
            if self.layer_idx is None:
                raise ValueError("The layer index is needed with a cache.")
            kv_seq_len += past_key_value.get_usable_length(kv_seq_len, self.layer_idx)
        cos, sin = self.rotary_emb(value, seq_len=kv_seq_len)
        cos, sin = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
        query, key = turn_part(query, cos, sin), turn_part(key, cos, sin)
        if past_key_value is not None:
            cache_kwargs = {"sin": sin, "cos": cos, "partial_rotation_size": self.config.rotary_dim}
            key, value = past_key_value.update(key, value, self.layer_idx, cache_kwargs)
        weights = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(self.head_dim)
        if weights.size() != (bsz, self.num_heads, q_len, kv_seq_len):
            raise ValueError(f"Attention weights have the size {weights.size()}")
        if attention_mask is not None:
            weights = weights + attention_mask
        mixed = weights.softmax(dim=-1) @ value
        return self.out_proj(mixed.transpose(1, 2).reshape(bsz, q_len, -1)), past_key_value


class PhiMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation_fn = ACT2FN[config.activation_function]
        inner = config.n_inner if config.n_inner is not None else 2 * config.n_embd
        self.fc1 = nn.Linear(config.n_embd, inner)
        self.fc2 = nn.Linear(inner, config.n_embd)

    def forward(self, hidden_states):
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class PhiParallelBlock(nn.Module):
    def __init__(self, config: MiniPhiConfig, layer_idx: int):
        super().__init__()
        self.ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mixer = PhiAttention(config, layer_idx=layer_idx)
        self.mlp = PhiMLP(config)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, use_cache=False):
        residual = hidden_states
        hidden_states = self.ln(hidden_states)
        attended, present = self.mixer(hidden_states, attention_mask, position_ids, past_key_value)
        return self.resid_dropout(attended) + self.resid_dropout(self.mlp(hidden_states)) + residual, present


class MiniPhiPreTrainedModel(PreTrainedModel):
    config_class = MiniPhiConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = False
    _no_split_modules = ["PhiParallelBlock"]
    _skip_keys_device_placement = "past_key_values"
    _supports_flash_attn_2 = True
    _supports_cache_class = True

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear,)):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=std)
        elif isinstance(module, nn.LayerNorm):
            if module.bias is not None:
                module.bias.data.zero_()
            module.weight.data.fill_(1.0)


class MiniPhiModel(MiniPhiPreTrainedModel):
    def __init__(self, config: MiniPhiConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([PhiParallelBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self._use_flash_attention_2 = config._attn_implementation == "flash_attention_2"
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[List[torch.FloatTensor]] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> Union[Tuple, BaseModelOutputWithPast]:
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        batch_size, seq_length = input_ids.shape[:2] if input_ids is not None else inputs_embeds.shape[:2]
        past_key_values_length = 0
        if use_cache:
            use_legacy_cache = not isinstance(past_key_values, Cache)
            if use_legacy_cache:
                past_key_values = DynamicCache.from_legacy_cache(past_key_values)
            past_key_values_length = past_key_values.get_usable_length(seq_length)
        if position_ids is None:
            device = input_ids.device if input_ids is not None else inputs_embeds.device
            position_ids = torch.arange(
                past_key_values_length, seq_length + past_key_values_length, dtype=torch.long, device=device
            )
            position_ids = position_ids.unsqueeze(0)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        hidden_states = self.embed_dropout(inputs_embeds)
        if self._use_flash_attention_2:
            attention_mask = attention_mask if (attention_mask is not None and 0 in attention_mask) else None
        else:
            # 4d mask is passed through the layers
            attention_mask = _prepare_4d_causal_attention_mask(
                attention_mask, (batch_size, seq_length), inputs_embeds, past_key_values_length
            )
        next_decoder_cache = None
        for decoder_layer in self.h:
            hidden_states, next_decoder_cache = decoder_layer(
                hidden_states, attention_mask, position_ids, past_key_values if use_cache else None, use_cache
            )
        next_cache = None
        if use_cache:
            next_cache = next_decoder_cache.to_legacy_cache() if use_legacy_cache else next_decoder_cache
        if not return_dict:
            return tuple(v for v in [hidden_states, next_cache] if v is not None)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=next_cache)


class CausalLMHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.linear = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, hidden_states):
        return self.linear(self.ln(hidden_states)).to(torch.float32)


class MiniPhiForCausalLM(MiniPhiPreTrainedModel):
    _keys_to_ignore_on_load_missing = [""]
    _keys_to_ignore_on_load_unexpected = [r"h\.\d+\.mlp.(fc_in|fc_out)\.(weight|bias)"]
    _tied_weights_keys = ["lm_head.linear.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.transformer = MiniPhiModel(config)
        self.lm_head = CausalLMHead(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head.linear

    def set_output_embeddings(self, new_embeddings):
        self.lm_head.linear = new_embeddings

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=return_dict,
        )
        logits = self.lm_head(outputs[0])
        loss = None
        if labels is not None:
            loss = nn.CrossEntropyLoss()(logits[..., :-1, :].reshape(-1, logits.size(-1)), labels[..., 1:].reshape(-1))
        if not return_dict:
            output = (logits,) + outputs[1:]
            return (loss,) + output if loss is not None else output
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        if past_key_values is not None:
            if isinstance(past_key_values, Cache):
                cache_length = past_key_values.get_seq_length()
                past_length = past_key_values.seen_tokens
                max_cache_length = past_key_values.get_max_length()
            else:
                cache_length = past_length = past_key_values[0][0].shape[2]
                max_cache_length = None
            input_ids = input_ids[:, past_length - input_ids.shape[1] :] if past_length < input_ids.shape[1] else input_ids[:, -1:]
            if max_cache_length is not None and attention_mask is not None:
                if cache_length + input_ids.shape[1] > max_cache_length:
                    attention_mask = attention_mask[:, -max_cache_length:]
        position_ids = kwargs.get("position_ids", None)
        if attention_mask is not None and position_ids is None:
            position_ids = torch.relu(torch.cumsum(attention_mask.long(), -1) - 1)
            if past_key_values:
                position_ids = position_ids[:, -input_ids.shape[1] :]
        if inputs_embeds is not None and past_key_values is None:
            model_inputs = {"inputs_embeds": inputs_embeds}
        else:
            model_inputs = {"input_ids": input_ids}
        model_inputs.update(
            {
                "position_ids": position_ids,
                "past_key_values": past_key_values,
                "use_cache": kwargs.get("use_cache"),
                "attention_mask": attention_mask,
            }
        )
        return model_inputs

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        reordered_past = ()
        for layer_past in past_key_values:
            reordered_past += (tuple(past_state.index_select(0, beam_idx.to(past_state.device)) for past_state in layer_past),)
        return reordered_past

"""Scaled embeddings, scaled residuals, scaled logits; two sets of rotary factors, for short and for long texts."""
import math
from typing import Dict, Optional

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask, _prepare_4d_causal_attention_mask_for_sdpa
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import add_start_docstrings, is_torch_fx_available, logging

from .configuration_mini_minicpm import MiniMiniCPMConfig

logger = logging.get_logger(__name__)


def rms_layernorm(hidden: torch.Tensor, weight: torch.Tensor, eps: float):
    old_dtype = hidden.dtype
    variance = hidden.to(torch.float32).pow(2).mean(dim=-1, keepdim=True)
    return (hidden * torch.rsqrt(variance + eps)).to(old_dtype) * weight


class MiniCPMRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        return rms_layernorm(hidden_states, self.weight, self.variance_epsilon)


class LongRotary(nn.Module):
    def __init__(self, config, dim):
        super().__init__()
        scaling = config.rope_scaling
        self.original = scaling["original_max_position_embeddings"]
        self.short_factor, self.long_factor = scaling["short_factor"], scaling["long_factor"]
        self.amplitude = math.sqrt(1 + math.log(config.max_position_embeddings / self.original) / math.log(self.original))
        inv_freq = 1.0 / (config.rope_theta ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @torch.no_grad()
    def forward(self, x, position_ids):
        longest = int(position_ids.max()) + 1
        factors = self.long_factor if longest > self.original else self.short_factor
        inv_freq = self.inv_freq / torch.tensor(factors, dtype=torch.float32, device=x.device)
        freqs = position_ids[:, :, None].float() * inv_freq[None, None, :]
        emb = torch.cat((freqs, freqs), dim=-1)
        return (emb.cos() * self.amplitude).to(x.dtype), (emb.sin() * self.amplitude).to(x.dtype)


def apply_rotary(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-b, a), dim=-1) * sin.unsqueeze(1)


class MiniCPMAttention(nn.Module):
    def __init__(self, config, layer_idx: Optional[int] = None):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        scaling_type = config.rope_scaling["type"] if config.rope_scaling is not None else None
        if scaling_type != "longrope":
            raise ValueError(f"rope_scaling {scaling_type} is not supported")
        self.rotary_emb = LongRotary(config, self.head_dim)

    def split(self, x, heads):
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value: Optional[Cache] = None, **kwargs):
        query = self.split(self.q_proj(hidden_states), self.heads)
        key = self.split(self.k_proj(hidden_states), self.kv_heads)
        value = self.split(self.v_proj(hidden_states), self.kv_heads)
        kv_seq_len = key.shape[-2]
        if past_key_value is not None:
            kv_seq_len += past_key_value.get_usable_length(kv_seq_len, layer_idx=self.layer_idx)
        cos, sin = self.rotary_emb(value.to(torch.float32), position_ids)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if past_key_value is not None:
            key, value = past_key_value.update(key, value, self.layer_idx, {"sin": sin, "cos": cos})
        if key.shape[-2] != kv_seq_len:
            raise ValueError(f"the cache holds {key.shape[-2]} tokens, {kv_seq_len} were expected")
        mixed = self.attend(query, key, value, attention_mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), past_key_value

    def attend(self, query, key, value, mask):
        key, value = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (key, value))
        weights = query @ key.transpose(2, 3) / math.sqrt(self.head_dim)
        weights = weights + mask if mask is not None else weights
        return nn.functional.dropout(weights.softmax(-1), p=self.config.attention_dropout, training=self.training) @ value


class MiniCPMSdpaAttention(MiniCPMAttention):
    def attend(self, query, key, value, mask):
        key, value = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (key, value))
        causal = mask is None and query.shape[-2] > 1
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


MINICPM_ATTENTION_CLASSES = {"eager": MiniCPMAttention, "sdpa": MiniCPMSdpaAttention}


class MiniCPMDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.self_attn = MINICPM_ATTENTION_CLASSES[config._attn_implementation](config=config, layer_idx=layer_idx)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.input_layernorm = MiniCPMRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MiniCPMRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.scale = config.scale_depth / math.sqrt(config.num_hidden_layers)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None):
        attended, present = self.self_attn(self.input_layernorm(hidden_states), attention_mask, position_ids, past_key_value)
        hidden_states = hidden_states + attended * self.scale
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.down_proj(self.act_fn(self.gate_proj(normed)) * self.up_proj(normed)) * self.scale, present


class MiniMiniCPMPreTrainedModel(PreTrainedModel):
    config_class = MiniMiniCPMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniCPMDecoderLayer"]
    _skip_keys_device_placement = "past_key_values"
    _supports_flash_attn_2 = False
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()


@add_start_docstrings("The bare model.", "")
class MiniMiniCPMModel(MiniMiniCPMPreTrainedModel):
    def __init__(self, config: MiniMiniCPMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MiniCPMDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self._use_sdpa = config._attn_implementation == "sdpa"
        self.norm = MiniCPMRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        output_attentions = output_attentions if output_attentions is not None else self.config.output_attentions
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids) * self.config.scale_emb
        shape = inputs_embeds.shape[:2]
        seen = 0
        if use_cache:
            use_legacy_cache = not isinstance(past_key_values, Cache)
            if use_legacy_cache:
                past_key_values = DynamicCache.from_legacy_cache(past_key_values)
            seen = past_key_values.get_usable_length(shape[1])
        if position_ids is None:
            position_ids = torch.arange(seen, seen + shape[1], device=inputs_embeds.device).unsqueeze(0)
        if self._use_sdpa and not output_attentions:
            mask = _prepare_4d_causal_attention_mask_for_sdpa(attention_mask, shape, inputs_embeds, seen)
        else:
            mask = _prepare_4d_causal_attention_mask(attention_mask, shape, inputs_embeds, seen)
        hidden_states = inputs_embeds
        present = None
        for layer in self.layers:
            hidden_states, present = layer(hidden_states, mask, position_ids, past_key_values if use_cache else None)
        hidden_states = self.norm(hidden_states)
        next_cache = None
        if use_cache:
            next_cache = present.to_legacy_cache() if use_legacy_cache else present
        if not return_dict:
            return tuple(v for v in [hidden_states, next_cache] if v is not None)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=next_cache)


class MiniMiniCPMForCausalLM(MiniMiniCPMPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.model = MiniMiniCPMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                             past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
                             output_attentions=output_attentions, return_dict=return_dict)
        logits = self.lm_head(outputs[0] / (self.config.hidden_size / self.config.dim_model_base))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        if not return_dict:
            output = (logits,) + outputs[1:]
            return (loss,) + output if loss is not None else output
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs):
        past_length = 0
        if past_key_values is not None:
            if isinstance(past_key_values, Cache):
                past_length = past_key_values.seen_tokens
                max_cache_length = past_key_values.get_max_length()
                assert max_cache_length is None or max_cache_length > past_length
            else:
                past_length = past_key_values[0][0].shape[2]
            input_ids = input_ids[:, past_length:] if past_length < input_ids.shape[1] else input_ids[:, -1:]
        position_ids = kwargs.get("position_ids", None)
        if attention_mask is not None and position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            if past_key_values:
                position_ids = position_ids[:, -input_ids.shape[1] :]
        model_inputs = {"inputs_embeds": inputs_embeds} if inputs_embeds is not None and past_key_values is None else {"input_ids": input_ids}
        model_inputs.update({"position_ids": position_ids, "past_key_values": past_key_values,
                             "use_cache": kwargs.get("use_cache"), "attention_mask": attention_mask})
        return model_inputs

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        reordered_past = ()
        for layer_past in past_key_values:
            reordered_past += (tuple(past_state.index_select(0, beam_idx.to(past_state.device)) for past_state in layer_past),)
        return reordered_past

    @torch.inference_mode()
    def chat(self, tokenizer, query: str, history=None, max_length: int = 64, num_beams=1, do_sample=False, **kwargs):
        history = [] if history is None else history
        inputs = tokenizer(query, return_tensors="pt").to(self.device)
        outputs = self.generate(**inputs, max_length=max_length, num_beams=num_beams, do_sample=do_sample, **kwargs)
        return tokenizer.decode(outputs[0].tolist()[len(inputs["input_ids"][0]) : -1]), history

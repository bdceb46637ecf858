"""Forecasts a series of numbers: a gated embedding of each, layers of experts, one head for each horizon."""
import math
from typing import List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.activations import ACT2FN
from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal_2_10, logging

from .configuration_mini_time_moe import MiniTimeMoeConfig
from .ts_generation_mixin import TSGenerationMixin

logger = logging.get_logger(__name__)


class TimeMoeInputEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.emb_layer = nn.Linear(config.input_size, config.hidden_size, bias=False)
        self.gate_layer = nn.Linear(config.input_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.act_fn(self.gate_layer(x)) * self.emb_layer(x)


class TimeMoeRotaryEmbedding(torch.nn.Module):
    def __init__(self, dim, max_position_embeddings=2048, base=10000, device=None):
        super().__init__()
        self.dim, self.base = dim, base
        self.max_seq_len_cached = 0
        inv_freq = 1.0 / (self.base ** (torch.arange(0, self.dim, 2, dtype=torch.int64).float().to(device) / self.dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _grow(self, seq_len, dtype):
        self.max_seq_len_cached = seq_len
        freqs = torch.arange(seq_len, device=self.inv_freq.device)[:, None] * self.inv_freq[None]
        emb = torch.cat((freqs, freqs), dim=-1)
        self.register_buffer("cos_cached", emb.cos().to(dtype), persistent=False)
        self.register_buffer("sin_cached", emb.sin().to(dtype), persistent=False)

    def forward(self, x, seq_len):
        if seq_len > self.max_seq_len_cached:
            self._grow(seq_len, x.dtype)
        return self.cos_cached[:seq_len], self.sin_cached[:seq_len]


class TimeMoeRMSNorm(torch.nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class TimeMoeExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k, self.num_experts = config.num_experts_per_tok, config.num_experts
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.up = nn.ModuleList([nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(self.num_experts)])
        self.down = nn.ModuleList([nn.Linear(config.intermediate_size, config.hidden_size, bias=False) for _ in range(self.num_experts)])
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
        self.shared_up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.shared_down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        router_logits = self.gate(x)
        kept, chosen = router_logits.softmax(-1).topk(self.top_k, dim=-1)
        weights = torch.zeros_like(router_logits).scatter(-1, chosen, kept)
        made = sum(weights[..., e, None] * self.down[e](F.silu(self.up[e](x))) for e in range(self.num_experts))
        shared = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_down(F.silu(self.shared_up(x)))
        return made + shared, router_logits


class TimeMoeAttention(nn.Module):
    def __init__(self, config, layer_idx: Optional[int] = None):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotary_emb = TimeMoeRotaryEmbedding(self.head_dim, config.max_position_embeddings, config.rope_theta)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value: Optional[Cache] = None):
        shape = (*hidden_states.shape[:2], self.num_heads, self.head_dim)
        query, key, value = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        kv_seq_len = key.shape[-2]
        if past_key_value is not None:
            kv_seq_len += past_key_value.get_usable_length(kv_seq_len, self.layer_idx)
        cos, sin = (t[position_ids].unsqueeze(1) for t in self.rotary_emb(value, seq_len=kv_seq_len))
        query, key = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (query, key))
        if past_key_value is not None:
            key, value = past_key_value.update(key, value, self.layer_idx, {"sin": sin, "cos": cos})
        weights = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(self.head_dim)
        if attention_mask is not None:
            weights = weights + attention_mask
        return self.o_proj((weights.softmax(-1) @ value).transpose(1, 2).flatten(2)), past_key_value


TIME_MOE_ATTENTION_CLASSES = {"eager": TimeMoeAttention, "sdpa": TimeMoeAttention}


class TimeMoeDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = TIME_MOE_ATTENTION_CLASSES[config._attn_implementation](config, layer_idx)
        self.ffn_layer = TimeMoeExperts(config)
        self.input_layernorm = TimeMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = TimeMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states, attention_mask, position_ids, past_key_value):
        attended, present = self.self_attn(self.input_layernorm(hidden_states), attention_mask, position_ids, past_key_value)
        hidden_states = hidden_states + attended
        fed, router_logits = self.ffn_layer(self.post_attention_layernorm(hidden_states))
        return hidden_states + fed, present, router_logits


class MiniTimeMoePreTrainedModel(PreTrainedModel):
    config_class = MiniTimeMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TimeMoeDecoderLayer"]
    _skip_keys_device_placement = "past_key_values"
    _supports_flash_attn_2 = True
    _supports_sdpa = False
    _supports_cache_class = True

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, torch.nn.Linear):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.bias is not None:
                module.bias.data.zero_()


class MiniTimeMoeModel(MiniTimeMoePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_layer = TimeMoeInputEmbedding(config)
        self.layers = nn.ModuleList([TimeMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self._attn_implementation = config._attn_implementation
        self.norm = TimeMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(self, input_ids: torch.FloatTensor = None, attention_mask=None, position_ids=None, past_key_values=None,
                use_cache=None, output_hidden_states=None, return_dict=None):
        # input_ids is the series, [batch, length] or [batch, length, channels]
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        if len(input_ids.shape) == 2:
            input_ids = input_ids.unsqueeze(dim=-1)
        batch_size, seq_length, _ = input_ids.shape
        past_key_values_length = 0
        if use_cache:
            use_legacy_cache = not isinstance(past_key_values, Cache)
            if use_legacy_cache:
                past_key_values = DynamicCache.from_legacy_cache(past_key_values)
            past_key_values_length = past_key_values.get_usable_length(seq_length)
        if position_ids is None:
            position_ids = torch.arange(
                past_key_values_length, seq_length + past_key_values_length, dtype=torch.long, device=input_ids.device
            ).unsqueeze(0)
        hidden_states = self.embed_layer(input_ids)
        attention_mask = _prepare_4d_causal_attention_mask(
            attention_mask, (batch_size, seq_length), hidden_states, past_key_values_length, sliding_window=None
        )
        router_logits, present = (), None
        for layer in self.layers:
            hidden_states, present, logits = layer(hidden_states, attention_mask, position_ids, past_key_values if use_cache else None)
            router_logits += (logits,)
        hidden_states = self.norm(hidden_states)
        next_cache = None
        if use_cache:
            next_cache = present.to_legacy_cache() if use_legacy_cache else present
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=next_cache, router_logits=router_logits)


class MiniTimeMoeForPrediction(MiniTimeMoePreTrainedModel, TSGenerationMixin):
    def __init__(self, config: MiniTimeMoeConfig):
        super().__init__(config)
        self.apply_aux_loss = config.apply_aux_loss
        self.model = MiniTimeMoeModel(config)
        self.lm_heads = nn.ModuleList(
            [nn.Linear(config.hidden_size, config.input_size * horizon, bias=False) for horizon in config.horizon_lengths]
        )
        self.loss_function = torch.nn.HuberLoss(reduction="none", delta=2.0)
        self.post_init()

    def set_decoder(self, decoder):
        self.model = decoder

    def get_decoder(self):
        return self.model

    def forward(self, input_ids: torch.FloatTensor = None, attention_mask=None, position_ids=None, past_key_values=None,
                labels: Optional[torch.FloatTensor] = None, use_cache=None, return_dict=None, max_horizon_length=None):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                             past_key_values=past_key_values, use_cache=use_cache, return_dict=return_dict)
        predictions = self.lm_heads[0](outputs[0])
        loss = None
        if labels is not None:
            targets = labels if labels.dim() == 3 else labels.unsqueeze(-1)
            loss = self.loss_function(predictions, targets.to(predictions.dtype)).mean()
            if self.apply_aux_loss:
                probabilities = torch.stack([logits.softmax(-1).mean((0, 1)) for logits in outputs.router_logits])
                loss = loss + self.config.router_aux_loss_factor * (probabilities**2).sum()
        return MoeCausalLMOutputWithPast(loss=loss, logits=predictions, past_key_values=outputs.past_key_values,
                                         router_logits=outputs.router_logits)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        if past_key_values is not None:
            if isinstance(past_key_values, Cache):
                past_length = past_key_values.seen_tokens
                max_cache_length = past_key_values.get_max_length()
            else:
                past_length = past_key_values[0][0].shape[2]
            input_ids = input_ids[:, past_length:]
        position_ids = kwargs.get("position_ids", None)
        if attention_mask is not None and position_ids is None:
            position_ids = attention_mask.long().cumsum(-1) - 1
            position_ids.masked_fill_(attention_mask == 0, 1)
            position_ids = position_ids[:, -input_ids.shape[1] :]
        return {"input_ids": input_ids, "position_ids": position_ids, "past_key_values": past_key_values,
                "use_cache": kwargs.get("use_cache"), "attention_mask": attention_mask}

"""A mixture of small experts with one shared by all tokens, and a loss that balances the routed ones."""
import math
import warnings
from typing import List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_attn_mask_utils import (
    AttentionMaskConverter,
    _prepare_4d_attention_mask,
    _prepare_4d_causal_attention_mask,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS, is_torch_greater_or_equal_than_1_13
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal_2_10, logging
from transformers.utils.import_utils import is_torch_fx_available

from .configuration_mini_deepseek import MiniDeepseekConfig

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except ImportError:
    pass

# Makes the mask a leaf function of the FX graph.
if is_torch_fx_available():
    if not is_torch_greater_or_equal_than_1_13:
        import torch.fx

    _prepare_4d_causal_attention_mask = torch.fx.wrap(_prepare_4d_causal_attention_mask)

logger = logging.get_logger(__name__)


class DeepseekRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x):
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


ALL_LAYERNORM_LAYERS.append(DeepseekRMSNorm)


class YarnRotary(nn.Module):
    """Slow frequencies are interpolated, fast ones kept, those between are mixed."""

    def __init__(self, dim, base, scaling, length, device=None):
        super().__init__()
        self.mscale = 0.1 * scaling["mscale"] * math.log(scaling["factor"]) + 1.0
        fast = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
        turns = scaling["original_max_position_embeddings"] * fast / (2 * math.pi)
        keep = ((turns - scaling["beta_slow"]) / (scaling["beta_fast"] - scaling["beta_slow"])).clamp(0, 1)
        self.register_buffer("inv_freq", fast * keep + fast / scaling["factor"] * (1 - keep), persistent=False)
        self.max_seq_len_cached = None
        self._tabulate(length)

    def _tabulate(self, seq_len):
        self.max_seq_len_cached = seq_len
        freqs = torch.outer(torch.arange(seq_len, device=self.inv_freq.device, dtype=torch.float32), self.inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        self.register_buffer("cos_cached", emb.cos() * self.mscale, persistent=False)
        self.register_buffer("sin_cached", emb.sin() * self.mscale, persistent=False)

    def forward(self, x, seq_len=None):
        if self.max_seq_len_cached is None or seq_len > self.max_seq_len_cached:
            self._tabulate(seq_len)
        return self.cos_cached[:seq_len].to(x.dtype), self.sin_cached[:seq_len].to(x.dtype)


class DeepseekMLP(nn.Module):
    def __init__(self, config, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MoEGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k, self.experts, self.alpha = config.num_experts_per_tok, config.n_routed_experts, config.aux_loss_alpha
        self.norm = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty((self.experts, config.hidden_size)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        import torch.nn.init as init

        init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, tokens):
        scores = F.linear(tokens, self.weight).softmax(dim=-1)
        weight, index = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        if self.norm:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        aux_loss = None
        if self.training and self.alpha > 0.0:
            load = F.one_hot(index.flatten(), self.experts).float().mean(0) * self.experts
            aux_loss = (scores.mean(0) * load).sum() * self.alpha
        return index, weight, aux_loss


class AddAuxiliaryLoss(torch.autograd.Function):
    """Adds a loss's gradient without changing the values."""

    @staticmethod
    def forward(ctx, x, loss):
        ctx.dtype = loss.dtype
        ctx.needed = loss.requires_grad
        return x

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, torch.ones((), dtype=ctx.dtype, device=grad_output.device) if ctx.needed else None


class DeepseekMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.experts = nn.ModuleList([DeepseekMLP(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts)])
        self.gate = MoEGate(config)
        if config.n_shared_experts is not None:
            self.shared_experts = DeepseekMLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states):
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        index, weight, aux_loss = self.gate(tokens)
        made = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(index == number)
            made = made.index_add(0, rows, expert(tokens[rows]) * weight[rows, place, None])
        if aux_loss is not None:
            made = AddAuxiliaryLoss.apply(made, aux_loss)
        return made.view_as(hidden_states) + self.shared_experts(hidden_states)


class DeepseekAttention(nn.Module):
    def __init__(self, config: MiniDeepseekConfig, layer_idx: Optional[int] = None):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"]:
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias))
        self._init_rope()

    def _init_rope(self):
        if self.config.rope_scaling is None:
            plain = {"factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 0.0, "original_max_position_embeddings": 1}
            self.rotary_emb = YarnRotary(self.head_dim, self.config.rope_theta, plain, self.config.max_position_embeddings)
        elif self.config.rope_scaling["type"] == "yarn":
            self.rotary_emb = YarnRotary(
                self.head_dim, self.config.rope_theta, self.config.rope_scaling, self.config.max_position_embeddings
            )
        else:
            raise ValueError(f"Unknown RoPE scaling type {self.config.rope_scaling['type']}")

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, output_attentions=False, **kwargs):
        if "padding_mask" in kwargs:
            warnings.warn("Passing `padding_mask` is deprecated. Use `attention_mask` instead.")
        heads = hidden_states.shape[:2] + (self.num_heads, self.head_dim)
        query_states = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        kv_seq_len = key_states.shape[-2]
        if past_key_value is not None:
            kv_seq_len += past_key_value.get_usable_length(kv_seq_len, self.layer_idx)
        cos, sin = (t[position_ids].unsqueeze(1) for t in self.rotary_emb(value_states, seq_len=kv_seq_len))
        query_states, key_states = (
            x * cos + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1) * sin
            for x in (query_states, key_states)
        )
        if past_key_value is not None:
            cache_kwargs = {"sin": sin, "cos": cos}  # Specific to RoPE models
            key_states, value_states = past_key_value.update(key_states, value_states, self.layer_idx, cache_kwargs)
        weights = torch.matmul(query_states, key_states.transpose(2, 3)) / math.sqrt(self.head_dim)
        if attention_mask is not None:
            weights = weights + attention_mask
        weights = weights.softmax(-1)
        mixed = torch.matmul(weights, value_states).transpose(1, 2).flatten(2)
        return self.o_proj(mixed), weights if output_attentions else None, past_key_value


class DeepseekDecoderLayer(nn.Module):
    def __init__(self, config: MiniDeepseekConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DeepseekAttention(config, layer_idx)
        routed = config.n_routed_experts is not None and layer_idx >= config.first_k_dense_replace
        self.mlp = DeepseekMoE(config) if routed else DeepseekMLP(config, config.intermediate_size)
        self.input_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states, **kwargs):
        attended, weights, present = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights, present


class MiniDeepseekPreTrainedModel(PreTrainedModel):
    config_class = MiniDeepseekConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekDecoderLayer"]
    _skip_keys_device_placement = "past_key_values"
    _supports_flash_attn_2 = True
    _supports_cache_class = True

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()


class MiniDeepseekModel(MiniDeepseekPreTrainedModel):
    def __init__(self, config: MiniDeepseekConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self._use_flash_attention_2 = config._attn_implementation == "flash_attention_2"
        self.norm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        output_attentions = output_attentions if output_attentions is not None else self.config.output_attentions
        output_hidden_states = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, seq_length = inputs_embeds.shape[:2]
        past_key_values_length = 0
        if use_cache:
            use_legacy_cache = not isinstance(past_key_values, Cache)
            if use_legacy_cache:
                past_key_values = DynamicCache.from_legacy_cache(past_key_values)
            past_key_values_length = past_key_values.get_usable_length(seq_length)
        if position_ids is None:
            position_ids = torch.arange(past_key_values_length, seq_length + past_key_values_length, device=inputs_embeds.device)[None]
        if self._use_flash_attention_2:
            attention_mask = attention_mask if (attention_mask is not None and 0 in attention_mask) else None
        else:
            attention_mask = _prepare_4d_causal_attention_mask(
                attention_mask, (batch_size, seq_length), inputs_embeds, past_key_values_length
            )
        hidden_states = inputs_embeds
        all_hidden_states, all_self_attns, next_decoder_cache = (), (), None
        for decoder_layer in self.layers:
            all_hidden_states += (hidden_states,)
            hidden_states, weights, next_decoder_cache = decoder_layer(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_value=past_key_values,
                output_attentions=output_attentions,
            )
            all_self_attns += (weights,)
        hidden_states = self.norm(hidden_states)
        next_cache = None
        if use_cache:
            next_cache = next_decoder_cache.to_legacy_cache() if use_legacy_cache else next_decoder_cache
        states = all_hidden_states + (hidden_states,) if output_hidden_states else None
        attentions = all_self_attns if output_attentions else None
        if not return_dict:
            return tuple(v for v in [hidden_states, next_cache, states, attentions] if v is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, past_key_values=next_cache, hidden_states=states, attentions=attentions
        )


class MiniDeepseekForCausalLM(MiniDeepseekPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.model = MiniDeepseekModel(config)
        self.vocab_size = config.vocab_size
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

    def set_decoder(self, decoder):
        self.model = decoder

    def get_decoder(self):
        return self.model

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                             output_attentions, output_hidden_states, return_dict)
        logits = self.lm_head(outputs[0]).float()
        loss = None
        if labels is not None:
            loss = nn.CrossEntropyLoss()(logits[:, :-1].reshape(-1, self.config.vocab_size), labels[:, 1:].reshape(-1))
        if not return_dict:
            output = (logits,) + outputs[1:]
            return (loss,) + output if loss is not None else output
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values,
                                      hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs):
        if past_key_values is not None:
            if isinstance(past_key_values, Cache):
                cache_length = past_key_values.get_seq_length()
                past_length = past_key_values.seen_tokens
                max_cache_length = past_key_values.get_max_length()
            else:
                cache_length = past_length = past_key_values[0][0].shape[2]
                max_cache_length = None
            if attention_mask is not None and attention_mask.shape[1] > input_ids.shape[1]:
                input_ids = input_ids[:, -(attention_mask.shape[1] - past_length) :]
            elif past_length < input_ids.shape[1]:
                input_ids = input_ids[:, past_length:]
            if max_cache_length is not None and attention_mask is not None and cache_length + input_ids.shape[1] > max_cache_length:
                attention_mask = attention_mask[:, -max_cache_length:]
        position_ids = kwargs.get("position_ids", None)
        if attention_mask is not None and position_ids is None:
            position_ids = attention_mask.long().cumsum(-1) - 1
            position_ids.masked_fill_(attention_mask == 0, 1)
            if past_key_values:
                position_ids = position_ids[:, -input_ids.shape[1] :]
        if inputs_embeds is not None and past_key_values is None:
            model_inputs = {"inputs_embeds": inputs_embeds}
        else:
            model_inputs = {"input_ids": input_ids}
        model_inputs.update({"position_ids": position_ids, "past_key_values": past_key_values,
                             "use_cache": kwargs.get("use_cache"), "attention_mask": attention_mask})
        return model_inputs

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(tuple(state.index_select(0, beam_idx.to(state.device)) for state in layer) for layer in past_key_values)

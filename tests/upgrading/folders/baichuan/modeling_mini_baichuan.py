# A decoder without position embeddings: linear biases, one packed projection, an output head of unit rows.
import math
from typing import List, Optional, Tuple, Union

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.generation.utils import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ContextManagers, logging

from .configuration_mini_baichuan import MiniBaichuanConfig

logger = logging.get_logger(__name__)

try:
    from xformers import ops as xops
except ImportError:
    xops = None
    logger.warning_once("xformers is not installed: attention is computed by torch.")


def head_slopes(count):
    """One slope per head: powers of two; heads beyond the last power of two take those in between."""
    full = 2 ** int(math.log2(count))
    slopes = [2.0 ** (-8.0 * (i + 1) / full) for i in range(full)]
    return slopes + [2.0 ** (-4.0 * (2 * i + 1) / full) for i in range(count - full)]


def distance_biases(count, length):
    """[heads, length, length]: minus infinity for what comes later, minus slope times distance for what was."""
    places = torch.arange(length)
    distance = places[None, :] - places[:, None]
    biases = torch.tensor(head_slopes(count))[:, None, None] * distance
    return biases.masked_fill(distance > 0, float("-inf"))


class RMSNorm(torch.nn.Module):
    def __init__(self, hidden_size, epsilon=1e-6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size))
        self.epsilon = epsilon

    def forward(self, states):
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.epsilon)


class PackedAttention(torch.nn.Module):
    def __init__(self, config: MiniBaichuanConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.W_pack = torch.nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, states, bias, past_key_value=None, use_cache=False):
        packed = self.W_pack(states).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = packed.unbind(0)
        if past_key_value is not None:
            key = torch.cat([past_key_value[0], key], dim=2)
            value = torch.cat([past_key_value[1], value], dim=2)
        past_key_value = (key, value) if use_cache else None
        scores = query @ key.transpose(2, 3) / math.sqrt(self.head_dim) + bias[..., -query.shape[2] :, :]
        mixed = torch.softmax(scores.clamp(min=torch.finfo(scores.dtype).min), dim=-1) @ value
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), past_key_value


class BaichuanLayer(torch.nn.Module):
    def __init__(self, config: MiniBaichuanConfig):
        super().__init__()
        self.self_attn = PackedAttention(config=config)
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.input_layernorm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)

    def forward(self, states, bias, past_key_value=None, use_cache=False):
        attended, present = self.self_attn(self.input_layernorm(states), bias, past_key_value, use_cache=use_cache)
        states = states + attended
        gate, up = self.gate_up(self.post_attention_layernorm(states)).chunk(2, -1)
        states = states + self.down(self.act_fn(gate) * up)
        return (states, present) if use_cache else (states,)


class MiniBaichuanPreTrainedModel(PreTrainedModel):
    config_class = MiniBaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BaichuanLayer"]

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, torch.nn.Linear):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, torch.nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()
        elif isinstance(module, RMSNorm):
            module.weight.data.fill_(1.0)


class MiniBaichuanModel(MiniBaichuanPreTrainedModel):
    def __init__(self, config: MiniBaichuanConfig):
        super().__init__(config)
        self.n_head = config.num_attention_heads
        self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = torch.nn.ModuleList([BaichuanLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.gradient_checkpointing = config.gradient_checkpointing
        self.post_init()
        self.max_cache_pos = config.model_max_length
        self.first_run = True

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def get_biases(self, like, length):
        if self.first_run or length > self.max_cache_pos:
            self.first_run = False
            self.max_cache_pos = max(length, self.max_cache_pos)
            self.register_buffer("future_mask", distance_biases(self.n_head, self.max_cache_pos).to(like), persistent=False)
        return self.future_mask[: self.n_head, :length, :length]

    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        past_key_values: Optional[List[torch.FloatTensor]] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = False,
        return_dict: Optional[bool] = True,
    ) -> Union[Tuple, BaseModelOutputWithPast]:
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        length = inputs_embeds.shape[1]
        if past_key_values is not None:
            length = length + past_key_values[0][0].shape[2]
        bias = self.get_biases(inputs_embeds, length)
        if attention_mask is not None:
            bias = bias + torch.zeros_like(attention_mask, dtype=bias.dtype).masked_fill(
                attention_mask == 0, torch.finfo(bias.dtype).min
            )[:, None, None]
        hidden_states = inputs_embeds
        next_decoder_cache = () if use_cache else None
        for idx, layer in enumerate(self.layers):
            past_key_value = past_key_values[idx] if past_key_values is not None else None
            layer_outputs = layer(hidden_states, bias, past_key_value, use_cache)
            hidden_states = layer_outputs[0]
            if use_cache:
                next_decoder_cache += (layer_outputs[1],)
        hidden_states = self.norm(hidden_states)
        if not return_dict:
            return tuple(v for v in [hidden_states, next_decoder_cache] if v is not None)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=next_decoder_cache)


class UnitRows(nn.Module):
    """An output head whose rows have length one."""

    def __init__(self, hidden_size, vocab_size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty((vocab_size, hidden_size)))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, states):
        return F.linear(states, F.normalize(self.weight))


class MiniBaichuanForCausalLM(MiniBaichuanPreTrainedModel):
    def __init__(self, config, *model_args, **model_kwargs):
        super().__init__(config, *model_args, **model_kwargs)
        self.model = MiniBaichuanModel(config)
        self.lm_head = UnitRows(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        past_key_values: Optional[List[torch.FloatTensor]] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        labels: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = False,
        output_hidden_states: Optional[bool] = False,
        return_dict: Optional[bool] = True,
        **kwargs,
    ) -> Union[Tuple, CausalLMOutputWithPast]:
        outputs = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, return_dict)
        logits = self.lm_head(outputs[0])
        loss = None
        if labels is not None:
            shifted = logits[..., :-1, :].contiguous().view(-1, self.config.vocab_size)
            loss = F.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))
            loss = loss + self.config.z_loss_weight * shifted.max(-1).values.pow(2).mean()
        if not return_dict:
            output = (logits,) + outputs[1:]
            return (loss,) + output if loss is not None else output
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        **kwargs,
    ):
        if past_key_values:
            input_ids = input_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": attention_mask,
        }

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(tuple(kept.index_select(0, beam_idx) for kept in layer_past) for layer_past in past_key_values)

"""Dialogue model: states travel as [length, batch, width], keys and values are shared by groups of heads."""

from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init
from transformers.generation.utils import LogitsProcessorList, ModelOutput
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_mini_glm import MiniGLMConfig


class HalfRotary(nn.Module):
    """Turns neighbouring pairs of the first half of each head."""

    def __init__(self, width, dtype=None):
        super().__init__()
        frequencies = 10000.0 ** -(torch.arange(0, width, 2).to(dtype) / width)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, length):
        angles = torch.arange(length, dtype=torch.float, device=self.inv_freq.device)[:, None] * self.inv_freq
        return torch.polar(torch.ones_like(angles), angles)


def turn(states, table):
    """states: [length, batch, heads, width], table: complex [length, batch, width / 4]"""
    turned, kept = states.chunk(2, dim=-1)
    pairs = torch.view_as_complex(turned.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.cat([torch.view_as_real(pairs * table.unsqueeze(2)).flatten(-2).type_as(kept), kept], dim=-1)


class GroupedAttention(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.number = number
        self.heads, self.groups, self.width = config.num_attention_heads, config.multi_query_group_num, config.kv_channels
        self.sizes = [self.heads * self.width, self.groups * self.width, self.groups * self.width]
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.sizes), bias=config.add_qkv_bias)
        self.dense = nn.Linear(self.sizes[0], config.hidden_size, bias=False)

    def forward(self, states, blocked, table, kv_cache=None, use_cache=True):
        parts = self.query_key_value(states).split(self.sizes, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.width)) for part in parts)
        query, key = turn(query, table), turn(key, table)
        if kv_cache is not None:
            key, value = torch.cat([kv_cache[0], key]), torch.cat([kv_cache[1], value])
        kept = (key, value) if use_cache else None
        key, value = (t.repeat_interleave(self.heads // self.groups, dim=2) for t in (key, value))
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * self.width**-0.5
        scores = scores.masked_fill(blocked, -1e30).softmax(-1)
        return self.dense(torch.einsum("bhqk,kbhd->qbhd", scores, value).flatten(2)), kept


class GLMBlock(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attention = GroupedAttention(config, number)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.up = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, states, blocked, table, kv_cache=None, use_cache=True):
        mixed, kept = self.self_attention(self.input_layernorm(states), blocked, table, kv_cache, use_cache)
        states = states + mixed
        gate, up = self.up(self.post_attention_layernorm(states)).chunk(2, dim=-1)
        return states + self.down(F.silu(gate) * up), kept


class MiniGLMPreTrainedModel(PreTrainedModel):
    is_parallelizable = False
    supports_gradient_checkpointing = True
    config_class = MiniGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GLMBlock"]

    def _init_weights(self, module: nn.Module):
        return

    def get_masks(self, input_ids, past_key_values, padding_mask=None):
        """True where a query may not look: [batch, 1, queries, keys]"""
        batch, new = input_ids.shape
        seen = 0
        if past_key_values:
            seen = past_key_values[0][0].shape[0]
        blocked = torch.ones(new, seen + new, dtype=torch.bool, device=input_ids.device).triu(seen + 1)
        if padding_mask is not None:
            return blocked[None, None] | (padding_mask[:, None, None, :] < 1)
        return blocked[None, None]

    def get_position_ids(self, input_ids, device):
        return torch.arange(input_ids.shape[1], device=device).expand(input_ids.shape)

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, MiniGLMModel):
            module.gradient_checkpointing = value


class MiniGLMModel(MiniGLMPreTrainedModel):
    def __init__(self, config: MiniGLMConfig, device=None, empty_init=True):
        super().__init__(config)
        make = skip_init if empty_init else (lambda cls, *args, **kwargs: cls(*args, **kwargs))
        self.gradient_checkpointing = False
        self.word_embeddings = make(nn.Embedding, config.padded_vocab_size, config.hidden_size)
        self.rotary_pos_emb = HalfRotary(config.kv_channels // 2, dtype=config.torch_dtype)
        self.layers = nn.ModuleList([GLMBlock(config, i + 1) for i in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.output_layer = make(nn.Linear, config.hidden_size, config.padded_vocab_size, bias=False)

    def get_input_embeddings(self):
        return self.word_embeddings

    def forward(self, input_ids, position_ids=None, attention_mask=None, past_key_values=None, use_cache=None, return_dict=None):
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        blocked = self.get_masks(input_ids, past_key_values, padding_mask=attention_mask)
        table = self.rotary_pos_emb(self.config.seq_length)
        table = table[position_ids] if position_ids is not None else table[None, : input_ids.shape[1]]
        table = table.transpose(0, 1)
        states = self.word_embeddings(input_ids).transpose(0, 1).contiguous()
        if not past_key_values:
            past_key_values = [None for _ in self.layers]
        presents = () if use_cache else None
        for layer, kv_cache in zip(self.layers, past_key_values):
            states, kept = layer(states, blocked, table, kv_cache=kv_cache, use_cache=use_cache)
            if use_cache:
                presents = presents + (kept,)
        states = self.final_layernorm(states)
        if not return_dict:
            return tuple(v for v in [states, presents] if v is not None)
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=presents)


class MiniGLMForConditionalGeneration(MiniGLMPreTrainedModel):
    def __init__(self, config: MiniGLMConfig, empty_init=True, device=None):
        super().__init__(config)
        self.max_sequence_length = config.max_length
        self.transformer = MiniGLMModel(config, empty_init=empty_init, device=device)
        self.config = config

    def _update_model_kwargs_for_generation(
        self,
        outputs: ModelOutput,
        model_kwargs: Dict[str, Any],
        is_encoder_decoder: bool = False,
        standardize_cache_format: bool = False,
    ) -> Dict[str, Any]:
        model_kwargs["past_key_values"] = self._extract_past_from_model_output(
            outputs, standardize_cache_format=standardize_cache_format
        )
        if "attention_mask" in model_kwargs:
            mask = model_kwargs["attention_mask"]
            model_kwargs["attention_mask"] = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=-1)
        if "position_ids" in model_kwargs:
            places = model_kwargs["position_ids"]
            model_kwargs["position_ids"] = torch.cat([places, places[..., -1:] + 1], dim=-1)
        model_kwargs["is_first_forward"] = False
        return model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        use_cache: Optional[bool] = None,
        is_first_forward: bool = True,
        **kwargs,
    ) -> dict:
        if position_ids is None:
            position_ids = self.get_position_ids(input_ids, device=input_ids.device)
        if not is_first_forward and past_key_values is not None:
            position_ids = position_ids[..., -1:]
            input_ids = input_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "return_last_logit": True,
            "use_cache": use_cache,
        }

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        past_key_values: Optional[Tuple[torch.FloatTensor]] = None,
        labels: Optional[torch.Tensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        return_last_logit: Optional[bool] = False,
    ):
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        outputs = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=return_dict,
        )
        states = outputs[0]
        if return_last_logit:
            states = states[-1:]
        logits = self.transformer.output_layer(states).transpose(0, 1).contiguous()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        if not return_dict:
            return ((loss,) if loss is not None else ()) + (logits,) + outputs[1:]
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    @staticmethod
    def _reorder_cache(past, beam_idx: torch.LongTensor):
        return tuple(tuple(kept.index_select(1, beam_idx) for kept in layer) for layer in past)

    @torch.inference_mode()
    def chat(self, tokenizer, query: str, max_length: int = 64, logits_processor=None, **kwargs):
        logits_processor = logits_processor or LogitsProcessorList()
        inputs = tokenizer(query, return_tensors="pt").to(self.device)
        made = self.generate(**inputs, max_length=max_length, logits_processor=logits_processor, **kwargs)
        return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :].tolist())

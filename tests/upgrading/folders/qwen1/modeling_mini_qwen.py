"""GPT-2's names over rotary positions; beyond the trained length queries grow with log n and the base with the text."""
import math
from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.model_parallel_utils import assert_device_map, get_device_map

from .configuration_mini_qwen import MiniQWenConfig

logger = logging.get_logger(__name__)

SUPPORT_CUDA = torch.cuda.is_available()
SUPPORT_BF16 = SUPPORT_CUDA and torch.cuda.is_bf16_supported()


class StretchedRotary(torch.nn.Module):
    def __init__(self, dim, base=10000):
        super().__init__()
        self.dim = dim
        self.base = base
        # a plain attribute: it moves nowhere by itself
        self.inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
        self._tables = None
        self._tabulated = (0, 1.0)

    def forward(self, length, alpha=1.0):
        if self._tables is None or length > self._tabulated[0] or alpha != self._tabulated[1]:
            inv_freq = self.inv_freq
            if alpha != 1.0:
                inv_freq = self.inv_freq * alpha ** (-torch.arange(0, self.dim, 2).float() / (self.dim - 2))
            self._tabulated = (max(2 * length, 16), alpha)
            angles = torch.outer(torch.arange(self._tabulated[0]).type_as(inv_freq), inv_freq).repeat(1, 2)
            self._tables = angles.cos(), angles.sin()
        return [table[None, :length, None, :] for table in self._tables]


def rotate(x, tables):
    cos, sin = (table[:, -x.shape[1] :].to(x.device) for table in tables)
    a, b = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).type_as(x)


class RMSNorm(torch.nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class QWenAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.register_buffer("masked_bias", torch.tensor(-1e4), persistent=False)
        self.seq_length = config.seq_length
        self.num_heads, self.head_dim = config.num_attention_heads, config.kv_channels
        self.c_attn = nn.Linear(config.hidden_size, 3 * self.num_heads * self.head_dim)
        self.c_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=not config.no_bias)
        self.use_logn_attn = config.use_logn_attn
        growth = [max(1.0, math.log(i, self.seq_length)) for i in range(1, 2 * config.max_position_embeddings)]
        self.register_buffer("logn_tensor", torch.tensor(growth)[None, :, None, None], persistent=False)

    def forward(self, states, tables, visible, layer_past, attention_mask, use_cache):
        query, key, value = self.c_attn(states).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        query, key = rotate(query, tables), rotate(key, tables)
        if layer_past is not None:
            key = torch.cat((layer_past[0], key), dim=1)
            value = torch.cat((layer_past[1], value), dim=1)
        present = (key, value) if use_cache else None
        seen, size = key.size(1) - query.size(1), key.size(1)
        if self.use_logn_attn and size > self.seq_length and not self.training:
            query = query * self.logn_tensor[:, seen:size].type_as(query)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / self.head_dim**0.5
        scores = torch.where(visible[:, :, seen:size, :size], scores, self.masked_bias.to(scores.dtype))
        if attention_mask is not None:
            scores = scores + attention_mask
        return self.c_proj(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)), present


class QWenBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = QWenAttention(config)
        self.ln_2 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size // 2, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, config.intermediate_size // 2, bias=not config.no_bias)
        self.c_proj = nn.Linear(config.intermediate_size // 2, config.hidden_size, bias=not config.no_bias)

    def forward(self, states, *args):
        attended, present = self.attn(self.ln_1(states), *args)
        states = states + attended
        normed = self.ln_2(states)
        return states + self.c_proj(self.w1(normed) * F.silu(self.w2(normed))), present


class MiniQWenPreTrainedModel(PreTrainedModel):
    config_class = MiniQWenConfig
    base_model_prefix = "transformer"
    is_parallelizable = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]

    def __init__(self, *inputs, **kwargs):
        super().__init__(*inputs, **kwargs)

    def _init_weights(self, module):
        """Initialize the weights."""
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            module.weight.data.fill_(1.0)
        for name, p in module.named_parameters():
            if name == "c_proj.weight":
                p.data.normal_(mean=0.0, std=self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers))


class MiniQWenModel(MiniQWenPreTrainedModel):
    _keys_to_ignore_on_load_missing = ["attn.masked_bias"]

    def __init__(self, config):
        super().__init__(config)
        self.seq_length = config.seq_length
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.rotary_emb = StretchedRotary(int(config.kv_channels * config.rotary_pct), base=config.rotary_emb_base)
        self.h = nn.ModuleList([QWenBlock(config) for i in range(config.num_hidden_layers)])
        size = config.max_position_embeddings
        self.register_buffer(
            "registered_causal_mask",
            torch.tril(torch.ones((size, size), dtype=torch.bool)).view(1, 1, size, size),
            persistent=False,
        )
        self.ln_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.model_parallel = False
        self.device_map = None
        self.post_init()

    def parallelize(self, device_map=None):
        self.device_map = get_device_map(len(self.h), range(torch.cuda.device_count())) if device_map is None else device_map
        assert_device_map(self.device_map, len(self.h))
        self.model_parallel = True

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, new_embeddings):
        self.wte = new_embeddings

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Tuple[Tuple[torch.Tensor]]] = None,
        attention_mask: Optional[torch.FloatTensor] = None,
        head_mask: Optional[torch.FloatTensor] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ):
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        output_hidden_states = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        if past_key_values is None:
            past_length = 0
            past_key_values = tuple([None] * len(self.h))
        else:
            past_length = past_key_values[0][0].size(-3)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if attention_mask is not None:
            attention_mask = attention_mask.view(inputs_embeds.shape[0], -1)[:, None, None, :].to(dtype=self.dtype)
            attention_mask = (1.0 - attention_mask) * torch.finfo(self.dtype).min
        head_mask = self.get_head_mask(head_mask, len(self.h))
        hidden_states = self.drop(inputs_embeds)
        length = hidden_states.size()[1] + past_length
        alpha = 1.0
        if self.config.use_dynamic_ntk and not self.training:
            alpha = float(max(2 ** math.ceil(math.log2(max(length, self.seq_length) / self.seq_length) + 1) - 1, 1))
        tables = self.rotary_emb(length, alpha=alpha)
        presents = () if use_cache else None
        all_hidden_states = () if output_hidden_states else None
        for block, layer_past in zip(self.h, past_key_values):
            if output_hidden_states:
                all_hidden_states = all_hidden_states + (hidden_states,)
            hidden_states, present = block(
                hidden_states, tables, self.registered_causal_mask, layer_past, attention_mask, use_cache
            )
            if use_cache is True:
                presents = presents + (present,)
        hidden_states = self.ln_f(hidden_states)
        if not return_dict:
            return tuple(v for v in [hidden_states, presents, all_hidden_states] if v is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, past_key_values=presents, hidden_states=all_hidden_states
        )


class MiniQWenLMHeadModel(MiniQWenPreTrainedModel):
    _keys_to_ignore_on_load_unexpected = [r"h\.\d+\.attn\.masked_bias"]

    def __init__(self, config):
        super().__init__(config)
        self.transformer = MiniQWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.bf16:
            self.transformer.bfloat16()
            self.lm_head.bfloat16()
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs):
        if past_key_values:
            input_ids = input_ids[:, -1].unsqueeze(-1)
        attention_mask = kwargs.get("attention_mask", None) if input_ids.size(0) > 1 else None
        if inputs_embeds is not None and past_key_values is None:
            model_inputs = {"inputs_embeds": inputs_embeds}
        else:
            model_inputs = {"input_ids": input_ids}
        model_inputs.update(
            {"past_key_values": past_key_values, "use_cache": kwargs.get("use_cache"), "attention_mask": attention_mask}
        )
        return model_inputs

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, head_mask=None, inputs_embeds=None,
                labels=None, use_cache=None, output_attentions=None, output_hidden_states=None,
                return_dict=None) -> Union[Tuple, CausalLMOutputWithPast]:
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        transformer_outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        lm_logits = self.lm_head(transformer_outputs[0])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(lm_logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if not return_dict:
            output = (lm_logits,) + transformer_outputs[1:]
            return ((loss,) + output) if loss is not None else output
        return CausalLMOutputWithPast(
            loss=loss,
            logits=lm_logits,
            past_key_values=transformer_outputs.past_key_values,
            hidden_states=transformer_outputs.hidden_states,
        )

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx: torch.Tensor) -> Tuple[Tuple[torch.Tensor]]:
        return tuple(
            tuple(past_state.index_select(0, beam_idx.to(past_state.device)) for past_state in layer_past)
            for layer_past in past_key_values
        )

    def generate(self, inputs=None, generation_config=None, logits_processor=None, stop_words_ids=None, **kwargs):
        generation_config = generation_config if generation_config is not None else self.generation_config
        if stop_words_ids:
            logits_processor = logits_processor or LogitsProcessorList()
        return super().generate(inputs, generation_config=generation_config, logits_processor=logits_processor, **kwargs)

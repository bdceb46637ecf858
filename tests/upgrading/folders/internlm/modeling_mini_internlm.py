# coding=utf-8
""" A decoder with biases in its attention, and rotary tables whose base grows with the text. """
from typing import List, Optional, Tuple, Union

import torch
from torch import nn
from torch.nn import CrossEntropyLoss
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import _expand_mask
from transformers.utils import add_start_docstrings_to_model_forward, logging, replace_return_docstrings

from .configuration_mini_internlm import MiniInternLMConfig

logger = logging.get_logger(__name__)
_CONFIG_FOR_DOC = "MiniInternLMConfig"
INPUTS_DOCSTRING = r"""
    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): token ids.
"""


def causal_bias(shape, dtype, device, past=0):
    """Zero where a token may look, the dtype's smallest number elsewhere: [batch, 1, new, past + new]"""
    batch, new = shape
    bias = torch.full((new, past + new), torch.finfo(dtype).min, dtype=dtype, device=device).triu(past + 1)
    return bias.expand(batch, 1, new, past + new)


class RootMeanSquare(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class GrowingRotary(nn.Module):
    def __init__(self, dim, trained=32, base=10000, factor=1.0):
        super().__init__()
        self.dim, self.trained, self.base, self.factor = dim, trained, base, factor
        self.register_buffer("inv_freq", self.frequencies(base))
        self.tabulate(trained, self.inv_freq)

    def frequencies(self, base):
        return base ** -(torch.arange(0, self.dim, 2).float() / self.dim)

    def tabulate(self, length, inv_freq):
        self.length = length
        angles = torch.einsum("i,j->ij", torch.arange(length, dtype=inv_freq.dtype, device=inv_freq.device), inv_freq)
        angles = torch.cat((angles, angles), dim=-1)[None, None]
        self.register_buffer("cos_cached", angles.cos(), persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)

    def forward(self, x, seq_len=None):
        if seq_len > self.trained:
            stretch = self.factor * seq_len / self.trained - (self.factor - 1)
            self.tabulate(seq_len, self.frequencies(self.base * stretch ** (self.dim / (self.dim - 2))).to(x.device))
        elif self.length > self.trained:
            self.tabulate(self.trained, self.inv_freq)
        return self.cos_cached[:, :, :seq_len].to(x.dtype), self.sin_cached[:, :, :seq_len].to(x.dtype)


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class BiasedAttention(nn.Module):
    def __init__(self, config: MiniInternLMConfig):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias))
        if config.rotary["type"] not in ("origin", "dynamic"):
            raise ValueError("rotary type must be origin or dynamic")
        self.rotary_emb = GrowingRotary(self.head_dim, config.max_position_embeddings, config.rotary["base"])

    def forward(self, hidden_states, attention_mask, position_ids, past_key_value=None, output_attentions=False, use_cache=False):
        heads = (*hidden_states.shape[:2], self.num_heads, self.head_dim)
        q, k, v = (p(hidden_states).view(heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        kv_seq_len = k.shape[-2]
        if past_key_value is not None:
            kv_seq_len += past_key_value[0].shape[-2]
        cos, sin = (t[0, 0][position_ids].unsqueeze(1) for t in self.rotary_emb(v, seq_len=kv_seq_len))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past_key_value is not None:
            k = torch.cat([past_key_value[0], k], dim=2)
            v = torch.cat([past_key_value[1], v], dim=2)
        past_key_value = (k, v) if use_cache else None
        weights = nn.functional.softmax(q @ k.mT / self.head_dim**0.5 + attention_mask, dim=-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2)), weights if output_attentions else None, past_key_value


class MiniInternLMDecoderLayer(nn.Module):
    def __init__(self, config: MiniInternLMConfig):
        super().__init__()
        self.self_attn = BiasedAttention(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.input_layernorm = RootMeanSquare(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RootMeanSquare(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, *args):
        attended, weights, present = self.self_attn(self.input_layernorm(hidden_states), *args)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.down_proj(self.act_fn(self.gate_proj(normed)) * self.up_proj(normed)), weights, present


class MiniInternLMPreTrainedModel(PreTrainedModel):
    config_class = MiniInternLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniInternLMDecoderLayer"]
    _skip_keys_device_placement = "past_key_values"

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

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, MiniInternLMModel):
            module.gradient_checkpointing = value


class MiniInternLMModel(MiniInternLMPreTrainedModel):
    _auto_class = "AutoModel"

    def __init__(self, config: MiniInternLMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MiniInternLMDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RootMeanSquare(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        # Initialize weights and apply final processing
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    @add_start_docstrings_to_model_forward(INPUTS_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[List[torch.FloatTensor]] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> Union[Tuple, BaseModelOutputWithPast]:
        output_attentions = output_attentions if output_attentions is not None else self.config.output_attentions
        output_hidden_states = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, seq_length, _ = inputs_embeds.shape
        past_key_values_length = 0
        if past_key_values is not None:
            past_key_values_length = past_key_values[0][0].shape[2]
        total = past_key_values_length + seq_length
        if position_ids is None:
            position_ids = torch.arange(past_key_values_length, total, device=inputs_embeds.device).unsqueeze(0)
        if attention_mask is None:
            attention_mask = torch.ones((batch_size, total), dtype=torch.bool, device=inputs_embeds.device)
        mask = _expand_mask(attention_mask, inputs_embeds.dtype, tgt_len=seq_length)
        if seq_length > 1:
            mask = mask + causal_bias((batch_size, seq_length), mask.dtype, mask.device, past_key_values_length)
        mask = mask.clamp(min=torch.finfo(mask.dtype).min)
        hidden_states = inputs_embeds
        states, attentions, caches = (), (), ()
        for idx, decoder_layer in enumerate(self.layers):
            states += (hidden_states,)
            past_key_value = past_key_values[idx] if past_key_values is not None else None
            hidden_states, weights, present = decoder_layer(
                hidden_states, mask, position_ids, past_key_value, output_attentions, use_cache
            )
            attentions += (weights,)
            caches += (present,)
        hidden_states = self.norm(hidden_states)
        made = (
            hidden_states,
            caches if use_cache else None,
            states + (hidden_states,) if output_hidden_states else None,
            attentions if output_attentions else None,
        )
        return BaseModelOutputWithPast(*made) if return_dict else tuple(v for v in made if v is not None)


class MiniInternLMForCausalLM(MiniInternLMPreTrainedModel):
    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.model = MiniInternLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Initialize weights and apply final processing
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    @replace_return_docstrings(output_type=CausalLMOutputWithPast, config_class=_CONFIG_FOR_DOC)
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        """
        Returns:
        """
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        logits = self.lm_head(outputs[0])
        loss = None
        if labels is not None:
            loss = CrossEntropyLoss()(logits[:, :-1].reshape(-1, self.config.vocab_size), labels[:, 1:].reshape(-1))
        if not return_dict:
            return ((loss,) if loss is not None else ()) + (logits,) + outputs[1:]
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        if past_key_values:
            input_ids = input_ids[:, -1:]
        position_ids = kwargs.get("position_ids", None)
        if attention_mask is not None and position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            if past_key_values:
                position_ids = position_ids[:, -1].unsqueeze(-1)
        model_inputs = {"input_ids": input_ids}
        if inputs_embeds is not None and past_key_values is None:
            model_inputs = {"inputs_embeds": inputs_embeds}
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
            reordered_past += (tuple(past_state.index_select(0, beam_idx) for past_state in layer_past),)
        return reordered_past

"""A model that fills masks: every token sees every other; the network is a plain module inside the model."""
from __future__ import annotations

import logging
import math
import sys
from collections.abc import MutableMapping
from dataclasses import fields
from functools import partial
from typing import Callable, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import AutoModel

from .configuration_mini_llada import MiniLLaDAConfig, ModelConfig

log = logging.getLogger(__name__)


class BufferCache(dict, MutableMapping[str, torch.Tensor]):
    """Keeps tensors that are the same for all layers, apart from the module's buffers."""


class RMSNorm(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.ones(config.d_model, device=config.init_device))

    def forward(self, x):
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class RotaryEmbedding(nn.Module):
    def __init__(self, config: ModelConfig, cache: BufferCache):
        super().__init__()
        self.config = config
        self.__cache = cache
        # Warm up cache.
        self.get_rotary_embedding(config.max_sequence_length, torch.device("cpu"))

    def get_rotary_embedding(self, seq_len: int, device: torch.device):
        if (pos_sin := self.__cache.get("rope_pos_sin")) is not None and pos_sin.shape[-2] >= seq_len:
            if pos_sin.device != device:
                self.__cache["rope_pos_sin"] = pos_sin = pos_sin.to(device)
                self.__cache["rope_pos_cos"] = self.__cache["rope_pos_cos"].to(device)
            return pos_sin[:, :, :seq_len], self.__cache["rope_pos_cos"][:, :, :seq_len]
        dim = self.config.d_model // self.config.n_heads
        inv_freq = 1.0 / (self.config.rope_theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float) / dim))
        freqs = torch.einsum("i , j -> i j", torch.arange(seq_len, device=device, dtype=torch.float), inv_freq)
        positions = torch.cat((freqs, freqs), dim=-1)[None, None]
        self.__cache["rope_pos_sin"] = positions.sin()
        self.__cache["rope_pos_cos"] = positions.cos()
        return self.__cache["rope_pos_sin"], self.__cache["rope_pos_cos"]

    def forward(self, q, k):
        sin, cos = self.get_rotary_embedding(k.shape[-2], q.device)

        def turn(t):
            a, b = t.chunk(2, dim=-1)
            return t * cos + torch.cat((-b, a), dim=-1) * sin

        return turn(q), turn(k)


class LLaDABlock(nn.Module):
    def __init__(self, layer_id: int, config: ModelConfig, cache: BufferCache):
        super().__init__()
        self.layer_id = layer_id
        self.config = config
        self.__cache = cache
        d, dev, bias = config.d_model, config.init_device, config.include_bias
        self.attn_norm, self.ff_norm = RMSNorm(config), RMSNorm(config)
        self.q_proj = nn.Linear(d, d, bias=bias, device=dev)
        self.k_proj = nn.Linear(d, d, bias=bias, device=dev)
        self.v_proj = nn.Linear(d, d, bias=bias, device=dev)
        self.attn_out = nn.Linear(d, d, bias=bias, device=dev)
        self.ff_proj = nn.Linear(d, config.mlp_hidden_size, bias=bias, device=dev)
        self.up_proj = nn.Linear(d, config.mlp_hidden_size, bias=bias, device=dev)
        self.ff_out = nn.Linear(config.mlp_hidden_size, d, bias=bias, device=dev)
        self.rotary_emb = RotaryEmbedding(config, self.__cache)

    def forward(self, x, attention_bias=None):
        normed = self.attn_norm(x)
        q, k, v = (p(normed).unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotary_emb(q, k)
        att = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias, is_causal=False)
        x = x + self.attn_out(att.transpose(1, 2).flatten(2))
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))


class LLaDANetwork(nn.Module):
    def __init__(self, config: ModelConfig, init_params: bool = True):
        super().__init__()
        self.config = config
        self.__cache = BufferCache()
        size = config.embedding_size or config.vocab_size
        self.transformer = nn.ModuleDict(
            dict(wte=nn.Embedding(size, config.d_model, device=config.init_device), ln_f=RMSNorm(config))
        )
        self.transformer.update(
            {"blocks": nn.ModuleList([LLaDABlock(i, config, self.__cache) for i in range(config.n_layers)])}
        )
        if not config.weight_tying:
            self.transformer.update({"ff_out": nn.Linear(config.d_model, size, bias=config.include_bias)})
        if init_params and self.config.init_device != "meta":
            self.reset_parameters()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.transformer.wte.weight.device
        return torch.device("cpu") if device.type == "meta" else device

    def reset_parameters(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=self.config.init_std)

    def forward(self, input_ids, input_embeddings=None, attention_mask=None, output_hidden_states=False):
        x = self.transformer.wte(input_ids) if input_embeddings is None else input_embeddings
        bias = None
        if attention_mask is not None and 0.0 in attention_mask:
            bias = (1.0 - attention_mask.to(dtype=x.dtype)[:, None, None, :]) * torch.finfo(x.dtype).min
        states = []
        for block in self.transformer.blocks:
            states.append(x)
            x = block(x, bias)
        x = self.transformer.ln_f(x)
        states.append(x)
        if self.config.weight_tying:
            logits = F.linear(x, self.transformer.wte.weight, None)
        else:
            logits = self.transformer.ff_out(x)
        return logits, tuple(states) if output_hidden_states else None


def create_model_config_from_pretrained_config(config: MiniLLaDAConfig):
    """Builds a `ModelConfig` from the config of the Hub."""
    kwargs = {}
    for field in fields(ModelConfig):
        kwargs[field.name] = getattr(config, field.name)
    return ModelConfig(**kwargs)


class MiniLLaDAModelLM(PreTrainedModel):
    """An outer class, so that the Auto classes can load the network."""

    config_class = MiniLLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ["LLaDABlock"]

    def __init__(self, config: MiniLLaDAConfig, model: Optional[LLaDANetwork] = None, init_params: bool = False):
        super().__init__(config)
        if not model:
            model_config = create_model_config_from_pretrained_config(config)
            # Initialize model (always on CPU to start with so we don't run out of GPU memory).
            model_config.init_device = "cpu"
            self.model = LLaDANetwork(model_config, init_params=init_params)
        else:
            self.model = model

    def forward(
        self,
        input_ids: torch.LongTensor = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        past_key_values: Optional[List[torch.FloatTensor]] = None,
        labels: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        cache_position: Optional[Cache] = None,  # This is a hack mitigation of an issue in transformers `4.39.x`
    ) -> Union[Tuple, CausalLMOutputWithPast]:
        if use_cache is None:
            use_cache = self.config.use_cache
        if output_attentions:
            raise ValueError("output_attentions is not yet supported in LLaDA")
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        logits, hidden_states = self.model.forward(
            input_ids, input_embeddings=inputs_embeds, attention_mask=attention_mask, output_hidden_states=output_hidden_states
        )
        loss = None
        if labels is not None:
            import warnings

            warnings.warn("Note that for LLaDA, you cannot calculate the loss here.", UserWarning)
        if not return_dict:
            return (logits, hidden_states) if hidden_states is not None else (logits,)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=None, hidden_states=hidden_states)

    def can_generate(self) -> bool:
        return True

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, past_key_values: Optional[List[Tuple]] = None, **kwargs
    ):
        if past_key_values:
            # This is because we want the model to only process the last generated token.
            input_ids = input_ids[:, -1:]
        model_inputs = {"input_ids": input_ids, "past_key_values": past_key_values}
        model_inputs.update(kwargs)
        model_inputs["use_cache"] = kwargs.pop("use_cache", self.config.use_cache)
        return model_inputs

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.transformer.wte

    def set_input_embeddings(self, value: torch.nn.Module):
        self.model.transformer.wte = value

    def get_output_embeddings(self):
        if self.config.weight_tying:
            return self.model.transformer.wte
        else:
            return self.model.transformer.ff_out

    def set_output_embeddings(self, value: torch.nn.Module):
        if self.config.weight_tying:
            self.model.transformer.wte = value
        else:
            self.model.transformer.ff_out = value

    def tie_weights(self):
        if self.config.weight_tying:
            self.model.transformer.ff_out = self.model.transformer.wte


# Register the model so that it is available for transformer pipelines, auto-loading, etc.
AutoModel.register(MiniLLaDAConfig, MiniLLaDAModelLM)

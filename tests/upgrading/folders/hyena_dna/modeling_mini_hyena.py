# -*- coding: utf-8 -*-
"""Long convolutions whose filters a small network makes from positions; no attention and no cache."""
import math
from typing import Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithNoAttention, CausalLMOutput, SequenceClassifierOutput

from .configuration_mini_hyena import MiniHyenaConfig


def fftconv(u, k, D):
    """Causal convolution of u [batch, width, length] with k [width, length], by the discrete Fourier transform"""
    size = 2 * u.shape[-1]
    y = torch.fft.irfft(torch.fft.rfft(u, n=size) * torch.fft.rfft(k, n=size), n=size)[..., : u.shape[-1]]
    return y + u * D.unsqueeze(-1)


class PositionalFeatures(nn.Module):
    def __init__(self, config):
        super().__init__()
        length = config.max_seq_len
        t = torch.linspace(0, 1, length)[None, :, None]
        bands = (config.emb_dim - 1) // 2
        angles = 2 * math.pi * torch.arange(length)[None, :, None] / length * torch.linspace(1e-4, bands - 1, bands)
        self.z = nn.Parameter(torch.cat([t, angles.cos(), -angles.sin()], dim=-1), requires_grad=True)
        self.register_buffer("t", t, persistent=False)

    def forward(self, length):
        return self.z[:, :length], self.t[:, :length]


class ExponentialModulation(nn.Module):
    def __init__(self, width, fast=0.3, slow=1.5, target=1e-2, shift=0.05):
        super().__init__()
        self.shift = shift
        deltas = torch.linspace(math.log(target) / slow, math.log(target) / fast, width)[None, None]
        self.register_buffer("deltas", deltas, persistent=False)

    def forward(self, t, x):
        return x * (torch.exp(-t * self.deltas.abs()) + self.shift)


class Sin(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.freq = nn.Parameter(torch.ones(1, width))

    def forward(self, x):
        return torch.sin(self.freq * x)


class HyenaFilter(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.d_model * (config.hyena_order - 1)
        self.bias = nn.Parameter(torch.randn(width))
        self.pos_emb = PositionalFeatures(config)
        act = Sin(config.filter_order)
        self.implicit_filter = nn.Sequential(
            nn.Linear(config.emb_dim, config.filter_order),
            act,
            nn.Linear(config.filter_order, config.filter_order),
            act,  # one activation is used twice, so its weight has two names
            nn.Linear(config.filter_order, width, bias=False),
        )
        self.modulation = ExponentialModulation(width)

    def forward(self, length):
        z, t = self.pos_emb(length)
        return self.modulation(t, self.implicit_filter(z))[0].T


class HyenaOperator(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.d_model, self.order = config.d_model, config.hyena_order
        width = config.d_model * (self.order + 1)
        self.in_proj = nn.Linear(config.d_model, width)
        self.short_filter = nn.Conv1d(
            width, width, config.short_filter_order, groups=width, padding=config.short_filter_order - 1
        )
        self.filter_fn = HyenaFilter(config)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, u):
        length = u.size(-2)
        *x, v = self.short_filter(self.in_proj(u).transpose(1, 2))[..., :length].split(self.d_model, dim=1)
        k = self.filter_fn(length).unflatten(0, (self.order - 1, self.d_model))
        bias = self.filter_fn.bias.view(self.order - 1, self.d_model)
        for o, x_i in enumerate(reversed(x[1:])):
            v = fftconv(v * x_i, k[o], bias[o])
        return self.out_proj((v * x[0]).transpose(1, 2))


class HyenaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mixer = HyenaOperator(config)
        self.norm1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.fc1 = nn.Linear(config.d_model, config.d_inner)
        self.fc2 = nn.Linear(config.d_inner, config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.mixer(self.norm1(hidden_states))
        return hidden_states + self.fc2(F.gelu(self.fc1(self.norm2(hidden_states)), approximate="tanh"))


class MiniHyenaPreTrainedModel(PreTrainedModel):
    config_class = MiniHyenaConfig
    base_model_prefix = "hyena"
    supports_gradient_checkpointing = False
    _no_split_modules = ["HyenaBlock"]
    _skip_keys_device_placement = "past_key_values"
    _keys_to_ignore_on_load_missing = [r"freq"]  # Shared tensors that safetensors merges

    def _init_weights(self, module, initializer_range=0.02):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=initializer_range)
        # the residual projections are scaled by the depth
        for name, p in self.named_parameters():
            if name in ["out_proj.weight", "fc2.weight"]:
                nn.init.normal_(p, mean=0.0, std=initializer_range / math.sqrt(2 * self.config.n_layer))


class MiniHyenaModel(MiniHyenaPreTrainedModel):
    def __init__(self, config, **kwargs) -> None:
        super().__init__(config, **kwargs)
        vocab_size = config.vocab_size
        if vocab_size % config.pad_vocab_size_multiple != 0:
            vocab_size += config.pad_vocab_size_multiple - (vocab_size % config.pad_vocab_size_multiple)
        self.word_embeddings = nn.Embedding(vocab_size, config.d_model)
        self.layers = nn.ModuleList([HyenaBlock(config) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        # Initialize weights and apply final processing
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def forward(self, input_ids=None, inputs_embeds=None, output_hidden_states=None, return_dict=None):
        output_hidden_states = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        hidden_states = inputs_embeds if inputs_embeds is not None else self.word_embeddings(input_ids)
        all_hidden_states = []
        for layer in self.layers:
            all_hidden_states.append(hidden_states)
            hidden_states = layer(hidden_states)
        hidden_states = self.ln_f(hidden_states)
        all_hidden_states = tuple(all_hidden_states) + (hidden_states,) if output_hidden_states else None
        if not return_dict:
            return tuple(v for v in (hidden_states, all_hidden_states) if v is not None)
        return BaseModelOutputWithNoAttention(last_hidden_state=hidden_states, hidden_states=all_hidden_states)


class MiniHyenaForCausalLM(MiniHyenaPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.hyena = MiniHyenaModel(config)
        vocab_size = self.hyena.word_embeddings.num_embeddings
        self.vocab_size = vocab_size
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.hyena.word_embeddings

    def set_input_embeddings(self, value):
        self.hyena.word_embeddings = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def forward(self, input_ids=None, inputs_embeds=None, labels=None, output_hidden_states=None, return_dict=None,
                output_attentions=None) -> Union[Tuple, CausalLMOutput]:
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        outputs = self.hyena(input_ids, inputs_embeds, output_hidden_states, return_dict)
        logits = self.lm_head(outputs[0]).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if not return_dict:
            output = (logits,) + outputs[1:]
            return (loss,) + output if loss is not None else output
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

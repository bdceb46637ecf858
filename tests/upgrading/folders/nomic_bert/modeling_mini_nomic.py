"""An encoder with rotary positions whose tables live in plain attributes and are made when first needed."""
import math
from functools import partial
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, MaskedLMOutput
from transformers.models.bert.modeling_bert import (
    BaseModelOutputWithPoolingAndCrossAttentions as BertOutput,
    BertForPreTrainingOutput,
)

from .configuration_mini_nomic import MiniNomicConfig


def _init_weights(module, initializer_range=0.02):
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=initializer_range)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])


class MiniNomicPreTrainedModel(PreTrainedModel):
    config_class = MiniNomicConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = "past_key_values"

    def __init__(self, config, *inputs, **kwargs):
        super().__init__(config)
        if not isinstance(config, MiniNomicConfig):
            raise ValueError(f"`{self.__class__.__name__}` needs a `MiniNomicConfig`")
        self.config = config


class RotaryEmbedding(nn.Module):
    def __init__(self, dim: int, base=10000.0, device=None):
        super().__init__()
        self.dim = dim
        self.base = float(base)
        inv_freq = self._compute_inv_freq(device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached = None
        self._sin_cached = None

    def _compute_inv_freq(self, device=None):
        return 1.0 / (self.base ** (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim))

    def _update_cos_sin_cache(self, seqlen, device=None, dtype=None):
        if seqlen > self._seq_len_cached or self._cos_cached is None or self._cos_cached.device != device:
            self._seq_len_cached = seqlen
            freqs = torch.outer(torch.arange(seqlen, device=device, dtype=torch.float32), self.inv_freq)
            self._cos_cached = torch.cos(freqs).to(dtype)
            self._sin_cached = torch.sin(freqs).to(dtype)

    def forward(self, qkv):
        """qkv: [batch, length, 3, heads, head_dim]; values are not turned"""
        self._update_cos_sin_cache(qkv.shape[1], device=qkv.device, dtype=qkv.dtype)
        cos, sin = (t[None, : qkv.shape[1], None, None].repeat(1, 1, 1, 1, 2) for t in (self._cos_cached, self._sin_cached))
        qk, v = qkv[:, :, :2], qkv[:, :, 2:]
        a, b = qk.chunk(2, dim=-1)
        return torch.cat([qk * cos + torch.cat([-b, a], dim=-1) * sin, v], dim=2)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.n_head, config.n_embd // config.n_head
        self.register_buffer("norm_factor", torch.sqrt(torch.tensor(self.head_dim, dtype=torch.float32)), persistent=False)
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_proj_bias)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.qkv_proj_bias)
        self.rotary_emb = RotaryEmbedding(int(self.head_dim * config.rotary_emb_fraction), base=config.rotary_emb_base)

    def forward(self, hidden_states, attention_mask=None):
        qkv = self.Wqkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = self.rotary_emb(qkv).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(query, key.transpose(-1, -2)) / self.norm_factor
        if attention_mask is not None:
            scores = scores + attention_mask
        return self.out_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.norm1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.fc11 = nn.Linear(config.n_embd, config.n_inner, bias=config.mlp_fc1_bias)
        self.fc12 = nn.Linear(config.n_embd, config.n_inner, bias=config.mlp_fc1_bias)
        self.fc2 = nn.Linear(config.n_inner, config.n_embd, bias=config.mlp_fc1_bias)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, x, attention_mask=None):
        x = self.norm1(x + self.attn(x, attention_mask))
        return self.norm2(x + self.fc2(self.fc11(x) * F.silu(self.fc12(x))))


class MiniNomicModel(MiniNomicPreTrainedModel):
    def __init__(self, config: MiniNomicConfig, add_pooling_layer=True):
        super().__init__(config)
        self.pad_vocab_size_multiple = getattr(config, "pad_vocab_size_multiple", 1)
        if config.vocab_size % self.pad_vocab_size_multiple != 0:
            config.vocab_size += self.pad_vocab_size_multiple - (config.vocab_size % self.pad_vocab_size_multiple)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.n_embd, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.n_embd)
        self.emb_ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.pooler = nn.Linear(config.n_embd, config.n_embd) if add_pooling_layer else None
        self.apply(partial(_init_weights, initializer_range=config.initializer_range))

    def get_input_embeddings(self):
        return self.word_embeddings

    def set_input_embeddings(self, value):
        self.word_embeddings = value

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, return_dict=None):
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden_states = self.emb_ln(self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids))
        mask = self.get_extended_attention_mask(attention_mask, input_ids.shape)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        pooled_output = torch.tanh(self.pooler(hidden_states[:, 0])) if self.pooler is not None else None
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden_states, pooler_output=pooled_output)


class MiniNomicForMaskedLM(MiniNomicPreTrainedModel):
    _tied_weights_keys = ["decoder.bias", "decoder.weight"]

    def __init__(self, config: MiniNomicConfig):
        super().__init__(config)
        self.model = MiniNomicModel(config, add_pooling_layer=False)
        self.transform = nn.Linear(config.n_embd, config.n_embd)
        self.layer_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.decoder = nn.Linear(config.n_embd, config.vocab_size)
        self.apply(partial(_init_weights, initializer_range=config.initializer_range))
        self.tie_weights()

    def tie_weights(self):
        self.decoder.weight = self.model.word_embeddings.weight

    def get_output_embeddings(self):
        return self.decoder

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels: Optional[torch.Tensor] = None):
        outputs = self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        logits = self.decoder(self.layer_norm(F.gelu(self.transform(outputs.last_hidden_state))))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=-100)
        return MaskedLMOutput(loss=loss, logits=logits)

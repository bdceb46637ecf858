"""An encoder for embeddings: rotary positions with a grown base, and latent vectors that read the tokens."""
import math
from typing import Dict, List, Optional, Tuple, Union

import torch
import torch.utils.checkpoint
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_attn_mask_utils import _prepare_4d_attention_mask, _prepare_4d_attention_mask_for_sdpa
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration import MiniGteConfig

try:
    import xformers.ops as xops
except ImportError as e:
    xops = None

logger = logging.get_logger(__name__)


class RotaryEmbedding(torch.nn.Module):
    def __init__(self, dim, max_position_embeddings=512, base=10000.0, device=None):
        super().__init__()
        self.dim = dim
        self.max_position_embeddings = max_position_embeddings
        self.base = base
        inv_freq = 1.0 / (self.base ** (torch.arange(0, self.dim, 2).float().to(device) / self.dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._set_cos_sin_cache(
            seq_len=max_position_embeddings, device=self.inv_freq.device, dtype=torch.get_default_dtype()
        )

    def _set_cos_sin_cache(self, seq_len, device, dtype):
        self.max_seq_len_cached = seq_len
        t = torch.arange(self.max_seq_len_cached, device=device, dtype=torch.float32)
        freqs = torch.einsum("i,j->ij", t, self.inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        self.register_buffer("cos_cached", emb.cos().to(dtype), persistent=False)
        self.register_buffer("sin_cached", emb.sin().to(dtype), persistent=False)

    def forward(self, x, seq_len=None):
        if seq_len > self.max_seq_len_cached:
            self._set_cos_sin_cache(seq_len=seq_len, device=x.device, dtype=x.dtype)
        return self.cos_cached[:seq_len, ...].to(dtype=x.dtype), self.sin_cached[:seq_len, ...].to(dtype=x.dtype)


class NTKScalingRotaryEmbedding(RotaryEmbedding):
    """Grows the base by a fixed factor."""

    def __init__(self, dim, max_position_embeddings=512, base=10000, device=None, scaling_factor=1.0):
        self.scaling_factor = scaling_factor
        super().__init__(dim, max_position_embeddings * scaling_factor, base * scaling_factor, device)

    def _set_cos_sin_cache(self, seq_len, device, dtype):
        seq_len = int(seq_len)
        lambd = self.scaling_factor ** (2 / self.dim)
        self.register_buffer("inv_freq", self.inv_freq / lambd, persistent=False)
        super()._set_cos_sin_cache(seq_len, device, dtype)


class Embeddings(nn.Module):
    def __init__(self, config: MiniGteConfig):
        super().__init__()
        self.padding_idx = config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=self.padding_idx)
        head_dim = config.hidden_size // config.num_attention_heads
        self.type_vocab_size = config.type_vocab_size
        if self.type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # position_ids is contiguous in memory and excluded when serialized
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings), persistent=False)
        self._init_rope(config, head_dim)

    def _init_rope(self, config, head_dim):
        kwargs = dict(dim=head_dim, max_position_embeddings=config.max_position_embeddings, base=config.rope_theta)
        if config.rope_scaling is None:
            self.rotary_emb = RotaryEmbedding(**kwargs)
        else:
            kwargs.update(scaling_factor=config.rope_scaling["factor"])
            scaling_type = config.rope_scaling["type"]
            if scaling_type == "ntk":
                self.rotary_emb = NTKScalingRotaryEmbedding(**kwargs)
            else:
                raise ValueError(f"Unknown RoPE scaling type {scaling_type}")

    def forward(self, input_ids=None, token_type_ids=None, inputs_embeds=None):
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        seq_length = embeddings.shape[1]
        position_ids = self.position_ids[:seq_length]
        cos, sin = self.rotary_emb(embeddings, seq_len=seq_length)
        if self.type_vocab_size > 0:
            if token_type_ids is None:
                token_type_ids = position_ids.mul(0)
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        return self.LayerNorm(embeddings), (cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1))


class PackedAttention(nn.Module):
    def __init__(self, config: MiniGteConfig):
        super().__init__()
        self.config = config
        self.heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, config.hidden_size * 3, bias=True)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, states, bias, rope):
        """states: [batch, length, width], rope: two tables [length, 1, head_dim]"""
        query, key, value = self.qkv_proj(states).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        cos, sin = rope
        query, key = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (query, key))
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return self.o_proj(self._attention(query, key, value, bias).transpose(1, 2).flatten(2))

    def _attention(self, query, key, value, bias):
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.head_dim)
        return torch.matmul((scores + bias if bias is not None else scores).softmax(-1), value)


class PackedSdpaAttention(PackedAttention):
    def _attention(self, query, key, value, bias):
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)


ATTENTION = {"eager": PackedAttention, "sdpa": PackedSdpaAttention}


class Layer(nn.Module):
    def __init__(self, config: MiniGteConfig, attn_implementation=None):
        super().__init__()
        if attn_implementation is None:
            attn_implementation = config._attn_implementation
        self.attention = ATTENTION[attn_implementation](config)
        self.up_gate_proj = nn.Linear(config.hidden_size, config.intermediate_size * 2, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.attn_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states, bias, rope):
        states = self.attn_ln(states + self.attention(states, bias, rope))
        up, gate = self.up_gate_proj(states).chunk(2, dim=-1)
        return self.mlp_ln(states + self.down_proj(self.act_fn(gate) * up))


class LatentPooler(nn.Module):
    """Tokens read a few learnt vectors, then are averaged."""

    def __init__(self, config):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.num_latents, config.hidden_size))
        self.to_kv = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)

    def forward(self, states, attention_mask):
        key, value = self.to_kv(self.latents).chunk(2, -1)
        read = (states @ key.T / math.sqrt(key.shape[-1])).softmax(-1) @ value
        weights = attention_mask.unsqueeze(-1).to(read.dtype)
        return (read * weights).sum(1) / weights.sum(1)


class MiniGtePreTrainedModel(PreTrainedModel):
    config_class = MiniGteConfig
    base_model_prefix = "new"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def _init_weights(self, module):
        """Initialize the weights"""
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            module.bias.data.zero_()
            module.weight.data.fill_(1.0)


class MiniGteModel(MiniGtePreTrainedModel):
    def __init__(self, config: MiniGteConfig, add_pooling_layer=True):
        super().__init__(config)
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.pooler = LatentPooler(config) if add_pooling_layer and config.pooling == "latent" else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> Union[Tuple[torch.Tensor], BaseModelOutputWithPooling]:
        output_hidden_states = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("You cannot specify both input_ids and inputs_embeds at the same time")
        if input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        states, rope = self.embeddings(input_ids, token_type_ids, inputs_embeds)
        if attention_mask is None:
            attention_mask = torch.ones(states.shape[:2], device=states.device)
        if self.config._attn_implementation == "sdpa":
            bias = _prepare_4d_attention_mask_for_sdpa(attention_mask, states.dtype)
        else:
            bias = _prepare_4d_attention_mask(attention_mask, states.dtype)
        all_hidden_states = (states,) if output_hidden_states else None
        for layer in self.layers:
            states = layer(states, bias, rope)
            if output_hidden_states:
                all_hidden_states += (states,)
        pooled = self.pooler(states, attention_mask) if self.pooler is not None else None
        if not return_dict:
            return (states, pooled) + ((all_hidden_states,) if output_hidden_states else ())
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled, hidden_states=all_hidden_states)


class MiniGteForSequenceClassification(MiniGtePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.config = config
        self.new = MiniGteModel(config, add_pooling_layer=True)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, return_dict=None):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        outputs = self.new(input_ids, attention_mask, token_type_ids, return_dict=return_dict)
        logits = self.classifier(outputs[1])
        loss = None
        if labels is not None:
            if self.config.problem_type is None:
                if self.num_labels == 1:
                    self.config.problem_type = "regression"
                elif self.num_labels > 1 and (labels.dtype == torch.long or labels.dtype == torch.int):
                    self.config.problem_type = "single_label_classification"
            if self.config.problem_type == "regression":
                loss = nn.MSELoss()(logits.squeeze(), labels.squeeze())
            else:
                loss = nn.CrossEntropyLoss()(logits.view(-1, self.num_labels), labels.view(-1))
        return SequenceClassifierOutput(loss=loss, logits=logits)

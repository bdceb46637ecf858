"""A simple, flexible decoder: the bias of attention is kept in a buffer that the first call fills."""
import math
from typing import Any, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_mini_mpt import MiniMPTConfig

Tokenizer = Union[PreTrainedTokenizer, PreTrainedTokenizerFast]


class PlainNorm(torch.nn.LayerNorm):
    def __init__(self, size, eps=1e-05, device=None):
        super().__init__(size, eps=eps, device=device)

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def gen_slopes(n_heads, steepest=8, device=None):
    """[1, n_heads, 1, 1]; those of the next power of two, odd ones first, where n_heads is none."""
    count = 2 ** math.ceil(math.log2(n_heads))
    slopes = 2.0 ** (-(torch.arange(count, device=device) + 1.0) * steepest / count)
    if count != n_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:n_heads]
    return slopes[None, :, None, None]


class MultiheadAttention(nn.Module):
    def __init__(self, d_model, n_heads, qk_ln, attn_pdrop, device=None):
        super().__init__()
        self.n_heads, self.qk_ln = n_heads, qk_ln
        self.softmax_scale = 1 / math.sqrt(d_model / n_heads)
        self.Wqkv = nn.Linear(d_model, 3 * d_model, device=device)
        self.Wqkv._fused = (0, (d_model, 2 * d_model))
        if self.qk_ln:
            self.q_ln = PlainNorm(d_model, device=device)
            self.k_ln = PlainNorm(d_model, device=device)
        self.out_proj = nn.Linear(d_model, d_model, device=device)
        self.out_proj._is_residual = True

    def forward(self, x, past_key_value=None, attn_bias=None, attention_mask=None):
        query, key, value = self.Wqkv(x).chunk(3, dim=2)
        if self.qk_ln:
            query, key = self.q_ln(query), self.k_ln(key)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (query, key, value))
        k = k.transpose(2, 3)  # keys are kept with their length last
        if past_key_value is not None:
            if len(past_key_value) != 0:
                k = torch.cat([past_key_value[0], k], dim=3)
                v = torch.cat([past_key_value[1], v], dim=2)
            past_key_value = (k, v)
        asked, kept = q.size(-2), k.size(-1)
        scores = q.matmul(k) * self.softmax_scale
        if attn_bias is not None:
            scores = scores + attn_bias[..., -kept:]
        hidden = torch.ones(asked, kept, dtype=torch.bool, device=x.device).triu(kept - asked + 1)
        if attention_mask is not None:
            hidden = hidden | ~attention_mask[:, None, None, :]
        weights = scores.masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1)
        return self.out_proj(weights.matmul(v).transpose(1, 2).flatten(2)), past_key_value


class MPTBlock(nn.Module):
    def __init__(self, d_model, n_heads, expansion_ratio, attn_config, device=None):
        super().__init__()
        self.norm_1 = PlainNorm(d_model, device=device)
        self.attn = MultiheadAttention(d_model, n_heads, attn_config["qk_ln"], attn_config["attn_pdrop"], device=device)
        self.norm_2 = PlainNorm(d_model, device=device)
        self.up_proj = nn.Linear(d_model, expansion_ratio * d_model, device=device)
        self.act = nn.GELU(approximate="none")
        self.down_proj = nn.Linear(expansion_ratio * d_model, d_model, device=device)
        self.down_proj._is_residual = True

    def forward(self, x, past_key_value=None, attn_bias=None, attention_mask=None):
        b, past_key_value = self.attn(self.norm_1(x), past_key_value, attn_bias, attention_mask)
        x = x + b
        return x + self.down_proj(self.act(self.up_proj(self.norm_2(x)))), past_key_value


class MiniMPTPreTrainedModel(PreTrainedModel):
    config_class = MiniMPTConfig
    base_model_prefix = "model"
    _no_split_modules = ["MPTBlock"]


class MiniMPTModel(MiniMPTPreTrainedModel):
    def __init__(self, config: MiniMPTConfig):
        config._validate_config()
        super().__init__(config)
        self.alibi = config.attn_config["alibi"]
        self.alibi_bias_max = config.attn_config["alibi_bias_max"]
        self.wte = nn.Embedding(config.vocab_size, config.d_model, device=config.init_device)
        if not self.alibi:
            self.wpe = nn.Embedding(config.max_seq_len, config.d_model, device=config.init_device)
        self.emb_drop = nn.Dropout(config.emb_pdrop)
        self.blocks = nn.ModuleList(
            [
                MPTBlock(config.d_model, config.n_heads, config.expansion_ratio, config.attn_config, device=config.init_device)
                for _ in range(config.n_layers)
            ]
        )
        self.norm_f = PlainNorm(config.d_model, device=config.init_device)
        if config.init_device != "meta":
            self.apply(self.param_init_fn)
        self.is_causal = True
        self._attn_bias_initialized = False
        self.attn_bias = None
        self.attn_bias_shape = (1, config.n_heads, 1, config.max_seq_len) if self.alibi else None
        if config.no_bias:
            for module in self.modules():
                if hasattr(module, "bias") and isinstance(module.bias, nn.Parameter):
                    module.register_parameter("bias", None)

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    @torch.no_grad()
    def _attn_bias(self, device, dtype):
        if not self._attn_bias_initialized:
            if self.attn_bias_shape:
                self.attn_bias = torch.zeros(self.attn_bias_shape, device=device, dtype=dtype)
                places = torch.arange(1 - self.config.max_seq_len, 1, device=device, dtype=dtype)
                self.attn_bias.add_(places * gen_slopes(self.config.n_heads, self.alibi_bias_max, device))
            self._attn_bias_initialized = True
        return self.attn_bias

    def forward(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Optional[List[Tuple[torch.FloatTensor]]] = None,
        attention_mask: Optional[torch.ByteTensor] = None,
        return_dict: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        use_cache: Optional[bool] = None,
    ):
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
        if not return_dict:
            raise NotImplementedError("return_dict=False is not supported")
        tok_emb = self.wte(input_ids)
        past_position = 0
        if past_key_values is not None:
            past_position = past_key_values[0][0].size(3)
        if self.alibi:
            x = tok_emb
        else:
            pos = torch.arange(past_position, past_position + input_ids.size(1), device=input_ids.device).unsqueeze(0)
            x = tok_emb + self.wpe(pos)
        x = self.emb_drop(x)
        attn_bias = self._attn_bias(device=x.device, dtype=torch.float32)
        if use_cache and past_key_values is None:
            past_key_values = [() for _ in range(self.config.n_layers)]
        all_hidden_states = () if output_hidden_states else None
        for b_idx, block in enumerate(self.blocks):
            if output_hidden_states:
                all_hidden_states = all_hidden_states + (x,)
            past_key_value = past_key_values[b_idx] if past_key_values is not None else None
            x, past_key_value = block(x, past_key_value, attn_bias, attention_mask)
            if past_key_values is not None:
                past_key_values[b_idx] = past_key_value
        x = self.norm_f(x)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values, hidden_states=all_hidden_states)

    def param_init_fn(self, module):
        std = self.config.init_config["init_std"]
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            if getattr(module, "_is_residual", False):
                with torch.no_grad():
                    module.weight.div_(math.sqrt(2 * self.config.n_layers))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=std)


class MiniMPTForCausalLM(MiniMPTPreTrainedModel):
    def __init__(self, config: MiniMPTConfig):
        super().__init__(config)
        if not config.tie_word_embeddings:
            raise ValueError("only tied embeddings are supported")
        self.transformer = MiniMPTModel(config)
        self.logit_scale = None
        if config.logit_scale is not None:
            self.logit_scale = 1 / math.sqrt(config.d_model) if config.logit_scale == "inv_sqrt_d_model" else config.logit_scale

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, value):
        self.transformer.wte = value

    def get_output_embeddings(self):
        return self.transformer.wte

    def set_output_embeddings(self, new_embeddings):
        self.transformer.wte = new_embeddings

    def get_decoder(self):
        return self.transformer

    def forward(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Optional[List[Tuple[torch.FloatTensor]]] = None,
        attention_mask: Optional[torch.ByteTensor] = None,
        labels: Optional[torch.LongTensor] = None,
        return_dict: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        use_cache: Optional[bool] = None,
    ):
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        outputs = self.transformer(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            return_dict=return_dict,
            output_hidden_states=output_hidden_states,
            use_cache=use_cache,
        )
        logits = F.linear(outputs.last_hidden_state, self.transformer.wte.weight)
        if self.logit_scale is not None:
            logits *= self.logit_scale
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def param_init_fn(self, module):
        self.transformer.param_init_fn(module)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is not None:
            raise NotImplementedError("inputs_embeds are not supported")
        attention_mask = kwargs["attention_mask"].bool()
        if attention_mask[:, -1].sum() != attention_mask.shape[0]:
            raise NotImplementedError("right padding is not supported")
        if past_key_values is not None:
            input_ids = input_ids[:, -1].unsqueeze(-1)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache", True),
        }

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        reordered_past = []
        for layer_past in past_key_values:
            reordered_past += [tuple(past_state.index_select(0, beam_idx) for past_state in layer_past)]
        return reordered_past

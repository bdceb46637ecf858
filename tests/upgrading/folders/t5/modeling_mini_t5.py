"""Encoder and decoder with relative positions and one table of embeddings; caches are tuples of four tensors a layer."""
import copy
import math
from typing import Optional, Tuple, Union

import torch
from torch import nn
from torch.nn import CrossEntropyLoss
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS, find_pruneable_heads_and_indices, prune_linear_layer
from transformers.utils import DUMMY_INPUTS, DUMMY_MASK, is_torch_fx_proxy, logging
from transformers.utils.model_parallel_utils import assert_device_map, get_device_map

from .configuration_mini_t5 import MiniT5Config

logger = logging.get_logger(__name__)


class T5LayerNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


ALL_LAYERNORM_LAYERS.append(T5LayerNorm)


class T5Attention(nn.Module):
    def __init__(self, config, has_relative_attention_bias=False):
        super().__init__()
        self.is_decoder = config.is_decoder
        self.has_relative_attention_bias = has_relative_attention_bias
        self.buckets = config.relative_attention_num_buckets
        self.d_kv, self.n_heads = config.d_kv, config.num_heads
        inner = self.n_heads * self.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(self.buckets, self.n_heads)
        self.pruned_heads = set()

    def prune_heads(self, heads):
        heads, index = find_pruneable_heads_and_indices(heads, self.n_heads, self.d_kv, self.pruned_heads)
        self.q, self.k, self.v = (prune_linear_layer(p, index) for p in (self.q, self.k, self.v))
        self.o = prune_linear_layer(self.o, index, dim=1)
        self.n_heads -= len(heads)

    def compute_bias(self, query_length, key_length, device):
        """[1, heads, queries, keys]: one number for each clipped distance"""
        distance = torch.arange(key_length, device=device)[None, :] - torch.arange(query_length, device=device)[:, None]
        if self.is_decoder:
            bucket = (-distance).clamp(0, self.buckets - 1)
        else:
            bucket = (distance + self.buckets // 2).clamp(0, self.buckets - 1)
        return self.relative_attention_bias(bucket).permute(2, 0, 1).unsqueeze(0)

    def split(self, x):
        return x.view(x.shape[0], -1, self.n_heads, self.d_kv).transpose(1, 2)

    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, past_key_value=None, use_cache=False):
        length = hidden_states.shape[1]
        if past_key_value is not None:
            assert len(past_key_value) == 2, f"past_key_value should have 2 past states, got {len(past_key_value)}"
            length += past_key_value[0].shape[2]
        query = self.split(self.q(hidden_states))
        if key_value_states is None:
            key, value = self.split(self.k(hidden_states)), self.split(self.v(hidden_states))
            if past_key_value is not None:
                key = torch.cat([past_key_value[0], key], dim=2)
                value = torch.cat([past_key_value[1], value], dim=2)
        elif past_key_value is None:
            key, value = self.split(self.k(key_value_states)), self.split(self.v(key_value_states))
        else:
            key, value = past_key_value
        scores = torch.matmul(query, key.transpose(3, 2))
        if position_bias is None:
            if not self.has_relative_attention_bias:
                position_bias = torch.zeros((1, self.n_heads, query.shape[2], key.shape[2]), device=scores.device)
            else:
                position_bias = self.compute_bias(length, key.shape[2], device=scores.device)[:, :, -query.shape[2] :, :]
            if mask is not None:
                position_bias = position_bias + mask
        weights = nn.functional.softmax((scores + position_bias).float(), dim=-1).type_as(scores)
        output = self.o(torch.matmul(weights, value).transpose(1, 2).flatten(2))
        return output, (key, value) if (self.is_decoder and use_cache) else None, position_bias


class T5Block(nn.Module):
    def __init__(self, config, has_relative_attention_bias=False):
        super().__init__()
        self.is_decoder = config.is_decoder
        self.SelfAttention = T5Attention(config, has_relative_attention_bias)
        self.norm1, self.norm2 = T5LayerNorm(config.d_model), T5LayerNorm(config.d_model)
        if self.is_decoder:
            self.EncDecAttention = T5Attention(config)
            self.norm3 = T5LayerNorm(config.d_model)
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x, mask, position_bias=None, encoder_states=None, encoder_mask=None, cross_bias=None, past=None, use_cache=False):
        if past is not None:
            expected = 2 if encoder_states is None else 4
            if len(past) != expected:
                raise ValueError(f"There should be {expected} past states, got {len(past)}")
        own, other = (past[:2], past[2:]) if past is not None else (None, None)
        mixed, present, position_bias = self.SelfAttention(self.norm1(x), mask, None, position_bias, own, use_cache)
        x = x + mixed
        if self.is_decoder and encoder_states is not None:
            mixed, present2, cross_bias = self.EncDecAttention(
                self.norm3(x), encoder_mask, encoder_states, cross_bias, other, use_cache
            )
            x = x + mixed
            if present is not None:
                present = present + present2
        return x + self.wo(torch.relu(self.wi(self.norm2(x)))), present, position_bias, cross_bias


class MiniT5PreTrainedModel(PreTrainedModel):
    config_class = MiniT5Config
    base_model_prefix = "transformer"
    is_parallelizable = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["T5Block"]
    _keep_in_fp32_modules = ["wo"]

    @property
    def dummy_inputs(self):
        ids, mask = torch.tensor(DUMMY_INPUTS), torch.tensor(DUMMY_MASK)
        return {"decoder_input_ids": ids, "input_ids": ids, "decoder_attention_mask": mask}

    def _init_weights(self, module):
        factor = self.config.initializer_factor
        if isinstance(module, T5LayerNorm):
            module.weight.data.fill_(factor * 1.0)
        elif isinstance(module, T5Attention):
            for part in (module.q, module.k, module.v, module.o):
                part.weight.data.normal_(mean=0.0, std=factor * (self.config.d_model**-0.5))
            if module.has_relative_attention_bias:
                module.relative_attention_bias.weight.data.normal_(mean=0.0, std=factor * (self.config.d_model**-0.5))
        elif isinstance(module, T5Block):
            module.wi.weight.data.normal_(mean=0.0, std=factor * (self.config.d_model**-0.5))
            module.wo.weight.data.normal_(mean=0.0, std=factor * (self.config.d_ff**-0.5))
        elif isinstance(module, (MiniT5Model, MiniT5ForConditionalGeneration)):
            module.shared.weight.data.normal_(mean=0.0, std=factor * 1.0)

    def _shift_right(self, input_ids):
        start = self.config.decoder_start_token_id
        pad_token_id = self.config.pad_token_id
        if start is None:
            raise ValueError("self.model.config.decoder_start_token_id has to be defined.")
        if is_torch_fx_proxy(input_ids):
            shifted = torch.full(input_ids.shape[:-1] + (1,), start)
            shifted = torch.cat([shifted, input_ids[..., :-1]], dim=-1)
        else:
            shifted = input_ids.new_zeros(input_ids.shape)
            shifted[..., 1:] = input_ids[..., :-1].clone()
            shifted[..., 0] = start
        return shifted.masked_fill(shifted == -100, pad_token_id)


class T5Stack(MiniT5PreTrainedModel):
    def __init__(self, config, embed_tokens=None):
        super().__init__(config)
        self.embed_tokens = embed_tokens
        self.is_decoder = config.is_decoder
        self.block = nn.ModuleList([T5Block(config, has_relative_attention_bias=bool(i == 0)) for i in range(config.num_layers)])
        self.final_layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.post_init()
        # Model parallel
        self.model_parallel = False
        self.device_map = None

    def parallelize(self, device_map=None):
        self.device_map = get_device_map(len(self.block), range(torch.cuda.device_count())) if device_map is None else device_map
        assert_device_map(self.device_map, len(self.block))

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, new_embeddings):
        self.embed_tokens = new_embeddings

    def forward(self, input_ids=None, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
                inputs_embeds=None, head_mask=None, past_key_values=None, use_cache=None, return_dict=None, **unused):
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, seq_length = inputs_embeds.shape[:2]
        mask_seq_length = past_key_values[0][0].shape[2] + seq_length if past_key_values is not None else seq_length
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, mask_seq_length, device=inputs_embeds.device)
        if past_key_values is None:
            past_key_values = [None] * len(self.block)
        extended = self.get_extended_attention_mask(attention_mask, (batch_size, seq_length))
        if self.is_decoder and encoder_hidden_states is not None:
            if encoder_attention_mask is None:
                encoder_attention_mask = torch.ones(encoder_hidden_states.shape[:2], device=inputs_embeds.device)
            encoder_attention_mask = self.invert_attention_mask(encoder_attention_mask)
        head_mask = self.get_head_mask(head_mask, self.config.num_layers)
        x, position_bias, cross_bias, presents = inputs_embeds, None, None, ()
        for block, past in zip(self.block, past_key_values):
            x, present, position_bias, cross_bias = block(
                x, extended, position_bias, encoder_hidden_states, encoder_attention_mask, cross_bias, past, use_cache
            )
            presents += (present,)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.final_layer_norm(x), past_key_values=presents if self.is_decoder and use_cache else None
        )


class MiniT5Model(MiniT5PreTrainedModel):
    _keys_to_ignore_on_load_unexpected = ["decoder.block.0.EncDecAttention.relative_attention_bias.weight"]
    _tied_weights_keys = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]

    def __init__(self, config: MiniT5Config):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        encoder_config = copy.deepcopy(config)
        encoder_config.is_decoder = False
        encoder_config.use_cache = False
        encoder_config.is_encoder_decoder = False
        self.encoder = T5Stack(encoder_config, self.shared)
        decoder_config = copy.deepcopy(config)
        decoder_config.is_decoder = True
        decoder_config.is_encoder_decoder = False
        self.decoder = T5Stack(decoder_config, self.shared)
        self.post_init()

    def get_input_embeddings(self):
        return self.shared

    def set_input_embeddings(self, new_embeddings):
        self.shared = new_embeddings
        self.encoder.set_input_embeddings(new_embeddings)
        self.decoder.set_input_embeddings(new_embeddings)

    def _tie_weights(self):
        if self.config.tie_word_embeddings:
            self._tie_or_clone_weights(self.encoder.embed_tokens, self.shared)
            self._tie_or_clone_weights(self.decoder.embed_tokens, self.shared)

    def get_encoder(self):
        return self.encoder

    def get_decoder(self):
        return self.decoder

    def forward(self, input_ids=None, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None,
                encoder_outputs=None, past_key_values=None, use_cache=None, return_dict=None):
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        decoded = self.decoder(input_ids=decoder_input_ids, attention_mask=decoder_attention_mask, past_key_values=past_key_values,
                               encoder_hidden_states=encoder_outputs[0], encoder_attention_mask=attention_mask, use_cache=use_cache)
        return Seq2SeqModelOutput(last_hidden_state=decoded.last_hidden_state, past_key_values=decoded.past_key_values,
                                  encoder_last_hidden_state=encoder_outputs[0])


class MiniT5ForConditionalGeneration(MiniT5Model):
    _tied_weights_keys = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]

    def __init__(self, config: MiniT5Config):
        super().__init__(config)
        self.model_dim = config.d_model
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def forward(self, input_ids=None, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None,
                encoder_outputs: Optional[Tuple[Tuple[torch.Tensor]]] = None, past_key_values=None, labels=None, use_cache=None,
                output_attentions=None, output_hidden_states=None, return_dict=None) -> Union[Tuple, Seq2SeqLMOutput]:
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = self._shift_right(labels)
        outputs = super().forward(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs,
                                  past_key_values, use_cache)
        sequence_output = outputs[0]
        if self.config.tie_word_embeddings:
            sequence_output = sequence_output * (self.model_dim**-0.5)
        lm_logits = self.lm_head(sequence_output)
        loss = None
        if labels is not None:
            loss = CrossEntropyLoss(ignore_index=-100)(lm_logits.view(-1, lm_logits.size(-1)), labels.view(-1))
        return Seq2SeqLMOutput(loss=loss, logits=lm_logits, past_key_values=outputs.past_key_values,
                               encoder_last_hidden_state=outputs.encoder_last_hidden_state)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, head_mask=None,
                                      decoder_attention_mask=None, use_cache=None, encoder_outputs=None, **kwargs):
        # cut decoder_input_ids if past is used
        if past_key_values is not None:
            past_length = past_key_values[0][0].shape[2]
            remove_prefix_length = past_length if input_ids.shape[1] > past_length else input_ids.shape[1] - 1
            input_ids = input_ids[:, remove_prefix_length:]
        return {"decoder_input_ids": input_ids, "past_key_values": past_key_values, "encoder_outputs": encoder_outputs,
                "attention_mask": attention_mask, "use_cache": use_cache}

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor):
        return self._shift_right(labels)

    def _reorder_cache(self, past_key_values, beam_idx):
        if past_key_values is None:
            logger.warning("You might want to consider setting `use_cache=True` to speed up decoding")
            return past_key_values
        reordered = ()
        for layer_past_states in past_key_values:
            reordered += (tuple(state.index_select(0, beam_idx.to(state.device)) for state in layer_past_states),)
        return reordered

"""A BERT for DNA that removes padding before its layers and puts linear biases in place of positions."""
import copy
import math
import warnings
from typing import List, Optional, Tuple, Union

import torch
import torch.nn as nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertPreTrainedModel

from .bert_padding import index_put_rows, unpad_rows
from .configuration_mini_dnabert import MiniDnaBertConfig

try:
    from flash_attn import flash_attn_qkvpacked_func
except ImportError as e:
    flash_attn_qkvpacked_func = None


class BertEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        # ALiBi doesn't use position embeddings
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("token_type_ids", torch.zeros(config.max_position_embeddings, dtype=torch.long), persistent=False)

    def forward(self, input_ids, token_type_ids=None, past_key_values_length=0):
        length = input_ids.shape[1]
        if token_type_ids is None:
            token_type_ids = self.token_type_ids[None, :length].expand_as(input_ids)
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)))


class BertUnpadSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.hidden_size % config.num_attention_heads != 0 and not hasattr(config, "embedding_size"):
            raise ValueError("the hidden size must be a multiple of the number of attention heads")
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.position_embedding_type = config.position_embedding_type
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, hidden_states, places, shape, bias):
        """hidden_states: [tokens, width], places: where each token stands in the padded batch"""
        qkv = index_put_rows(self.Wqkv(hidden_states), places, shape)
        q, k, v = qkv.unflatten(-1, (3, self.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size) + bias
        mixed = torch.matmul(self.dropout(nn.functional.softmax(scores, dim=-1)), v)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)[places]


class BertLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = BertUnpadSelfAttention(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gated_layers = nn.Linear(config.hidden_size, config.intermediate_size * 2, bias=False)
        self.act = nn.GELU(approximate="none")
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states, places, shape, bias):
        hidden_states = self.LayerNorm(self.dense(self.attention(hidden_states, places, shape, bias)) + hidden_states)
        gated, non_gated = self.gated_layers(hidden_states).chunk(2, dim=-1)
        return self.layernorm(self.wo(self.act(gated) * non_gated) + hidden_states)


class BertEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        layer = BertLayer(config)
        self.layer = nn.ModuleList([copy.deepcopy(layer) for _ in range(config.num_hidden_layers)])
        self.num_attention_heads = config.num_attention_heads
        # The alibi mask will be dynamically expanded if it is too small for the input the model receives.
        self._current_alibi_size = int(config.alibi_starting_size)
        self.alibi = torch.zeros((1, self.num_attention_heads, self._current_alibi_size, self._current_alibi_size))
        self.rebuild_alibi_tensor(size=config.alibi_starting_size)

    def rebuild_alibi_tensor(self, size: int, device: Optional[Union[torch.device, str]] = None):
        count = self.num_attention_heads
        slopes = 2.0 ** (-8.0 * torch.arange(1, count + 1, device=device) / count)
        places = torch.arange(size, device=device)
        self._current_alibi_size = size
        self.alibi = -slopes[None, :, None, None] * torch.abs(places[:, None] - places[None, :])

    def forward(self, hidden_states, attention_mask):
        batch, length = attention_mask.shape
        if self._current_alibi_size < length:
            warnings.warn(f"Increasing alibi size from {self._current_alibi_size} to {length}")
            self.rebuild_alibi_tensor(size=length, device=hidden_states.device)
        elif self.alibi.device != hidden_states.device:
            self.alibi = self.alibi.to(hidden_states.device)
        bias = (1.0 - attention_mask[:, None, None].to(hidden_states.dtype)) * -10000.0 + self.alibi[:, :, :length, :length]
        rows, places = unpad_rows(hidden_states, attention_mask)
        for layer_module in self.layer:
            rows = layer_module(rows, places, (batch, length), bias)
        return index_put_rows(rows, places, (batch, length))


class MiniDnaBertModel(BertPreTrainedModel):
    config_class = MiniDnaBertConfig

    def __init__(self, config, add_pooling_layer=True):
        super(MiniDnaBertModel, self).__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def forward(self, input_ids: torch.Tensor, token_type_ids=None, attention_mask=None, masked_tokens_mask=None, **kwargs):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        encoded = self.encoder(self.embeddings(input_ids, token_type_ids), attention_mask)
        pooled = torch.tanh(self.pooler(encoded[:, 0])) if self.pooler is not None else None
        return encoded, pooled


class BertLMPredictionHead(nn.Module):
    def __init__(self, config, bert_model_embedding_weights):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(bert_model_embedding_weights.size(1), bert_model_embedding_weights.size(0))
        self.decoder.weight = bert_model_embedding_weights

    def forward(self, hidden_states):
        return self.decoder(self.LayerNorm(self.transform_act_fn(self.dense(hidden_states))))


class MiniDnaBertForMaskedLM(BertPreTrainedModel):
    config_class = MiniDnaBertConfig

    def __init__(self, config):
        super().__init__(config)
        if config.is_decoder:
            warnings.warn("If you want to use it as an encoder, make sure that `config.is_decoder=False`")
        self.bert = MiniDnaBertModel(config, add_pooling_layer=False)
        self.cls = BertLMPredictionHead(config, self.bert.embeddings.word_embeddings.weight)
        # Initialize weights and apply final processing
        self.post_init()

    def get_output_embeddings(self):
        return self.cls.decoder

    def set_output_embeddings(self, new_embeddings):
        self.cls.decoder = new_embeddings

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, return_dict: Optional[bool] = None):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        outputs = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        prediction_scores = self.cls(outputs[0])
        loss = None
        if labels is not None:
            loss = nn.CrossEntropyLoss()(prediction_scores.flatten(0, 1), labels.flatten())
        if not return_dict:
            return ((loss,) if loss is not None else ()) + (prediction_scores,)
        return MaskedLMOutput(loss=loss, logits=prediction_scores)

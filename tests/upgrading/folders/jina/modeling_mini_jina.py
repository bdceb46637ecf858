"""A BERT with symmetric linear biases in place of positions, and embeddings by pooling."""
import math
from typing import List, Optional, Tuple, Union

import torch
from torch import nn
from torch.nn import CrossEntropyLoss
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import apply_chunking_to_forward, find_pruneable_heads_and_indices, prune_linear_layer
from transformers.utils import logging

from .configuration_mini_jina import MiniJinaConfig

logger = logging.get_logger(__name__)


class JinaEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.register_buffer("token_type_ids", torch.zeros((1, config.max_position_embeddings), dtype=torch.long), persistent=False)

    def forward(self, input_ids, token_type_ids=None):
        if token_type_ids is None:
            if hasattr(self, "token_type_ids"):
                token_type_ids = self.token_type_ids[:, : input_ids.shape[1]].expand(input_ids.shape)
            else:
                token_type_ids = torch.zeros_like(input_ids)
        return self.LayerNorm(self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids))


class JinaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = config.hidden_size
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.pruned_heads = set()

    def prune_heads(self, heads):
        if len(heads) == 0:
            return
        heads, index = find_pruneable_heads_and_indices(
            heads, self.num_attention_heads, self.attention_head_size, self.pruned_heads
        )
        for name in ("query", "key", "value"):
            setattr(self, name, prune_linear_layer(getattr(self, name), index))
        self.dense = prune_linear_layer(self.dense, index, dim=1)
        self.num_attention_heads = self.num_attention_heads - len(heads)
        self.pruned_heads = self.pruned_heads.union(heads)

    def forward(self, hidden_states, attention_mask=None, head_mask=None, output_attentions=False, bias=None):
        split = lambda x: x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        q, k, v = split(self.query(hidden_states)), split(self.key(hidden_states)), split(self.value(hidden_states))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.attention_head_size) + attention_mask
        probs = nn.functional.softmax(scores + bias, dim=-1)
        if head_mask is not None:
            probs = probs * head_mask
        return self.dense((probs @ v).transpose(1, 2).flatten(2)), probs if output_attentions else None


class JinaLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.seq_len_dim = 1
        self.attention = JinaAttention(config)
        self.is_decoder = config.is_decoder
        self.add_cross_attention = config.add_cross_attention
        if self.add_cross_attention and not self.is_decoder:
            raise ValueError(f"{self} should be used as a decoder model if cross attention is added")
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.LayerNorm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states, attention_mask, head_mask, output_attentions, bias):
        attended, probs = self.attention(hidden_states, attention_mask, head_mask, output_attentions, bias)
        attended = self.LayerNorm(attended + hidden_states)
        fed = apply_chunking_to_forward(self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, attended)
        return self.LayerNorm2(fed + attended), probs

    def feed_forward_chunk(self, attended):
        return self.output(self.act(self.intermediate(attended)))


class JinaEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList([JinaLayer(config) for _ in range(config.num_hidden_layers)])
        self.num_attention_heads = config.num_attention_heads
        self._current_alibi_size = config.max_position_embeddings
        self.register_buffer("alibi", self.rebuild_alibi_tensor(size=config.max_position_embeddings), persistent=False)

    def rebuild_alibi_tensor(self, size: int, device: Optional[Union[torch.device, str]] = None):
        """[1, heads, size, size]: minus the slope times the distance to either side"""
        slopes = torch.tensor([2.0 ** (-8 * (i + 1) / self.num_attention_heads) for i in range(self.num_attention_heads)])
        places = torch.arange(size)
        alibi = -slopes[None, :, None, None] * (places[None, :] - places[:, None]).abs()
        self._current_alibi_size = size
        return alibi.to(device) if device is not None else alibi

    def forward(self, hidden_states, attention_mask, head_mask, output_attentions=False):
        length = hidden_states.shape[1]
        if self._current_alibi_size < length:
            self.register_buffer("alibi", self.rebuild_alibi_tensor(length, device=hidden_states.device), persistent=False)
        elif self.alibi.device != hidden_states.device:
            self.alibi = self.alibi.to(hidden_states.device)
        bias = self.alibi[:, :, :length, :length].to(hidden_states.dtype)
        all_probs = ()
        for i, layer in enumerate(self.layer):
            hidden_states, probs = layer(hidden_states, attention_mask, head_mask[i], output_attentions, bias)
            all_probs += (probs,)
        return hidden_states, all_probs if output_attentions else None


class MiniJinaPreTrainedModel(PreTrainedModel):
    config_class = MiniJinaConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["JinaLayer"]

    def _init_weights(self, module):
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

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, JinaEncoder):
            module.gradient_checkpointing = value


class MiniJinaModel(MiniJinaPreTrainedModel):
    def __init__(self, config: MiniJinaConfig, add_pooling_layer=True):
        super().__init__(config)
        self.config = config
        self.emb_pooler = config.emb_pooler
        self.embeddings = JinaEmbeddings(config)
        self.encoder = JinaEncoder(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.post_init()

    @torch.inference_mode()
    def encode(self, sentences: List[str], tokenizer, batch_size: int = 8):
        encoded = tokenizer(sentences, padding=True, return_tensors="pt").to(self.device)
        return self.mean_pooling(self.forward(**encoded)[0], encoded["attention_mask"])

    def mean_pooling(self, states, attention_mask):
        weights = attention_mask.unsqueeze(-1).float()
        return torch.sum(states * weights, 1) / torch.clamp(weights.sum(1), min=1e-9)

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def _prune_heads(self, heads_to_prune):
        for layer, heads in heads_to_prune.items():
            self.encoder.layer[layer].attention.prune_heads(heads)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, head_mask=None, output_attentions=None,
                output_hidden_states=None, return_dict=None):
        output_attentions = output_attentions if output_attentions is not None else self.config.output_attentions
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.size(), device=input_ids.device)
        extended_attention_mask: torch.Tensor = self.get_extended_attention_mask(attention_mask, input_ids.size())
        head_mask = self.get_head_mask(head_mask, self.config.num_hidden_layers)
        sequence_output, probs = self.encoder(
            self.embeddings(input_ids, token_type_ids), extended_attention_mask, head_mask, output_attentions
        )
        pooled_output = self.pooler(sequence_output[:, 0]).tanh() if self.pooler is not None else None
        if not return_dict:
            return (sequence_output, pooled_output)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=sequence_output, pooler_output=pooled_output, attentions=probs
        )


class JinaLMHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        # Need a link between the two variables so that the bias is correctly resized with `resize_token_embeddings`
        self.decoder.bias = self.bias

    def forward(self, states):
        return self.decoder(nn.functional.gelu(self.transform(states)))


class MiniJinaForMaskedLM(MiniJinaPreTrainedModel):
    _tied_weights_keys = ["cls.decoder.bias", "cls.decoder.weight"]

    def __init__(self, config):
        super().__init__(config)
        if config.is_decoder:
            logger.warning("is_decoder should be False")
        self.bert = MiniJinaModel(config, add_pooling_layer=False)
        self.cls = JinaLMHead(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.cls.decoder

    def set_output_embeddings(self, new_embeddings):
        self.cls.decoder = new_embeddings

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, return_dict=None):
        outputs = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, return_dict=return_dict)
        prediction_scores = self.cls(outputs[0])
        masked_lm_loss = None
        if labels is not None:
            masked_lm_loss = CrossEntropyLoss()(prediction_scores.view(-1, self.config.vocab_size), labels.view(-1))
        return MaskedLMOutput(loss=masked_lm_loss, logits=prediction_scores)


class MiniJinaForSequenceClassification(MiniJinaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MiniJinaModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, return_dict=None):
        states = self.bert(input_ids, attention_mask, token_type_ids)[0]
        logits = self.classifier(states[:, 0])
        loss = None
        if labels is not None:
            if self.config.problem_type is None:
                self.config.problem_type = "single_label_classification"
            loss = CrossEntropyLoss()(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

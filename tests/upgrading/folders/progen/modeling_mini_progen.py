# A decoder for proteins: attention and MLP side by side, pairs of channels rotated.
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.file_utils import add_start_docstrings
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import DUMMY_INPUTS, logging
from transformers.utils.model_parallel_utils import assert_device_map, get_device_map

from .configuration_mini_progen import MiniProGenConfig

logger = logging.get_logger(__name__)
PRETRAINED_MODEL_ARCHIVE_LIST = []


def sinusoids(dim, length):
    angles = torch.einsum("i,j->ij", torch.arange(length).float(), 10000 ** (-torch.arange(0, dim, 2) / dim))
    return torch.sin(angles), torch.cos(angles)


def rotate_pairs(x, tables, start):
    sin, cos = (t[start : start + x.shape[1], None, :].repeat_interleave(2, dim=-1).to(x.device) for t in tables)
    pairs = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + pairs * sin


class ProGenAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.register_buffer(
            "bias",
            torch.tril(torch.ones((config.n_positions, config.n_positions), dtype=torch.bool)).view(
                1, 1, config.n_positions, config.n_positions
            ),
            persistent=False,
        )
        self.register_buffer("masked_bias", torch.tensor(-1e9), persistent=False)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.num_heads, self.head_dim = config.n_head, config.embed_dim // config.n_head
        self.scale_attn = torch.sqrt(torch.tensor(self.head_dim, dtype=torch.float32)).to(torch.get_default_dtype())
        self.qkv_proj = nn.Linear(config.embed_dim, config.embed_dim * 3, bias=False)
        self.out_proj = nn.Linear(config.embed_dim, config.embed_dim, bias=False)
        self.rotary_dim = config.rotary_dim

    def forward(self, hidden_states, layer_past=None, attention_mask=None, head_mask=None, use_cache=False, output_attentions=False):
        heads = (*hidden_states.shape[:2], self.num_heads, self.head_dim)
        query, key, value = (t.view(heads) for t in self.qkv_proj(hidden_states).chunk(3, dim=-1))
        offset = 0
        if layer_past is not None:
            offset = layer_past[0].shape[-2]
        tables = sinusoids(self.rotary_dim, offset + key.shape[1])
        r = self.rotary_dim
        query = torch.cat([rotate_pairs(query[..., :r], tables, offset), query[..., r:]], dim=-1).permute(0, 2, 1, 3)
        key = torch.cat([rotate_pairs(key[..., :r], tables, offset), key[..., r:]], dim=-1).permute(0, 2, 1, 3)
        value = value.permute(0, 2, 1, 3)
        if layer_past is not None:
            past_key, past_value = layer_past
            key = torch.cat((past_key, key), dim=-2)
            value = torch.cat((past_value, value), dim=-2)
        present = (key, value) if use_cache is True else None
        query_length, key_length = query.size(-2), key.size(-2)
        causal_mask = self.bias[:, :, key_length - query_length : key_length, :key_length]
        weights = torch.matmul(query, key.transpose(-1, -2)) / self.scale_attn
        weights = torch.where(causal_mask, weights, self.masked_bias.to(weights.dtype))
        if attention_mask is not None:
            weights = weights + attention_mask
        weights = self.attn_dropout(nn.Softmax(dim=-1)(weights))
        if head_mask is not None:
            weights = weights * head_mask
        outputs = (self.out_proj(torch.matmul(weights, value).transpose(1, 2).flatten(2)), present)
        return outputs + (weights,) if output_attentions else outputs


class ProGenBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.n_inner if config.n_inner is not None else 4 * config.embed_dim
        self.ln_1 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_epsilon)
        self.attn = ProGenAttention(config)
        self.fc_in = nn.Linear(config.embed_dim, inner)
        self.fc_out = nn.Linear(inner, config.embed_dim)
        self.act = ACT2FN[config.activation_function]

    def forward(self, hidden_states, **kwargs):
        normed = self.ln_1(hidden_states)
        outputs = self.attn(normed, **kwargs)
        return (outputs[0] + self.fc_out(self.act(self.fc_in(normed))) + hidden_states,) + outputs[1:]


class MiniProGenPreTrainedModel(PreTrainedModel):
    config_class = MiniProGenConfig
    base_model_prefix = "transformer"
    is_parallelizable = True

    def __init__(self, *inputs, **kwargs):
        super().__init__(*inputs, **kwargs)

    @property
    def dummy_inputs(self):
        return {"input_ids": torch.tensor(DUMMY_INPUTS)}

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear,)):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            module.bias.data.zero_()
            module.weight.data.fill_(1.0)


class MiniProGenModel(MiniProGenPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size_emb, config.embed_dim)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([ProGenBlock(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_epsilon)
        self.init_weights()
        # Model parallel
        self.model_parallel = False
        self.device_map = None

    def parallelize(self, device_map=None):
        self.device_map = get_device_map(len(self.h), range(torch.cuda.device_count())) if device_map is None else device_map
        assert_device_map(self.device_map, len(self.h))
        self.model_parallel = True

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, new_embeddings):
        self.wte = new_embeddings

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, head_mask=None, inputs_embeds=None,
                use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        output_attentions = output_attentions if output_attentions is not None else self.config.output_attentions
        output_hidden_states = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        inputs_embeds = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None:
            past_key_values = tuple([None] * len(self.h))
        if attention_mask is not None:
            attention_mask = attention_mask.view(inputs_embeds.shape[0], -1)[:, None, None, :]
            attention_mask = (1.0 - attention_mask.to(dtype=self.dtype)) * -10000.0
        head_mask = self.get_head_mask(head_mask, self.config.n_layer)
        hidden_states = self.drop(inputs_embeds)
        presents, attentions, states = (), (), ()
        for i, (block, layer_past) in enumerate(zip(self.h, past_key_values)):
            states += (hidden_states,)
            outputs = block(hidden_states, layer_past=layer_past, attention_mask=attention_mask, head_mask=head_mask[i],
                            use_cache=use_cache, output_attentions=output_attentions)
            hidden_states = outputs[0]
            presents += (outputs[1],)
            attentions += tuple(outputs[2:])
        hidden_states = self.ln_f(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=presents if use_cache else None,
            hidden_states=states + (hidden_states,) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )


@add_start_docstrings("The model with a head.", "")
class MiniProGenForCausalLM(MiniProGenPreTrainedModel):
    _keys_to_ignore_on_load_missing = [r"h\.\d+\.attn\.masked_bias", r"h\.\d+\.attn\.bias", r"lm_head\.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.transformer = MiniProGenModel(config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size_lm_head)
        self.init_weights()

    def get_output_embeddings(self):
        return None

    def set_output_embeddings(self, new_embeddings):
        return

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        # only last token for inputs_ids if past is defined in kwargs
        if past_key_values:
            input_ids = input_ids[:, -1].unsqueeze(-1)
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": kwargs.get("attention_mask", None),
        }

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, head_mask=None, inputs_embeds=None, labels=None,
                use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        outputs = self.transformer(input_ids, past_key_values=past_key_values, attention_mask=attention_mask, head_mask=head_mask,
                                   inputs_embeds=inputs_embeds, use_cache=use_cache, output_attentions=output_attentions,
                                   output_hidden_states=output_hidden_states, return_dict=return_dict)
        lm_logits = self.lm_head(outputs[0]).to(torch.float32)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(lm_logits[..., :-1, :].flatten(0, 1), labels[..., 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=lm_logits, past_key_values=outputs.past_key_values,
                                      hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    @staticmethod
    def _reorder_cache(past: Tuple[Tuple[torch.Tensor]], beam_idx: torch.Tensor) -> Tuple[Tuple[torch.Tensor]]:
        return tuple(tuple(state.index_select(0, beam_idx.to(state.device)) for state in layer_past) for layer_past in past)

"""A picture's tokens before a text's, read by an encoder and answered by a decoder."""
import math
from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
from torch import nn
from transformers.generation.utils import GenerationMixin
from transformers.modeling_attn_mask_utils import _prepare_4d_attention_mask, _prepare_4d_causal_attention_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import add_start_docstrings, logging

from .configuration_mini_florence import MiniFlorenceConfig, MiniLanguageConfig

logger = logging.get_logger(__name__)


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int, decoder_start_token_id: int):
    shifted = input_ids.new_zeros(input_ids.shape)
    shifted[:, 1:] = input_ids[:, :-1].clone()
    shifted[:, 0] = decoder_start_token_id
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    return shifted.masked_fill_(shifted == -100, pad_token_id)


class DropPath(nn.Module):
    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device) >= self.drop_prob
        return x * keep / (1 - self.drop_prob)


class VisionStage(nn.Module):
    def __init__(self, channels, width, stride, drop):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=stride, stride=stride)
        self.norm = nn.LayerNorm(width)
        self.dw = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop_path = DropPath(drop)

    def forward(self, x):
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))
        x = x + self.drop_path(self.dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return (x + self.drop_path(self.mlp(x))).permute(0, 3, 1, 2)


class MiniDaViT(nn.Module):
    def __init__(self, config):
        super().__init__()
        # the deeper the stage, the more is dropped
        rates = [x.item() for x in torch.linspace(0, config.drop_path_rate, len(config.dim_embed))]
        channels = [3] + list(config.dim_embed)
        self.stages = nn.ModuleList(
            [VisionStage(channels[i], channels[i + 1], config.patch_size if i == 0 else 2, rates[i]) for i in range(len(rates))]
        )
        self.dim_out = channels[-1]

    def forward_features(self, x):
        for stage in self.stages:
            x = stage(x)
        return x.flatten(2).transpose(1, 2)


class LearnedPositions(nn.Embedding):
    def __init__(self, count, width):
        self.offset = 2
        super().__init__(count + self.offset, width)

    def forward(self, length, seen=0):
        return super().forward(torch.arange(seen, seen + length, device=self.weight.device) + self.offset)


class MiniAttention(nn.Module):
    def __init__(self, width, heads, is_decoder=False, config: Optional[MiniLanguageConfig] = None):
        super().__init__()
        self.num_heads, self.is_decoder, self.config = heads, is_decoder, config
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def _shape(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x, key_value_states=None, past_key_value: Optional[Tuple[torch.Tensor]] = None, attention_mask=None):
        query = self._shape(self.q_proj(x))
        if key_value_states is not None and past_key_value is not None and past_key_value[0].shape[2] == key_value_states.shape[1]:
            key, value = past_key_value
        else:
            source = x if key_value_states is None else key_value_states
            key, value = self._shape(self.k_proj(source)), self._shape(self.v_proj(source))
            if key_value_states is None and past_key_value is not None:
                key, value = torch.cat([past_key_value[0], key], dim=2), torch.cat([past_key_value[1], value], dim=2)
        past_key_value = (key, value) if self.is_decoder else None
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        scores = scores + attention_mask if attention_mask is not None else scores
        return self.out_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)), past_key_value


FLORENCE_ATTENTION_CLASSES = {"eager": MiniAttention, "sdpa": MiniAttention}


class MiniLayer(nn.Module):
    def __init__(self, config, decoder):
        super().__init__()
        attention = FLORENCE_ATTENTION_CLASSES[config._attn_implementation]
        self.self_attn = attention(config.d_model, config.decoder_attention_heads, is_decoder=decoder, config=config)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.encoder_attn = attention(config.d_model, config.decoder_attention_heads, is_decoder=True, config=config) if decoder else None
        self.norm2 = nn.LayerNorm(config.d_model) if decoder else None
        self.fc1, self.fc2 = nn.Linear(config.d_model, 2 * config.d_model), nn.Linear(2 * config.d_model, config.d_model)
        self.norm3 = nn.LayerNorm(config.d_model)

    def forward(self, x, mask, source=None, source_mask=None, past=None):
        mixed, present = self.self_attn(x, past_key_value=past[:2] if past is not None else None, attention_mask=mask)
        x = self.norm1(x + mixed)
        if self.encoder_attn is not None:
            mixed, cross = self.encoder_attn(x, source, past[2:] if past is not None else None, source_mask)
            x = self.norm2(x + mixed)
            present = present + cross
        return self.norm3(x + self.fc2(nn.functional.gelu(self.fc1(x)))), present


class MiniLanguagePreTrainedModel(PreTrainedModel):
    config_class = MiniLanguageConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module):
        std = self.config.init_std
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()


class MiniStack(MiniLanguagePreTrainedModel):
    def __init__(self, config: MiniLanguageConfig, embed_tokens: Optional[nn.Embedding], decoder: bool):
        super().__init__(config)
        self.is_stack_decoder = decoder
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        if embed_tokens is not None:
            self.embed_tokens.weight = embed_tokens.weight
        self.embed_positions = LearnedPositions(config.max_position_embeddings, config.d_model)
        count = config.decoder_layers if decoder else config.encoder_layers
        self.layers = nn.ModuleList([MiniLayer(config, decoder) for _ in range(count)])
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, source=None, source_mask=None, past_key_values=None,
                use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        shape = inputs_embeds.shape[:2]
        past_key_values_length = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        x = self.layernorm_embedding(inputs_embeds + self.embed_positions(shape[1], past_key_values_length))
        if self.is_stack_decoder:
            mask = _prepare_4d_causal_attention_mask(attention_mask, shape, inputs_embeds, past_key_values_length)
            if source_mask is not None:
                source_mask = _prepare_4d_attention_mask(source_mask, inputs_embeds.dtype, tgt_len=shape[1])
        else:
            mask = _prepare_4d_attention_mask(attention_mask, inputs_embeds.dtype) if attention_mask is not None else None
        next_decoder_cache = () if use_cache and self.is_stack_decoder else None
        for idx, layer in enumerate(self.layers):
            past = past_key_values[idx] if past_key_values is not None else None
            x, present = layer(x, mask, source, source_mask, past)
            if next_decoder_cache is not None:
                next_decoder_cache += (present,)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x, past_key_values=next_decoder_cache)


class MiniLanguageModel(MiniLanguagePreTrainedModel):
    _tied_weights_keys = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]

    def __init__(self, config: MiniLanguageConfig):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.encoder = MiniStack(config, self.shared, decoder=False)
        self.decoder = MiniStack(config, self.shared, decoder=True)
        self.post_init()

    def _tie_weights(self):
        if self.config.tie_word_embeddings:
            self._tie_or_clone_weights(self.encoder.embed_tokens, self.shared)
            self._tie_or_clone_weights(self.decoder.embed_tokens, self.shared)

    def get_input_embeddings(self):
        return self.shared

    def set_input_embeddings(self, value):
        self.shared = value
        self.encoder.embed_tokens = self.shared
        self.decoder.embed_tokens = self.shared


class MiniLanguageForConditionalGeneration(MiniLanguagePreTrainedModel, GenerationMixin):
    base_model_prefix = "model"
    _tied_weights_keys = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"]
    _keys_to_ignore_on_load_missing = ["final_logits_bias"]

    def __init__(self, config: MiniLanguageConfig):
        super().__init__(config)
        self.model = MiniLanguageModel(config)
        self.register_buffer("final_logits_bias", torch.zeros((1, self.model.shared.num_embeddings)))
        self.lm_head = nn.Linear(config.d_model, self.model.shared.num_embeddings, bias=False)
        self.post_init()

    def get_encoder(self):
        return self.model.encoder

    def get_decoder(self):
        return self.model.decoder

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def forward(self, input_ids=None, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None,
                encoder_outputs: Optional[List[torch.FloatTensor]] = None, past_key_values=None, inputs_embeds=None, labels=None,
                use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)
        if encoder_outputs is None:
            encoder_outputs = self.model.encoder(input_ids, inputs_embeds, attention_mask)
        decoded = self.model.decoder(decoder_input_ids, None, decoder_attention_mask, encoder_outputs[0], attention_mask,
                                     past_key_values, use_cache)
        lm_logits = self.lm_head(decoded[0]) + self.final_logits_bias.to(decoded[0].device)
        loss = None
        if labels is not None:
            loss = nn.CrossEntropyLoss()(lm_logits.view(-1, self.config.vocab_size), labels.view(-1))
        return Seq2SeqLMOutput(loss=loss, logits=lm_logits, past_key_values=decoded.past_key_values,
                               encoder_last_hidden_state=encoder_outputs[0])

    def prepare_inputs_for_generation(self, decoder_input_ids, past_key_values=None, attention_mask=None, decoder_attention_mask=None,
                                      use_cache=None, encoder_outputs=None, **kwargs):
        # cut decoder_input_ids if past_key_values is used
        if past_key_values is not None:
            past_length = past_key_values[0][0].shape[2]
            # Some generation methods already pass only the last input ID
            if decoder_input_ids.shape[1] > past_length:
                remove_prefix_length = past_length
            else:
                # Default to old behavior: keep only final ID
                remove_prefix_length = decoder_input_ids.shape[1] - 1
            decoder_input_ids = decoder_input_ids[:, remove_prefix_length:]
        return {"input_ids": None, "encoder_outputs": encoder_outputs, "past_key_values": past_key_values,
                "decoder_input_ids": decoder_input_ids, "attention_mask": attention_mask, "use_cache": use_cache}

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(tuple(state.index_select(0, beam_idx.to(state.device)) for state in layer) for layer in past_key_values)


class MiniFlorencePreTrainedModel(PreTrainedModel):
    config_class = MiniFlorenceConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = "past_key_values"

    @property
    def _supports_flash_attn_2(self):
        return self.language_model._supports_flash_attn_2

    @property
    def _supports_sdpa(self):
        return self.language_model._supports_sdpa


@add_start_docstrings("The picture's model and the text's.", "")
class MiniFlorenceForConditionalGeneration(MiniFlorencePreTrainedModel):
    _tied_weights_keys = ["language_model.encoder.embed_tokens.weight", "language_model.decoder.embed_tokens.weight",
                          "language_model.lm_head.weight"]

    def __init__(self, config: MiniFlorenceConfig):
        super().__init__(config)
        self.vision_tower = MiniDaViT(config.vision_config)
        self.image_projection = nn.Parameter(torch.empty(self.vision_tower.dim_out, config.projection_dim))
        self.image_proj_norm = nn.LayerNorm(config.projection_dim)
        self.vocab_size = config.vocab_size
        language_model = MiniLanguageForConditionalGeneration(config=config.text_config)
        if language_model._tied_weights_keys is not None:
            self._tied_weights_keys = [f"language_model.{k}" for k in language_model._tied_weights_keys]
        self.language_model = language_model
        self.pad_token_id = self.config.pad_token_id if self.config.pad_token_id is not None else -1
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def get_encoder(self):
        return self.language_model.get_encoder()

    def _encode_image(self, pixel_values):
        return self.image_proj_norm(self.vision_tower.forward_features(pixel_values) @ self.image_projection)

    def _merge(self, image_features, inputs_embeds):
        merged = torch.cat([image_features, inputs_embeds], dim=1)
        return merged, torch.ones(merged.shape[:2], device=merged.device)

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None,
                encoder_outputs=None, past_key_values=None, inputs_embeds=None, labels=None, use_cache=None, return_dict=None):
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            inputs_embeds, attention_mask = self._merge(self._encode_image(pixel_values), inputs_embeds)
        if decoder_input_ids is None and labels is None:
            decoder_input_ids = input_ids[:, :1] * 0 + self.config.text_config.decoder_start_token_id
        return self.language_model(attention_mask=attention_mask, labels=labels, inputs_embeds=inputs_embeds,
                                   decoder_input_ids=decoder_input_ids, encoder_outputs=encoder_outputs,
                                   decoder_attention_mask=decoder_attention_mask, past_key_values=past_key_values, use_cache=use_cache)

    def generate(self, input_ids, inputs_embeds=None, pixel_values=None, attention_mask=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None:
                inputs_embeds, attention_mask = self._merge(self._encode_image(pixel_values), inputs_embeds)
        return self.language_model.generate(input_ids=None, inputs_embeds=inputs_embeds, **kwargs)

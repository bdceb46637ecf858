"""A waveform through convolutions, sinusoidal places, an encoder."""

import math
from typing import Optional, Tuple, Union

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import add_code_sample_docstrings, add_start_docstrings, logging

from .configuration_mini_speech import MiniSpeechConfig

logger = logging.get_logger(__name__)


class SinusoidalPositions(nn.Embedding):
    def __init__(self, num_positions: int, dim: int):
        super().__init__(num_positions, dim)
        self.weight = self._fill(self.weight)

    @staticmethod
    def _fill(out: nn.Parameter):
        count, dim = out.shape
        angles = torch.arange(count)[:, None] / torch.pow(10000, 2 * (torch.arange(dim)[None] // 2) / dim)
        out.requires_grad = False
        out[:, 0 : dim // 2] = angles[:, 0::2].sin()
        out[:, dim // 2 :] = angles[:, 1::2].cos()
        out.detach_()
        return out

    @torch.no_grad()
    def forward(self, length):
        return super().forward(torch.arange(length, device=self.weight.device))


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.heads = config.num_attention_heads
        self.qkv, self.out = (
            nn.Linear(config.hidden_size, 3 * config.hidden_size),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.fc1, self.fc2 = nn.Linear(config.hidden_size, 48), nn.Linear(48, config.hidden_size)
        self.register_buffer("distance_bias", -torch.arange(config.max_source_positions).float() / 50, persistent=False)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        n = x.shape[1]
        places = torch.arange(n, device=x.device)
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + self.distance_bias[(places[:, None] - places[None]).abs()]
        scores = scores if mask is None else scores + mask
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class MiniSpeechPreTrainedModel(PreTrainedModel):
    config_class = MiniSpeechConfig
    base_model_prefix = "speech"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.bias.data.zero_()
            module.weight.data.fill_(1.0)

    def _get_feat_extract_output_lengths(self, input_lengths: Union[torch.LongTensor, int]):
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride):
            input_lengths = torch.div(input_lengths - kernel, stride, rounding_mode="floor") + 1
        return input_lengths


class MiniSpeechModel(MiniSpeechPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        dims = [1] + list(config.conv_dim)
        self.convs = nn.ModuleList(
            [
                nn.Conv1d(dims[i], dims[i + 1], k, s)
                for i, (k, s) in enumerate(zip(config.conv_kernel, config.conv_stride))
            ]
        )
        scale = torch.tensor(config.hidden_size).sqrt()
        self.scale = scale.item()
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.num_hidden_layers)])
        frequencies = torch.exp(
            -torch.arange(0, config.hidden_size, 2).float() * math.log(10000.0) / config.hidden_size
        )
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(
        self, input_values, attention_mask=None, output_attentions=None, output_hidden_states=None, return_dict=None
    ):
        output_hidden_states = (
            output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        )
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        x = input_values[:, None]
        for conv in self.convs:
            x = nn.functional.gelu(conv(x))
        x = x.transpose(1, 2)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.frequencies
        x = x + torch.cat([angles.sin(), angles.cos()], dim=-1) / self.scale
        mask = None
        if attention_mask is not None:
            lengths = self._get_feat_extract_output_lengths(attention_mask.sum(-1))
            hidden = torch.arange(x.shape[1], device=x.device)[None] >= lengths[:, None]
            mask = hidden[:, None, None].to(x.dtype) * torch.finfo(x.dtype).min
        states = ()
        for layer in self.layers:
            states += (x,)
            x = layer(x, mask)
        x = self.norm(x)
        if not return_dict:
            return (x,)
        return BaseModelOutput(last_hidden_state=x, hidden_states=states + (x,) if output_hidden_states else None)


class MiniSpeechForClassification(MiniSpeechPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        if hasattr(config, "add_adapter") and config.add_adapter:
            raise ValueError("no adapters here")
        self.speech = MiniSpeechModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_values, attention_mask=None, labels=None, return_dict=None):
        logits = self.classifier(self.speech(input_values, attention_mask).last_hidden_state.mean(1))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)

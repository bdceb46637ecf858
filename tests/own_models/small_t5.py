"""An encoder-decoder on T5's stacks with a scale of its own on the encoder's states."""

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration


class ScaledT5Config(T5Config):
    model_type = "scaled_t5_of_one_file"


class ScaledT5ForConditionalGeneration(T5ForConditionalGeneration):
    config_class = ScaledT5Config

    def __init__(self, config):
        super().__init__(config)
        self.states_scale = nn.Parameter(torch.ones(config.d_model))
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, encoder_outputs=None, **kwargs):
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
            encoder_outputs.last_hidden_state = encoder_outputs.last_hidden_state * self.states_scale
        return super().forward(attention_mask=attention_mask, encoder_outputs=encoder_outputs, **kwargs)

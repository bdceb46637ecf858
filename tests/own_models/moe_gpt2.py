"""A GPT-2 with experts instead of MLPs: stock blocks, a config of its own, `forward` as stock GPT-2 has it."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model


class MoeGPT2Config(GPT2Config):
    model_type = "moe_gpt2_of_one_file"

    def __init__(self, num_experts=3, **kwargs):
        super().__init__(**kwargs)
        self.num_experts = num_experts


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = 2 * config.n_embd
        self.router = nn.Linear(config.n_embd, config.num_experts, bias=False)
        self.up = nn.ModuleList(nn.Linear(config.n_embd, width) for _ in range(config.num_experts))
        self.down = nn.ModuleList(nn.Linear(width, config.n_embd) for _ in range(config.num_experts))

    def forward(self, x):
        gates = self.router(x).softmax(-1)
        outputs = [down(torch.tanh(up(x))) for up, down in zip(self.up, self.down)]
        return sum(gates[..., i : i + 1] * output for i, output in enumerate(outputs))


class MoeGPT2Model(GPT2Model):
    config_class = MoeGPT2Config

    def __init__(self, config):
        super().__init__(config)
        for block in self.h:
            block.mlp = Experts(config)
        self.post_init()


class MoeGPT2LMHeadModel(GPT2LMHeadModel):
    config_class = MoeGPT2Config

    def __init__(self, config):
        super().__init__(config)
        self.transformer = MoeGPT2Model(config)
        self.post_init()

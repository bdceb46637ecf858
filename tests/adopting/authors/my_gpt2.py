import math

import torch
from torch import nn
from transformers import GPT2Config, GPT2PreTrainedModel


class ParallelBlock(nn.Module):
    """Attention and MLP side by side on one norm, as in GPT-J, with squared ReLU."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.resid_pdrop)

    def attention(self, x, mask):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(~mask, float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))

    def forward(self, x, mask):
        h = self.ln(x)
        return x + self.drop(self.attention(h, mask)) + self.drop(self.down(torch.relu(self.up(h)) ** 2))


class MyGPT2Model(GPT2PreTrainedModel):
    config_class = GPT2Config

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([ParallelBlock(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        T = input_ids.size(1)
        mask = torch.ones(T, T, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        if attention_mask is not None:
            # a row that sees nothing would be NaN: every token sees itself
            mask = mask & attention_mask[:, None, None, :].bool() | torch.eye(T, dtype=torch.bool, device=mask.device)
        x = self.wte(input_ids) + self.wpe(torch.arange(T, device=input_ids.device))
        x = self.drop(x)
        for block in self.h:
            x = block(x, mask)
        return self.ln_f(x)

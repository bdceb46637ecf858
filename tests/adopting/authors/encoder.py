import math

import torch
from torch import nn


class PositionalEncoding(nn.Module):
    def __init__(self, d_model, dropout=0.1, max_len=512):
        super().__init__()
        self.dropout = nn.Dropout(p=dropout)
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(1, max_len, d_model)
        pe[0, :, 0::2] = torch.sin(position * div_term)
        pe[0, :, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe)

    def forward(self, x):
        return self.dropout(x + self.pe[:, : x.size(1)])


class Tagger(nn.Module):
    """Tags every word of a sentence."""

    def __init__(self, vocab, hidden=64, layers=2, heads=4, tags=5, max_len=128, dropout=0.1, pad=0):
        super().__init__()
        self.hidden = hidden
        self.embed = nn.Embedding(vocab, hidden, padding_idx=pad)
        self.pos = PositionalEncoding(hidden, dropout, max_len)
        layer = nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.fc = nn.Linear(hidden, tags)

    def forward(self, src, src_key_padding_mask=None):
        x = self.pos(self.embed(src) * math.sqrt(self.hidden))
        x = self.encoder(x, src_key_padding_mask=src_key_padding_mask)
        return self.fc(x)

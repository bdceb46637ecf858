import torch
import torch.nn as nn


class StoryDecoder(nn.Module):
    """A language model of nn.TransformerDecoderLayer; what the layers attend to across is a learned memory."""

    def __init__(
        self,
        ntoken: int,
        d_model: int = 128,
        nhead: int = 4,
        d_hid: int = 256,
        nlayers: int = 4,
        memory_slots: int = 8,
        max_len: int = 128,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.tok = nn.Embedding(ntoken, d_model)
        self.pos = nn.Parameter(torch.randn(1, max_len, d_model) * 0.02)
        self.memory = nn.Parameter(torch.randn(1, memory_slots, d_model) * 0.02)
        self.layers = nn.ModuleList(
            [
                nn.TransformerDecoderLayer(d_model, nhead, d_hid, dropout, batch_first=True, norm_first=True)
                for _ in range(nlayers)
            ]
        )
        self.norm = nn.LayerNorm(d_model)
        self.out = nn.Linear(d_model, ntoken)

    def forward(self, x, pad_mask=None):
        """x: [batch, length]; pad_mask: True where x is padding."""
        b, t = x.shape
        causal = torch.triu(torch.full((t, t), float("-inf"), device=x.device), diagonal=1)
        if pad_mask is not None:
            pad_mask = torch.zeros(b, t, device=x.device).masked_fill(pad_mask, float("-inf"))
        h = self.tok(x) + self.pos[:, :t]
        memory = self.memory.expand(b, -1, -1)
        for layer in self.layers:
            h = layer(h, memory, tgt_mask=causal, tgt_key_padding_mask=pad_mask)
        return self.out(self.norm(h))

import torch
import torch.nn as nn


class Translator(nn.Module):
    def __init__(
        self, src_vocab, tgt_vocab, dim=64, heads=4, enc_layers=2, dec_layers=2, ff=128, max_len=64, dropout=0.1
    ):
        super().__init__()
        self.src_embed = nn.Embedding(src_vocab, dim)
        self.tgt_embed = nn.Embedding(tgt_vocab, dim)
        self.positions = nn.Embedding(max_len, dim)
        self.transformer = nn.Transformer(dim, heads, enc_layers, dec_layers, ff, dropout, batch_first=True)
        self.generator = nn.Linear(dim, tgt_vocab)

    def embed(self, table, ids):
        return table(ids) + self.positions(torch.arange(ids.size(1), device=ids.device))

    def encode(self, src, src_mask=None):
        return self.transformer.encoder(self.embed(self.src_embed, src), src_key_padding_mask=src_mask)

    def decode(self, tgt, memory, src_mask=None):
        t = tgt.size(1)
        causal = torch.triu(torch.ones(t, t, dtype=torch.bool, device=tgt.device), diagonal=1)
        out = self.transformer.decoder(
            self.embed(self.tgt_embed, tgt), memory, tgt_mask=causal, memory_key_padding_mask=src_mask
        )
        return self.generator(out)

    def forward(self, src, tgt, src_mask=None):
        return self.decode(tgt, self.encode(src, src_mask), src_mask)

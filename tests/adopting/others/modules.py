"""Small modules that differ from those of `authors` in what a wrapper has to find out."""

import itertools
import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel

SCALE = 3.0


class Recurrent(nn.Module):
    """A language model whose size comes through **kwargs, whose targets are `y`, and whose padding is 0."""

    def __init__(self, vocab_size=40, dim=16, **kwargs):
        super().__init__()
        self.e = nn.Embedding(vocab_size, dim)
        self.rnn = nn.LSTM(dim, dim, kwargs.get("num_layers", 1), batch_first=True)
        self.fc = nn.Linear(dim, vocab_size)

    def forward(self, x, y=None):
        logits = self.fc(self.rnn(self.e(x) * SCALE)[0])
        if y is None:
            return logits
        return logits, cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=0)


class Smoothed(nn.Module):
    """Label smoothing, with targets that the caller has shifted."""

    def __init__(self, vocab_size=40, dim=16):
        super().__init__()
        self.e, self.rnn = nn.Embedding(vocab_size, dim), nn.GRU(dim, dim, batch_first=True)
        self.fc = nn.Linear(dim, vocab_size)

    def forward(self, idx, targets=None):
        logits, loss = self.fc(self.rnn(self.e(idx))[0]), None
        if targets is not None:
            flat = logits.view(-1, logits.size(-1))
            loss = cross_entropy(flat, targets.reshape(-1), label_smoothing=0.1, ignore_index=-1)
        return logits, loss


class Sentiment(nn.Module):
    """BERT, dropout and two linear layers; all three inputs are required."""

    def __init__(self, hidden_size=32, n_classes=3, dropout=0.3):
        super().__init__()
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
        self.bert = BertModel(BertConfig(vocab_size=90, hidden_size=hidden_size, max_position_embeddings=64, **sizes))
        self.drop = nn.Dropout(dropout)
        self.fc1, self.fc2 = nn.Linear(hidden_size, 16), nn.Linear(16, n_classes)

    def forward(self, ids, mask, token_type_ids):
        out = self.bert(ids, attention_mask=mask, token_type_ids=token_type_ids)
        return self.fc2(torch.relu(self.fc1(self.drop(out.pooler_output))))


class OneLogit(nn.Module):
    """A probability per row; what is returned has another form with labels."""

    def __init__(self, vocab_size=30, dim=8):
        super().__init__()
        self.e, self.o = nn.Embedding(vocab_size, dim), nn.Linear(dim, 1)

    def forward(self, x, labels=None):
        logits = self.o(self.e(x).mean(1))
        if labels is None:
            return (logits,)
        return nn.BCEWithLogitsLoss()(logits.view(-1), labels.view(-1)), logits


class SeveralLabels(nn.Module):
    def __init__(self, vocab_size=30, dim=8, classes=4):
        super().__init__()
        self.e, self.o = nn.Embedding(vocab_size, dim), nn.Linear(dim, classes)

    def forward(self, x, labels=None):
        z = self.o(self.e(x).mean(1))
        if labels is None:
            return z
        return {"loss": nn.functional.binary_cross_entropy_with_logits(z, labels.float()), "logits": z}


class Quantity(nn.Module):
    """One number per row and no loss: nobody knows of what."""

    def __init__(self, vocab_size=30, dim=8):
        super().__init__()
        self.e, self.o = nn.Embedding(vocab_size, dim), nn.Linear(dim, 1)

    def forward(self, x):
        return self.o(self.e(x).mean(1))


class Keep(nn.Module):
    """A required mask, True at tokens; features before the logits."""

    def __init__(self, vocab_size=30, dim=8, classes=4):
        super().__init__()
        self.e, self.a, self.o = nn.Embedding(vocab_size, dim), nn.Linear(dim, 1), nn.Linear(dim, classes)

    def forward(self, x, mask):
        e = self.e(x)
        weights = self.a(e).squeeze(-1).masked_fill(~mask, -1e9).softmax(-1)
        features = (weights[..., None] * e).sum(1)
        return features, self.o(features)


class PadById(nn.Module):
    def __init__(self, vocab_size=30, dim=8, classes=4, pad_idx=2):
        super().__init__()
        self.pad = pad_idx
        self.e, self.a, self.o = nn.Embedding(vocab_size, dim), nn.Linear(dim, 1), nn.Linear(dim, classes)

    def forward(self, x):
        e = self.e(x)
        weights = self.a(e).squeeze(-1).masked_fill(x == self.pad, -1e9).softmax(-1)
        return self.o((weights[..., None] * e).sum(1))


class EncoderDecoder(nn.Module):
    def __init__(self, src_vocab=30, tgt_vocab=40, dim=16):
        super().__init__()
        self.se, self.te = nn.Embedding(src_vocab, dim), nn.Embedding(tgt_vocab, dim)
        self.enc, self.dec = nn.GRU(dim, dim, batch_first=True), nn.GRU(dim, dim, batch_first=True)
        self.out = nn.Linear(dim, tgt_vocab)

    def forward(self, src, trg):
        return self.out(self.dec(self.te(trg), self.enc(self.se(src))[1])[0])


class ZeroHead(nn.Module):
    """Bidirectional, with a head that starts at zero, so that a new one's outputs depend on nothing."""

    def __init__(self, vocab_size=30, dim=8):
        super().__init__()
        self.e, self.att = nn.Embedding(vocab_size, dim), nn.MultiheadAttention(dim, 2, batch_first=True)
        self.o = nn.Linear(dim, vocab_size)
        nn.init.zeros_(self.att.out_proj.weight)
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.o.bias)

    def forward(self, x):
        e = self.e(x)
        return self.o(e + self.att(e, e, e)[0])


class Patches(nn.Module):
    """A picture classifier without a convolution, whose size only its arguments tell."""

    def __init__(self, *, image_size=24, patch_size=8, num_classes=4, dim=16, channels=3):
        super().__init__()
        self.p = patch_size
        self.emb = nn.Linear(channels * patch_size**2, dim)
        self.pos = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2, dim))
        self.head = nn.Linear(dim, num_classes)

    def forward(self, img):
        b, c, h, w = img.shape
        x = img.reshape(b, c, h // self.p, self.p, w // self.p, self.p).permute(0, 2, 4, 3, 5, 1)
        return self.head((self.emb(x.reshape(b, -1, c * self.p**2)) + self.pos).mean(1))


class Settings:
    n_layer = 2
    drop = 0.1

    def __init__(self, vocab_size, block_size, n_embd=16):
        self.vocab_size, self.block_size, self.n_embd = vocab_size, block_size, n_embd


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln, self.qkv = nn.LayerNorm(c.n_embd), nn.Linear(c.n_embd, 3 * c.n_embd)
        self.drop = nn.Dropout(c.drop)
        self.register_buffer("mask", torch.tril(torch.ones(c.block_size, c.block_size)), persistent=False)

    def forward(self, x):
        q, k, v = self.qkv(self.ln(x)).chunk(3, -1)
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.size(-1))).masked_fill(
            self.mask[: x.size(1), : x.size(1)] == 0, float("-inf")
        )
        return x + self.drop(scores.softmax(-1) @ v)


class FromClass(nn.Module):
    """Its config is a plain class, which it insists on."""

    def __init__(self, config):
        super().__init__()
        assert isinstance(config, Settings)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        return self.head(x)


class FromDictionary(nn.Module):
    def __init__(self, cfg, sizes=[16, 8], act=None):  # noqa: B006
        super().__init__()
        self.e = nn.Embedding(cfg["vocab"], cfg["model"]["dim"])
        self.drop = nn.Dropout(cfg.get("dropout", 0.1))
        widths = [cfg["model"]["dim"], *sizes]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
        self.o, self.act = nn.Linear(widths[-1], cfg["classes"]), act or "relu"

    def forward(self, tokens):
        x = self.e(tokens).mean(1)
        for layer in self.layers:
            x = getattr(torch, self.act)(layer(x))
        return self.o(self.drop(x))


class Scaled(nn.Module):
    """Keeps its argument under the same name, but not its value."""

    def __init__(self, vocab_size=30, dim=8, scale=4.0):
        super().__init__()
        self.vocab_size, self.dim, self.scale = vocab_size, dim, scale**0.5
        self.e, self.o = nn.Embedding(vocab_size, dim), nn.Linear(dim, vocab_size)

    def forward(self, x):
        return self.o((self.e(x) * self.scale).tanh())


class Spans(nn.Module):
    """Starts and ends of answers, with a loss of its own of the usual kind."""

    def __init__(self, vocab_size=30, dim=8):
        super().__init__()
        self.e, self.rnn = nn.Embedding(vocab_size, dim), nn.GRU(dim, dim, batch_first=True)
        self.ends = nn.Linear(dim, 2)

    def forward(self, x, start_positions=None, end_positions=None):
        start, end = self.ends(self.rnn(self.e(x))[0]).split(1, dim=-1)
        start, end = start.squeeze(-1), end.squeeze(-1)
        if start_positions is None:
            return start, end
        return (cross_entropy(start, start_positions) + cross_entropy(end, end_positions)) / 2, start, end


class Waves(nn.Module):
    """Sounds of at least 80 samples, one channel."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv, self.out = nn.Conv1d(1, 4, 80, stride=16), nn.Linear(4, classes)

    def forward(self, x):
        return self.out(self.conv(x).relu().mean(-1))


class Forecast(nn.Module):
    """The next numbers of a series with several features; the layer that takes it is recurrent."""

    def __init__(self, features=3, dim=8, horizon=5):
        super().__init__()
        self.rnn, self.out = nn.GRU(features, dim, batch_first=True), nn.Linear(dim, horizon)

    def forward(self, series):
        return self.out(self.rnn(series)[0][:, -1])

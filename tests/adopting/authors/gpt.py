"""
A small GPT in one file: the model, its optimizer, sampling, and a training loop on a text file.

Run it as

    python gpt.py input.txt

and it trains a character model and leaves ckpt.pt, from which it goes on the next time.
"""

import argparse
import inspect
import math
import os
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    context: int = 256  # longest sequence
    vocab_size: int = 256
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0
    bias: bool = True  # in the linears and norms


class Norm(nn.Module):
    """LayerNorm whose bias can be left out."""

    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class SelfAttention(nn.Module):
    """Causal self-attention, query, key and value in one projection."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.flash = hasattr(F, "scaled_dot_product_attention")
        if not self.flash:
            print("slow attention: torch is older than 2.0")
        # which positions a position sees
        self.register_buffer("causal", torch.tril(torch.ones(config.context, config.context)).bool(), persistent=False)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash and self.training:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
            att = att.masked_fill(~self.causal[:T, :T], float("-inf"))
            y = att.softmax(dim=-1) @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.drop(self.c_proj(y))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.drop(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = Norm(config.n_embd, config.bias)
        self.attn = SelfAttention(config)
        self.ln_2 = Norm(config.n_embd, config.bias)
        self.mlp = FeedForward(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.vocab_size is not None
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.context, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=Norm(config.n_embd, config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied

        self.apply(self._init_weights)
        # the projections that write to the residual stream start smaller, by the number of them
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

        print(f"parameters: {self.count() / 1e6:.2f}M")

    def count(self, positions=False):
        n = sum(p.numel() for p in self.parameters())
        return n if positions else n - self.transformer.wpe.weight.numel()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, idx, targets=None):
        T = idx.size(1)
        assert T <= self.config.context, f"{T} tokens, but the context is {self.config.context}"
        pos = torch.arange(0, T, dtype=torch.long, device=idx.device)

        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)

        if targets is not None:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits = self.lm_head(x[:, [-1], :])  # sampling needs the last position alone
            loss = None
        return logits, loss

    def optimizer(self, weight_decay, lr, betas, device_type):
        params = {n: p for n, p in self.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for p in params.values() if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = "fused" in inspect.signature(torch.optim.AdamW).parameters and device_type == "cuda"
        return torch.optim.AdamW(groups, lr=lr, betas=betas, **({"fused": True} if fused else {}))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Go on after idx (B, T), one token at a time."""
        for _ in range(max_new_tokens):
            seen = idx[:, -self.config.context :]
            logits, _ = self(seen)
            logits = logits[:, -1, :] / temperature
            if top_k is not None:
                v, _ = torch.topk(logits, min(top_k, logits.size(-1)))
                logits[logits < v[:, [-1]]] = -float("inf")
            idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)
        return idx


class Characters:
    """Text as numbers, a character each."""

    def __init__(self, text):
        self.chars = sorted(set(text))
        self.number = {c: i for i, c in enumerate(self.chars)}

    def encode(self, text):
        return torch.tensor([self.number[c] for c in text], dtype=torch.long)

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)


def get_batch(data, config, batch_size, device):
    starts = torch.randint(len(data) - config.context - 1, (batch_size,))
    x = torch.stack([data[i : i + config.context] for i in starts])
    y = torch.stack([data[i + 1 : i + 1 + config.context] for i in starts])
    return x.to(device), y.to(device)


@torch.no_grad()
def estimate_loss(model, splits, args, device):
    model.eval()
    out = {}
    for split, data in splits.items():
        losses = torch.zeros(args.eval_iters)
        for k in range(args.eval_iters):
            X, Y = get_batch(data, model.config, args.batch_size, device)
            losses[k] = model(X, Y)[1].item()
        out[split] = losses.mean().item()
    model.train()
    return out


def learning_rate(it, args):
    """Linear warmup, then a cosine down to a tenth."""
    if it < args.warmup:
        return args.lr * (it + 1) / (args.warmup + 1)
    ratio = min(1.0, (it - args.warmup) / max(1, args.max_iters - args.warmup))
    return args.lr * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * ratio)))


def save(path, model, optimizer, it, best):
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "model_args": asdict(model.config),
            "iter_num": it,
            "best_val_loss": best,
        },
        path,
    )


def resume(path):
    ckpt = torch.load(path, map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**ckpt["model_args"]))
    state = ckpt["model"]
    # torch.compile puts a prefix before every name
    for k in list(state):
        if k.startswith("_orig_mod."):
            state[k[len("_orig_mod.") :]] = state.pop(k)
    model.load_state_dict(state)
    return model, ckpt


def train(args):
    device = args.device
    with open(args.text) as f:
        text = f.read()
    chars = Characters(text)
    data = chars.encode(text)
    n = int(0.9 * len(data))
    splits = {"train": data[:n], "val": data[n:]}

    best, start = float("inf"), 0
    if os.path.exists(args.out):
        model, ckpt = resume(args.out)
        best, start = ckpt["best_val_loss"], ckpt["iter_num"]
    else:
        model = GPT(GPTConfig(vocab_size=len(chars.chars), context=args.context))
    model.to(device)
    optimizer = model.optimizer(args.weight_decay, args.lr, (0.9, 0.95), device)
    run = torch.compile(model) if args.compile else model

    t0 = time.time()
    for it in range(start, args.max_iters):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(it, args)
        if it % args.eval_every == 0:
            losses = estimate_loss(model, splits, args, device)
            print(f"step {it}: train {losses['train']:.4f}, val {losses['val']:.4f}")
            if losses["val"] < best:
                best = losses["val"]
                save(args.out, model, optimizer, it, best)
        X, Y = get_batch(splits["train"], model.config, args.batch_size, device)
        _, loss = run(X, Y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if it % 100 == 0:
            print(f"iter {it}: loss {loss.item():.4f}, {time.time() - t0:.1f}s")

    prompt = torch.zeros((1, 1), dtype=torch.long, device=device)
    print(chars.decode(model.generate(prompt, 500)[0].tolist()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("text")
    parser.add_argument("--out", default="ckpt.pt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_iters", type=int, default=5000)
    parser.add_argument("--eval_every", type=int, default=250)
    parser.add_argument("--eval_iters", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--compile", action="store_true")
    train(parser.parse_args())

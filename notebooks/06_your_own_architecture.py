# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own architecture, step by step
#
# You have a model in a file, in the style of a blog post: a plain `nn.Module`, no config class, no transformers. This
# notebook makes a Hub repo of it without changing a line of that file, starts it from GPT-2's weights, trains it, and
# verifies the result.
#
# **With a model of your own**: replace the file below, or run `mymodels adopt my_model.py:MyNet --weights net.pt --out DIR`.

# %%
import shutil
from pathlib import Path

import torch
import transformers

from mymodels import load_sample_text

transformers.logging.set_verbosity_error()
work = Path("output/06")  # everything this notebook writes
shutil.rmtree(work, ignore_errors=True)
work.mkdir(parents=True)

# %% [markdown]
# ## The author's file
#
# A GPT with one change: each block first mixes a token with the three before it, by a causal convolution. It starts at zero,
# so that a block without training does what GPT-2's does. `forward(idx, targets)` returns the logits and the loss.

# %%
_ = (work / "conv_gpt.py").write_text('''"""A GPT whose blocks first look at the last tokens through a convolution."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.mix = nn.Conv1d(width, width, 4, groups=width)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.mix(F.pad(x.transpose(1, 2), (3, 0))).transpose(1, 2)
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class ConvGPT(nn.Module):
    def __init__(self, vocab_size, width=64, layers=2, heads=4, max_length=64):
        super().__init__()
        self.max_length = max_length
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, idx, targets=None):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
''')

# %% [markdown]
# ## Adopt
#
# `adopt` builds and runs the class in a process of its own, to find out what it takes and returns. It writes a config class
# with the constructor's arguments and a `PreTrainedModel` around the module. Before anything is written, the folder's model
# gives the module's outputs bit for bit in a process without mymodels. What it could not derive, it lists.

# %%
from mymodels import adopt
from mymodels.training.tokenizers import train_gpt2_tokenizer

texts = [document.text for document in load_sample_text("train")]
tokenizer = train_gpt2_tokenizer(texts, vocab_size=512, model_max_length=64)
adopted = adopt(
    f"{work}/conv_gpt.py:ConvGPT",
    work / "conv-gpt",
    config={"vocab_size": len(tokenizer)},
    tokenizer=tokenizer,
    quick=True,
)
print(f"{adopted.auto_class}")
for missing in adopted.missing:
    print("missing:", missing)
print(*sorted(file.name for file in adopted.folder.iterdir()), sep="\n")

# %% [markdown]
# The generated file reads like one that a person wrote:

# %%
print((work / "conv-gpt" / "modeling_conv_gpt.py").read_text()[:2500])

# %% [markdown]
# ## Start from GPT-2's weights
#
# A stock GPT-2 of the same size, trained for a moment, stands for the one that you would take from the Hub. Its weights are
# transposed `Conv1D`s with other names; `warm_start` matches them by their role, and accounts for every tensor.

# %%
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mymodels import train, warm_start

held_out = [document.text for document in load_sample_text("held_out")]


def chunks(texts: list[str], length: int = 64) -> list[dict[str, torch.Tensor]]:
    """The texts as tokens, end to end, cut into rows of `length`."""
    ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def held_out_loss(model: torch.nn.Module, rows: int = 32) -> float:
    """Mean loss per token, in nats."""
    batch = torch.stack([row["input_ids"] for row in chunks(held_out)[:rows]])
    with torch.inference_mode():
        return model.eval()(input_ids=batch, labels=batch).loss.item()


torch.manual_seed(0)
ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=2, n_head=4, **ends))
train(
    gpt2, chunks(texts), output_dir=work / "gpt2-run", max_steps=300, per_device_train_batch_size=16, learning_rate=3e-3
)

model = AutoModelForCausalLM.from_pretrained(work / "conv-gpt", trust_remote_code=True)
random_loss = held_out_loss(model)
report = warm_start(model, gpt2)
print(report)
print(
    f"held-out loss: stock GPT-2 {held_out_loss(gpt2):.4f}, before {random_loss:.4f}, warm-started {held_out_loss(model):.4f}"
)

# %% [markdown]
# The convolution is the only thing that is new. As it starts at zero, the model starts where GPT-2 stands.
#
# ## Train
#
# `train` asks for nothing but a loss. `mymodels finetune` works on the folder too.

# %%
train(model, chunks(texts), output_dir=work / "run", max_steps=100, per_device_train_batch_size=16, learning_rate=1e-3)
train(
    gpt2,
    chunks(texts),
    output_dir=work / "gpt2-more",
    max_steps=100,
    per_device_train_batch_size=16,
    learning_rate=1e-3,
)
print(f"after 100 steps more: with the convolution {held_out_loss(model):.4f}, stock GPT-2 {held_out_loss(gpt2):.4f}")

# %% [markdown]
# ## Save, verify, push
#
# `build_repo` writes the complete folder, with outputs recorded from the trained weights; `verify` loads it in clean processes.

# %%
from mymodels import build_repo
from mymodels.hub import verify
from mymodels.hub.card import Card

card = Card(name="ConvGPT", license="apache-2.0", description="A GPT whose blocks start with a causal convolution.")
folder = build_repo(model, tokenizer, work / "repo", card=card)
found = verify(folder, quick=True)
held = [check for checks in found.runs.values() for check in checks if check.status == "ok"]
print(f"{len(held)} checks held")
assert found.passed

# %% [markdown]
# From here it is a Hub repo like any other: `mymodels push output/06/repo me/conv-gpt` ([05_private_hub](05_private_hub.ipynb)
# has that in full), and on another machine, without mymodels:

# %%
again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("The little girl", return_tensors="pt")
print(tokenizer.decode(again.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))

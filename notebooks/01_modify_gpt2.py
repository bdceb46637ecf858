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
# # From stock GPT-2 to your own
#
# You have a trained GPT-2 and want another architecture: rotary positions, fewer key/value heads, another norm. Training
# from random weights would throw away what the old model knows. This notebook shows how to
#
# - change one thing at a time by naming it, and see what it costs and what it saves;
# - carry the old weights over (*warm start*) and read the report on what became of each;
# - train the new model briefly, and find out whether the change was worth it.
#
# It takes a minute or two on one CPU core, needs no network, and trains on the book excerpts that ship with mymodels. Its
# models are toys; the calls are the same for real ones.

# %%
import shutil
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from mymodels import MyGPT2Config, MyGPT2ForCausalLM, load_sample_text, train, warm_start
from mymodels.training.tokenizers import train_gpt2_tokenizer

work = Path("output/01")  # everything this notebook writes
shutil.rmtree(work, ignore_errors=True)
work.mkdir(parents=True)
logging.set_verbosity_error()  # transformers has remarks on models as small as these

# %% [markdown]
# ## Text into examples
#
# A language model learns from windows of tokens. The documents are laid end to end, an end token after each, and cut.

# %%
WINDOW = 64
train_texts = [document.text for document in load_sample_text("train")]
held_out_texts = [document.text for document in load_sample_text("held_out")]
# from datasets import load_dataset  # texts from a Hub data set instead:
# train_texts = load_dataset("roneneldan/TinyStories", split="train[:2000]")["text"]

tokenizer = train_gpt2_tokenizer(train_texts, vocab_size=512, model_max_length=WINDOW)


def windows(texts):
    ids = [i for text in texts for i in [*tokenizer(text, verbose=False).input_ids, tokenizer.eos_token_id]]
    rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    return [{"input_ids": row, "labels": row} for row in rows]


examples, held_out = windows(train_texts), windows(held_out_texts)
print(f"{len(examples)} windows to train on, {len(held_out)} held out, {len(tokenizer)} tokens in the vocabulary")


@torch.inference_mode()
def held_out_loss(model):
    """Nats per token on text the model never saw: the one number this notebook judges by."""
    model.eval()
    rows = torch.stack([example["input_ids"] for example in held_out]).split(32)
    losses = [(model(input_ids=row, labels=row).loss.item(), len(row)) for row in rows]
    return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)


# %% [markdown]
# ## The stock model
#
# `GPT2LMHeadModel` is transformers' own class, here in a small size and trained for three passes over the text.

# %%
ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
stock_config = GPT2Config(vocab_size=len(tokenizer), n_embd=96, n_layer=2, n_head=4, n_positions=WINDOW,
                          initializer_range=0.06, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **ids)  # fmt: skip
torch.manual_seed(0)
stock = GPT2LMHeadModel(stock_config)
# stock = GPT2LMHeadModel.from_pretrained("gpt2")  # the real one; its tokenizer is AutoTokenizer.from_pretrained("gpt2")
before_training = held_out_loss(stock)
train(stock, examples, num_train_epochs=3, per_device_train_batch_size=8, learning_rate=6e-3)
stock_loss = held_out_loss(stock)
print(f"held-out loss {before_training:.3f} → {stock_loss:.3f} nats per token")

# %% [markdown]
# ## MyGPT2 is GPT-2, until you say otherwise
#
# With default switches `MyGPT2` computes what GPT-2 computes. This is what makes the rest of the notebook a fair
# comparison: whatever changes later was changed on purpose.

# %%
report = warm_start("mygpt2", stock)
row = held_out[0]["input_ids"][None]
with torch.inference_mode():
    difference = (report.model(row).logits - stock(row).logits).abs().max().item()
print(f"largest difference of the logits: {difference:.1e}")
assert difference < 1e-4

# %% [markdown]
# ## One switch at a time
#
# Each switch is one field of `MyGPT2Config`. Three things can be known before any training:
#
# - *parameters*: what has to be stored and trained;
# - *cache*: what generation keeps in memory for each token it has seen; for long texts this is what fills a GPU;
# - *held-out loss after the warm start*: how much of what the model knew survives the change.

# %%
changes = {
    "nothing": {},
    "gated MLP": {"mlp_type": "gated"},
    "two more layers": {"num_hidden_layers": 4},
    "RMSNorm": {"norm_type": "rmsnorm"},
    "2 key/value heads": {"num_key_value_heads": 2},
    "1 key/value head": {"num_key_value_heads": 1},
    "rotary positions": {"position_embedding_type": "rope"},
}


def cache_per_token(config):
    """Bytes: a key and a value for each layer and key/value head, four bytes a number."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4


after = {}
print(f"{'change':18} {'parameters':>10} {'cache':>7} {'loss':>7}  the step")
for name, overrides in changes.items():
    torch.manual_seed(0)
    report = warm_start("mygpt2", stock, overrides=overrides)
    after[name] = held_out_loss(report.model)
    size, cache = report.model.num_parameters(), cache_per_token(report.model.config)
    print(f"{name:18} {size:10,} {cache:7,} {after[name]:7.3f}  {'exact' if report.is_exact else 'approximate'}")

for name in ("nothing", "gated MLP", "two more layers"):
    assert abs(after[name] - stock_loss) < 1e-3, f"{name} is said to be exact"
assert all(after[name] < before_training - 1 for name in changes), "something was lost altogether"

# %% [markdown]
# Some changes are *exact*: the gated MLP starts with a gate that lets the old result through, the added layers start by
# writing zeros. The new model is larger and computes the same, and training can use the room.
#
# The others lose something, and the loss says how much. RMSNorm hardly anything. Key/value heads are averaged, and every
# one taken away costs more, for a cache that is half or a quarter. With rotary positions, the old table of positions has
# no place at all: what the layers had learned to read from it is gone, and must be learned again.
#
# ## All at once, with an account
#
# Now the model we want: smaller cache, no table of positions, a cheaper norm, a gated MLP. The report has a row for every
# parameter of the new model and every tensor of the old one.

# %%
MODERN = {
    "position_embedding_type": "rope",
    "norm_type": "rmsnorm",
    "num_key_value_heads": 2,
    "mlp_type": "gated",
}
torch.manual_seed(0)
report = warm_start("mygpt2", stock, overrides=MODERN)
print(report)

# %% [markdown]
# Read it from the bottom up: `unused` is what the old model knew and the new one cannot take, `new` is what starts from
# nothing. If anything stands there that you did not expect, stop. `warm_start(…, strict=True, allow=["wpe"])` stops by
# itself.
#
# ## A short training
#
# Three models get the same examples in the same order, under the same schedule:
#
# - the stock model goes on: what would have happened without any change?
# - the new architecture from the warm start;
# - the new architecture from random weights: is the warm start worth anything?

# %%
STEPS = 200
few = examples[: STEPS * 8]

torch.manual_seed(0)
contestants = {
    "stock, trained on": stock,
    "yours, warm start": report.model,
    "yours, random weights": MyGPT2ForCausalLM(MyGPT2Config.from_dict(report.model.config.to_dict())),
}
losses, results = {}, {}
for name, model in contestants.items():
    start = held_out_loss(model)
    losses[name] = train(model, few, per_device_train_batch_size=8, learning_rate=4e-3, seed=1)
    results[name] = (start, held_out_loss(model))
    print(f"{name:22} held-out loss {start:.3f} → {results[name][1]:.3f}")
assert results["yours, warm start"][1] < results["yours, warm start"][0]
assert results["yours, warm start"][1] < results["yours, random weights"][1]

# %%
COLOURS = dict(zip(contestants, ["#000000", "#0072B2", "#E69F00"]))  # Okabe and Ito, colour-blind safe
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=[3, 2], layout="constrained")
for name, curve in losses.items():
    smooth = torch.tensor(curve).unfold(0, 10, 1).mean(-1)  # mean of ten steps
    left.plot(range(10, len(curve) + 1), smooth, color=COLOURS[name], label=name)
left.set_xlabel("step of the short training")
left.set_ylabel("training loss, nats per token\n(mean of ten steps)")
left.legend(frameon=False)
for place, (name, (start, end)) in enumerate(results.items()):
    right.plot([start, end], [place, place], color=COLOURS[name], linewidth=2)
    right.plot(start, place, "o", color=COLOURS[name], markerfacecolor="white")
    right.plot(end, place, "o", color=COLOURS[name])
    right.text(min(start, end), place - 0.16, f"{start:.2f} → {end:.2f}", color=COLOURS[name])
right.set_yticks(range(len(results)), list(results))
right.set_ylim(len(results) - 0.5, -0.5)
right.set_xlabel("held-out loss, nats per token,\nbefore (○) and after (●)")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
plt.show()

# %% [markdown]
# The new model begins some 0.2 nats behind the stock model, which is what could not be carried over. After these steps it
# is level with it, with half the cache, no table of positions and a gate in every MLP. The same architecture from random
# weights is still half a nat behind: that is what the warm start was worth. Which of the two would win in the end takes a
# longer training to say.
#
# ## What it writes
#
# A number is not a text. Greedy continuations of the same words:

# %%
prompt = tokenizer("The little girl looked at the", return_tensors="pt")
for name, model in contestants.items():
    tokens = model.generate(**prompt, max_new_tokens=25, no_repeat_ngram_size=3, pad_token_id=tokenizer.pad_token_id)
    print(f"{name:22} {tokenizer.decode(tokens[0])!r}")

# %% [markdown]
# ## Save it
#
# The folder holds the new model's code beside its weights, so it loads with transformers alone.

# %%
model = contestants["yours, warm start"]
model.save_pretrained(work / "my-gpt2")
tokenizer.save_pretrained(work / "my-gpt2")
print(sorted(path.name for path in (work / "my-gpt2").iterdir()))

from transformers import AutoModelForCausalLM

loaded = AutoModelForCausalLM.from_pretrained(work / "my-gpt2", trust_remote_code=True)
with torch.inference_mode():
    assert torch.equal(loaded(**prompt).logits, model(**prompt).logits)
print("loaded again, the logits are equal")

# %% [markdown]
# ## Take with you
#
# - Start from stock, name what changes, and measure each change alone before all of them together.
# - A warm start tells you what it could not carry over. Read it before you train.
# - Compare with the old model under the same further training, not with the old model as it was.
#
# The same on the command line, from the real GPT-2:
# `mymodels warm-start gpt2 --to mygpt2 --set num_key_value_heads=4 --set norm_type=rmsnorm --out my-gpt2`. All switches
# are in the README; how to hand the result to others is in `05_private_hub`.

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
# # From data to a fine-tuned classifier
#
# A BERT turns each token into a vector; a classifier needs one vector per text. How the many become one is called pooling,
# and stock BERT offers one way. This notebook
#
# - makes a data set out of texts, split so that the result can be believed;
# - fine-tunes the same BERT with five poolings, and compares them side by side, with the error bars the data allow;
# - looks at what the best one gets wrong: confusion matrix and examples;
# - ends with a complete Hub folder that loads anywhere.
#
# The task: was a passage written for children or for adults? The texts are book excerpts that ship with mymodels, the BERT
# is a very small one made here, so that all of it runs in a few minutes on one CPU core without network.

# %%
import csv
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from IPython.display import Image, display
from matplotlib import pyplot as plt
from rich.console import Console
from transformers import BertConfig, BertModel
from transformers.utils import logging

from mymodels import finetune, load_sample_text
from mymodels.training.sample_text import passages
from mymodels.training.tokenizers import train_bert_tokenizer

work = Path("output/02")  # everything this notebook writes
shutil.rmtree(work, ignore_errors=True)
work.mkdir(parents=True)
logging.set_verbosity_error()  # transformers has remarks on models as small as these

# %% [markdown]
# ## Data
#
# `finetune` reads CSV, TSV, JSONL, Parquet, a Hub data set or a `datasets.Dataset`; here it gets CSV files with the columns
# `text` and `label`. Two decisions matter more than the format:
#
# - *Three parts.* The model learns from `train`, every choice (pooling, when to stop) is made on `validation`, and `test`
#   is looked at once, at the end. A choice made on the test data makes the test result too good.
# - *Split documents, not passages.* Two passages of one excerpt share names and places. With one of them in `train` and the
#   other in `validation`, a model gets points for remembering names.

# %%
learning = load_sample_text("train")
parts = {
    "train": [document for i, document in enumerate(learning) if i % 5],
    "validation": [document for i, document in enumerate(learning) if not i % 5],
    "test": load_sample_text("held_out"),
}
for part, documents in parts.items():
    rows = passages(documents, words=64)  # cuts each document into passages of 64 words
    with open(work / f"{part}.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    print(
        f"{part:10} {len(documents):3} documents, {len(rows):4} passages: {dict(Counter(label for _, label in rows))}"
    )

data, validation, test = (str(work / f"{part}.csv") for part in parts)
# data, validation, test = "stanfordnlp/imdb", None, None  # a Hub data set instead; with its own splits

# %% [markdown]
# ## A BERT to start from
#
# In real life this is one line, `base = "bert-base-uncased"`. Here it is a very small stock `BertModel` with random weights:
# it has never read anything, and must learn the words with the task. (`finetune(…, task="lm")` would first let it guess
# hidden words.)

# %%
texts = [text for text, _ in passages(parts["train"])]
tokenizer = train_bert_tokenizer(texts, vocab_size=2048, model_max_length=96)
config = BertConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                    intermediate_size=128, max_position_embeddings=96, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
torch.manual_seed(0)
base = work / "base"
tokenizer.save_pretrained(base)
BertModel(config).save_pretrained(base)
# base = "bert-base-uncased"  # a model of the Hub instead; learning_rate=2e-5 to 5e-5 below

# %% [markdown]
# ## Five poolings, side by side
#
# `to="mybert"` warm-starts a MyBert from the stock weights, and `overrides` are its config fields:
#
# | `pooling` | the text's vector |
# |---|---|
# | `pooler` | stock BERT: the first token, through a dense layer and tanh |
# | `cls` | the first token as it is |
# | `mean` | the mean over all tokens |
# | `max` | of each feature the largest value |
# | `attention` | a mean with learned weights |
#
# Everything else is the same: start, seed, order of the examples, schedule.

# %%
POOLINGS = ["pooler", "cls", "mean", "max", "attention"]
SAME = {"to": "mybert", "validation": validation, "num_train_epochs": 4, "learning_rate": 2e-3,
        "per_device_train_batch_size": 32, "seed": 0, "bf16": False, "disable_tqdm": False,
        "dataloader_pin_memory": torch.cuda.is_available()}  # fmt: skip
# to compare, no more: without golden outputs, checkpoints, and evaluations on the way
BRIEFLY = {"golden": False, "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False,
           "console": Console(quiet=True)}  # fmt: skip

compared = {}
for pooling in POOLINGS:
    tuned = finetune(base, data, work / pooling, overrides={"pooling": pooling}, **BRIEFLY, **SAME)
    compared[pooling] = tuned.metrics["validation"]
    print(f"{pooling:10}", "  ".join(f"{name} {value:.3f}" for name, value in compared[pooling].items()))

# %% [markdown]
# Which differences are real? Each accuracy is a share of some 300 passages, and such a share is uncertain by chance alone:
# its standard error is $\sqrt{p(1-p)/n}$. Draw it.

# %%
count = len(tuned.data.validation)
majority = max(Counter(tuned.data.validation["label"]).values()) / count
figure, axes = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
for place, metrics in enumerate(compared.values()):
    share = metrics["accuracy"]
    axes.errorbar(share, place, xerr=np.sqrt(share * (1 - share) / count), fmt="o", color="#0072B2", capsize=3)
axes.axvline(majority, color="0.4", linestyle=":")
axes.text(majority, -0.75, " always the larger class", color="0.4", fontsize=8, va="center")
axes.set_yticks(range(len(compared)), list(compared))
axes.set_ylim(len(compared) - 0.5, -1)
axes.set_xlabel(f"accuracy on {count} validation passages (bar: one standard error)")
axes.spines[["top", "right"]].set_visible(False)
axes.grid(axis="x", color="0.92")
plt.show()

# %% [markdown]
# All are far above the dotted line, and most bars overlap: with so few passages and one seed, the order of neighbours is
# chance, and so may be the winner. One has to be chosen all the same. But the best of five validation results is too good,
# because it was chosen for being the best. This is what the test data are for.
#
# ## The chosen one
#
# Once more, with all that a folder for others should have: a card, the test result, and `golden.safetensors`, recorded
# outputs by which a loader can tell that it has the right model. Class weights are computed from the data, as one class is
# a little larger.

# %%
from mymodels.hub.card import Card

best = max(compared, key=lambda pooling: compared[pooling]["accuracy"])
card = Card(
    license="apache-2.0", language="en", name="For children or adults?", limits="A tutorial's toy, from a few books."
)
final = finetune(
    base,
    data,
    work / "final",
    overrides={"pooling": best},
    test=test,
    class_weights="balanced",
    card=card,
    console=Console(width=100, force_jupyter=False),
    **SAME,
)
assert final.metrics["test"]["accuracy"] > majority

# %% [markdown]
# The folder has two pictures. Did it learn, and when did it stop learning?

# %%
display(Image(final.path / "loss_curve.png", width=520))

# %% [markdown]
# Where the dashed line turns up while the other goes on falling, the model begins to learn the training passages by heart.
# The weights that are kept are those of the best evaluation, not the last.
#
# What is taken for what? A row is a true class, so the two numbers of a row add up to its passages:

# %%
display(Image(final.path / "confusion_matrix.png", width=420))

# %% [markdown]
# ## Read the errors
#
# Numbers say how often, examples say why. These are the validation passages on which the model was most sure and wrong:

# %%
probabilities = torch.tensor(final.logits).softmax(-1)
truth = torch.tensor(final.data.validation["label"][:])
wrong = (probabilities.argmax(-1) != truth).nonzero().flatten()
for i in sorted(wrong.tolist(), key=lambda i: -probabilities[i].max())[:4]:
    guess = final.data.labels[probabilities[i].argmax()]
    print(f"for {final.data.labels[truth[i]]}, taken to be for {guess} ({probabilities[i].max():.0%}):")
    print("   ", final.data.validation[i]["text"][:240], "…\n")

# %% [markdown]
# And is it at least unsure where it is wrong? If so, its probability can be used to pass doubtful texts on to a person:

# %%
right = probabilities.argmax(-1) == truth
certainty = probabilities.max(-1).values
for low, high in ((0.5, 0.7), (0.7, 0.9), (0.9, 1.01)):
    within = (certainty >= low) & (certainty < high)
    if within.any():
        share = right[within].float().mean().item()
        print(f"said {low:.0%}–{min(high, 1):.0%}: {within.sum():4} passages, {share:.0%} of them right")

# %% [markdown]
# Hardly: after four passes over so few texts it is sure of nearly everything. Numbers that say "99 %" are not yet
# probabilities. MyBert's `label_smoothing` is one thing to try, more data the better one.
#
# ## Use it
#
# The folder is a Hub repo: with `trust_remote_code=True`, transformers loads it on a machine that has never heard of
# mymodels, and `mymodels push` takes it to the Hub (`05_private_hub`).

# %%
from transformers import pipeline

classify = pipeline("text-classification", str(final.path), trust_remote_code=True)
for text in (
    "The little rabbit hopped over the garden gate and ran home to tell his mother.",
    "The committee had deferred its decision, and the solicitor observed that the estate would bear the costs.",
):
    print(f"{classify(text)[0]['label']:9} {text}")

# %% language="bash"
# mymodels verify output/02/final --no-exec | tail -1

# %% [markdown]
# ## Take with you
#
# - Decide on validation data, report on test data, and split by where texts come from.
# - Pooling is one config field; comparing all of them costs an evening and not a rewrite.
# - An accuracy without its error bar invites stories.
# - On the command line: `mymodels finetune --model bert-base-uncased --to mybert --set pooling=mean --data train.csv
#   --validation validation.csv --test test.csv --out my-bert`.

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
# # A training loop you can read, killed and resumed
#
# A training run is a loop of a dozen lines, and then there is everything that goes wrong in the second week of it. This
# notebook walks through `mymodels/training/loop.py`, and shows
#
# - what each line of the loop is for, and which ones accelerate changes when there are several devices;
# - what learning-rate schedules look like, and what a warm-up is good for;
# - what has to be in a checkpoint so that a run goes on *exactly*;
# - a run that is killed for real, resumed, and compared with one that was not: bit for bit.
#
# One CPU core, no network.

# %%
import inspect
import json
import logging
import shutil
import sys
from pathlib import Path

import torch
from matplotlib import pyplot as plt

from mymodels.training import loop

work = Path("output/03")  # everything this notebook writes
shutil.rmtree(work, ignore_errors=True)
work.mkdir(parents=True)
logging.basicConfig(stream=sys.stdout, format="%(levelname)s: %(message)s", level=logging.ERROR)

# %% [markdown]
# ## The loop
#
# The next cells show parts of the real source, not copies of it.

# %%
source = inspect.getsource(loop.train).splitlines()


def show(first, last):
    """The lines of the loop from the one that holds `first` to the one that holds `last`."""
    start = next(i for i, line in enumerate(source) if first in line)
    end = next(i for i, line in enumerate(source[start:], start) if last in line)
    print("\n".join(line.removeprefix("    ") for line in source[start : end + 1]))


show("loader: Any = DataLoader", "accelerator.prepare(")

# %% [markdown]
# `accelerator.prepare` is what makes one file serve one CPU, one GPU, or many. With several processes it wraps the model so
# that gradients are averaged, and the loader so that each process gets its own share of the batches. On one device it
# does next to nothing.
#
# `parameter_groups` keeps weight decay away from norms and biases: pulling a norm's scale towards zero regularises nothing.
#
# Now the step itself:

# %%
show("while progress.step < steps and (group", "optimizer.zero_grad()")

# %% [markdown]
# Line by line, why:
#
# - `islice(batches, accumulate)`: gradients of several batches add up before one optimizer step, so a large batch needs the
#   memory of a small one. The loss is divided by their number, or the learning rate would grow with it.
# - `no_sync`: across processes the gradients are averaged once, with the last batch, and not after each.
# - `clip_grad_norm_`: one bad batch may have a huge gradient; it keeps the direction and cuts the length.
# - `check_finite`: a NaN that reaches the weights stays there. So it is caught before the step, and the error names
#   the step and the examples.
# - `scheduler.step()` after `optimizer.step()`, once per step and not per batch.
# - `zero_grad()`: PyTorch adds gradients to those that are there; forgetting this line is a classic.
#
# ## Schedules
#
# The learning rate changes during a run. `lr_scheduler_type` takes the names that transformers has; all of these start with
# a warm-up over the first tenth:

# %%
from transformers import get_scheduler

STEPS = 200
STYLES = {  # a colour-blind reader tells them by the dashes
    "linear": ("#000000", "-"),
    "cosine": ("#0072B2", "--"),
    "polynomial": ("#E69F00", "-."),
    "constant_with_warmup": ("#009E73", ":"),
}


def learning_rates(name, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, warmup, STEPS, **SPECIFIC.get(name, {}))
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


SPECIFIC = {"polynomial": {"scheduler_specific_kwargs": {"power": 3.0}}}
figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
for name, (colour, dashes) in STYLES.items():
    axes.plot(learning_rates(name, STEPS // 10), color=colour, linestyle=dashes, label=name)
axes.axvspan(0, STEPS // 10, color="0.93")
axes.text(STEPS // 20, 1.04, "warm-up", ha="center", color="0.4", fontsize=8)
axes.set_ylim(-0.03, 1.12)
axes.set_xlabel("optimizer step")
axes.set_ylabel("share of the\npeak learning rate")
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## A run to play with
#
# The model and its data are made by a small module, because a process that gets killed has to be another one than this
# notebook. It is written here, and imported here too.

# %%
# %%writefile output/03/tiny_run.py
"""A small MyGPT2 on the sample text: python tiny_run.py OUTPUT_DIR [--resume]"""

import sys

import torch

from mymodels import MyGPT2Config, MyGPT2ForCausalLM, load_sample_text
from mymodels.training.loop import train
from mymodels.training.tokenizers import train_gpt2_tokenizer


def make_model():
    torch.manual_seed(0)
    return MyGPT2ForCausalLM(
        MyGPT2Config(
            vocab_size=512,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.06,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def make_examples():
    texts = [document.text for document in load_sample_text("train")[:56]]
    # texts = load_dataset("roneneldan/TinyStories", split="train[:500]")["text"]  # from the Hub instead
    tokenizer = train_gpt2_tokenizer(texts, vocab_size=512, model_max_length=64)
    ids = [i for text in texts for i in tokenizer(text, verbose=False).input_ids]
    rows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    return [{"input_ids": row, "labels": row} for row in rows]


SETTINGS = {"max_steps": 120, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 5e-3}

if __name__ == "__main__":
    train(
        make_model(),
        make_examples(),
        output_dir=sys.argv[1],
        save_steps=40,
        resume_from_checkpoint="--resume" in sys.argv,
        **SETTINGS,
    )

# %% [markdown]
# First: is a warm-up good for anything? The same model from the same random weights, with and without, at a learning rate
# that is on the high side:

# %%
sys.path.insert(0, str(work))
from tiny_run import SETTINGS, make_examples, make_model

examples = make_examples()
curves = {}
for share in (0.0, 0.2):
    curves[share] = loop.train(
        make_model(), examples, max_steps=150, per_device_train_batch_size=8, learning_rate=1.5e-2, warmup_ratio=share
    )
    print(f"warm-up over {share:.0%} of the steps: loss at the end {sum(curves[share][-20:]) / 20:.2f}")

# %%
figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
for share, (colour, dashes) in zip(curves, [("#E69F00", "-"), ("#0072B2", "--")]):
    axes.plot(range(1, 151), curves[share], color=colour, linestyle=dashes, label=f"warm-up {share:.0%}")
axes.set_xlabel("optimizer step")
axes.set_ylabel("training loss,\nnats per token")
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
axes.grid(color="0.92")
plt.show()

# %% [markdown]
# Without a warm-up the first steps are as long as the longest, and AdamW takes them when its running means have seen next
# to nothing. Both runs come down to a plateau, where the model knows how often each token occurs and little else. The one
# with the warm-up gets off it, the other does not in these steps. It is one run each: a hint, no proof.
#
# ## What a checkpoint holds
#
# This is the run that will not be killed. It saves every 40 steps:

# %%
whole = loop.train(make_model(), examples, output_dir=str(work / "whole"), save_steps=40, **SETTINGS)
print(sorted(path.name for path in (work / "whole").iterdir()))
newest = work / "whole" / "checkpoint-120"
for path in sorted(newest.iterdir()):
    print(f"{path.stat().st_size:>9,}  {path.name}")

# %% [markdown]
# It is a model folder (config, code, weights: `from_pretrained` loads it) with four files more. None of them needs more
# than `weights_only=True`, so a checkpoint from somebody else runs nothing:

# %%
optimizer = torch.load(newest / "optimizer.pt", weights_only=True)
name, state = next(iter(optimizer["state"].items()))
print(f"optimizer.pt: {len(optimizer['state'])} parameters by name; of {name}: {', '.join(state)}")
print("scheduler.pt:", torch.load(newest / "scheduler.pt", weights_only=True)["scheduler"]["last_epoch"], "steps")
random_states = torch.load(newest / "rng_state.pth", weights_only=True)
print("rng_state.pth:", ", ".join(random_states), "| of each process:", ", ".join(random_states["processes"][0]))
print("trainer_state.json:", ", ".join(json.loads((newest / "trainer_state.json").read_text())))

# %% [markdown]
# Why each is there:
#
# - **optimizer**: AdamW divides by a running mean of squared gradients. Without it the first steps after a resume are those
#   of a new optimizer: too long.
# - **schedule**: or the warm-up starts again in the middle of the run.
# - **random states**: dropout draws numbers. Other numbers, other weights.
# - **sampler**: the order of the current epoch. Without it some examples are seen twice and others never.
# - **losses**: so that the curve is one curve.
#
# ## Kill it
#
# Now the same run in a process of its own. As soon as its first checkpoint is there and it has gone on for a moment, it gets
# SIGKILL: no handler runs, nothing is flushed, as when the power fails or the cluster wants its node back.

# %%
import os
import signal
import subprocess
import time

run = work / "killed"
environment = {**os.environ, "TQDM_DISABLE": "1"}
command = [sys.executable, str(work / "tiny_run.py"), str(run)]
with open(work / "killed.log", "w") as log:
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
while not (run / "checkpoint-40").is_dir() and process.poll() is None:
    time.sleep(0.01)
time.sleep(0.2)
process.send_signal(signal.SIGKILL)
assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
print(f"exit code {process.returncode}; left behind: {sorted(path.name for path in run.glob('checkpoint-*'))}")

# %% [markdown]
# A folder `checkpoint-N` appears whole or not at all: it is written under another name and moved when it is complete. So
# there is nothing to clean up, wherever the kill fell. Resume, in one more process:

# %%
resumed = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
assert resumed.returncode == 0, resumed.stderr
print(sorted(path.name for path in run.glob("checkpoint-*")))

# %% [markdown]
# And compare it with the run that was not killed: every weight, every state of the optimizer, every loss.

# %%
from safetensors.torch import load_file

ends = [folder / "checkpoint-120" for folder in (work / "whole", run)]
weights = [load_file(end / "model.safetensors") for end in ends]
assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
states = [torch.load(end / "optimizer.pt")["state"] for end in ends]
assert all(torch.equal(states[0][name][key], states[1][name][key]) for name in states[0] for key in states[0][name])
losses = [torch.load(end / "rng_state.pth")["losses"] for end in ends]
assert torch.equal(*losses) and losses[1].tolist() == whole
print(f"{len(weights[0])} tensors, {len(states[0])} optimizer states, {len(whole)} losses: bit for bit the same")

# %% [markdown]
# ## What the usual way does
#
# The usual way is to save the weights, and to start again from them. Here it goes on from the weights of the first
# checkpoint, with everything else new:

# %%
from transformers import AutoModelForCausalLM

START = 40
weights_only = AutoModelForCausalLM.from_pretrained(work / "whole" / f"checkpoint-{START}")
rest = SETTINGS | {"max_steps": SETTINGS["max_steps"] - START}
naive = loop.train(weights_only, examples, **rest)


def smooth(losses):
    return torch.tensor(losses).unfold(0, 5, 1).mean(-1)


figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.plot(range(5, 121), smooth(whole), color="#000000", linewidth=3, alpha=0.35, label="not killed")
axes.plot(range(5, 121), smooth(losses[1].tolist()), color="#0072B2", linestyle="--", label="killed, resumed exactly")
axes.plot(range(START + 5, 121), smooth(naive), color="#E69F00", label="started again from the weights alone")
axes.axvline(START, color="0.5", linestyle=":")
axes.text(START + 0.5, axes.get_ylim()[1], "checkpoint", va="top", color="0.4", fontsize=8)
axes.set_xlabel("optimizer step")
axes.set_ylabel("training loss, nats per token\n(mean of five steps)")
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
axes.grid(color="0.92")
plt.show()

# %% [markdown]
# The dashed line lies on the grey one. The other one is another run: a second warm-up, an optimizer that has forgotten
# everything, another order of the examples. Here it even ends lower, by the luck of a later peak of the learning rate. That
# is the danger: with such restarts, nobody can tell any more whether a change of the loss comes from the model, the data, or
# the day on which the cluster went down.
#
# ## A damaged checkpoint
#
# Disks fail, too. Each checkpoint has a manifest of hashes; a resume reads all of them, and takes the newest checkpoint that
# is whole:

# %%
damaged = run / "checkpoint-120" / "optimizer.pt"
content = bytearray(damaged.read_bytes())
content[len(content) // 2] ^= 1  # one bit
damaged.write_bytes(content)

from mymodels.training.checkpoint_dirs import find_checkpoint

logging.getLogger().setLevel(logging.INFO)
print("it would go on from", find_checkpoint(run, True))

# %% [markdown]
# ## More than one device
#
# The same file, unchanged, on two processes (gloo on CPUs, NCCL on GPUs), or with the parameters sharded:
#
# ```bash
# accelerate launch --num_processes 2 --cpu tiny_run.py run     # two processes, each with half of every batch's examples
# accelerate launch --config_file mymodels/training/accelerate_configs/fsdp2.yaml -m mymodels.training.example --output_dir run
# ```
#
# A checkpoint of one process can be resumed by two, with half the accumulation, as the optimizer's state is stored by
# parameter name and not by device.
#
# ## Take with you
#
# - The step is: loss, backward, clip, check, optimizer, schedule, zero. The order matters.
# - Exact resume is a matter of listing everything that has a state. Test it by killing.
# - If a resumed run cannot be compared bit for bit on a CPU, something is missing in the checkpoint.

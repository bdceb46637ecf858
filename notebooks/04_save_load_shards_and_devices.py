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
# # Save, load, shards and devices
#
# A model on disk is a folder of plain files. This notebook opens each of them by hand, so that afterwards you can
#
# - say what every file in a Hub folder is for, and which ones a loader needs;
# - read a `.safetensors` file with nothing but `struct` and `json`;
# - place a model's parts on devices, or on disk when memory is short;
# - open weights in formats of the past, and know why some of them are dangerous.
#
# It needs no network and no GPU. The model is the small MyGPT2 that ships in `hub_repo/`; any folder or Hub id works
# in its place.

# %%
import hashlib
import json
import shutil
import struct
from collections import Counter
from pathlib import Path

import torch
from matplotlib import pyplot as plt

folder = Path("../hub_repo/mygpt2")
# folder = Path(huggingface_hub.snapshot_download("user/name"))  # a model of the Hub instead

work = Path("output/04")  # everything this notebook writes
shutil.rmtree(work, ignore_errors=True)
work.mkdir(parents=True)

# %% [markdown]
# ## What is in the folder
#
# `mymodels inspect` reads names, shapes and sizes. It runs nothing, so it is safe on a folder you do not trust.

# %% language="bash"
# mymodels inspect ../hub_repo/mygpt2

# %% [markdown]
# A loader needs four things of these: `config.json`, the code that `auto_map` names (a model that transformers knows
# has none), the weights, and the index that says which shard holds what. The tokenizer files turn text into numbers and
# back. The rest is for people and for proof: the card, `golden.safetensors` (inputs with the outputs they must give) and
# `manifest.json` (size and hash of every file).
#
# `config.json` is where a load begins. `architectures` says what was saved, `auto_map` which file defines each class:

# %%
config = json.loads((folder / "config.json").read_text())
for field in ("model_type", "architectures", "auto_map", "position_embedding_type", "num_key_value_heads", "dtype"):
    print(f"{field:25} {config[field]}")

# %% [markdown]
# ## A shard, opened by hand
#
# A safetensors file is the simplest format there is:
#
# | bytes | what |
# |---|---|
# | 8 | length *n* of the header, little-endian unsigned 64-bit |
# | *n* | header: JSON, tensor name → `dtype`, `shape`, `data_offsets` |
# | the rest | the numbers, one tensor after another, row by row |
#
# There is nothing in it that could run. That is the whole difference from a pickle.


# %%
def read_header(path):
    """The header, and where the data begins."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


shard = folder / "model-00004-of-00004.safetensors"
header, start = read_header(shard)
print(f"{shard.name}: {start} bytes of header, then {shard.stat().st_size - start:,} bytes of numbers\n")
for name, entry in list(header.items())[:4]:
    print(name, entry)

# %% [markdown]
# So one tensor is a slice of the file. Reading it takes a `seek` and a `read`, and the rest of the file is never touched:
# that is why a large model can be inspected, or loaded in parts, within little memory.


# %%
def read_tensor(path, name):
    header, start = read_header(path)
    begin, end = header[name]["data_offsets"]
    with open(path, "rb") as file:
        file.seek(start + begin)
        numbers = bytearray(file.read(end - begin))
    return torch.frombuffer(numbers, dtype=torch.float32).reshape(header[name]["shape"])  # all of this model is F32


by_hand = read_tensor(shard, "model.norm.weight")
print(by_hand.shape, by_hand[:4])

from safetensors import safe_open

with safe_open(shard, "pt") as file:
    assert torch.equal(by_hand, file.get_tensor("model.norm.weight"))  # the library reads the same

# %% [markdown]
# ## Shards and the index
#
# Large models are cut into several files, so that one can be fetched, written or repaired without the others. The index
# maps each tensor to its file. Here it is checked against the shards, all of them, by hand:

# %%
index = json.loads((folder / "model.safetensors.index.json").read_text())
print(index["metadata"])
print(Counter(index["weight_map"].values()))

shards = {path.name: read_header(path)[0] for path in sorted(folder.glob("model-*.safetensors"))}
found = {name: file for file, header in shards.items() for name in header if name != "__metadata__"}
assert found == index["weight_map"], "the index and the shards disagree"
print(f"{len(found)} tensors, each in the shard that the index names")

# %% [markdown]
# Note what is not there: `lm_head.weight`. The head shares its weight with the token embeddings
# (`tie_word_embeddings`), a shared tensor is stored once, and the loader ties the two again.
#
# Where the bytes are:

# %%
KINDS = {"embed_tokens": "embeddings", "self_attn": "attention", "mlp": "MLP", "norm": "norms (too thin to see)"}
COLOURS = dict(zip(KINDS.values(), ["#0072B2", "#E69F00", "#56B4E9", "#000000"]))  # Okabe and Ito, colour-blind safe

figure, axes = plt.subplots(figsize=(8, 2.4))
for row, header in enumerate(shards.values()):
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (offset / 1000 for offset in entry["data_offsets"])
            kind = next(kind for part, kind in KINDS.items() if part in name)
            axes.barh(row, end - begin, left=begin, color=COLOURS[kind], edgecolor="white", linewidth=0.8)
axes.set_yticks(range(len(shards)), [f"shard {row + 1}" for row in range(len(shards))])
axes.invert_yaxis()
axes.set_xlabel("position in the data, kB")
axes.legend([plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()], COLOURS, ncols=4,
            loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)  # fmt: skip
axes.spines[["top", "right", "left"]].set_visible(False)
axes.tick_params(axis="y", length=0)
plt.show()

# %% [markdown]
# ## Save it differently
#
# `save_checkpoint` cuts a checkpoint anew, one shard in memory at a time. It writes beside the target and exchanges the
# two in one step, so that a kill or a full disk leaves the old checkpoint or the new one, never half of each.

# %%
from mymodels import open_checkpoint, save_checkpoint

checkpoint = open_checkpoint(folder)  # a mapping, name → tensor; nothing is read but names, shapes and types
for size in ("10MB", "1MB", "500kB"):
    save_checkpoint(checkpoint, work / size, max_shard_size=size)
    print(f"{size:>6}: {', '.join(sorted(path.name for path in (work / size).iterdir()))}")

# %% [markdown]
# In how many shards a model lies makes no difference to what it is:

# %%
again = open_checkpoint(work / "500kB")
assert again.keys() == checkpoint.keys() and all(torch.equal(again[name], checkpoint[name]) for name in checkpoint)
print(f"{len(again)} tensors, each bit for bit the same")

# %% [markdown]
# ## Is it whole?
#
# A download that broke off, a disk that lies: a weight file with one wrong bit still loads, and the model is a little
# worse for no visible reason. The manifest holds the hash of every file. By hand:

# %%
manifest = json.loads((folder / "manifest.json").read_text())
for name, entry in manifest["files"].items():
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"], name
print(f"{len(manifest['files'])} files are what they were when the folder was made")

# %% [markdown]
# Now flip one bit in a copy, and let `mymodels check` find it. It exits with 1, so a script can rely on it:

# %%
shutil.copytree(folder, work / "damaged")
with open(work / "damaged" / shard.name, "r+b") as file:
    file.seek(start + 1000)
    byte = file.read(1)[0]
    file.seek(start + 1000)
    file.write(bytes([byte ^ 1]))

# %% language="bash"
# mymodels check ../hub_repo/mygpt2 --full
# mymodels check output/04/damaged --full || echo "exit code $?"

# %% [markdown]
# ## Devices
#
# A model need not lie in one place. A device map says where each module goes: a GPU's number, `"cpu"`, or `"disk"`. With
# `device_map="auto"`, accelerate fills the GPUs first, then the CPU's memory, then the disk. What it would do on a machine
# with two (very small) GPUs can be computed on any machine:

# %%
import logging

from accelerate import infer_auto_device_map, init_empty_weights

from mymodels import MyGPT2Config, MyGPT2ForCausalLM

logging.getLogger("accelerate").setLevel(logging.ERROR)  # it would warn that these GPUs are not there

with init_empty_weights():  # the meta device: shapes without numbers, so a model of any size fits
    empty = MyGPT2ForCausalLM(MyGPT2Config.from_pretrained(folder))
empty.tie_weights()

memory = {0: "2.2MB", 1: "1MB", "cpu": "10MB"}
places = infer_auto_device_map(empty, memory, no_split_module_classes=empty._no_split_modules)
for module, place in places.items():
    print(f"{module:20} {place if place in ('cpu', 'disk') else f'GPU {place}'}")

# %% [markdown]
# `_no_split_modules` names what must stay together: a block adds its input to its output, and the two have to be on one
# device.
#
# ## Offload to disk
#
# Without a GPU the same thing can be shown for real: two of the three blocks stay on disk, each is fetched when the
# forward pass reaches it and dropped afterwards. Slower, but a model larger than memory runs.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

from mymodels import load_checkpoint_and_dispatch

device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu",
              "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}  # fmt: skip
split = load_checkpoint_and_dispatch(empty, folder, device_map=device_map, offload_folder=work / "offload").eval()
whole = AutoModelForCausalLM.from_pretrained(folder)  # all of it in memory


def in_memory(model):
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type != "meta")


print(f"in memory: {in_memory(split):,} of {in_memory(whole):,} bytes")
print("on disk:", sorted(path.name for path in (work / "offload").iterdir())[:2], "…")

# %% [markdown]
# The parameters of an offloaded block are on the meta device until they are needed. The result is the same, to the bit:

# %%
tokenizer = AutoTokenizer.from_pretrained(folder)
batch = tokenizer("The little girl looked at the", return_tensors="pt")
with torch.inference_mode():
    assert torch.equal(split(**batch).logits, whole(**batch).logits)
print(split.model.layers[2].mlp.up_proj.weight.device, "before and after the forward pass; the logits are equal")

# %% [markdown]
# With transformers alone it is `from_pretrained(folder, device_map=…, offload_folder=…)`. Ours takes the same arguments
# and any format, which is the next subject.
#
# ## Formats of the past
#
# Weights come in many wrappings. Here the same model is written in five of them, with what trainings leave around it:

# %%
weights = whole.state_dict()
torch.save(weights, work / "pytorch_model.bin")  # what transformers wrote until 2023
torch.save({"module." + name: tensor for name, tensor in weights.items()}, work / "parallel.pt")  # from DataParallel
optimizer = torch.optim.AdamW(whole.parameters())
state = {"epoch": 7, "model_state_dict": weights, "optimizer_state_dict": optimizer.state_dict(), "loss": 3.2}
torch.save(state, work / "training.pt")
save_checkpoint(checkpoint, work / "half", dtype=torch.float16)


class Logits(torch.nn.Module):  # TorchScript wants tensors in, tensors out
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


import warnings

from transformers.utils import logging as transformers_logging

transformers_logging.set_verbosity_error()  # tracing touches every attribute, and some have something to say
with warnings.catch_warnings():  # tracing warns of each shape it fixes
    warnings.simplefilter("ignore")
    torch.jit.trace(Logits(whole), batch["input_ids"], check_trace=False).save(work / "traced.pt")

# %% [markdown]
# `open_checkpoint` looks at the content, not at the name, and gives the same mapping for each:

# %%
print(f"{'file':18} {'format':22} tensors  what stands beside them")
for name in ("pytorch_model.bin", "parallel.pt", "training.pt", "half", "traced.pt"):
    opened = open_checkpoint(work / name)
    print(f"{name:18} {opened.format:22} {len(opened):7}  {', '.join(opened.extras) or '–'}")

# %% [markdown]
# Prefixes such as `module.` stay, because an archive should be reported as it is; renaming is for the loader
# (`warm_start` knows them). The numbers are the ones that were saved:

# %%
for name, prefix in {
    "pytorch_model.bin": "",
    "parallel.pt": "module.",
    "training.pt": "",
    "traced.pt": "model.",
}.items():
    opened = open_checkpoint(work / name)
    assert all(torch.equal(opened[prefix + key], tensor) for key, tensor in weights.items()), name
half = open_checkpoint(work / "half")
print(
    "equal; half precision is off by at most", max((half[k].float() - checkpoint[k]).abs().max().item() for k in half)
)

# %% [markdown]
# ## Why not pickle
#
# `.bin`, `.pt` and `.pth` are pickles: a list of instructions that rebuild objects, and an instruction may call any
# function. This file looks like a checkpoint and writes a file when it is loaded the old way:

# %%


class Trap:
    def __reduce__(self):  # what to call to rebuild me
        return Path.touch, (work / "I_was_here",)


torch.save({"weight": torch.ones(2), "note": Trap()}, work / "stranger.pt")

torch.load(work / "stranger.pt", weights_only=False)  # never do this with a file you did not write
print("torch.load(weights_only=False) ran its code:", (work / "I_was_here").exists())

# %%
(work / "I_was_here").unlink()
try:
    open_checkpoint(work / "stranger.pt")
except ValueError as refusal:
    print(refusal)
assert not (work / "I_was_here").exists()

# %% [markdown]
# The way out of the past is one command, which reads whatever it is given and writes safetensors:

# %% language="bash"
# mymodels convert output/04/training.pt output/04/converted --max-shard-size 1MB
# mymodels inspect output/04/converted --diff ../hub_repo/mygpt2 || echo "exit code $?: not the same"

# %% [markdown]
# One line differs, and it is right: the old file has the tied head under a second name, the Hub folder stores it once. The
# optimizer was left behind, and the command said so.

# %% [markdown]
# ## Take with you
#
# - A model is a config, code, and named blocks of numbers; everything else in a folder is for people and for proof.
# - Reading a tensor is a seek and a read. Sharding, offloading and lazy inspection all follow from that.
# - `device_map` moves modules, not results.
# - Prefer safetensors; open the others with something that does not run them.

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
# # A private Hub repo: build, verify, push, load pinned to a commit
#
# A model with code of its own is a program that others run. This notebook takes one the whole way to a private repo and
# back, and shows at each step what makes it safe to load:
#
# - *build*: a folder that loads on machines that have never heard of mymodels;
# - *verify*: proof that it does, in clean processes, before anybody else finds out;
# - *push*: privately, in one commit, every file read back and compared;
# - *load* exactly the commit that was pushed, or run no code that nobody has reviewed.
#
# **To run it against the Hub**, log in first: `hf auth login`, with a token that may write, or set `HF_TOKEN`. It makes a
# private repo `mymodels-tutorial` in your account, about 0.6 MB. Without a token the notebook runs too, and says what it
# would send.
#
# The outputs you see here come from a server on the author's own machine that speaks the Hub's protocol
# (`tests/hub/hub_server.py`; the account there is called `me`). `HF_ENDPOINT` is all that tells the two apart.

# %%
import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token
from rich.console import Console

work = Path("output/05")  # everything this notebook writes
shutil.rmtree(work, ignore_errors=True)
work.mkdir(parents=True)

api = HfApi()  # takes the address from HF_ENDPOINT, the token from HF_TOKEN or from where `hf auth login` put it
can_push = get_token() is not None
user = api.whoami()["name"] if can_push else "you"
repo_id = f"{user}/mymodels-tutorial"
print(f"will push to {repo_id}" if can_push else "nobody is logged in: nothing will be sent")

# %% [markdown]
# ## A model
#
# Any will do; this one has random weights. It differs from GPT-2 in three ways that stock `GPT2LMHeadModel` cannot express,
# so the code has to travel with the weights.

# %%
from mymodels import MyGPT2Config, MyGPT2ForCausalLM, load_sample_text
from mymodels.training.tokenizers import train_gpt2_tokenizer

texts = [document.text for document in load_sample_text("train")]
tokenizer = train_gpt2_tokenizer(texts, vocab_size=512, model_max_length=64)
config = MyGPT2Config(
    vocab_size=len(tokenizer),
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,  # grouped-query attention
    norm_type="rmsnorm",
    position_embedding_type="rope",
    max_position_embeddings=64,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
torch.manual_seed(0)
model = MyGPT2ForCausalLM(config).eval()

# %% [markdown]
# ## Build
#
# `build_repo` writes everything a loader needs, and everything a reader should know. On the command line it is
# `mymodels build SOURCE --out DIR`, for a folder of any format.

# %%
from mymodels import build_repo
from mymodels.hub.card import Card

card = Card(
    name="A tutorial's MyGPT2",
    repo_id=repo_id,
    license="apache-2.0",
    language="en",
    description="A GPT-2 with rotary positions, RMSNorm and grouped-query attention.",
    training_data="None: the weights are random.",
    limits="It shows how a repo is made, and is good for nothing else.",
)
folder = build_repo(model, tokenizer, work / "repo", card=card, max_shard_size="200kB")
for file in sorted(folder.iterdir()):
    print(f"{file.stat().st_size:>9,}  {file.name}")

# %% [markdown]
# Two of these files are worth a look. `config.json` names the code that defines each class; the code is flat, because the
# Hub's loader does not follow subfolders:

# %%
print(json.dumps(json.loads((folder / "config.json").read_text())["auto_map"], indent=2))
print("imports of the model's code:")
for line in (folder / "modeling_mygpt2.py").read_text().splitlines():
    if line.startswith(("import ", "from ")):
        print("   ", line)

# %% [markdown]
# and `golden.safetensors` has inputs with the outputs they must give. Whoever loads the folder can see whether the
# model is the one that was saved, and not just one that loads without an error:

# %%
from safetensors.torch import load_file

for name, tensor in load_file(folder / "golden.safetensors").items():
    print(f"{name:50} {tuple(tensor.shape)}")

# %% [markdown]
# ## Verify
#
# First the folder is read, without running anything in it. Then it is copied to processes that have transformers, no
# mymodels, no network and an empty cache; there it is loaded through every Auto class, and what it computes is compared.

# %%
from collections import Counter

from mymodels.hub import verify


def show(checks):
    print(", ".join(f"{count} {status}" for status, count in Counter(check.status for check in checks).items()))


found = verify(folder)
print("read: ", end="")
show(found.static)
for release, checks in found.runs.items():
    print(f"under transformers {release}: ", end="")
    show(checks)
    for check in checks:
        if check.name in ("load", "golden", "weights", "cached generation", "eager = sdpa"):
            print(f"  {check.name:18} {check.status:8} {check.where}  {check.what}")
assert found.passed

# %% [markdown]
# `mymodels verify FOLDER` prints all of it, and `--transformers 4.56,5.0,latest` repeats it under other releases, each
# installed in a place of its own.
#
# A check is worth something only if it can fail. Here is a mistake that everybody makes once: the code imports a package
# that is on the author's machine.

# %%
shutil.copytree(folder, work / "broken")
code = work / "broken" / "modeling_mygpt2.py"
code.write_text("import mymodels\n" + code.read_text())
for _, check in verify(work / "broken", execute=False).failed:
    print(f"{check.name} ({check.where}): {check.what}\n    → {check.remedy}")

# %% [markdown]
# It would have loaded here, and failed for everybody else. The manifest noticed the change, too.
#
# ## Push
#
# `push` makes the repo if there is none (private, unless you ask for a public one), verifies the folder once more, and
# refuses pickles, secrets and stray files by name. With `dry_run=True` it compares and stops. It is also
# `mymodels push FOLDER USER/NAME`.

# %%
from mymodels.hub import HubError, push

console = Console(width=100, force_jupyter=False)
if can_push:
    push(folder, repo_id, dry_run=True, no_verify=True, console=console)  # it was verified above
else:
    sizes = [file.stat().st_size for file in folder.iterdir()]
    print(f"with a token, a private repo would get {len(sizes)} files, {sum(sizes):,} bytes")

# %%
if can_push:
    first = push(folder, repo_id)
    print(f"{repo_id} holds the folder at commit {first.commit}\n\n{first.snippet}")

# %% [markdown]
# If `push` returns, every file was read from the Hub again after the upload and found to be the same. The snippet loads
# this commit and no other.
#
# A second push sends only what changed. The model card gets a new sentence (and the manifest its new hash); the weights
# stay where they are:

# %%
from mymodels.checkpoints import write_manifest

with open(folder / "README.md", "a") as file:
    file.write("\nIt was pushed twice.\n")
write_manifest(folder)
if can_push:
    second = push(folder, repo_id, no_verify=True)
    print("sent:", ", ".join(second.uploaded))
    print("not sent:", sum(file.state == "unchanged" for file in second.files), "files")
    assert second.commit != first.commit and not any("safetensors" in name for name in second.uploaded)

# %% [markdown]
# Private means: without your token the repo is not there at all.

# %%
from huggingface_hub.utils import RepositoryNotFoundError

if can_push:
    print("private:", api.repo_info(repo_id).private)
    try:
        HfApi(token=False).repo_info(repo_id)
        raise AssertionError("a stranger can see it")
    except RepositoryNotFoundError:
        print("for a stranger it does not exist")

# %% [markdown]
# ## Load, pinned to a commit
#
# `trust_remote_code=True` runs whatever code the repo has *at that moment*, and a branch or a tag can move. A commit
# cannot. So pin it, for the weights (`revision`) and for the code (`code_revision`). A process without mymodels, where the
# repo's own code has to do:

# %%
import subprocess
import sys

LOAD = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
repo_id, commit = sys.argv[1:]
pinned = {"revision": commit, "code_revision": commit, "trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(repo_id, **pinned)
model = AutoModelForCausalLM.from_pretrained(repo_id, **pinned)
with torch.inference_mode():
    logits = model(**tokenizer("A commit cannot move.", return_tensors="pt")).logits
assert "mymodels" not in sys.modules
print(type(model).__module__.rpartition(".")[0].endswith(commit), type(model).__name__, logits.double().sum().item())
"""
if can_push:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, repo_id, first.commit], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    from_this_commit, name, there = run.stdout.split()
    with torch.inference_mode():
        here = model(**tokenizer("A commit cannot move.", return_tensors="pt")).logits.double().sum().item()
    print(f"{name} of that commit's own code: {from_this_commit}; sum of its logits there and here: {there}, {here}")
    assert from_this_commit == "True" and abs(float(there) - here) < 1e-3

# %% [markdown]
# The older commit still has the older card, whatever was pushed since:

# %%
if can_push:
    for result in (first, second):
        text = Path(api.hf_hub_download(repo_id, "README.md", revision=result.commit)).read_text()
        print(result.commit[:12], "pushed twice" in text)

# %% [markdown]
# ## Lock
#
# A pin protects against the repo changing. A lock also says what was *reviewed*: it records the hash of every code file,
# and `mymodels.load` runs these files or none. Put it into your own version control, as you would with any lock file.

# %%
import mymodels
from mymodels.hub import LockError, write_lock

reviewed = f"{repo_id}@{first.commit}" if can_push else folder  # a folder can be locked, too
lock = write_lock(reviewed, work / "model.lock")
print("\n".join(lock.files))

if can_push:
    locked = mymodels.load(repo_id, lock=work / "model.lock", auto_class="AutoModelForCausalLM")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), locked.state_dict().values()))
    print("loaded under the lock, every weight equal")

# %% [markdown]
# And code that is not the reviewed one does not run, although the folder looks fine:

# %%
try:
    mymodels.load(work / "broken", lock=work / "model.lock")
    raise AssertionError("it was loaded")
except (LockError, HubError) as refusal:
    print(refusal)

# %% [markdown]
# ## Clean up
#
# The repo is yours. To remove it: `hf repo delete USER/mymodels-tutorial`.
#
# ## Take with you
#
# - A Hub folder is complete when a process without your packages can load it. Let a machine check that: `verify`.
# - Private is the default here. Going public should be a decision.
# - Pin a commit wherever code runs; lock it where the code was reviewed.

"""What MyGPT2's switches are worth in pretraining: tokens that a modern shape needs to reach stock GPT-2's loss.

    python benchmarks/modern_gpt2.py [--seeds 3] [--tokens 400000] [--short] [--json FILE] [--figure FILE]

The rival is transformers' own `GPT2LMHeadModel`, as large as MyGPT2 to 3 %, trained on the same batches in the same
order with the same optimizer and schedule. Text: Jane Austen's novels, from Debian's `r-cran-janeaustenr` (needs
apt-get and `pip install -e '.[bench]'`). Four novels are trained on; each shape's learning rate is chosen on
*Northanger Abbey*, from the same candidates, by runs of half the tokens; *Persuasion* is for the numbers reported.

The runs of a seed take turns every few steps, so that whatever else the machine does hits all alike; the time compared
is the processor time of their training steps, on one thread. A second rival is the stock shape with the modern one's
wider random weights. Then one switch at a time is taken out of the modern shape (first seed, the same learning rate).
No dropout: by default no token is seen twice.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, get_scheduler

from mymodels import MyGPT2Config, MyGPT2ForCausalLM
from mymodels.training.loop import parameter_groups
from mymodels.training.tokenizers import train_gpt2_tokenizer

PACKAGE = "r-cran-janeaustenr"
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")  # its order
CHOOSING, TEST = "northangerabbey", "persuasion"
LENGTH, BATCH, VOCABULARY = 256, 4, 2048
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
SIZES = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": LENGTH}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SWITCHES: dict[str, dict[str, Any]] = {  # name → fields of MyGPT2Config; together they are the modern shape
    "rotary positions": {"position_embedding_type": "rope"},
    "RMSNorm": {"norm_type": "rmsnorm"},
    "QK-norm": {"qk_norm": True},
    "no biases": {"attention_bias": False, "mlp_bias": False},
    "relu² MLP": {"activation_function": "relu2"},
    "initializer_range 0.06": {"initializer_range": 0.06},
}
REINITIALISED = "stock, initializer_range 0.06"  # 0.02 is for GPT-2's width; this rival has that much in common
RIVALS = ("stock", REINITIALISED)
SHAPES: dict[str, Any] = {
    "stock": {},  # transformers' own class
    REINITIALISED: SWITCHES["initializer_range 0.06"],
    "modern": {
        **{field: value for fields in SWITCHES.values() for field, value in fields.items()},
        "intermediate_size": 544,  # what biases and the table of positions cost goes into the MLP
    },
}


def novels() -> dict[str, str]:
    """Name → text, a paragraph a line. The package is fetched once, into `$MYMODELS_CACHE` or `~/.cache/mymodels`."""
    home = Path(os.environ.get("MYMODELS_CACHE") or Path.home() / ".cache" / "mymodels") / "austen"
    if not list(home.glob("*.deb")):
        home.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", "--quiet", PACKAGE], cwd=home, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"apt-get cannot fetch {PACKAGE} ({error}): put its .deb file into {home}") from None
    try:
        import pyreadr
    except ImportError:
        raise SystemExit("reading the novels needs pyreadr: run `pip install -e '.[bench]'`") from None
    texts = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "--extract", str(next(home.glob("*.deb"))), folder], check=True)
        rest = next(Path(folder).rglob("data/Rdata.rdb")).read_bytes()
    for name in NOVELS:  # R's lazy-load file: one after the other, each a length of 4 bytes and a zlib stream
        stream = zlib.decompressobj()
        (lines,) = pyreadr.read_r(BytesIO(stream.decompress(rest[4:])))[None].to_dict("list").values()
        rest = stream.unused_data
        paragraphs = "\n".join(line if isinstance(line, str) else "" for line in lines).split("\n\n")
        texts[name] = "\n".join(" ".join(part.split()) for part in paragraphs if part.strip())
    return texts


def encoded(texts: dict[str, str]) -> dict[str, torch.Tensor]:
    """`train`, `choosing`, `test`: windows of `LENGTH` tokens; 32 of each held-out novel, evenly spaced."""
    training = [text for name, text in texts.items() if name not in (CHOOSING, TEST)]
    tokenizer = train_gpt2_tokenizer(training, vocab_size=VOCABULARY, model_max_length=LENGTH)
    parts = {"train": training, "choosing": [texts[CHOOSING]], "test": [texts[TEST]]}
    found = {}
    for part, members in parts.items():
        ids = [i for text in members for i in (tokenizer.bos_token_id, *tokenizer(text, verbose=False)["input_ids"])]
        windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
        found[part] = windows if part == "train" else windows[torch.linspace(0, len(windows) - 1, 32).long()]
    return found


def batches(windows: torch.Tensor, tokens: int, seed: int) -> list[torch.Tensor]:
    """As many `[BATCH, LENGTH]` as make `tokens`, in an order by `seed`; all windows are used before any again."""
    generator, needed, order = torch.Generator().manual_seed(seed), tokens // (BATCH * LENGTH) * BATCH, []
    while len(order) < needed:
        order += torch.randperm(len(windows), generator=generator).tolist()
    return list(windows[order[:needed]].split(BATCH))


def build(fields: dict[str, Any], seed: int) -> PreTrainedModel:
    """MyGPT2 with these fields of its config; without any, transformers' GPT-2."""
    torch.manual_seed(seed)
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, **SIZES, **NO_DROPOUT}
    if not fields:
        return GPT2LMHeadModel(GPT2Config(**shared))
    return MyGPT2ForCausalLM(MyGPT2Config(**shared, **fields))


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@torch.no_grad()
def loss_on(model: PreTrainedModel, windows: torch.Tensor) -> float:
    with autocast():
        losses = [model.eval()(part, labels=part, use_cache=False).loss.item() for part in windows.split(16)]
    model.train()
    return mean(losses)


def run(model: PreTrainedModel, data: list[torch.Tensor], rate: float, held_out: torch.Tensor, every: int) -> Iterator:
    """Train, and after each `every` steps give (tokens, held-out loss, processor seconds of training so far)."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=rate, betas=(0.9, 0.95), fused=True)
    schedule = get_scheduler(
        "cosine_with_min_lr", optimizer, len(data) // 20, len(data), scheduler_specific_kwargs={"min_lr_rate": 0.1}
    )
    model.train()
    seconds, tokens = 0.0, 0
    for step, batch in enumerate(data, start=1):
        started = time.process_time()
        with autocast():
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.process_time() - started
        tokens += batch.numel()
        if step % every == 0 or step == len(data):
            yield tokens, loss_on(model, held_out), seconds


def reached(curve: list[tuple[float, float, float]], rival: list[tuple[float, float, float]]) -> dict[str, float]:
    """Tokens and time until `curve` is at `rival`'s final loss, as shares of the rival's, interpolated; {} if never."""
    tokens, target, seconds = rival[-1]
    for before, after in pairwise(curve):
        if after[1] <= target < before[1]:
            part = (before[1] - target) / (before[1] - after[1])
            at = [start + part * (end - start) for start, end in zip(before, after)]
            return {"tokens": at[0] / tokens, "time": at[2] / seconds}
    return {}


def draw(seeds: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    for name, color in zip(SHAPES, ("0.25", "0.6", "tab:blue")):
        tokens = [point[0] / 1e6 for point in seeds[0]["curves"][name]]
        losses = [[point[1] for point in at] for at in zip(*(seed["curves"][name] for seed in seeds))]
        axes.plot(tokens, [mean(at) for at in losses], color=color, label=name)
        axes.fill_between(tokens, [min(at) for at in losses], [max(at) for at in losses], color=color, alpha=0.2)
    for rival, color in (("stock", "0.25"), (REINITIALISED, "0.6")):
        target = mean(seed["curves"][rival][-1][1] for seed in seeds)
        shares = [seed["reached"][rival] for seed in seeds]
        if all(shares):
            end = seeds[0]["curves"][rival][-1][0] / 1e6
            ratio = mean(share["tokens"] for share in shares)
            axes.plot([ratio * end, end], [target, target], color=color, linestyle=":", linewidth=1.2)
            axes.plot([ratio * end], [target], "o", color="tab:blue")
            axes.annotate(f"{ratio:.2f} ×", (ratio * end, target), (-6, -13), ha="right", textcoords="offset points")
    axes.set(xlabel="training tokens, millions", ylabel="loss on a novel held out, nats per token")
    axes.set_ylim(top=6.6)
    axes.set_title(f"mean and range of {len(seeds)} seeds", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.93")
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=800_000, help="of each run (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="one seed, 100,000 tokens, two rates, no ablation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw the curves (needs matplotlib)")
    arguments = parser.parse_args()
    count, tokens = (1, 100_000) if arguments.short else (arguments.seeds, arguments.tokens)
    torch.set_num_threads(1)
    data = encoded(novels())
    sizes = {name: build(shape, 0).num_parameters() for name, shape in SHAPES.items()}
    every = max(1, tokens // (BATCH * LENGTH) // 20)

    sweep: dict[str, dict[float, float]] = {name: {} for name in SHAPES}
    trials = [(name, rate) for name in SHAPES for rate in (RATES[1::2] if arguments.short else RATES)]
    for name, rate in tqdm(trials, desc="learning rates", disable=None):
        steps = batches(data["train"], tokens // 2, seed=1000)
        *_, last = run(build(SHAPES[name], 1000), steps, rate, data["choosing"], len(steps))
        sweep[name][rate] = last[1]
        tqdm.write(f"{name}, rate {rate:g}: loss {last[1]:.3f}")
    best = {name: min(found, key=lambda rate: found[rate]) for name, found in sweep.items()}

    seeds: list[dict[str, Any]] = []
    for seed in tqdm(range(count), desc="seeds", disable=None):
        steps = batches(data["train"], tokens, seed)
        runs = (run(build(shape, seed), steps, best[name], data["test"], every) for name, shape in SHAPES.items())
        curves = dict(zip(SHAPES, map(list, zip(*zip(*runs)))))  # zip: a block of steps of each run in turn
        seeds.append({"curves": curves, "reached": {r: reached(curves["modern"], curves[r]) for r in RIVALS}})
        tqdm.write(f"seed {seed}: {seeds[-1]['reached']}, final {[round(c[-1][1], 3) for c in curves.values()]}")

    ablation = {}
    stock = seeds[0]["curves"]["stock"]
    for name, fields in tqdm([] if arguments.short else list(SWITCHES.items()), desc="ablation", disable=None):
        rest = {key: value for key, value in SHAPES["modern"].items() if key not in fields}
        curve = []
        for point in run(build(rest, 0), batches(data["train"], tokens, 0), best["modern"], data["test"], every):
            curve.append(point)
            if point[1] <= stock[-1][1]:
                break
        ablation[name] = reached(curve, stock).get("tokens")  # None: not within the same budget
        tqdm.write(f"without {name}: {ablation[name]}")

    means = {
        rival: {of: mean(seed["reached"][rival].get(of, float("inf")) for seed in seeds) for of in ("tokens", "time")}
        for rival in RIVALS
    }
    final = {name: mean(seed["curves"][name][-1][1] for seed in seeds) for name in SHAPES}
    table = Table(title="what the modern shape needs to reach a rival's final loss")
    for column in ("rival", "its loss", "its parameters", "tokens", "time"):
        table.add_column(column, justify="left" if column == "rival" else "right")
    for rival in RIVALS:
        values = [f"× {means[rival][of]:.2f}" for of in ("tokens", "time")]
        table.add_row(rival, f"{final[rival]:.3f}", f"{sizes[rival] / sizes['modern']:.3f} ×", *values)
    for name, share in ablation.items():
        table.add_row(
            f"stock (modern less {name})", f"{stock[-1][1]:.3f}", "", f"× {share:.2f}" if share else "> 1", ""
        )
    Console().print(table)
    print(f"modern ends at {final['modern']:.3f}; learning rates {best}")
    if arguments.json:
        record = {"tokens": tokens, "parameters": sizes, "sweep": sweep, "final_loss": final, "modern_needs": means}
        arguments.json.write_text(json.dumps({**record, "ablation": ablation, "seeds": seeds}, indent=1) + "\n")
    if arguments.figure:
        draw(seeds, arguments.figure)
    return int(not (means["stock"]["tokens"] <= 0.6 and means["stock"]["time"] <= 0.75))


if __name__ == "__main__":
    sys.exit(main())

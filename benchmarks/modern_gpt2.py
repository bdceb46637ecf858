"""What MyGPT2's switches are worth in pretraining: tokens that a modern shape needs to reach stock GPT-2's loss.

    python benchmarks/modern_gpt2.py [--seeds 3] [--tokens 800000] [--short] [--json FILE] [--figure FILE]

The rival is transformers' own `GPT2LMHeadModel`, as large as MyGPT2 to 3 %, trained on the same batches in the same
order with the same optimizer and schedule. Text: Jane Austen's novels, from Debian's `r-cran-janeaustenr` (needs
apt-get and `pip install 'mymodels[bench]'`). Four novels are trained on; each shape's learning rate is chosen on
*Northanger Abbey*, from the same candidates, by runs of half the tokens; *Persuasion* is for the numbers reported.

The two runs of a seed take turns every few steps, so that whatever else the machine does hits both alike; the time
compared is the processor time of their training steps, on one thread. Then each switch is taken out of the modern shape
and, by itself, put into the stock one (first seed). No dropout: hardly a token is seen twice.
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
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SIZES = {"n_embd": 192, "n_layer": 4, "n_head": 6, "n_positions": LENGTH}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SWITCHES: dict[str, dict[str, Any]] = {  # name → fields of MyGPT2Config; together they are the modern shape
    "rotary positions": {"position_embedding_type": "rope"},
    "RMSNorm": {"norm_type": "rmsnorm"},
    "QK-norm": {"qk_norm": True},
    "no biases": {"attention_bias": False, "mlp_bias": False},
    "relu² MLP": {"activation_function": "relu2"},
    "initializer_range 0.06": {"initializer_range": 0.06},
}
MODERN = {key: value for fields in SWITCHES.values() for key, value in fields.items()}
MODERN_WIDTH = {"intermediate_size": 800}  # what biases and the table of positions cost goes into the MLP


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
        raise SystemExit("reading the novels needs pyreadr: run `pip install 'mymodels[bench]'`") from None
    texts = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "--extract", str(next(home.glob("*.deb"))), folder], check=True)
        # R's lazy-load file: objects one after the other, each a length of 4 bytes and a zlib stream of an .rds file
        rest = next(Path(folder).rglob("data/Rdata.rdb")).read_bytes()
        for name in NOVELS:
            stream = zlib.decompressobj()
            path = Path(folder, f"{name}.rds")
            path.write_bytes(stream.decompress(rest[4:]))
            rest = stream.unused_data
            lines = [line if isinstance(line, str) else "" for line in pyreadr.read_r(str(path))[None].iloc[:, 0]]
            paragraphs = "\n".join(line.strip() for line in lines).split("\n\n")
            texts[name] = "\n".join(" ".join(part.split()) for part in paragraphs if part.strip())
    return texts


def encoded(texts: dict[str, str]) -> dict[str, torch.Tensor]:
    """`train`, `choosing`, `test`: windows of `LENGTH` tokens; 64 of each held-out novel, evenly spaced."""
    training = [text for name, text in texts.items() if name not in (CHOOSING, TEST)]
    tokenizer = train_gpt2_tokenizer(training, vocab_size=VOCABULARY, model_max_length=LENGTH)
    parts = {"train": training, "choosing": [texts[CHOOSING]], "test": [texts[TEST]]}
    found = {}
    for part, members in parts.items():
        ids = [i for text in members for i in (tokenizer.bos_token_id, *tokenizer(text, verbose=False)["input_ids"])]
        windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
        found[part] = windows if part == "train" else windows[torch.linspace(0, len(windows) - 1, 64).long()]
    return found


def batches(windows: torch.Tensor, tokens: int, seed: int) -> list[torch.Tensor]:
    """As many `[BATCH, LENGTH]` as make `tokens`, in an order by `seed`; all windows are used before any again."""
    generator, needed, order = torch.Generator().manual_seed(seed), tokens // (BATCH * LENGTH) * BATCH, []
    while len(order) < needed:
        order += torch.randperm(len(windows), generator=generator).tolist()
    return list(windows[order[:needed]].split(BATCH))


def build(shape: str | dict[str, Any], seed: int) -> PreTrainedModel:
    """`"stock"` is transformers' GPT-2, anything else fields of MyGPT2Config."""
    torch.manual_seed(seed)
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, **SIZES, **NO_DROPOUT}
    if isinstance(shape, str):
        return GPT2LMHeadModel(GPT2Config(**shared))
    return MyGPT2ForCausalLM(MyGPT2Config(**shared, **shape))


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


def crossing(curve: list[tuple[float, float, float]], target: float) -> tuple[float, float] | None:
    """Tokens and seconds at which a curve first reaches `target`, interpolated; None if it does not."""
    for before, after in pairwise(curve):
        if after[1] <= target < before[1]:
            part = (before[1] - target) / (before[1] - after[1])
            return before[0] + part * (after[0] - before[0]), before[2] + part * (after[2] - before[2])
    return None


def draw(pairs: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, color in (("stock", "0.35"), ("modern", "tab:blue")):
        tokens = [point[0] / 1e6 for point in pairs[0][name]]
        losses = [[point[1] for point in at] for at in zip(*(pair[name] for pair in pairs))]
        axes.plot(tokens, [mean(at) for at in losses], color=color, label=f"{name} shape, mean of {len(pairs)} seeds")
        axes.fill_between(tokens, [min(at) for at in losses], [max(at) for at in losses], color=color, alpha=0.25)
    target = mean(pair["stock"][-1][1] for pair in pairs)
    axes.axhline(target, color="0.35", linestyle=":", linewidth=1)
    reached = [pair["tokens_ratio"] for pair in pairs if pair["tokens_ratio"]]
    if reached:
        place = mean(reached) * pairs[0]["stock"][-1][0] / 1e6
        axes.plot([place], [target], "o", color="tab:blue")
        note = f"stock's final loss\nat {mean(reached):.2f} × its tokens"
        axes.annotate(note, (place, target), (12, 16), textcoords="offset points", color="tab:blue")
    axes.set(xlabel="training tokens, millions", ylabel="loss on a novel held out, nats per token")
    axes.set_ylim(top=min(pair["stock"][2][1] for pair in pairs))
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
    seeds, tokens = (1, 100_000) if arguments.short else (arguments.seeds, arguments.tokens)
    rates = RATES[1:3] if arguments.short else RATES
    torch.set_num_threads(1)
    data = encoded(novels())
    shapes: dict[str, Any] = {"stock": "stock", "modern": {**MODERN, **MODERN_WIDTH}}
    sizes = {name: build(shape, 0).num_parameters() for name, shape in shapes.items()}
    every = max(1, tokens // (BATCH * LENGTH) // 32)

    sweep: dict[str, dict[float, float]] = {name: {} for name in shapes}
    for name, rate in tqdm([(n, r) for n in shapes for r in rates], desc="learning rates", disable=None):
        steps = batches(data["train"], tokens // 2, seed=1000)
        sweep[name][rate] = list(run(build(shapes[name], 1000), steps, rate, data["choosing"], len(steps)))[-1][1]
    best = {name: min(found, key=lambda rate: found[rate]) for name, found in sweep.items()}

    pairs = []
    for seed in tqdm(range(seeds), desc="seeds", disable=None):
        steps = batches(data["train"], tokens, seed)
        runs = (run(build(shapes[name], seed), steps, best[name], data["test"], every) for name in ("stock", "modern"))
        turns = list(zip(*runs))  # one block of steps each, in turn
        pair: dict[str, Any] = {name: list(curve) for name, curve in zip(("stock", "modern"), zip(*turns))}
        reached = crossing(pair["modern"], pair["stock"][-1][1])
        pair["tokens_ratio"] = reached and reached[0] / pair["stock"][-1][0]
        pair["time_ratio"] = reached and reached[1] / pair["stock"][-1][2]
        pairs.append(pair)

    rows = []
    variants = []
    if not arguments.short:
        for name, fields in SWITCHES.items():
            rest = {key: value for key, value in MODERN.items() if key not in fields}
            variants += [(name, "taken out of modern", {**rest, **MODERN_WIDTH}, best["modern"])]
            variants += [(name, "put into stock", fields, best["stock"])]
    target = pairs[0]["stock"][-1][1]
    for name, how, fields, rate in tqdm(variants, desc="ablation", disable=None):
        curve = []
        for point in run(build(fields, 0), batches(data["train"], tokens, 0), rate, data["test"], every):
            curve.append(point)
            if point[1] <= target:
                break
        reached = crossing(curve, target)
        ratio = reached and reached[0] / pairs[0]["stock"][-1][0]
        rows.append({"switch": name, "how": how, "tokens_ratio": ratio, "last_loss": curve[-1][1]})

    ratios = {
        key: mean(pair[key] if pair[key] else float("inf") for pair in pairs) for key in ("tokens_ratio", "time_ratio")
    }
    table = Table(title="tokens to reach stock GPT-2's final held-out loss, × its tokens")
    for column in ("", "taken out of modern", "put into stock"):
        table.add_column(column, justify="right" if column else "left")
    shown = {(row["switch"], row["how"]): row["tokens_ratio"] for row in rows}
    spread = "–".join(f"{edge([p['tokens_ratio'] or float('inf') for p in pairs]):.2f}" for edge in (min, max))
    table.add_row(f"all (seeds: {spread})", f"{ratios['tokens_ratio']:.2f}", "")
    for name in SWITCHES if rows else ():
        cells = [shown[name, how] for how in ("taken out of modern", "put into stock")]
        table.add_row(name, *(f"{ratio:.2f}" if ratio else "> 1" for ratio in cells))
    Console().print(table)
    final = {name: mean(pair[name][-1][1] for pair in pairs) for name in shapes}
    print(f"time ratio {ratios['time_ratio']:.2f}; parameters {sizes}; rates {best}; final losses {final}")
    if arguments.json:
        record = {"tokens": tokens, "parameters": sizes, "rates": best, "sweep": sweep, "final_loss": final, **ratios}
        arguments.json.write_text(json.dumps({**record, "pairs": pairs, "ablation": rows}, indent=1) + "\n")
    if arguments.figure:
        draw(pairs, arguments.figure)
    if arguments.short:
        return 0  # too short for the claim
    return int(not (ratios["tokens_ratio"] <= 0.6 and ratios["time_ratio"] <= 0.75))


if __name__ == "__main__":
    sys.exit(main())

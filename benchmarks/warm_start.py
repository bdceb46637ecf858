"""What a warm start is worth: language-model loss after each way to change GPT-2, against random weights.

    python benchmarks/warm_start.py [--steps 60] [--seeds 2] [--json FILE] [--figure FILE]

The source is a stock `GPT2LMHeadModel`, trained here on the sample text. For each change: held-out loss right after
`warm_start`, after a short training, and what the same architecture reaches from random weights in the same steps over
the same batches. Each trains at the better of two learning rates. Means over seeds.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from mymodels import MyGPT2ForCausalLM, load_sample_text, warm_start
from mymodels.demo import batches, windows
from mymodels.training.evaluation import evaluate
from mymodels.training.loop import train
from mymodels.training.tokenizers import train_gpt2_tokenizer

SIZES = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 128}
BATCH = 8
RATES = (1e-3, 4e-3)
UNTIED = {"tie_word_embeddings": False}
CHANGES: dict[str, dict[str, Any]] = {  # name → config fields
    "none": {},
    "untied head": UNTIED,
    "RMSNorm, with head bias": {**UNTIED, "norm_type": "rmsnorm", "lm_head_bias": True},
    "6 layers": {"num_hidden_layers": 6},
    "MLP twice as wide": {"intermediate_size": 1024},
    "gated MLP": {"mlp_type": "gated"},
    "256 positions": {"max_position_embeddings": 256},
    "RMSNorm, tied": {"norm_type": "rmsnorm"},
    "2 key/value heads": {"num_key_value_heads": 2},
    "1 key/value head": {"num_key_value_heads": 1},
    "MLP half as wide": {"intermediate_size": 256},
    "2 layers": {"num_hidden_layers": 2},
    "rotary positions": {"position_embedding_type": "rope"},
    "SwiGLU": {"mlp_type": "gated", "activation_function": "silu"},
    "rotary, RMSNorm, 2 kv heads": {
        "position_embedding_type": "rope",
        "norm_type": "rmsnorm",
        "num_key_value_heads": 2,
    },
}


def trained(model, examples: list, steps: int, seed: int, held_out: list) -> float:
    """Held-out loss after `steps` at the better of two learning rates; the model is not changed."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[: steps * BATCH]
    losses = []
    for rate in RATES:
        model.load_state_dict(start)
        chosen = [examples[i] for i in order]
        train(model, chosen, per_device_train_batch_size=BATCH, learning_rate=rate, seed=seed, description="")
        losses.append(evaluate(model, held_out)[0])
    model.load_state_dict(start)
    return min(losses)


def draw(rows: list[dict], source_loss: float, steps: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.36 * len(rows) + 1.3))
    places = range(len(rows))[::-1]
    for place, row in zip(places, rows):
        axes.plot([row["warm_trained"], row["random_trained"]], [place] * 2, color="0.85", linewidth=5, zorder=1)
    style = {"zorder": 2, "s": 42}
    axes.scatter(
        [row["random_trained"] for row in rows], places, color="0.45", label=f"random weights, {steps} steps", **style
    )
    axes.scatter(
        [row["warm"] for row in rows],
        places,
        facecolors="none",
        edgecolors="tab:blue",
        label="warm start, 0 steps",
        **style,
    )
    axes.scatter(
        [row["warm_trained"] for row in rows], places, color="tab:blue", label=f"warm start, {steps} steps", **style
    )
    axes.axvline(source_loss, color="0.3", linestyle=":", linewidth=1, label="the source")
    axes.set_yticks(list(places), [row["change"] + ("" if row["exact"] else " *") for row in rows])
    axes.set_xlabel("held-out loss, nats per token  (* approximate)")
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.4, 1.0 + 1.1 / len(rows) * 1.6),
        ncols=4,
        frameon=False,
        fontsize=8,
        columnspacing=1.2,
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.93")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the short training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw them (needs matplotlib)")
    arguments = parser.parse_args()

    training, held_out = load_sample_text("train"), load_sample_text("held_out")
    tokenizer = train_gpt2_tokenizer([d.text for d in training], vocab_size=1024, model_max_length=128)
    examples, test = windows(tokenizer, training), batches(windows(tokenizer, held_out))
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    stock = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), initializer_range=0.06, **SIZES, **ids))
    train(
        stock, examples, num_train_epochs=6, per_device_train_batch_size=BATCH, learning_rate=4e-3, description="source"
    )
    source_loss = evaluate(stock, test)[0]

    rows = []
    for name, changes in tqdm(CHANGES.items(), desc="changes", disable=None):
        found = []
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            report = warm_start("mygpt2", stock, overrides=changes)
            fresh = MyGPT2ForCausalLM(report.model.config)
            found.append(
                {
                    "warm": evaluate(report.model, test)[0],
                    "warm_trained": trained(report.model, examples, arguments.steps, seed, test),
                    "random_trained": trained(fresh, examples, arguments.steps, seed, test),
                }
            )
        means = {key: sum(row[key] for row in found) / len(found) for key in found[0]}
        spread = {f"{key}_spread": max(row[key] for row in found) - min(row[key] for row in found) for key in found[0]}
        rows.append({"change": name, "exact": report.is_exact, **means, **spread})

    table = Table(title=f"held-out loss, nats per token; the source has {source_loss:.3f}")
    for column in (
        "change",
        "step",
        "warm start",
        f"after {arguments.steps} steps",
        f"random, {arguments.steps} steps",
    ):
        table.add_column(column, justify="left" if column in ("change", "step") else "right")
    for row in rows:
        kind = "exact" if row["exact"] else "approximate"
        table.add_row(
            row["change"], kind, f"{row['warm']:.3f}", f"{row['warm_trained']:.3f}", f"{row['random_trained']:.3f}"
        )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"source_loss": source_loss, "steps": arguments.steps, "seeds": arguments.seeds, "rows": rows}, indent=2) + "\n")  # fmt: skip
    if arguments.figure:
        draw(rows, source_loss, arguments.steps, arguments.figure)
    wrong = [row["change"] for row in rows if row["exact"] and abs(row["warm"] - source_loss) > 1e-3]
    wrong += [row["change"] for row in rows if row["warm_trained"] >= row["random_trained"]]
    if wrong:
        print(f"not as claimed: {', '.join(dict.fromkeys(wrong))}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

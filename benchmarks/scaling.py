"""How the cost of MyGPT2 grows: with the length of the sequence, with and without a sliding window, and with its size.

    python benchmarks/scaling.py [--short] [--threads N] [--json FILE] [--figure FILE]

A forward pass over one row of 128 … 4096 tokens, last logits only, with 4 blocks of GPT-2's width; the theory beside it
is a linear cost for each token and a quadratic one for each pair of tokens that see each other: T²/2 in full attention,
about T·w within a window of w = 256. Its two constants are fitted to the times of full attention alone. And a step of
generation against the bytes of weights that it reads, for models of 2 … 12 blocks and three widths. Times are relative
to the first point.
"""

import sys
from statistics import median
from typing import Any

import numpy
import pairs
import torch
from tqdm import tqdm

from mymodels import MyGPT2Config, MyGPT2ForCausalLM

WINDOW = 256
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
SHAPES = ((384, 4), (384, 12), (768, 2), (768, 4), (768, 8), (768, 12), (1024, 8))  # width, blocks


def make(window: int | None = None, width: int = 768, blocks: int = 4, vocabulary: int = 8192) -> MyGPT2ForCausalLM:
    kinds = ["sliding_attention" if window else "full_attention"] * blocks
    config = MyGPT2Config(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=blocks, num_attention_heads=width // 64,
        max_position_embeddings=max(LENGTHS), sliding_window=window, layer_types=kinds,
    )  # fmt: skip
    return MyGPT2ForCausalLM(config).eval()


def least(calls: dict[Any, Any], repeats: int) -> dict[Any, float]:
    """Median seconds of each call, timed in turn."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for number in tqdm(range(repeats + 1), leave=False, disable=None):
        for name, call in calls.items():
            took = pairs.seconds(call)
            if number:
                times[name].append(took)
    return {name: median(values) for name, values in times.items()}


def seen_pairs(length: int, window: int | None) -> float:
    """Pairs of tokens of which one sees the other."""
    near = min(length, window or length)
    return near * (near + 1) / 2 + (length - near) * near


def by_length(repeats: int, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    models = {"full": (make(), None), "window": (make(WINDOW), WINDOW)}
    forward = torch.inference_mode()(lambda model, ids: model(ids, use_cache=False, logits_to_keep=1))
    ids = torch.randint(8192, (1, max(lengths)))
    calls = {
        (name, n): lambda model=model, n=n: forward(model, ids[:, :n])
        for n in lengths
        for name, (model, _) in models.items()
    }
    times = least(calls, repeats)
    # each length weighs the same: divided by the time
    terms = numpy.array([[n / times["full", n], seen_pairs(n, None) / times["full", n]] for n in lengths])
    linear, square = numpy.linalg.lstsq(terms, numpy.ones(len(lengths)), rcond=None)[0]
    first = times["full", lengths[0]] / lengths[0]
    return [
        {
            "work": f"{name}, {n} tokens",
            "attention": name,
            "length": n,
            "per_token": times[name, n] / n / first,
            "theory": (linear * n + square * seen_pairs(n, models[name][1])) / n / first,
        }
        for name, n in calls
    ]


def by_size(repeats: int, shapes: tuple[tuple[int, int], ...], steps: int) -> list[dict[str, Any]]:
    rows, calls = [], {}
    for width, blocks in shapes:
        model = make(None, width, blocks, 50257)
        with torch.inference_mode():
            cache = model(torch.ones(1, 16, dtype=torch.long), use_cache=True).past_key_values

        @torch.inference_mode()
        def run(model=model, cache=cache) -> None:
            for _ in range(steps):
                model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)

        calls[width, blocks] = run
        read = sum(p.nbytes for p in model.parameters()) - model.model.embed_positions.weight.nbytes
        rows.append({"work": f"width {width}, {blocks} blocks", "width": width, "blocks": blocks, "bytes": read})
    times = least(calls, repeats)
    for row in rows:
        row["per_step"] = times[row["width"], row["blocks"]] / times[shapes[0]]
        row["theory"] = row["bytes"] / rows[0]["bytes"]
    return rows


def draw(rows: list[dict[str, Any]], pyplot: Any) -> None:
    _, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.8))
    for name, colour in (("full", "tab:blue"), ("window", "tab:orange")):
        chosen = [row for row in rows if row.get("attention") == name]
        lengths = [row["length"] for row in chosen]
        label = "full attention" if name == "full" else f"window of {WINDOW}"
        left.plot(lengths, [row["per_token"] for row in chosen], marker="o", color=colour, label=label)
        left.plot(lengths, [row["theory"] for row in chosen], color=colour, linestyle=":", label=f"{label}, theory")
    left.set_xscale("log", base=2)
    left.set_xticks([row["length"] for row in rows if row.get("attention") == "full"])
    left.xaxis.set_major_formatter("{x:.0f}")
    left.set_xlabel("tokens in the sequence")
    left.set_ylabel("time per token (full, 128 tokens = 1)")
    sizes = [row for row in rows if "bytes" in row]
    sizes.sort(key=lambda row: row["bytes"])
    right.plot([r["bytes"] / 1e6 for r in sizes], [r["per_step"] for r in sizes], "o", label="measured")
    right.plot([r["bytes"] / 1e6 for r in sizes], [r["theory"] for r in sizes], ":", color="0.4", label="in proportion")
    right.set_xlabel("weights read for each token, MB")
    right.set_ylabel("time of a generation step (smallest = 1)")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    right.set_xlim(left=0)


def main() -> int:
    arguments = pairs.arguments(__doc__).parse_args()
    pairs.start(arguments)
    short = arguments.short
    rows = by_length(1 if short else 5, LENGTHS[:5] if short else LENGTHS)
    rows += by_size(2 if short else 7, SHAPES[1::2] if short else SHAPES, 4 if short else 16)
    for row in rows:
        row |= {"rival": "theory", "ratio": row["theory"] / row.get("per_token", row.get("per_step"))}
    return pairs.finish(rows, arguments, draw)


if __name__ == "__main__":
    sys.exit(main())

"""How cost grows, in four panels, each beside what theory says.

    python benchmarks/scaling.py [--short] [--threads N] [--json FILE] [--figure FILE]

- Length: a forward pass over one row of 128 … 4096 tokens, last logits only, 4 blocks of GPT-2's width, in full
  attention and within a window of 256. Theory: a cost for each token, and one for each pair of tokens that see each
  other, T²/2 of them or about T·256; the two constants are fitted to the times of full attention alone.
- Fill: MyBert and stock BERT on a batch of 32 rows of 256 tokens, of which 10 … 100 % are not padding. Theory: in
  proportion to the tokens; stock computes padding too.
- Size: a step of generation, models of several widths and depths. Theory: in proportion to the weights read.
- Loading: `from_pretrained` of a sharded folder to the first logits, with everything imported and the files in the
  page cache. Theory: in proportion to the files' bytes.

Times are relative to the first point of each panel. An exponent is the slope of the logarithms, fitted to the points;
where theory is no power, its curve is fitted in the same way.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import pairs
import torch
from cold_start import folders
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from mymodels import MyBertConfig, MyBertModel, MyGPT2Config, MyGPT2ForCausalLM

WINDOW = 256
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
FILLS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
SHAPES = ((384, 4), (384, 12), (768, 4), (768, 8), (768, 12), (1024, 12))  # width, blocks
BLOCKS = (2, 6, 12, 24)
ROWS = 32  # of the batch whose fill varies, and
ROW = 256  # their length
Curves = list[dict[str, Any]]


def make(window: int | None = None, width: int = 768, blocks: int = 4, vocabulary: int = 8192) -> MyGPT2ForCausalLM:
    kinds = ["sliding_attention" if window else "full_attention"] * blocks
    config = MyGPT2Config(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=blocks, num_attention_heads=width // 64,
        max_position_embeddings=max(LENGTHS), sliding_window=window, layer_types=kinds,
    )  # fmt: skip
    return MyGPT2ForCausalLM(config).eval()


def timed(calls: dict[Any, Callable[[], Any]], repeats: int, work: str) -> dict[Any, float]:
    """Median seconds of each call, timed in turn after once for warming up."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for number in tqdm(range(repeats + 1), desc=work, leave=False, disable=None):
        for name, call in calls.items():
            took = pairs.seconds(call)
            if number:
                times[name].append(took)
    return {name: median(values) for name, values in times.items()}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    return float(numpy.polyfit(numpy.log(x), numpy.log(y), 1)[0])


def curve(panel: str, name: str, x: Sequence[float], y: Sequence[float], theory: Sequence[float]) -> dict[str, Any]:
    """A row for the table and a line for the figure; the ratio is how much theory's grows by how much ours does."""
    return {
        "work": f"{panel}: {name}",
        "panel": panel,
        "name": name,
        "rival": f"theory, ^{exponent(x, theory):.2f}; measured ^{exponent(x, y):.2f}",
        "ratio": (theory[-1] / theory[0]) / (y[-1] / y[0]),
        "x": list(x),
        "y": list(y),
        "theory": list(theory),
    }


def seen_pairs(length: int, window: int | None) -> float:
    """Pairs of tokens of which one sees the other."""
    near = min(length, window or length)
    return near * (near + 1) / 2 + (length - near) * near


def by_length(repeats: int, lengths: tuple[int, ...]) -> Curves:
    models = {"full attention": (make(), None), f"window of {WINDOW}": (make(WINDOW), WINDOW)}
    ids = torch.randint(8192, (1, max(lengths)))

    @torch.inference_mode()
    def forward(model: MyGPT2ForCausalLM, length: int) -> None:
        model(ids[:, :length], use_cache=False, logits_to_keep=1)

    calls = {(name, n): lambda m=m, n=n: forward(m, n) for n in lengths for name, (m, _) in models.items()}
    times = timed(calls, repeats, "length")
    full = [times["full attention", n] for n in lengths]
    # each length weighs the same: divided by the time
    terms = numpy.array([[n / took, seen_pairs(n, None) / took] for n, took in zip(lengths, full)])
    linear, square = numpy.linalg.lstsq(terms, numpy.ones(len(lengths)), rcond=None)[0]
    unit = full[0] / lengths[0]
    found = []
    for name, (_, window) in models.items():
        measured = [times[name, n] / n / unit for n in lengths]
        theory = [(linear + square * seen_pairs(n, window) / n) / unit for n in lengths]
        found.append(curve("tokens in the sequence", name, lengths, measured, theory))
    return found


def by_fill(repeats: int, fills: tuple[float, ...]) -> Curves:
    shape = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 1536}
    models = {"MyBert": MyBertModel(MyBertConfig(**shape)).eval(), "stock BERT": BertModel(BertConfig(**shape)).eval()}
    models["MyBert"].load_state_dict(models["stock BERT"].state_dict())

    @torch.inference_mode()
    def encode(name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return models[name](**batch).pooler_output

    calls, shares = {}, []
    for fill in fills:
        # one row of full length, the others from short to long, as in real batches
        rest = (fill * ROWS - 1) / (ROWS - 1) * ROW
        spread = min(rest - 1, ROW - rest)
        counts = torch.cat([torch.linspace(rest - spread, rest + spread, ROWS - 1).round(), torch.tensor([ROW])])
        mask = (torch.arange(ROW)[None] < counts[:, None]).long()
        batch = {"input_ids": torch.randint(1000, 20000, mask.shape) * mask, "attention_mask": mask}
        pairs.agree(f"fill {fill:.0%}", *(lambda name=name, batch=batch: encode(name, batch) for name in models))
        shares.append(100 * mask.float().mean().item())
        calls |= {(name, fill): lambda name=name, batch=batch: encode(name, batch) for name in models}
    times = timed(calls, repeats, "fill")
    unit = times["MyBert", fills[0]]
    found = []
    for name in models:
        measured = [times[name, fill] / unit for fill in fills]
        theory = [measured[0] * (share / shares[0] if name == "MyBert" else 1) for share in shares]
        found.append(curve("tokens in a batch, % of its size", name, shares, measured, theory))
    return found


def by_size(repeats: int, shapes: tuple[tuple[int, int], ...], steps: int) -> Curves:
    calls, read = {}, {}
    for width, blocks in shapes:
        model = make(None, width, blocks, 50257)
        with torch.inference_mode():
            cache = model(torch.ones(1, 16, dtype=torch.long), use_cache=True).past_key_values

        @torch.inference_mode()
        def run(model=model, cache=cache) -> None:
            for _ in range(steps):
                model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)

        calls[width, blocks] = run
        read[width, blocks] = sum(p.nbytes for p in model.parameters()) - model.model.embed_positions.weight.nbytes
    times = timed(calls, repeats, "size")
    order = sorted(shapes, key=read.__getitem__)
    x, y = ([values[shape] for shape in order] for values in (read, times))
    return [
        curve(
            "weights, MB",
            "a step of generation",
            [value / 1e6 for value in x],
            [value / y[0] for value in y],
            [value / x[0] for value in x],
        )
    ]


def by_file_size(repeats: int, blocks: tuple[int, ...]) -> Curves:
    with tempfile.TemporaryDirectory() as root:
        where = {count: folders(Path(root), count) for count in blocks}
        sizes = [sum(f.stat().st_size for f in where[count]["package"].glob("*.safetensors")) for count in blocks]

        @torch.inference_mode()
        def load(folder: Path) -> torch.Tensor:
            return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(16)[None]).logits

        kinds = {"MyGPT2": "package", "stock GPT-2": "stock"}
        pairs.agree("loading", *(lambda kind=kind: load(where[blocks[0]][kind]) for kind in kinds.values()))
        calls = {(n, c): lambda k=k, c=c: load(where[c][k]) for c in blocks for n, k in kinds.items()}
        times = timed(calls, repeats, "loading")
    found = []
    for name in kinds:
        measured = [times[name, count] / times["MyGPT2", blocks[0]] for count in blocks]
        theory = [measured[0] * size / sizes[0] for size in sizes]
        found.append(curve("files to load, MB", name, [size / 1e6 for size in sizes], measured, theory))
    return found


def draw(rows: Curves, pyplot: Any) -> None:
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    labels = ("time per token", "time of a batch", "time of a step", "time to logits")
    _, grid = pyplot.subplots(2, 2, figsize=(10, 7.2))
    for panel, label, axes in zip(panels, labels, grid.flat):
        for row, colour in zip((row for row in rows if row["panel"] == panel), ("tab:blue", "tab:orange")):
            name = f"{row['name']}, ^{exponent(row['x'], row['y']):.2f}"
            axes.plot(row["x"], row["y"], "o-", color=colour, markersize=4, label=name)
            theory = f"theory, ^{exponent(row['x'], row['theory']):.2f}"
            axes.plot(row["x"], row["theory"], ":", color=colour, label=theory)
        axes.set(xscale="log", yscale="log", xlabel=panel, ylabel=f"{label}, relative")
        ticks = sorted({value for row in rows if row["panel"] == panel for value in row["x"]})
        axes.set_xticks(ticks, [f"{value:.0f}" for value in ticks], fontsize=8)
        axes.minorticks_off()
        low, high = axes.get_ylim()
        axes.set_yticks(
            [value for value in (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 50) if low <= value <= high]
        )
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(color="0.93")
        axes.spines[["top", "right"]].set_visible(False)


def main() -> int:
    arguments = pairs.arguments(__doc__).parse_args()
    pairs.start(arguments)
    short = arguments.short
    rows = by_length(1 if short else 3, LENGTHS[:5] if short else LENGTHS)
    rows += by_fill(1 if short else 5, FILLS[1::2] if short else FILLS)
    rows += by_size(2 if short else 7, SHAPES[::2] if short else SHAPES, 4 if short else 16)
    rows += by_file_size(2 if short else 5, BLOCKS[:3] if short else BLOCKS)
    return pairs.finish(rows, arguments, draw)


if __name__ == "__main__":
    sys.exit(main())

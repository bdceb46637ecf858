"""What the speed benchmarks share: two ways to do the same work, timed alternately, and the floor under both.

    parser = pairs.arguments(__doc__)
    arguments = parser.parse_args()
    pairs.start(arguments)
    rows = [pairs.compare("work", ours, rival, repeats=7, target=1.2, floor=pairs.bare_products(ours))]
    pairs.finish(rows, arguments, draw)

Everything is a ratio within one run: the rival's time by ours, and the time of the bare matrix products by ours.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from mymodels.models.products import batched, fastest, one_dnn

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="less of everything; the ratios are rougher")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's own choice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw them (needs matplotlib)")
    return parser


def start(arguments: argparse.Namespace) -> None:
    """Threads, clock and seed as asked."""
    global clock
    clock = CLOCKS[arguments.clock]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def seconds(call: Callable[[], Any]) -> float:
    begin = clock()
    call()
    return clock() - begin


def difference(ours: Any, rival: Any) -> float:
    """The largest difference between two results: tensors, numbers, or lists of either."""
    if isinstance(ours, (list, tuple)):
        assert len(ours) == len(rival), f"{len(ours)} results against {len(rival)}"
        return max(map(difference, ours, rival))
    first, second = torch.as_tensor(ours), torch.as_tensor(rival)
    assert first.shape == second.shape, f"shape {list(first.shape)} against {list(second.shape)}"
    return (first.double() - second.double()).abs().max().item() if first.numel() else 0.0


def agree(work: str, ours: Callable[[], Any], rival: Callable[[], Any], tolerance: float = 1e-4) -> float:
    """The difference of the two results, which is at most `tolerance`, or nothing is timed."""
    found = difference(ours(), rival())
    if not found <= tolerance:
        raise SystemExit(f"{work}: the results differ by {found:.2g}, more than {tolerance:.2g}; nothing was timed")
    return found


def compare(
    work: str,
    ours: Callable[[], Any],
    rival: Callable[[], Any],
    *,
    rival_name: str = "stock, sdpa",
    repeats: int = 7,
    tolerance: float | None = 1e-4,
    target: float | None = None,
    floor: Callable[[], Any] | None = None,
    floor_target: float | None = None,
) -> dict[str, Any]:
    """Time `ours` and `rival` (and `floor`) in turn, who begins changing each time; what they return must agree.

    Args:
        tolerance: between the results of the first calls, which also warm up; None: they may differ, and only warm up.
        target: of the ratio rival/ours.
        floor: the bare matrix products of the work, see `bare_products`; our share of it is its time by ours.

    Returns:
        A row for `finish`: medians in seconds, the median of the ratios of neighbours and their quartiles.
    """
    found = agree(work, ours, rival, float("inf") if tolerance is None else tolerance)
    calls = {"ours": ours, "rival": rival} | ({"floor": floor} if floor else {})
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in tqdm(range(repeats), desc=work, leave=False, disable=None):
        for name in list(calls) if number % 2 else reversed(calls):
            times[name].append(seconds(calls[name]))
    ratios = [rival_time / our_time for rival_time, our_time in zip(times["rival"], times["ours"])]
    ordered = sorted(ratios)
    row = {
        "work": work,
        "rival": rival_name,
        "ratio": median(ratios),
        "quartiles": [ordered[round((len(ordered) - 1) * share)] for share in (0.25, 0.75)],
        "target": target,
        "difference": None if tolerance is None else found,
        "seconds": {name: median(values) for name, values in times.items()},
        "times": times,
    }
    if floor:
        row["share_of_floor"] = median(bare / our for bare, our in zip(times["floor"], times["ours"]))
        row["floor_target"] = floor_target
    return row


class _Products(TorchDispatchMode):
    """Writes down every matrix product of what runs under it: (first operand's shape, second operand)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[tuple[int, ...], torch.Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name.split("::")[1]
        if name in ("linear", "_linear_pointwise"):
            self.note(args[0], args[1].t())
        elif name == "bmm" and args[1].stride(0) == 0:  # parts of a weight, and the same states for each
            self.note(args[1][0].t(), args[0].flatten(0, 1).t())
        elif name in ("mm", "bmm", "matmul"):
            self.note(args[0], args[1])
        elif name in ("addmm", "baddbmm"):
            self.note(args[1], args[2])
        elif "scaled_dot_product" in name and "backward" not in name:
            query, key, value = args[:3]
            if (kwargs or {}).get("is_causal") or any(flag is True for flag in args[3:]):  # half of all pairs
                half = (key.shape[-2] + 1) // 2
                key, value = key[..., :half, :], value[..., :half, :]
            self.note(query, key.transpose(-2, -1))
            self.note(query.new_empty(1).expand(*query.shape[:-1], key.shape[-2]), value)
        return function(*args, **(kwargs or {}))

    def note(self, first: torch.Tensor, second: torch.Tensor) -> None:
        if second.ndim == 2:
            self.found.append(((first.numel() // first.shape[-1], first.shape[-1]), second.detach()))
        else:  # one product for each head of each example
            self.found.append(((-1, *first.shape[-2:]), second.detach()))


def _mm(first: torch.Tensor, second: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(first, second, out=out)


def _bmm(first: torch.Tensor, second: torch.Tensor, out: torch.Tensor) -> None:
    torch.bmm(first, second, out=out)


def _one_dnn(first: torch.Tensor, second: torch.Tensor, out: torch.Tensor) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return _mm(first, second, out)
    torch.ops.mkldnn._linear_pointwise(first, second.t(), None, "none", [], "")


def _batched(first: torch.Tensor, second: torch.Tensor, out: torch.Tensor) -> None:
    batched(first, second.t())


def _least(product: Callable, *operands: torch.Tensor) -> float:
    return min(seconds(lambda: product(*operands)) for _ in range(3))


def bare_products(call: Callable[[], Any]) -> Callable[[], None]:
    """The matrix products of `call`, which runs twice here, and nothing else, as a call: a floor for the same work.

    Weights are the model's own, so that as much memory is read; the other operands are noise in buffers made here.
    A product with a weight is made by the kernel of torch, MKL or oneDNN that is the fastest for its shape here.
    """
    with torch.no_grad():
        call()  # what is measured once, at the first call, is no part of the work
        with _Products() as products:
            call()
    assert products.found, "no matrix product was seen"
    buffers: dict[Any, torch.Tensor] = {}

    def buffer(kind: str, *shape: int, like: torch.Tensor) -> torch.Tensor:
        key = (kind, shape, like.dtype)
        if key not in buffers:
            buffers[key] = torch.randn(shape, dtype=torch.float32, device=like.device).to(like.dtype)
        return buffers[key]

    faster: dict[Any, Callable] = {}
    jobs: list[tuple[Callable, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for shape, second in products.found:
        if second.ndim == 2:
            first, out = buffer("first", *shape, like=second), buffer("out", shape[0], second.shape[1], like=second)
            key = (shape, tuple(second.shape))
            if key not in faster and shape[0] <= 4 and second.dtype is torch.float32:
                # each weight comes from memory, and not from the caches as in `_least`
                product = fastest(*shape, torch.get_num_threads())
                faster[key] = {one_dnn: _one_dnn, batched: _batched}.get(product, _mm)
            elif key not in faster:
                took = {product: _least(product, first, second, out) for product in (_mm, _one_dnn)}
                faster[key] = min(took, key=took.__getitem__)
            jobs.append((faster[key], first, second, out))
        else:
            count = second[..., 0, 0].numel()
            rows, inner, columns = *shape[1:], second.shape[-1]
            turned = second.stride(-1) != 1  # keys come transposed
            held = (count, columns, inner) if turned else (count, inner, columns)
            operand = buffer("second", *held, like=second)
            out = buffer("out", count, rows, columns, like=second)
            first = buffer("first", count, rows, inner, like=second)
            jobs.append((_bmm, first, operand.transpose(1, 2) if turned else operand, out))

    def run() -> None:
        with torch.no_grad():
            for product, first, second, out in jobs:
                product(first, second, out)

    return run


def bars(rows: list[dict[str, Any]], pyplot: Any) -> None:
    """The figure of a script whose rows are ratios: a bar each, its quartiles as a line, a mark at the target."""
    _, axes = pyplot.subplots(figsize=(7.2, 0.42 * len(rows) + 1.2))
    places = range(len(rows))[::-1]
    axes.barh(places, [row["ratio"] for row in rows], color="tab:blue", height=0.6)
    for place, row in zip(places, rows):
        low, high = row.get("quartiles", (row["ratio"], row["ratio"]))
        axes.plot([low, high], [place, place], color="0.2", linewidth=1)
        end = max(high, row.get("target") or 0)
        axes.annotate(f"{row['ratio']:.2f}×", (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
        if row.get("target"):
            axes.plot([row["target"]] * 2, [place - 0.38, place + 0.38], color="tab:orange", linewidth=2)
    axes.axvline(1, color="0.4", linestyle=":", linewidth=1)
    axes.set_yticks(places, [row["work"] for row in rows])
    axes.set_xlabel("the rival's by ours (line: quartiles of the pairs; mark: target)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def in_own_process(script: str, *words: str) -> dict[str, Any]:
    """The JSON that `script`, called with `words`, prints last; for peak memory and cold starts."""
    run = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{script} {' '.join(words)} failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def finish(
    rows: list[dict[str, Any]],
    arguments: argparse.Namespace,
    draw: Callable[[list[dict[str, Any]], Any], None] = bars,
    made_with: dict[str, Any] | None = None,
) -> int:
    """Print the table, write the JSON and the figure; a target that was missed is no failure.

    Args:
        draw: called with the rows and matplotlib's pyplot; it leaves one figure.
        made_with: for the JSON, over what is written there of the versions and the machine.
    """
    details = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "clock": arguments.clock,
        "short": arguments.short,
    } | (made_with or {})
    threads = details["threads"] if isinstance(details["threads"], list) else [details["threads"]]
    table = Table(title=f"{', '.join(map(str, threads))} threads, {arguments.clock} time: the rival's by ours")
    floors, notes = (any(name in row for row in rows) for name in ("share_of_floor", "note"))
    for column in ("work", "rival", "ratio", "quartiles", "target", "of the floor", "target")[: 7 if floors else 5]:
        table.add_column(column, justify="left" if column in ("work", "rival") else "right")
    if notes:
        table.add_column("note")
    for row in rows:
        share, wanted = row.get("share_of_floor"), row.get("floor_target")
        cells = [
            row["work"],
            row["rival"],
            f"{row['ratio']:.2f}×",
            "–".join(f"{value:.2f}" for value in row["quartiles"]) if "quartiles" in row else "",
            f"{row['target']:.2f}×" if row.get("target") else "",
        ]
        floor = [f"{share:.0%}" if share else "", f"{wanted:.0%}" if wanted else ""] if floors else []
        table.add_row(*cells, *floor, *([row.get("note", "")] if notes else []))
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"made_with": details, "rows": rows}, indent=1) + "\n")
    if arguments.figure:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        draw(rows, pyplot)
        arguments.figure.parent.mkdir(parents=True, exist_ok=True)
        pyplot.gcf().tight_layout()
        pyplot.savefig(arguments.figure, dpi=130)
    return 0

"""Peak memory while a sharded checkpoint of 500 MB is saved and loaded, ours beside transformers', a process each.

    python benchmarks/checkpoint_memory.py [--short] [--json FILE] [--figure FILE]

A model of GPT-2's geometry (124M) in shards of 100 MB (and one of 154 MB, the embeddings: a tensor is never split).
Counted is what the process occupies above what the imports and a small run of the same had taken: for saving, also the
model itself, by its size; for loading, up to each weight having been read. The ratio is of everything (the kernel's own high-water
mark); beside it, looked at every millisecond, without pages of files, which the system may drop at any time
(memory-mapped shards). The claim, checked at the end: at most the model and one shard, and no more than the stock
model takes by transformers' own functions. `--short` leaves out what `from_pretrained` and `save_pretrained` do not
meet.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairs
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mymodels import MyGPT2Config, MyGPT2ForCausalLM, warm_start
from mymodels.checkpoints import load_checkpoint_and_dispatch, load_state_dict, save_checkpoint

SHARD = 100_000_000
SLACK = 30_000_000  # the allocator's, and code read on the way
SMALL = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512}
CASES = {  # (work, who): what, measured with --short too
    ("save", "stock"): ("save_pretrained of a stock GPT-2", True),
    ("save", "ours"): ("save_pretrained", True),
    ("save", "model"): ("save_checkpoint of a model", False),
    ("save", "state dict"): ("save_checkpoint of a state dict", False),
    ("load", "stock"): ("from_pretrained of a stock GPT-2", True),
    ("load", "ours"): ("from_pretrained", True),
    ("load", "state dict"): ("load_state_dict", False),
    ("load", "model"): ("load_checkpoint_and_dispatch from meta", False),
    ("load", "converted"): ("from_pretrained of a stock folder as ours", False),
    ("load", "warm"): ("warm_start from a stock folder", False),
}


def memory() -> tuple[int, int, int]:
    """Bytes this process occupies: at the most so far, now, and now without pages of files."""
    text = Path("/proc/self/status").read_text()
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.endswith("kB")}
    return fields["VmHWM"], fields["VmRSS"], fields["RssAnon"] + fields["RssShmem"]


def peak_of(action: Callable[[], Any]) -> tuple[int, int]:
    """How far memory rises during `action`, at the most: all of it, and without pages of files."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    _, start, start_anonymous = memory()
    anonymous = start_anonymous
    done = threading.Event()

    def watch() -> None:
        nonlocal anonymous
        while not done.is_set():
            anonymous = max(anonymous, memory()[2])
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = action()
        if result is not None:  # memory-mapped weights are only read when they are used
            for tensor in (result if isinstance(result, dict) else result.state_dict()).values():
                tensor.sum()
    finally:
        done.set()
        watcher.join()
    return memory()[0] - start, anonymous - start_anonymous


def prepare(work: str, who: str, folder: Path, config: dict[str, int]) -> Callable[[], Any]:
    """What to measure; what it returns is to be read."""
    ours, stock, target = folder / "ours", folder / "stock", folder / f"{work}-{who}"
    if work == "save":
        model = GPT2LMHeadModel(GPT2Config(**config)) if who == "stock" else MyGPT2ForCausalLM(MyGPT2Config(**config))
        if who in ("stock", "ours"):
            return lambda: model.save_pretrained(target, max_shard_size=SHARD)
        what = model if who == "model" else model.state_dict()
        return lambda: save_checkpoint(what, target, max_shard_size=SHARD) and None
    with torch.device("meta"):
        empty = MyGPT2ForCausalLM(MyGPT2Config(**config))
    empty.tie_weights()
    return {
        "stock": lambda: GPT2LMHeadModel.from_pretrained(stock),
        "ours": lambda: MyGPT2ForCausalLM.from_pretrained(ours),
        "state dict": lambda: load_state_dict(ours),
        "model": lambda: load_checkpoint_and_dispatch(empty, ours, device_map="cpu"),
        "converted": lambda: MyGPT2ForCausalLM.from_pretrained(stock),
        "warm": lambda: warm_start("mygpt2", stock, overrides={"norm_type": "rmsnorm"}).model,
    }[who]


def write_folders(folder: Path, config: dict[str, int]) -> None:
    model = MyGPT2ForCausalLM(MyGPT2Config(**config))
    model.save_pretrained(folder / "ours", max_shard_size=SHARD)
    GPT2LMHeadModel(GPT2Config(**config)).save_pretrained(folder / "stock", max_shard_size=SHARD)


def main() -> int:
    parser = pairs.arguments(__doc__)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    pairs.start(arguments)
    if arguments.measure:
        work, who, folder = arguments.measure
        peak_of(prepare(work, who, Path(folder, "small"), SMALL))  # what is imported on first use
        print(json.dumps(peak_of(prepare(work, who, Path(folder, "large"), {}))))
        return 0

    with tempfile.TemporaryDirectory() as folder:
        write_folders(Path(folder, "small"), SMALL)
        write_folders(Path(folder, "large"), {})
        index = json.loads(Path(folder, "large", "ours", "model.safetensors.index.json").read_text())
        size = index["metadata"]["total_size"]
        largest = max(file.stat().st_size for file in Path(folder, "large", "ours").glob("*.safetensors"))
        found = {}
        for (work, who), (_, always) in CASES.items():
            if always or not arguments.short:
                taken = pairs.in_own_process(__file__, "--measure", work, who, folder)
                found[work, who] = [count + (size if work == "save" else 0) for count in taken]
    rows, wrong = [], []
    for (work, who), (peak, anonymous) in found.items():
        if who == "stock":
            continue
        what, stock = CASES[work, who][0], found[work, "stock"]
        rows.append(
            {
                "work": f"peak memory, {work}: {what}",
                "rival": CASES[work, "stock"][0],
                "ratio": stock[0] / peak,
                "target": 1.0,
                "of_the_model": {"ours": peak / size, "rival": stock[0] / size},
                "without_file_pages": {"ours": anonymous / size, "rival": stock[1] / size},
            }
        )
        limit = size + largest + SLACK
        if anonymous > limit:
            wrong.append(f"{what} takes {anonymous / size:.2f} of the model, more than {limit / size:.2f}")
        if max(peak - stock[0], anonymous - stock[1]) > SLACK:
            wrong.append(f"{what} takes more than stock: {peak / size:.2f} against {stock[0] / size:.2f} of the model")
    pairs.finish(rows, arguments)
    for row in rows:
        shares = [
            f"{row[key]['ours']:.2f} (stock {row[key]['rival']:.2f})" for key in ("of_the_model", "without_file_pages")
        ]
        print(f"{row['work']}: {shares[0]} of the model, without file pages {shares[1]}")
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

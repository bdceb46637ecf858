"""A training step of a language model of GPT-2's geometry (124M): MyGPT2 beside stock GPT-2, the same weights.

    python benchmarks/train_lm.py [--short] [--threads N] [--json FILE] [--figure FILE]

Forward, backward and AdamW, in float32, without dropout, from random weights: once on 4 rows of 256 tokens, once on
Reuters documents of their own lengths, eight at a time up to 256 tokens: padded for the stock model, packed for ours.
Peak memory of the first is of a process of its own each, above what Python and torch occupy. `--short`: 2 of the 12
blocks and a vocabulary of 16384.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable

import pairs
import torch
from checkpoint_memory import peak_of
from reuters import documents
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from mymodels import MyGPT2Config, MyGPT2ForCausalLM
from mymodels.training.packing import DataCollatorForPacking

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SMALL = {"n_layer": 2, "vocab_size": 16384}  # with --short
Batch = dict[str, torch.Tensor]


def models(short: bool) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Ours and the stock one, with the same random weights."""
    stock = GPT2LMHeadModel(GPT2Config(**NO_DROPOUT, **(SMALL if short else {}))).train()
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        return MyGPT2ForCausalLM.from_pretrained(folder).train(), stock


def stepper(model: PreTrainedModel, batches: list[Batch]) -> Callable[[], list[float]]:
    """A call that makes a step on each batch and returns their losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)  # as the Trainer's

    def run() -> list[float]:
        losses = []
        for batch in batches:
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    return run


def equal_rows() -> list[Batch]:
    ids = torch.randint(16384, (4, 256), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids}]


def documents_of_their_lengths(count: int) -> tuple[list[Batch], list[Batch]]:
    """The same documents packed and padded; a document has as many random tokens as the real one has words."""
    pick = torch.Generator().manual_seed(0)
    lengths = [min(256, len(text.split())) for _, text in documents()["train"]][: 8 * count]
    packed, padded = [], []
    for start in range(0, len(lengths), 8):
        ids = [torch.randint(16384, (length,), generator=pick) for length in lengths[start : start + 8]]
        packed.append(DataCollatorForPacking()([{"input_ids": row, "labels": row} for row in ids]))
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], True)
        rows = torch.nn.utils.rnn.pad_sequence(ids, True)
        padded.append({"input_ids": rows, "attention_mask": mask, "labels": rows.masked_fill(mask == 0, -100)})
    return packed, padded


def peak(who: str, short: bool) -> int:
    """Bytes above what the process had, from the model's making on, through two steps."""
    changes = NO_DROPOUT | (SMALL if short else {})
    kinds = {"ours": (MyGPT2ForCausalLM, MyGPT2Config), "rival": (GPT2LMHeadModel, GPT2Config)}
    kind, config = kinds[who]

    def work() -> None:
        run = stepper(kind(config(**changes)).train(), equal_rows())
        run()
        run()

    return peak_of(work)[0]


def main() -> int:
    parser = pairs.arguments(__doc__)
    parser.add_argument("--peak", choices=("ours", "rival"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    pairs.start(arguments)
    if arguments.peak:
        print(json.dumps(peak(arguments.peak, arguments.short)))
        return 0
    repeats = 2 if arguments.short else 5
    ours, stock = models(arguments.short)
    batch = equal_rows()
    step, their_step = stepper(ours, batch), stepper(stock, batch)
    rows = [pairs.compare("train step, 4×256 tokens", step, their_step, target=1.10, repeats=repeats)]

    words = ["--short"] if arguments.short else []
    words += ["--threads", str(torch.get_num_threads())]
    found = {who: pairs.in_own_process(__file__, "--peak", who, *words) for who in ("ours", "rival")}
    rows.append(
        {
            "work": "its peak memory",
            "rival": "stock, sdpa",
            "ratio": found["rival"] / found["ours"],
            "target": 1 / 0.7,
            "bytes": found,
        }
    )
    packed, padded = documents_of_their_lengths(1 if arguments.short else 4)
    step, their_step = stepper(ours, packed), stepper(stock, padded)
    rows.append(
        pairs.compare(
            "train on documents, packed", step, their_step, rival_name="stock, padded", target=1.3, repeats=repeats
        )
    )
    return pairs.finish(rows, arguments)


if __name__ == "__main__":
    sys.exit(main())

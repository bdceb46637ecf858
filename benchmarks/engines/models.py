"""The models that are compared, as folders of stock transformers; made once and kept in the cache.

`gpt2`: GPT-2's geometry (124M), random weights: for speed, as no trained ones come from a package index. `reuters_gpt2`: a
small one, trained here on the Reuters documents: for the quality of int8. `minilm_r8`: the 6-layer MiniLM, its classifier
fitted on the training documents: both.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from reuters import classifiers, documents, encoded, minilm
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from mymodels import MyBertForSequenceClassification
from mymodels.training.loop import train
from mymodels.training.tokenizers import train_gpt2_tokenizer

from . import Rows, padded

NEVER_STOPS = {"bos_token_id": None, "eos_token_id": None}
SMALL = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 256, "vocab_size": 4096}
WINDOW = 128
SPARE = 1  # a token that is in no text: for the engines that insist on one that ends a text


def kept(name: str, write: Callable[[Path], None]) -> Path:
    home = Path(os.environ.get("MYMODELS_CACHE") or Path.home() / ".cache" / "mymodels") / "rivals"
    folder = home / name
    if not folder.is_dir():
        unfinished = home / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(unfinished)
        unfinished.rename(folder)
    return folder


def spelled(size: int) -> PreTrainedTokenizerFast:
    """A vocabulary of the words t0, t1, …: the engines read ids, but some of them want names for them."""
    words = WordLevel({f"t{number}": number for number in range(size)}, unk_token="t0")
    special = {f"{name}_token": f"t{size - 1}" for name in ("unk", "bos", "eos")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special)


def save(model: GPT2LMHeadModel, folder: Path) -> None:
    model.save_pretrained(folder)
    spelled(model.config.vocab_size).save_pretrained(folder)


def gpt2() -> Path:
    torch.manual_seed(0)
    return kept("gpt2", lambda to: save(GPT2LMHeadModel(GPT2Config(**NEVER_STOPS)).eval(), to))


def reuters_texts(part: str) -> list[str]:
    return [text for _, text in documents()[part]]


def reuters_gpt2() -> Path:
    """The small model; its training takes some minutes."""
    return kept("reuters_gpt2", _train_small)


def _train_small(folder: Path) -> None:
    texts = reuters_texts("train")
    tokenizer = train_gpt2_tokenizer(texts, SMALL["vocab_size"] - SPARE, SMALL["n_positions"])
    rows = [{"input_ids": row, "labels": row} for row in torch.tensor(windows(tokenizer, texts, WINDOW))]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SMALL, **NEVER_STOPS, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    train(
        model.train(), rows, max_steps=250, per_device_train_batch_size=8, learning_rate=3e-3,
        description="a small GPT-2 on Reuters",
    )  # fmt: skip
    save(model.eval(), folder)
    tokenizer.save_pretrained(folder / "text")


def windows(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> Rows:
    """The texts, each with an end token, one after the other, in pieces of `length` tokens."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, verbose=False).input_ids, tokenizer.eos_token_id]
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def held_out(count: int, length: int) -> Rows:
    """Prompts for `reuters_gpt2` from the test documents, spread over them."""
    found = windows(AutoTokenizer.from_pretrained(reuters_gpt2() / "text"), reuters_texts("test"), length)
    return found[:: len(found) // count][:count]


def minilm_r8() -> Path:
    return kept("minilm_r8", _fit_classifier)


def _fit_classifier(folder: Path) -> None:
    """Only the head is fitted (logistic regression on what the pooler gives), so it takes a minute or two."""
    from sklearn.linear_model import LogisticRegression

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    rows = encoded(tokenizer)["train"]
    ours, stock = classifiers(MyBertForSequenceClassification, BertForSequenceClassification)
    features = []
    with torch.inference_mode():
        for start in range(0, len(rows), 32):
            ids, mask = map(torch.from_numpy, padded([row["input_ids"][:128] for row in rows[start : start + 32]]))
            features.append(ours.base_model(input_ids=ids, attention_mask=mask).pooler_output.numpy())
    fitted = LogisticRegression(C=100, max_iter=2000).fit(np.concatenate(features), [row["labels"] for row in rows])
    assert list(fitted.classes_) == list(range(8))
    with torch.no_grad():
        stock.classifier.weight.copy_(torch.from_numpy(fitted.coef_))
        stock.classifier.bias.copy_(torch.from_numpy(fitted.intercept_))
    stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def r8_test() -> tuple[Rows, list[int]]:
    """The test documents as rows of ids, in the order of the news, and their labels."""
    found = encoded(AutoTokenizer.from_pretrained(minilm_r8()))["test"]
    return [row["input_ids"] for row in found], [row["labels"] for row in found]

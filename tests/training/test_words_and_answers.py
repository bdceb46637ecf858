"""`finetune` on labels of words and on answers in a context, with heads of one's own; truth: characters and forward itself."""

import json
import re
from pathlib import Path

import pytest
import torch
from own_models.bert_heads import SpanBert, WordBert, WordBertConfig
from own_models.make import BERT
from transformers import DataCollatorForTokenClassification

from mymodels import finetune, predict
from mymodels.training.data import DataError, load_data
from mymodels.training.preprocessing import choose_collator
from mymodels.training.tokenizers import train_bert_tokenizer
from mymodels.training.words_and_answers import encode_answers, encode_words

ANIMALS, REST = ["cat", "dog", "horse"], ["we", "saw", "the", "number"]
WORDS = [["we", "saw", "the", animal, "number", str(i)] for animal in ANIMALS for i in range(4)]
TAGS = [["ANIMAL" if word in ANIMALS else "O" for word in row] for row in WORDS]
QUICK = {"max_length": 32, "max_steps": 2, "learning_rate": 3e-3, "bf16": False, "golden": False, "eval_steps": 2}


@pytest.fixture
def tokenizer():
    return train_bert_tokenizer([" ".join(row) for row in WORDS] + ["what did we see ?"], 60, 64)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rows = {
        "words": [{"tokens": words, "ner_tags": tags} for words, tags in zip(WORDS, TAGS)],
        "answers": [
            {"question": "what did we see ?", "context": " ".join(words), "answers": {"text": [words[3]], "answer_start": [11]}}
            for words in WORDS
        ],
    }  # fmt: skip
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {name: tmp_path / f"{name}.jsonl" for name in rows}


def make(cls: type):
    torch.manual_seed(0)
    return cls(WordBertConfig(**{**BERT, "vocab_size": 60, "num_labels": 2, "num_hidden_layers": 1})).eval()


def test_a_word_s_first_token_has_its_label_and_an_answer_its_tokens(tokenizer, files: dict[str, Path]) -> None:
    data = load_data(files["words"], task="token-classification", validation=0.25)
    assert data.labels == ["ANIMAL", "O"] and len(data.validation) == 3
    examples = encode_words(data, tokenizer, 32)
    for row, example in zip(data.train, examples["train"]):
        offsets = tokenizer(row["text"], return_offsets_mapping=True)["offset_mapping"]
        starts = {m.start(): tag for m, tag in zip(re.finditer(r"\S+", row["text"]), row["tags"])}
        assert example["labels"] == [starts.get(a, -100) if b > a else -100 for a, b in offsets]
    assert isinstance(choose_collator("tokens", tokenizer, make(WordBert)), DataCollatorForTokenClassification)
    assert encode_words(data, tokenizer, 4)["train"][0]["labels"][-1] == -100 and "truncated" in data.notes[-1]

    data = load_data(files["answers"], task="question-answering", validation=0.25)
    for row, example in zip(data.train, encode_answers(data, tokenizer, 32)["train"]):
        ids = example["input_ids"][example["start_positions"] : example["end_positions"] + 1]
        assert tokenizer.decode(ids).replace(" ", "") == row["context"][row["start"] : row["end"]]
    question = len(tokenizer("what did we see ?", "").input_ids)
    for length, message in [
        (question + 2, "every answer is truncated"),
        (question - 2, "a question alone is longer than"),
    ]:
        with pytest.raises(DataError, match=message):
            encode_answers(data, tokenizer, length)


@pytest.mark.parametrize("given", [pytest.param("a folder", marks=pytest.mark.slow), "memory"])
def test_a_tagger_of_one_s_own_is_tuned_and_answers(given: str, tokenizer, files, tmp_path: Path) -> None:
    WordBert._auto_class = "AutoModelForTokenClassification"
    model = make(WordBert)
    tuned = finetune(
        model, files["words"], tmp_path / "out", task="token-classification", tokenizer=tokenizer, **QUICK
    )  # fmt: skip
    if given == "a folder":  # the folder of the first run, with its labels
        tuned = finetune(
            tmp_path / "out", files["words"], tmp_path / "again", task="token-classification", trust_remote_code=True, **QUICK
        )  # fmt: skip
    right = total = 0
    for row in tuned.data.validation:
        encoded = tokenizer(row["words"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = tuned.model(encoded.input_ids, encoded.attention_mask)[0][0].argmax(-1).tolist()
        firsts = [encoded.word_ids().index(number) for number in range(len(row["words"]))]
        right += sum(best[place] == tag for place, tag in zip(firsts, row["tags"]))
        total += len(firsts)
    assert tuned.metrics["validation"]["accuracy"] == pytest.approx(right / total)
    (tmp_path / "in.jsonl").write_text('{"text": "we saw the cat"}')
    predict(tuned.path, tmp_path / "in.jsonl", tmp_path / "out.jsonl", trust_remote_code=True)
    answer = json.loads((tmp_path / "out.jsonl").read_text())
    assert {token["label"] for token in answer["tokens"]} <= {"ANIMAL", "O"}


def test_answers_are_tuned(tokenizer, files, tmp_path: Path) -> None:
    SpanBert._auto_class = "AutoModelForQuestionAnswering"
    tuned = finetune(
        make(SpanBert), files["answers"], tmp_path / "out", task="question-answering", tokenizer=tokenizer, **QUICK
    )  # fmt: skip
    right = []
    for row in encode_answers(tuned.data, tokenizer, 32)["validation"]:
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            found = tuned.model(**inputs)
        right.append(
            found["start_logits"].argmax().item() == row["start_positions"]
            and found["end_logits"].argmax().item() == row["end_positions"]
        )
    assert tuned.metrics["validation"]["exact_match"] == pytest.approx(sum(right) / len(right))


def test_faults_of_the_data_are_named_by_row(tmp_path: Path) -> None:
    for task, row, message in [
        ("token-classification", {"tokens": ["a"], "tags": ["X", "Y"]}, "row 1, column 'tags': 2 labels for 1 words"),
        ("token-classification", {"tokens": "a b", "tags": ["X"]}, "row 1, column 'tokens': it is no list of words"),
        ("token-classification", {"text": "a"}, "name the one with the lists of words by --text-column"),
        ("question-answering", {"question": "a", "answer": "b"}, "name one of them context"),
        ("question-answering", {"question": "a", "context": "b b", "answer": "b"}, "'b' is 2 times in the context"),
        ("question-answering", {"question": "a", "context": "cb", "answer": "b", "answer_start": 0}, "no 'b' at the character 0"),
    ]:  # fmt: skip
        (tmp_path / "d.jsonl").write_text("\n".join([json.dumps(row)] * 4))
        with pytest.raises(DataError, match=re.escape(message)):
            load_data(tmp_path / "d.jsonl", task=task)

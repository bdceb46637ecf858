"""transformers' pipelines and streamers, also on a folder's own code, against stock models with the same weights."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny import from_stock_gpt2, mybert_config, mygpt2_config, stock_bert_config, stock_gpt2_config
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import mymodels
from mymodels.hub import build_repo
from mymodels.hub.releases import install, resolve
from mymodels.training.tokenizers import train_bert_tokenizer, train_gpt2_tokenizer

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "transformers"
TEXTS = ["the cat sat on the mat", "a dog", "where did the mat go and why did the dog sit on it"]
LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2}
BERT = {"label2id": LABELS, "id2label": {i: label for label, i in LABELS.items()}, "vocab_size": 83}
GPT2 = {"vocab_size": 290, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

# task → stock class, ours, what is asked, options of the call
CASES = {
    "text-classification": (BertForSequenceClassification, "MyBertForSequenceClassification", TEXTS, {"top_k": None}),
    "zero-shot-classification": (
        BertForSequenceClassification,
        "MyBertForSequenceClassification",
        TEXTS,
        {"candidate_labels": ["cats", "dogs"]},
    ),
    "token-classification": (BertForTokenClassification, "MyBertForTokenClassification", TEXTS, {}),
    "fill-mask": (BertForMaskedLM, "MyBertForMaskedLM", ["the [MASK] sat", "a dog [MASK] it"], {}),
    "feature-extraction": (BertModel, "MyBertModel", TEXTS, {}),
    "text-generation": (GPT2LMHeadModel, "MyGPT2ForCausalLM", TEXTS, {"do_sample": False, "max_new_tokens": 9}),
    "text-classification of MyGPT2": (GPT2ForSequenceClassification, "MyGPT2ForSequenceClassification", TEXTS, {}),
    "feature-extraction of MyGPT2": (GPT2Model, "MyGPT2Model", TEXTS, {}),
}


def same(found, expected) -> bool:
    """Equal in structure and texts, numbers within 1e-5."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected if isinstance(expected, str) else found == pytest.approx(expected, abs=1e-5)


def pair(case: str, folder: Path):
    """A stock model with its tokenizer, and a Hub repo folder of ours with the same weights."""
    stock_class, name, _, _ = CASES[case]
    if "Bert" in name:
        stock, mine = stock_class(stock_bert_config(**BERT)), getattr(mymodels, name)(mybert_config(**BERT))
        weights = stock.state_dict()
        weights.pop("cls.predictions.decoder.bias", None)  # a second name of another
        mine.load_state_dict(weights)
        tokenizer = train_bert_tokenizer(TEXTS, vocab_size=83, model_max_length=64)
    else:
        stock, mine = stock_class(stock_gpt2_config(**GPT2)), getattr(mymodels, name)(mygpt2_config(**GPT2))
        bare = stock_class is GPT2Model
        weights = from_stock_gpt2(
            {f"transformer.{name}" if bare else name: w for name, w in stock.state_dict().items()}
        )
        mine.load_state_dict({name.removeprefix("model.") if bare else name: w for name, w in weights.items()})
        tokenizer = train_gpt2_tokenizer(TEXTS, vocab_size=290, model_max_length=64)
    return stock.eval(), tokenizer, build_repo(mine, tokenizer, folder / f"{name}-folder", card="# card", golden=False)


@pytest.mark.parametrize("case", CASES)
def test_pipelines_give_what_the_stock_model_gives(case: str, tmp_path: Path) -> None:
    task, (_, _, asked, options) = case.partition(" of ")[0], CASES[case]
    stock, tokenizer, folder = pair(case, tmp_path)
    asking = pipeline(task, model=str(folder), device="cpu")
    expecting = pipeline(task, model=stock, tokenizer=tokenizer, device="cpu")
    for batch_size in (1, 2) if "feature" not in case else (1,):  # which shows states at padding, ours are 0
        found = asking(asked, batch_size=batch_size, **options)
        assert same(found, expecting(asked, batch_size=batch_size, **options))


SCRIPT = """
import json, sys
sys.modules["mymodels"] = None
from transformers import pipeline
for task, folder, asked, options in json.load(sys.stdin):
    asking = pipeline(task, model=folder, trust_remote_code=True, device="cpu")
    assert type(asking.model).__module__.startswith("transformers_modules.")
    print("found", json.dumps(asking(asked, **options), default=float))
"""


@pytest.mark.slow
def test_pipelines_on_the_folder_s_own_code(tmp_path: Path) -> None:
    jobs, expected = [], []
    for case, (_, _, asked, options) in CASES.items():
        task = case.partition(" of ")[0]
        stock, tokenizer, folder = pair(case, tmp_path / str(len(jobs)))
        jobs.append([task, str(folder), asked, options])
        expecting = pipeline(task, model=stock, tokenizer=tokenizer, device="cpu")
        expected.append(json.loads(json.dumps(expecting(asked, **options), default=float)))
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-c", SCRIPT]
    run = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, env=env)
    found = [json.loads(line.removeprefix("found ")) for line in run.stdout.splitlines() if line.startswith("found ")]
    assert len(found) == len(CASES), run.stderr
    for case, one, other in zip(CASES, found, expected):
        assert same(one, other), case


QUESTION = """
import json, sys
from transformers import pipeline
folder, question, context = sys.argv[1:]
answer = pipeline("question-answering", model=folder, trust_remote_code=True, device="cpu")
assert type(answer.model).__module__.startswith("transformers_modules.")
print(json.dumps(answer(question=question, context=context)))
"""


@pytest.mark.versions
@pytest.mark.parametrize("release", ["4.57", "5.2"])  # 5.3 and newer have no such pipeline
def test_question_answering_where_transformers_has_it(release: str, tmp_path: Path) -> None:
    stock = BertForQuestionAnswering(stock_bert_config(vocab_size=83))
    mine = mymodels.MyBertForQuestionAnswering(mybert_config(vocab_size=83))
    mine.load_state_dict(stock.state_dict())
    tokenizer = train_bert_tokenizer(TEXTS, vocab_size=83, model_max_length=64)
    stock.save_pretrained(tmp_path / "stock")
    folder = build_repo(mine, tokenizer, tmp_path / "mine", card="# card", golden=False)
    for file in folder.glob("tokenizer*"):  # 5.x writes them in a form that 4.x cannot read; `build_repo` does not
        shutil.copy(file, tmp_path / "stock")
    path = install(resolve([release])[0], CACHE)
    env = {**os.environ, "USE_TF": "0", "PYTHONPATH": str(path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    found = {}
    for place in (folder, tmp_path / "stock"):
        script = QUESTION if place == folder else QUESTION.replace("transformers_modules.", "transformers.")
        command = [sys.executable, "-c", script, str(place), "where did the dog sit", TEXTS[2]]
        run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        found[place] = json.loads(run.stdout.splitlines()[-1])
    assert same(*found.values())


def test_streamers_give_the_text_as_it_is_written(capsys: pytest.CaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "hub_repo" / "mygpt2")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "hub_repo" / "mygpt2").eval()
    inputs = tokenizer("It was a dark", return_tensors="pt")
    options = {**inputs, "do_sample": False, "max_new_tokens": 20}
    with torch.no_grad():
        whole = tokenizer.decode(model.generate(**options)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    writer = threading.Thread(target=model.generate, kwargs={**options, "streamer": streamer})
    writer.start()
    pieces = [piece for piece in streamer if piece]
    writer.join()
    assert "".join(pieces) == whole and len(pieces) > 5
    model.generate(**options, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out == whole + "\n"

"""The engines of benchmarks/ on tiny models: each gives what stock transformers gives."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, GPT2Config, GPT2LMHeadModel

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ENGINES = ("stock", "ours", "ONNX Runtime", "OpenVINO", "CTranslate2", "llama.cpp")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(95))]
ROWS = [[2, 9, 8, 7, 3], [2, 11, 3], [2, 40, 41, 42, 43, 44, 45, 3]]
PROMPTS = [[1, 2, 3, 4, 5], [200, 4, 90, 7, 7], [33, 32, 31, 30, 29]]

pytestmark = pytest.mark.rivals


@pytest.fixture(scope="module")
def engines():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("engines")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, engines) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 256, "vocab_size": 301, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None))
    importlib.import_module("engines.models").save(model.eval(), folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    config = BertConfig(**shape, vocab_size=len(WORDS), num_labels=8, initializer_range=0.2)
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    return folder


def start(engines, name: str, kind: str, folder: Path, precision: str):
    """The engine in this process, or a skip where it is not installed or has no such precision."""
    if name == "ours":
        return getattr(engines.load("ours"), kind)(folder, precision, 1, ours=True)
    engine = engines.ENGINES[name]
    if absent := engines.missing(name):
        pytest.skip(f"not installed: {', '.join(absent)}")
    if precision not in (engine.classifies if kind == "Classifier" else engine.generates):
        pytest.skip(f"{name} has no {precision} {kind.lower()} here")
    return getattr(engines.load(name), kind)(folder, precision, 1)


def expected(folder: Path) -> tuple[list[list[int]], np.ndarray]:
    """Greedy tokens of stock GPT-2, each from a whole forward pass, and the first one's log probabilities."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    ids, found = torch.tensor(PROMPTS), []
    with torch.no_grad():
        for _ in range(8):
            found.append(model(ids, use_cache=False).logits[:, -1].log_softmax(-1))
            ids = torch.cat([ids, found[-1].argmax(-1, keepdim=True)], 1)
    return ids[:, len(PROMPTS[0]) :].tolist(), found[0].numpy()


@pytest.mark.parametrize("name", ENGINES)
def test_generation_in_float32_is_stocks(engines, gpt2, name):
    tokens, log_probs = expected(gpt2)
    engine = start(engines, name, "Generator", gpt2, "float32")
    assert engine.generate(PROMPTS, 8) == tokens
    assert engine.generate(PROMPTS[:1], 8) == tokens[:1]  # another batch, after a cache that is full
    tolerance = 1e-3 if name == "ours" else engines.ENGINES[name].tolerance
    np.testing.assert_allclose(engine.log_probs(PROMPTS), log_probs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ENGINES[2:])
def test_generation_in_int8_is_close(engines, gpt2, name):
    _, log_probs = expected(gpt2)
    engine = start(engines, name, "Generator", gpt2, "int8")
    found = engine.log_probs(PROMPTS)
    divergence = (np.exp(log_probs) * (log_probs - found)).sum(-1)
    assert 0 < divergence.max() < 0.05  # above 0: it is int8
    assert [row[0] for row in engine.generate(PROMPTS, 8)] == found.argmax(-1).tolist()


@pytest.mark.parametrize("name", ENGINES[:-1])
def test_classification_in_float32_is_stocks(engines, bert, name):
    model = BertForSequenceClassification.from_pretrained(bert).eval()
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0].numpy() for row in ROWS]  # one by one, without padding
    engine = start(engines, name, "Classifier", bert, "float32")
    found = engine.logits([ROWS, ROWS[:1]])
    np.testing.assert_allclose(found[0], logits, atol=1e-3)
    np.testing.assert_allclose(found[1], logits[:1], atol=1e-3)


@pytest.mark.parametrize("name", ENGINES[2:-1])
def test_classification_in_int8_is_close(engines, bert, name, monkeypatch):
    texts = [" ".join(WORDS[5 + (start + 7 * i) % 95] for i in range(1 + start % 8)) for start in range(64)]
    monkeypatch.setattr(importlib.import_module("engines.models"), "reuters_texts", lambda part: texts)
    full = start(engines, "stock", "Classifier", bert, "float32").logits([ROWS])[0]
    found = start(engines, name, "Classifier", bert, "int8").logits([ROWS])[0]
    assert 0 < np.abs(found - full).max() < 0.25 * np.abs(full).max()  # OpenVINO's activations are in int8 as well


def test_an_engine_runs_in_a_process_of_its_own_and_its_errors_arrive(engines, gpt2):
    process = importlib.import_module("engines.process")
    with process.Worker("stock", "Generator", gpt2, "float32", 1) as worker:
        before = process.processor_seconds()
        assert worker.run("generate", PROMPTS, 8) == expected(gpt2)[0]
        assert 0 < process.processor_seconds() - before < 60
        with pytest.raises(
            SystemExit, match="stock, float32: AttributeError: 'Generator' object has no attribute 'nothing'"
        ):
            worker.run("nothing")
    assert worker.process.returncode == 0

"""Both models on the real engine, vLLM's Transformers backend on the CPU (`make test-vllm`).

The truth is transformers' own, in this process, of another release than the engine's.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import SWITCHES, mybert_config, mygpt2_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from mymodels import (
    MyBertForMaskedLM,
    MyBertForQuestionAnswering,
    MyBertForSequenceClassification,
    MyBertForTokenClassification,
    MyBertModel,
    MyGPT2ForCausalLM,
    MyGPT2ForSequenceClassification,
    MyGPT2Model,
)
from mymodels.training.tokenizers import train_gpt2_tokenizer

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".cache" / "vllm" / "bin" / "python"
HERE = Path(__file__).parent
pytestmark = pytest.mark.vllm

NEW = 16  # tokens to generate
PROMPTS = [[(7 * i * i + 3 * n) % 95 + 2 for i in range(n)] for n in (3, 11, 30, 40, 1)]  # all in one batch
TEXTS = ["The man", "Once upon a time, there was a girl who", "I", "It was in the year of our Lord one thousand and"]
REVIEWS = ["The market fell.", "Once upon a time a little rabbit went into the wood, and there it met a fox.", "Yes"]


class Case(NamedTuple):
    """A folder for the engine, what to ask, and how transformers answers: `truth(model, tokens)`."""

    make: Callable[[], PreTrainedModel]
    ask: str
    truth: Callable[[PreTrainedModel, torch.Tensor], object]
    engine: dict = {}


def greedy(model: PreTrainedModel, tokens: torch.Tensor, limit: int = NEW) -> dict[str, list]:
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=limit,
        min_new_tokens=limit,
        eos_token_id=None,
        no_repeat_ngram_size=0,  # the Hub folder's own generation settings have one, which vLLM does not know
    )
    logprobs = model(output).logits[0, tokens.shape[1] - 1 : -1].log_softmax(-1)
    best, second = logprobs.topk(2, dim=-1).values.unbind(-1)
    lead = (best - second).min().item()
    return {"tokens": output[0, tokens.shape[1] :].tolist(), "logprobs": best.tolist(), "lead": lead}


def probabilities(model: PreTrainedModel, tokens: torch.Tensor) -> list:
    return model(tokens).logits[0].softmax(-1).tolist()


def vector(model: PreTrainedModel, tokens: torch.Tensor) -> list[float]:
    return nn.functional.normalize(model(tokens).pooler_output[0], dim=-1).tolist()


def state(index: int) -> Callable[[PreTrainedModel, torch.Tensor], list[float]]:
    return lambda model, tokens: nn.functional.normalize(model(tokens)[0][0, index], dim=-1).tolist()


def gpt2(kind: type[PreTrainedModel], **switches) -> Callable[[], PreTrainedModel]:
    wide = {"n_embd": 128}  # heads of 32, the smallest that the engine's kernels take
    if "head_dim" in switches:
        switches["head_dim"] = 64
    return lambda: kind(mygpt2_config(**{**wide, **switches}))


def bert(kind: type[PreTrainedModel], **switches) -> Callable[[], PreTrainedModel]:
    return lambda: kind(mybert_config(**{"hidden_size": 128, "initializer_range": 0.1, "num_labels": 3, **switches}))


POOLINGS = ("pooler", "cls", "mean", "max", "attention")
CAUSAL = {**SWITCHES, "plain-scores": {"scale_attn_weights": False, "initializer_range": 0.05}}
CASES = {
    **{name: Case(gpt2(MyGPT2ForCausalLM, **switches), "generate", greedy) for name, switches in CAUSAL.items()},
    **{
        f"classifier-{pooling}": Case(bert(MyBertForSequenceClassification, pooling=pooling), "classify", probabilities)
        for pooling in POOLINGS
    },
    "classifier-layer-mix": Case(
        bert(MyBertForSequenceClassification, layer_mix=2, pooling="mean"), "classify", probabilities
    ),
    "classifier-causal": Case(
        gpt2(MyGPT2ForSequenceClassification, num_labels=3, **SWITCHES["modern"]), "classify", probabilities
    ),
    "tagger": Case(bert(MyBertForTokenClassification, pooling="mean"), "tag", probabilities),
    **{f"embedder-{pooling}": Case(bert(MyBertModel, pooling=pooling), "embed", vector) for pooling in POOLINGS[1:]},
    # by the engine's own pooling of the last hidden states, as with a stock BERT
    "embedder-pooler": Case(bert(MyBertModel), "embed", state(0)),
    "embedder-layer-mix": Case(bert(MyBertModel, layer_mix=2), "embed", state(0)),
    "embedder-causal": Case(
        gpt2(MyGPT2Model, **SWITCHES["modern"]), "embed", state(-1), {"pooler_config": {"pooling_type": "LAST"}}
    ),
    "embedder-causal-with-head": Case(
        gpt2(MyGPT2ForCausalLM), "embed", lambda model, tokens: state(-1)(model.model, tokens)
    ),
}
REFUSED = {
    "masked-lm": (bert(MyBertForMaskedLM), "generate", {}, "vLLM cannot serve MyBertForMaskedLM"),
    "masked-lm-embedder": (bert(MyBertForMaskedLM), "embed", {}, "vLLM cannot serve MyBertForMaskedLM"),
    "question-answering": (
        bert(MyBertForQuestionAnswering),
        "embed",
        {},
        "vLLM cannot serve MyBertForQuestionAnswering",
    ),
    "compiled-pooling": (
        bert(MyBertForSequenceClassification, pooling="mean"),
        "classify",
        {"enforce_eager": False},
        "this pooling needs vLLM's eager mode: add --enforce-eager",
    ),
}
HUB = {"hub_repo/mygpt2": ("generate", TEXTS, 200), "hub_repo/mybert": ("classify", REVIEWS, 256)}


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # biases and norms start as nothing
            nn.init.normal_(parameter, mean=float("norm" in name.lower() and name.endswith("weight")), std=0.3)
    return model.eval()


def save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    train_gpt2_tokenizer(["a b c"], vocab_size=97, model_max_length=64).save_pretrained(folder)


def environment(cache: Path) -> dict[str, str]:
    assert PYTHON.exists(), "vLLM's environment is missing: run `make test-vllm`"
    own = {"HF_MODULES_CACHE": str(cache), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**os.environ, **own, "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}


class Served(NamedTuple):
    results: dict[str, dict]
    truths: dict[str, list]
    log: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """All folders, each through an engine."""
    work = tmp_path_factory.mktemp("vllm")
    jobs, truths = [], {}

    def add(name: str, path: Path, ask: str, prompts: list, length: int, **engine) -> None:
        engine |= {"max_model_len": length, "kv_cache_memory_bytes": 2**26, **({} if ask == "generate" else POOLING)}
        jobs.append({"name": name, "path": str(path), "ask": ask, "prompts": prompts, "tokens": NEW, "engine": engine})

    for name, case in CASES.items():
        folder = work / name.replace("-", "_")
        for seed in range(20):  # the first weights for which no choice of a token is a near tie
            torch.manual_seed(seed)
            model = randomised(case.make())
            with torch.no_grad():
                truths[name] = [case.truth(model, torch.tensor([tokens])) for tokens in PROMPTS]
            if case.ask != "generate" or min(one["lead"] for one in truths[name]) > 5e-4:
                break
        else:
            raise AssertionError(f"{name}: near ties with every seed")
        save(model, folder)
        add(name, folder, case.ask, PROMPTS, 64, **case.engine)
    for name, (make, ask, engine, _) in REFUSED.items():
        folder = work / name.replace("-", "_")
        save(randomised(make()), folder)
        add(name, folder, ask, PROMPTS, 64, **engine)
    for path, (ask, texts, length) in HUB.items():
        add(path, ROOT / path, ask, texts, length)

    (work / "jobs.json").write_text(json.dumps(jobs))
    with open(work / "log.txt", "w") as log:
        command = [PYTHON, HERE / "vllm_engine.py", work / "jobs.json", work / "results.json"]
        code = subprocess.run(command, env=environment(work / "code"), stdout=log, stderr=log, timeout=1500).returncode
    log = (work / "log.txt").read_text()
    assert code == 0, log[-5000:]
    return Served(json.loads((work / "results.json").read_text()), truths, log)


POOLING = {"runner": "pooling"}


def answers(served: Served, name: str) -> list:
    result = served.results[name]
    assert "error" not in result, result
    return result["answers"]


def assert_same_generation(found: list[dict], expected: list[dict]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_every_switch_is_served_as_transformers_runs_it(served: Served, name: str) -> None:
    found, expected = answers(served, name), served.truths[name]
    if CASES[name].ask == "generate":
        assert_same_generation(found, expected)
        return
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_cannot_express_is_refused(served: Served, name: str) -> None:
    assert REFUSED[name][3] in served.results[name].get("error", "served")


@torch.no_grad()
def hub_truth() -> list[dict]:
    folder = ROOT / "hub_repo" / "mygpt2"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = [greedy(model, tokenizer(text, return_tensors="pt").input_ids) for text in TEXTS]
    return [one | {"text": tokenizer.decode(one["tokens"])} for one in found]


def test_the_hub_folder_generates(served: Served) -> None:
    assert_same_generation(answers(served, "hub_repo/mygpt2"), hub_truth())


@torch.no_grad()
def test_the_hub_folder_classifies(served: Served) -> None:
    folder = ROOT / "hub_repo" / "mybert"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = model(**tokenizer(REVIEWS, padding=True, return_tensors="pt")).logits.softmax(-1)
    torch.testing.assert_close(torch.tensor(answers(served, "hub_repo/mybert")), expected, atol=1e-4, rtol=0)


def test_the_engine_fuses(served: Served) -> None:
    for message in (
        "Fused: q_proj + k_proj + v_proj (self_attn: MyGPT2Attention) -> qkv_proj (QKVParallelLinear)",
        "Fused: gate_proj + up_proj (mlp: MyGPT2GatedMLP) -> gate_up_proj (MergedColumnParallelLinear)",
        "Fused: input_layernorm (RMSNorm) -> RMSNorm (CustomOp)",
        "Fused: q_norm (RMSNorm) -> RMSNorm (CustomOp)",
        "Fused: query + key + value (self: MyBertSelfAttention) -> qkv_proj (QKVParallelLinear)",
    ):
        assert message in served.log
    for name in (*CASES, *HUB):
        assert "QKVParallelLinear" in served.results[name]["modules"], name
    assert "SiluAndMul" in served.results["hub_repo/mygpt2"]["modules"]
    # the output projections are found too, which tensor parallelism needs: they get the partial sums together
    assert "RowParallelLinear" in served.results["stock"]["modules"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """`vllm serve` as the README says it; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON.with_name("vllm"), "serve", "hub_repo/mygpt2", "--trust-remote-code"]
    command += ["--model-impl", "transformers", "--enforce-eager", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(tmp_path / "code"), stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 180
        while not healthy(port):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()[-5000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started


def healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def test_vllm_serve_through_openais_client(server: str, tmp_path: Path) -> None:
    job = {"model": "hub_repo/mygpt2", "prompts": TEXTS, "tokens": NEW}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [PYTHON, HERE / "vllm_client.py", server, tmp_path / "job.json"]
    done = subprocess.run(command, env=environment(tmp_path / "code"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for found, expected in zip(json.loads(done.stdout), hub_truth(), strict=True):
        assert found["text"] == expected["text"]
        assert found["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)

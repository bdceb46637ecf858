"""ONNX: every switch, head and pooling in ONNX Runtime; the cache; int8; big weights; lines that run it; optimum."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import BERTS, COMBINED, ROOT, lines_that_run_it, mybert, mygpt2, run_lines
from tiny import GPT2, SWITCHES, batch, gpt2_pair
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from mymodels import cli, export_model
from mymodels.hub.releases import install, resolve

pytestmark = pytest.mark.export
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def exported(model: PreTrainedModel, tmp_path: Path, **options):
    model.save_pretrained(tmp_path / "model")
    return export_model(tmp_path / "model", "onnx", tmp_path / "out", **options)


def session(file: Path):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def greedy(file: Path, inputs: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """Prompt and `steps` tokens after it, for a batch padded on the left, with the graph's own cache."""
    graph = session(file)
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
    names = [output.name for output in graph.get_outputs()]
    past = {
        entry.name: np.zeros((len(ids), entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in graph.get_inputs()
        if entry.name.startswith("past_key_values")
    }
    tokens = ids
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clip(0)[:, -tokens.shape[1] :]
        feed = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, **past}
        results = dict(zip(names, graph.run(names, feed)))
        past = {name: results[name.replace("past_key_values", "present")] for name in past}
        tokens = results["logits"][:, -1:].argmax(-1)
        ids = np.concatenate((ids, tokens), axis=1)
        mask = np.concatenate((mask, np.ones_like(tokens)), axis=1)
    return torch.from_numpy(ids)


@pytest.mark.parametrize("name", COMBINED)
def test_a_language_model_writes_what_transformers_writes(name: str, tmp_path: Path) -> None:
    if name == "stock":
        truth, model = gpt2_pair()
    else:
        truth = model = mygpt2(**COMBINED[name])
    result = exported(model, tmp_path)
    assert result.differences.keys() == {"logits", "present"} and max(result.differences.values()) < 1e-4
    written = onnx.load(result.file)
    onnx.checker.check_model(written, full_check=True)
    assert [entry.version for entry in written.opset_import if not entry.domain] == [20] and result.opset == 20
    assert {entry.key: entry.value for entry in written.metadata_props}["opset"] == "20"
    assert [entry.name for entry in written.graph.input] == result.inputs
    assert result.inputs[:5] == [
        *("input_ids", "attention_mask", "position_ids"),
        *("past_key_values.0.key", "past_key_values.0.value"),
    ]
    assert [entry.name for entry in written.graph.output][:3] == ["logits", "present.0.key", "present.0.value"]
    assert not any(node.domain for node in written.graph.node)  # nothing but ONNX's own operations
    assert str(ROOT).encode() not in result.file.read_bytes()
    inputs = batch("left", rows=4, length=9)
    length = inputs["input_ids"].shape[1]
    expected = truth.generate(
        **inputs, do_sample=False, max_new_tokens=15, min_new_tokens=15, eos_token_id=None, pad_token_id=0
    )
    assert greedy(result.file, inputs, 15)[:, length:].equal(expected[:, length:])


@pytest.mark.parametrize("name", BERTS)
def test_every_head_and_pooling_of_mybert(name: str, tmp_path: Path) -> None:
    head, changes = BERTS[name]
    model = mybert(head, **changes)
    result = exported(model, tmp_path)
    assert max(result.differences.values()) < 1e-4
    graph = session(result.file)
    assert [entry.name for entry in graph.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    for rows, length in ((1, 3), (5, 19)):
        inputs = batch("right" if length > 10 else "none", rows, length)
        inputs["token_type_ids"] = torch.randint(2, inputs["input_ids"].shape)
        with torch.no_grad():
            expected = model(**inputs)
        for output, found in zip(result.outputs, graph.run(None, {k: v.numpy() for k, v in inputs.items()})):
            found = torch.from_numpy(found)
            if found.shape[:2] == (rows, length):  # per token
                found, wanted = (
                    found[inputs["attention_mask"].bool()],
                    expected[output][inputs["attention_mask"].bool()],
                )
            else:
                wanted = expected[output]
            assert (found - wanted).abs().max() < 1e-4, output
    assert ("pooler_output" in result.outputs) == (name == "bare")


@pytest.mark.parametrize("head, output", [("SequenceClassification", "logits"), ("", "last_hidden_state")])
def test_mygpt2_as_a_classifier_and_bare(head: str, output: str, tmp_path: Path) -> None:
    model = mygpt2(head, **SWITCHES["modern"])
    result = exported(model, tmp_path, opset=18)
    assert result.opset == 18 and list(result.differences) == [output] and result.differences[output] < 1e-4
    inputs = batch("right", 4, 13)
    (found,) = session(result.file).run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        expected = model(**inputs)[output]
    tokens = inputs["attention_mask"].bool() if not head else ...
    assert (torch.from_numpy(found)[tokens] - expected[tokens]).abs().max() < 1e-4


def test_an_opset_that_torch_does_not_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be exported to onnx: torch cannot write opset 14 for it, but 18"):
        exported(mybert("SequenceClassification"), tmp_path, opset=14)
    assert not (tmp_path / "out").exists()


def test_half_precision(tmp_path: Path) -> None:
    result = exported(mybert("SequenceClassification"), tmp_path, dtype="float16")
    assert result.dtype == "float16" and session(result.file).get_outputs()[0].type == "tensor(float16)"


@pytest.mark.parametrize("name, task", [("mygpt2", "text-generation"), ("mybert", "text-classification")])
def test_the_trained_models_in_int8(name: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["export", str(ROOT / "hub_repo" / name), "--to", "onnx", "--int8", "--out", str(tmp_path / "int8")]
    assert cli.main(arguments) == 0
    assert "decisions the same, KL" in capsys.readouterr().out
    written = onnx.load(tmp_path / "int8" / "model.onnx")
    stored = {tensor.name: tensor for tensor in written.graph.initializer}
    floats = sum(np.prod(t.dims) for t in stored.values() if t.data_type == onnx.TensorProto.FLOAT)
    assert {path.name for path in (tmp_path / "int8").glob("model*")} == {"model.onnx"}
    integers = sum(np.prod(t.dims) for t in stored.values() if t.data_type == onnx.TensorProto.INT8)
    assert integers > 10 * floats
    # the same numbers, measured here, on other texts
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "hub_repo" / name)
    loader = AutoModelForCausalLM if name == "mygpt2" else AutoModelForSequenceClassification
    model, graph = loader.from_pretrained(ROOT / "hub_repo" / name), session(tmp_path / "int8" / "model.onnx")
    rows = tokenizer("The wind blew over the hill, and the boy ran home to his mother before it was dark.")
    feed = {k: np.array([v]) for k, v in rows.items() if k in [entry.name for entry in graph.get_inputs()]}
    for entry in graph.get_inputs():
        if entry.name.startswith("past"):
            feed[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
    if name == "mygpt2":
        feed["position_ids"] = np.arange(feed["input_ids"].shape[1])[None]
    found = torch.from_numpy(graph.run(["logits"], feed)[0]).double().log_softmax(-1)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(feed["input_ids"])).logits.double().log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 < kl < 0.02


def test_big_weights_lie_beside_the_graph(tmp_path: Path) -> None:
    result = exported(mygpt2(), tmp_path, external_data_above=10_000)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    file = tmp_path / "moved" / "model.onnx"
    data = file.with_name("model.onnx_data")
    assert file.stat().st_size < data.stat().st_size and result.size == file.stat().st_size + data.stat().st_size
    onnx.checker.check_model(str(file), full_check=True)
    code = f"import onnxruntime; print(len(onnxruntime.InferenceSession({str(file)!r}).get_outputs()))"
    run = subprocess.run([sys.executable, "-I", "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert int(run.stdout) == 1 + 2 * GPT2["n_layer"]
    data.unlink()
    with pytest.raises(Exception, match=r"model\.onnx_data"):
        session(file)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a trained model's graph, exported once."""
    work = tmp_path_factory.mktemp("trained")

    def folder(name: str) -> Path:
        out = work / f"{name}_onnx"
        return out if out.exists() else export_model(ROOT / "hub_repo" / name, "onnx", out).folder

    return folder


def test_the_readmes_lines_generate_what_transformers_generates(trained: Callable[[str], Path]) -> None:
    source, folder = ROOT / "hub_repo" / "mygpt2", trained("mygpt2")
    assert len(lines_that_run_it(folder).splitlines()) < 30
    *_, ids = run_lines(folder, "print(ids.tolist())").splitlines()
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=20, no_repeat_ngram_size=0)
    assert json.loads(ids) == expected.tolist() and expected.shape[1] > inputs.input_ids.shape[1]


def test_the_readmes_lines_classify_as_torch_does(trained: Callable[[str], Path]) -> None:
    source = ROOT / "hub_repo" / "mybert"
    labels, logits = run_lines(trained("mybert"), "print(logits.tolist())").splitlines()
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForSequenceClassification.from_pretrained(source)
    texts = ["The cat sat on the mat.", "It was late."]
    with torch.no_grad():
        expected = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert (torch.tensor(json.loads(logits)) - expected).abs().max() < 1e-4
    assert labels == str([model.config.id2label[i] for i in expected.argmax(-1).tolist()])


OPTIMUM = """
import sys, torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSequenceClassification
from transformers import AutoTokenizer
folder, kind = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(["Once upon a time", "She"], padding=True, return_tensors="pt")
if kind == "classify":
    print(ORTModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)(**inputs).logits.tolist())
else:
    inputs.pop("token_type_ids", None)
    model = ORTModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    # optimum knows the shape of a cache by its own list of model types
    model.num_key_value_heads, model.embed_size_per_head = model.config.num_key_value_heads, model.config.head_dim
    print(model.generate(**inputs, do_sample=False, max_new_tokens=12, no_repeat_ngram_size=0).tolist())
assert "mymodels" not in sys.modules
"""


@pytest.mark.parametrize("name, kind", [("mygpt2", "generate"), ("mybert", "classify")])
def test_optimum_runs_it(name: str, kind: str, tmp_path: Path, trained: Callable[[str], Path]) -> None:
    """optimum-onnx 0.1 wants a transformers older than 4.58: it gets one, beside the installed one."""
    cache = ROOT / ".cache"
    release = install(resolve(["4.57"])[0], cache / "transformers")
    optimum = cache / "optimum-onnx-0.1.0"
    if not (optimum / "optimum" / "onnxruntime").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(optimum)]
        subprocess.run([*pip, "optimum==2.1.0", "optimum-onnx==0.1.0"], check=True)
    source = ROOT / "hub_repo" / name
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (optimum, release))), "USE_TF": "0"}
    run = subprocess.run(
        [sys.executable, "-c", OPTIMUM, str(trained(name)), kind],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    tokenizer = AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(["Once upon a time", "She"], padding=True, return_tensors="pt")
    if kind == "classify":
        with torch.no_grad():
            expected = AutoModelForSequenceClassification.from_pretrained(source)(**inputs).logits
        assert (found - expected).abs().max() < 1e-4
    else:
        inputs.pop("token_type_ids", None)
        model = AutoModelForCausalLM.from_pretrained(source)
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=12, no_repeat_ngram_size=0)
        assert found.equal(expected)

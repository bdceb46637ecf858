"""Two processes compute what one does: tensor and pipeline parallel, and fully sharded, by the models' own plans."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny import SWITCHES, batch, largest_difference, mybert_config, mygpt2_config
from transformers.distributed import DistributedConfig
from two_processes import fully_sharded, measure, one_step, pipeline, refusals, reloaded, run, tensor_parallel

import mymodels
from mymodels import MyGPT2ForCausalLM, open_checkpoint

MODELS_FOLDER = Path(mymodels.__file__).parent / "models"
HUB_REPO = Path(__file__).parents[2] / "hub_repo"
pytestmark = pytest.mark.slow

NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
BERT_CASES = {
    "classifier": ("MyBertForSequenceClassification", {}),
    "attention-pooling-mix": ("MyBertForSequenceClassification", {"pooling": "attention", "layer_mix": 3}),
    "mean-pooling": ("MyBertForSequenceClassification", {"pooling": "mean"}),
    "masked": ("MyBertForMaskedLM", {}),
    "masked-untied": ("MyBertForMaskedLM", {"tie_word_embeddings": False}),
    "tokens": ("MyBertForTokenClassification", {}),
}


def save_random(kind: str, config, folder: Path) -> None:
    """A model whose biases and norms are random too, not 0 and 1."""
    torch.manual_seed(1)
    model = getattr(mymodels, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def inputs_for(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    inputs = batch(
        "right" if "Bert" in kind else "left", rows=6, length=13
    )  # more rows than the fast products leave alone
    if kind.endswith("SequenceClassification"):
        return inputs | {"labels": torch.tensor([0, 1, 1, 0, 1, 1])}
    labels = inputs["input_ids"] % (2 if kind.endswith("TokenClassification") else 97)
    return inputs | {"labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for name, switches in SWITCHES.items():
        found[name] = ("MyGPT2ForCausalLM", folder / name)
        save_random(*found[name][:1], mygpt2_config(**switches, **NO_DROPOUT), folder / name)
    found["last-token"] = ("MyGPT2ForSequenceClassification", folder / "last-token")
    save_random(found["last-token"][0], mygpt2_config(**SWITCHES["modern"], **NO_DROPOUT), folder / "last-token")
    for name, (kind, switches) in BERT_CASES.items():
        found[name] = (kind, folder / name)
        drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        save_random(kind, mybert_config(**switches, **drop), folder / name)
    return found


SHARED_OUT = [name for name in [*SWITCHES, "last-token", *BERT_CASES] if name != "multi-query"]


GPT2_HALVED = """
    lm_head.weight model.embed_tokens.weight
    model.layers.*.self_attn.q_proj.weight model.layers.*.self_attn.k_proj.weight model.layers.*.self_attn.v_proj.weight
    model.layers.*.self_attn.o_proj.weight model.layers.*.mlp.up_proj.weight model.layers.*.mlp.down_proj.weight
"""
GPT2_BIASES = """
    model.layers.*.self_attn.q_proj.bias model.layers.*.self_attn.k_proj.bias model.layers.*.self_attn.v_proj.bias
    model.layers.*.mlp.up_proj.bias
"""
BERT_HALVED = """
    bert.embeddings.word_embeddings.weight bert.encoder.layer.*.attention.self.query.weight bert.encoder.layer.*.attention.self.query.bias
    bert.encoder.layer.*.attention.self.key.weight bert.encoder.layer.*.attention.self.key.bias
    bert.encoder.layer.*.attention.self.value.weight bert.encoder.layer.*.attention.self.value.bias
    bert.encoder.layer.*.attention.output.dense.weight bert.encoder.layer.*.intermediate.dense.weight
    bert.encoder.layer.*.intermediate.dense.bias bert.encoder.layer.*.output.dense.weight
"""
HALVED = {  # the whole head: its weight is that of the embeddings, counted once where they are tied
    "stock": GPT2_HALVED.replace("lm_head.weight", "") + GPT2_BIASES,
    "everything": GPT2_HALVED + " lm_head.bias model.layers.*.mlp.gate_proj.weight",
    "classifier": BERT_HALVED,
    "masked": BERT_HALVED,
}


@pytest.fixture(scope="module")
def two(models, tmp_path_factory) -> list[dict]:
    cases = {name: (*models[name], inputs_for(models[name][0])) for name in SHARED_OUT}
    return run(tensor_parallel, tmp_path_factory.mktemp("two"), cases)


@pytest.mark.parametrize("name", SHARED_OUT)
def test_tensor_parallel_is_the_same_model(name: str, models, two) -> None:
    kind, folder = models[name]
    expected = measure(getattr(mymodels, kind).from_pretrained(folder), inputs_for(kind))
    for result in (process[name] for process in two):
        assert largest_difference(result["logits"], expected["logits"]) <= 1e-5
        assert largest_difference(result["inference"], expected["inference"]) <= 1e-5
        assert result["gradients"].keys() == expected["gradients"].keys()
        for parameter, gradient in expected["gradients"].items():
            torch.testing.assert_close(result["gradients"][parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)
        assert torch.equal(result["tokens"], expected["tokens"]) if "tokens" in expected else True


@pytest.mark.parametrize(("name", "halved"), HALVED.items())
def test_each_process_holds_half_of_the_projections(name: str, halved: str, models, two) -> None:
    full = {
        key: tuple(p.shape)
        for key, p in getattr(mymodels, models[name][0]).from_pretrained(models[name][1]).named_parameters()
    }
    for process in two:
        shares = process[name]["shapes"]
        differ = {re.sub(r"\.\d+\.", ".*.", key) for key, shape in shares.items() if shape != full[key]}
        assert differ == set(halved.split())


@pytest.mark.parametrize("name", SHARED_OUT)
def test_what_two_processes_save_is_complete(name: str, models, two) -> None:
    folder = models[name][1]
    saved, again = open_checkpoint(folder), open_checkpoint(f"{folder}-again")
    for key in saved:
        assert torch.equal(saved[key], again[key])
    # transformers 5.23 writes a tied matrix out twice after tensor parallelism, whatever the model
    twice = {
        "lm_head.weight": "model.embed_tokens.weight",
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    }
    for key in again.keys() - saved.keys():
        assert torch.equal(again[key], saved[twice[key]])
    configs = [json.loads((Path(place) / "config.json").read_text()) for place in (folder, f"{folder}-again")]
    configs[1].pop("problem_type", None)  # which the first loss notes
    assert configs[0] == configs[1]
    assert not [field for field in configs[1] if "plan" in field or "distributed" in field]


def test_heads_that_cannot_be_shared_out_are_refused(models, tmp_path: Path) -> None:
    save_random("MyBertForMaskedLM", mybert_config(num_attention_heads=1), tmp_path / "one-head")
    cases = {"multi-query": models["multi-query"], "one-head": ("MyBertForMaskedLM", tmp_path / "one-head")}
    for said in run(refusals, tmp_path, cases):
        assert said == {
            "multi-query": "MyGPT2Config: num_key_value_heads=1, but it must be a multiple of tp_size=2: "
            "each process gets the same number of heads",
            "one-head": "MyBertConfig: num_attention_heads=1, but it must be a multiple of tp_size=2: "
            "each process gets the same number of heads",
        }


STAGED = ["stock", "modern", "everything", "untied", "sliding-mixed", "multi-query"]


@pytest.mark.parametrize("processes", [2, 3])
def test_pipeline_is_the_same_model(processes: int, models, tmp_path: Path) -> None:
    inputs = {key: inputs_for("MyGPT2ForCausalLM")[key] for key in ("input_ids", "attention_mask")}
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    given = [{"input_ids": inputs["input_ids"]}, inputs]
    for result in run(pipeline, tmp_path, {name: (models[name][1], given) for name in STAGED}, processes=processes):
        for name in STAGED:
            one = MyGPT2ForCausalLM.from_pretrained(models[name][1]).eval()
            assert len(result[name]["parameters"]) < len(list(one.parameters()))
            assert largest_difference(result[name]["step"], result[name]["outputs"][0][0][:, -1:]) <= 1e-5, name
            for (logits, tokens), batch_given in zip(result[name]["outputs"], given):
                with torch.no_grad():
                    assert largest_difference(logits, one(**batch_given).logits) <= 1e-5, name
                    assert torch.equal(tokens, one.generate(**batch_given, do_sample=False, max_new_tokens=12)), name


TRAINED = ["stock", "everything", "classifier", "masked", "masked-untied"]


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory) -> list[dict]:
    cases = {name: (*models[name], full_rows(models[name][0])) for name in TRAINED}
    return run(fully_sharded, tmp_path_factory.mktemp("trained"), cases)


def full_rows(kind: str) -> dict[str, torch.Tensor]:
    """Without padding, so that the mean over processes is the mean over labels."""
    inputs = inputs_for(kind)
    inputs = inputs | {"input_ids": inputs["input_ids"].clamp(min=2)}
    labels = inputs["labels"] if inputs["labels"].ndim == 1 else inputs["input_ids"]
    return {"input_ids": inputs["input_ids"], "labels": labels}


@pytest.mark.parametrize("name", TRAINED)
def test_a_fully_sharded_step_is_the_same_step(name: str, models, trained, one_step_done) -> None:
    expected = one_step_done(name)
    for process in trained:
        assert process[name].keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(process[name][key], tensor, rtol=0, atol=1e-5, msg=key)
        held = sum(process[f"{name} local"].values())
        assert held <= 0.55 * sum(p.numel() for p in load(*models[name]).parameters())


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_saved_sharded_loads_on_one_process(name: str, models, trained, one_step_done) -> None:
    kind, folder = models[name]
    expected = one_step_done(name)
    plain = {"model": {key: torch.empty_like(tensor) for key, tensor in expected.items()}}
    dcp.load(plain, checkpoint_id=f"{folder}-dcp", no_dist=True)
    gathered = load(kind, f"{folder}-gathered").state_dict()
    for found in (plain["model"], gathered):
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5, msg=key)


def test_what_is_saved_sharded_loads_on_another_layout(models, trained, one_step_done, tmp_path: Path) -> None:
    tensor, shards = DistributedConfig(tp_size=2), DistributedConfig(fsdp_size=2)
    cases = {}
    for name in TRAINED:
        kind, folder = models[name]
        cases[f"{name} tensor"] = (kind, f"{folder}-sharded", tensor)
        cases[f"{name} shards"] = (kind, f"{folder}-gathered", shards)
    for process in run(reloaded, tmp_path, cases):
        for case, found in process.items():
            for key, tensor in one_step_done(case.split()[0]).items():
                torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5, msg=f"{case} {key}")


def load(kind: str, folder) -> torch.nn.Module:
    return getattr(mymodels, kind).from_pretrained(folder)


@pytest.fixture(scope="module")
def one_step_done(models) -> Callable[[str], dict]:
    @functools.cache
    def weights(name: str) -> dict[str, torch.Tensor]:
        kind, folder = models[name]
        model = load(kind, folder)
        one_step(model, full_rows(kind))
        return {key: tensor.detach() for key, tensor in model.state_dict().items()}

    return weights


@pytest.mark.parametrize(
    ("name", "auto_class"), [("mygpt2", "AutoModelForCausalLM"), ("mybert", "AutoModelForSequenceClassification")]
)
def test_a_hub_folder_with_its_own_code_under_torchrun(name: str, auto_class: str, tmp_path: Path) -> None:
    folder = tmp_path / f"parallel-{name}"
    shutil.copytree(HUB_REPO / name, folder, ignore=shutil.ignore_patterns("*.py"))
    for file in MODELS_FOLDER.glob("*.py"):  # the code as it is now, not as it was shipped
        if file.name != "__init__.py":
            shutil.copy(file, folder)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    script = [Path(__file__).with_name("remote_parallel.py"), folder, auto_class, tmp_path / "out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher in ([], torchrun):
        done = subprocess.run([sys.executable, *launcher, *script], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    one, *two = (torch.load(tmp_path / f"out-{rank}.pt") for rank in ("-", 0, 1))
    for process in two:
        assert process["sharded"] >= 10
        assert largest_difference(process["logits"], one["logits"]) <= 1e-5
        for parameter, gradient in one["gradients"].items():
            torch.testing.assert_close(process["gradients"][parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)
        assert torch.equal(process["tokens"], one["tokens"]) if "tokens" in one else True

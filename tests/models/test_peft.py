"""PEFT on both models: default targets, a step, merging, saving, and loading where mymodels does not exist."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import warm_python
from tiny import largest_difference, mybert_config, mygpt2_config
from transformers import AutoTokenizer

import mymodels
from mymodels import MyBertForSequenceClassification, MyGPT2ForCausalLM

HUB = Path(__file__).parents[2] / "hub_repo"
TASKS = {
    "mygpt2": (MyGPT2ForCausalLM, mygpt2_config, "CAUSAL_LM", {"q_proj", "v_proj"}),
    "mybert": (MyBertForSequenceClassification, mybert_config, "SEQ_CLS", {"query", "value"}),
}
METHODS = {
    "lora": lambda task: peft.LoraConfig(task_type=task, r=4, lora_dropout=0.0),
    "dora": lambda task: peft.LoraConfig(task_type=task, r=4, use_dora=True),
    "loha": lambda task: peft.LoHaConfig(task_type=task, r=4),
    "ia3": lambda task: peft.IA3Config(task_type=task),
    "vera": lambda task: peft.VeraConfig(task_type=task, r=4),
    "ln": lambda task: peft.LNTuningConfig(task_type=task),
}


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(2, 97, (3, 11))
    labels = input_ids if name == "mygpt2" else torch.tensor([0, 1, 1])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TASKS)
def test_default_targets_a_step_and_merging(name: str, method: str) -> None:
    if (name, method) == ("mybert", "ln"):
        pytest.skip("PEFT has no such default for BERT either")
    model_class, config, task, targets = TASKS[name]
    base = model_class(config(**({"rope_theta": 500.0, "position_embedding_type": "rope"} if name == "mygpt2" else {})))
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = peft.get_peft_model(base, METHODS[method](task))
    if method == "lora":
        assert model.peft_config["default"].target_modules == targets
    inputs = inputs_of(name)
    with torch.no_grad():
        untouched = model.eval()(**inputs).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model.train()(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        adapted = model.eval()(**inputs).logits
        merged = model.merge_and_unload()
        assert type(merged) is model_class
        assert largest_difference(merged(**inputs).logits, adapted) <= 1e-4
    assert largest_difference(adapted, untouched) > 1e-2
    changed = [key for key, value in merged.state_dict().items() if not torch.equal(value, before[key])]
    heads = ("classifier",) if name == "mybert" else ()
    wanted = {"ln": ("norm", "LayerNorm")}.get(method, tuple(targets))
    assert changed and (
        method == "ia3"
        or all(key.split(".")[-2] in wanted or "norm" in key or key.split(".")[0] in heads for key in changed)
    )


@pytest.mark.slow
def test_importing_mymodels_leaves_peft_alone_until_it_is_needed() -> None:
    script = """
import sys, mymodels
assert "peft" not in sys.modules
finders = len(sys.meta_path)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table
assert (table["mygpt2"], table["mybert"]) == (table["llama"], table["bert"])
assert len(sys.meta_path) == finders - 1
"""
    folder = Path(mymodels.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr


ELSEWHERE = """
import json, sys
sys.modules["mymodels"] = None
import peft, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
hub, adapter, name = sys.argv[1:]
loader = {"mygpt2": peft.AutoPeftModelForCausalLM, "mybert": peft.AutoPeftModelForSequenceClassification}[name]
model = loader.from_pretrained(adapter, trust_remote_code=True).eval()
assert type(model.base_model.model).__module__.startswith("transformers_modules.")
batch = AutoTokenizer.from_pretrained(hub)("It was a dark night", return_tensors="pt")
with torch.no_grad():
    adapted = model(**batch).logits
    merged = model.merge_and_unload()(**batch).logits
    base = {"mygpt2": AutoModelForCausalLM, "mybert": AutoModelForSequenceClassification}[name]
    fresh = peft.get_peft_model(base.from_pretrained(hub, trust_remote_code=True), peft.LoraConfig(target_modules="all-linear"))
print(json.dumps([adapted.tolist(), merged.tolist(), sorted({t.split(".")[-1] for t in fresh.targeted_module_names})]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_saved_and_loaded_where_mymodels_does_not_exist(name: str, tmp_path: Path) -> None:
    model_class, _, task, _ = TASKS[name]
    model = peft.get_peft_model(model_class.from_pretrained(HUB / name), METHODS["lora"](task))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    batch = AutoTokenizer.from_pretrained(HUB / name)("It was a dark night", return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(HUB / name), str(tmp_path / "adapter"), name]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = warm_python.run(command, env=env)
    assert run.returncode == 0, run.stderr
    adapted, merged, targets = json.loads(run.stdout[run.stdout.index("[[") :])
    assert largest_difference(torch.tensor(adapted), expected) <= 1e-5
    assert largest_difference(torch.tensor(merged), expected) <= 1e-4
    matrices = {"mygpt2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}}
    assert set(targets) == matrices.get(name, {"query", "key", "value", "dense", "score", "classifier"})

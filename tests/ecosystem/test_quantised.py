"""Both folders quantised while they load, by torchao and bitsandbytes on the CPU, where mymodels does not exist."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mymodels.training.sample_text import load_sample_text, passages

HUB = Path(__file__).parents[2] / "hub_repo"
pytestmark = pytest.mark.ecosystem

SCRIPT = """
import json, sys
sys.modules["mymodels"] = None
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import BitsAndBytesConfig, TorchAoConfig
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

CONFIGS = {
    "none": lambda: None,
    "int8 weights": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "int8 dynamic": lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    "bnb int8": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]),
    "bnb nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "classifier", "score"],  # its kernel wants many rows
    ),
}

def size(model):
    def of(tensor):
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        return sum(of(getattr(tensor, name)) for name in parts) if parts else tensor.numel() * tensor.element_size()
    return sum(of(tensor) for tensor in model.state_dict().values())

def run(model, batches):
    with torch.no_grad():
        return torch.cat([model(**batch).logits.float().flatten(0, -2) for batch in batches])

job = json.load(sys.stdin)
loader = AutoModelForCausalLM if job["name"] == "mygpt2" else AutoModelForSequenceClassification
tokenizer = AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=True)
options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
batches = [tokenizer(job["texts"][i : i + 8], **options) for i in range(0, len(job["texts"]), 8)]
told, exact = {}, None
for label, make in CONFIGS.items():
    if job["saved"]:
        model, config = loader.from_pretrained(f"{job['out']}/{label}", trust_remote_code=True).eval(), None
    else:
        config = make()
        more = {} if config is None else {"quantization_config": config, "device_map": "cpu"}
        model = loader.from_pretrained(job["folder"], trust_remote_code=True, **more).eval()
        model.save_pretrained(f"{job['out']}/{label}")
    assert type(model).__module__.startswith("transformers_modules.")
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layer" in n]
    logits = run(model, batches)
    exact = logits if exact is None else exact
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="none"
    )
    told[label] = {
        "bytes": size(model),
        "weights": sorted({type(linear.weight).__name__ for linear in linears}),
        "divergence": divergence.sum(-1).mean().item(),
        "agreement": (logits.argmax(-1) == exact.argmax(-1)).float().mean().item(),
        "sum": [float(x) for x in logits.double().sum(-1)[::7]],
    }
    if job["name"] == "mygpt2":
        with torch.no_grad():
            losses = [model(**b, labels=b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)).loss for b in batches]
        told[label]["loss"] = torch.stack(losses).mean().item()
        told[label]["greedy"] = model.generate(**tokenizer(job["texts"][0][:50], return_tensors="pt"), do_sample=False,
            max_new_tokens=8)[0].tolist()
print("told", json.dumps(told))
"""

# label → class of the weights, largest mean KL of the outputs in nats: of the language model, of the classifier
EXPECTED = {
    "int8 weights": ("Int8Tensor", 1e-3, 1e-4),
    "int8 dynamic": ("Int8Tensor", 5e-3, 1e-3),
    "bnb int8": ("Int8Params", 5e-3, 1e-3),
    "bnb nf4": ("Params4bit", 5e-2, 5e-2),
}


def run(name: str, out: Path, *, saved: bool) -> dict:
    texts = [text for text, _ in passages(load_sample_text("held_out"), 60)[:24]]
    job = {"name": name, "folder": str(HUB / name), "out": str(out), "texts": texts, "saved": saved}
    env = {**os.environ, "HF_MODULES_CACHE": str(out / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", SCRIPT]
    process = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=env, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout[process.stdout.index("told ") + 5 :])


@pytest.mark.parametrize("name", ["mygpt2", "mybert"])
def test_quantised_while_loading_saved_and_loaded_again(name: str, tmp_path: Path) -> None:
    told, again = run(name, tmp_path, saved=False), run(name, tmp_path, saved=True)
    print(
        json.dumps({label: {k: v for k, v in row.items() if k not in ("sum", "greedy")} for label, row in told.items()})
    )
    assert told["none"]["weights"] == ["Parameter"]
    for label, (kind, of_language_model, of_classifier) in EXPECTED.items():
        row = told[label]
        assert row["weights"] == [kind], label  # what runs is quantised: our own fast products have stepped aside
        assert 0 < row["divergence"] < (of_language_model if name == "mygpt2" else of_classifier), label
        assert row["bytes"] < told["none"]["bytes"] * 0.7, label  # the embeddings stay as they are
        assert row["agreement"] > 0.9, label
        if name == "mygpt2":
            assert row["loss"] == pytest.approx(told["none"]["loss"], rel=0.02), label
        assert again[label]["weights"] == [kind] and again[label]["bytes"] == row["bytes"], label
        assert again[label]["sum"] == row["sum"] and again[label].get("greedy") == row.get("greedy"), label

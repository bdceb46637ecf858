"""MyBert as the backbone of a SentenceTransformer, from its folder's own code, where mymodels does not exist."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

HUB = Path(__file__).parents[2] / "hub_repo"
TEXTS = ["The cat sat on the mat.", "A dog.", "Where did the mat go, and why did the dog sit on it all day long?"]
pytestmark = pytest.mark.ecosystem

SCRIPT = """
import json, sys
sys.modules["mymodels"] = None
import torch
from sentence_transformers import InputExample, SentenceTransformer, losses
from sentence_transformers.models import Pooling, Transformer
folder, out = sys.argv[1:]
texts = json.load(sys.stdin)
trust = {"trust_remote_code": True}
backbone = Transformer(folder, model_args=trust, tokenizer_args=trust, config_args=trust)
assert type(backbone.auto_model).__module__.startswith("transformers_modules.")
model = SentenceTransformer(modules=[backbone, Pooling(backbone.get_word_embedding_dimension(), "mean")], device="cpu")
model.eval()
together, alone = model.encode(texts, batch_size=8), [model.encode([text])[0] for text in texts]
model.save(out)
again = SentenceTransformer(out, trust_remote_code=True, device="cpu")
assert type(again[0].auto_model).__module__.startswith("transformers_modules.")
features = model.tokenize(texts)
loss = losses.CosineSimilarityLoss(model.train())([features, features], torch.tensor([0.0, 0.5, 0.1]))
loss.backward()
grad = model[0].auto_model.embeddings.word_embeddings.weight.grad.abs().sum().item()
print("told", json.dumps({"together": together.tolist(), "alone": [row.tolist() for row in alone],
    "again": again.encode(texts).tolist(), "grad": grad}))
"""


@torch.no_grad()
def mean_of_the_hidden_states(text: str) -> torch.Tensor:
    encoded = AutoTokenizer.from_pretrained(HUB / "mybert")(text, return_tensors="pt")
    return AutoModel.from_pretrained(HUB / "mybert").eval()(**encoded).last_hidden_state[0].mean(dim=0)


def test_encode_save_load_and_a_gradient(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-c", SCRIPT, str(HUB / "mybert"), str(tmp_path / "saved")]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, input=json.dumps(TEXTS), capture_output=True, text=True, env=env, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    told = json.loads(process.stdout[process.stdout.index("told ") + 5 :])
    expected = torch.stack([mean_of_the_hidden_states(text) for text in TEXTS])  # one by one: no padding at all
    for how in ("together", "alone", "again"):
        assert (torch.tensor(told[how]) - expected).abs().max() <= 1e-5, how
    assert told["grad"] > 0

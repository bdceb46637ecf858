"""`--attention-interface`: from an old folder to a model that computes the same by "eager" and by "sdpa"."""

import json
import subprocess
import sys
from pathlib import Path

import folders
import pytest

from mymodels.hub.upgrading import upgrade

CACHE = Path(__file__).parents[2] / ".cache" / "transformers"
OTHER = """
import torch
from torch import nn
from transformers import PreTrainedModel, PretrainedConfig


class OldConfig(PretrainedConfig):
    model_type = "old"


class Attention(nn.Module):
    def forward(self, q, k, v, mask):
        {scores}
        weights = scores.softmax(-1)
        return torch.bmm(weights, v)


class Router(nn.Module):
    def forward(self, x):
        return x.softmax(-1)


class OldModel(PreTrainedModel):
    config_class = OldConfig

    def __init__(self, config):
        super().__init__(config)
        self.attention = Attention()
        self.post_init()

    def forward(self, input_ids):
        return self.attention(input_ids)
"""
LOADED = """
import json, sys, torch
from transformers import AutoModelForCausalLM
ids = torch.tensor([[5, 9, 13, 4, 21, 8], [0, 0, 7, 3, 44, 6]])
mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
found = {}
for name in ("eager", "sdpa"):
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], trust_remote_code=True, dtype=torch.float32, attn_implementation=name
    ).eval()
    calls = []
    own = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda *a, **k: calls.append(1) or own(*a, **k)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    torch.nn.functional.scaled_dot_product_attention = own
    found[name] = [model.config._attn_implementation, len(calls), logits[mask == 1].flatten().tolist()]
print(json.dumps(found))
"""


@pytest.mark.versions
def test_the_same_numbers_by_eager_and_by_sdpa(tmp_path: Path) -> None:
    old = folders.make("stablelm", tmp_path / "old-model")
    result = upgrade(old, tmp_path / "new", from_release="4.36", to="5.23", attention_interface=True, cache_dir=CACHE)
    assert result.proven and not result.undone, (result.refused, result.undone, result.proof and result.proof.bad)
    assert "attention interface" in result.rules and result.golden.startswith(
        "recorded from the original under transformers 4.36"
    )
    command = [sys.executable, "-c", LOADED, str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [found[name][0] for name in ("eager", "sdpa")] == ["eager", "sdpa"]
    assert found["eager"][1] == 0 and found["sdpa"][1] > 0  # it really is torch's own function
    assert found["sdpa"][2] == pytest.approx(found["eager"][2], abs=1e-5)


@pytest.mark.parametrize(
    "scores", ["scores = torch.baddbmm(mask, q, k.transpose(1, 2))", "scores = q @ k.transpose(1, 2) + mask"]
)
def test_another_form_is_refused_by_line(scores: str, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "modeling_old.py").write_text(OTHER.format(scores=scores))
    auto_map = {"AutoConfig": "modeling_old.OldConfig", "AutoModel": "modeling_old.OldModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "old", "auto_map": auto_map}))
    result = upgrade(folder, dry_run=True, attention_interface=True)
    assert [place.where for place in result.refused] == ["modeling_old.py:12"]
    assert "the attention of Attention has another form" in result.refused[0].what
    assert not upgrade(folder, dry_run=True).refused

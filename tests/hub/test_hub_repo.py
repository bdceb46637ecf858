"""The committed `hub_repo/` folders are what `build_repo` makes of their own weights today, and load as they stand."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from mymodels.demo import LABELS, make_mybert, make_mygpt2
from mymodels.hub import build_repo, load_in_clean_process
from mymodels.training.sample_text import load_sample_text, passages

HUB_REPO = Path(__file__).parents[2] / "hub_repo"
CLASSES = {"mygpt2": AutoModelForCausalLM, "mybert": AutoModelForSequenceClassification}


@pytest.mark.parametrize("name", CLASSES)
def test_no_drift(name: str, tmp_path: Path) -> None:
    committed = HUB_REPO / name
    model, tokenizer = CLASSES[name].from_pretrained(committed), AutoTokenizer.from_pretrained(committed)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    card = (committed / "README.md").read_text(encoding="utf-8")
    built = build_repo(model, tokenizer, tmp_path / name, card=card, max_shard_size=size // 3)
    assert sorted(path.name for path in built.iterdir()) == sorted(path.name for path in committed.iterdir())
    for path in built.iterdir():
        if path.name not in ("golden.safetensors", "manifest.json"):
            assert path.read_bytes() == (committed / path.name).read_bytes(), (
                f"{path.name} drifted: run `make hub_repo`"
            )
    # recorded outputs may differ in the last bits from one processor to another, and their hash with them
    ours, theirs = (load_file(folder / "golden.safetensors") for folder in (built, committed))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= 1e-4, f"{name} drifted: run `make hub_repo`"
    manifests = [json.loads((folder / "manifest.json").read_text())["files"] for folder in (built, committed)]
    for manifest in manifests:
        manifest.pop("golden.safetensors")
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("name", CLASSES)
def test_size_and_shards(name: str) -> None:
    files = list((HUB_REPO / name).iterdir())
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert len([path for path in files if path.suffix == ".safetensors"]) >= 2


def test_mygpt2_continues_a_sentence_in_a_clean_process() -> None:
    report, _ = load_in_clean_process(HUB_REPO / "mygpt2", ["AutoModelForCausalLM"], texts=["Oh"], prompt="Once upon a")
    seen = report["models"]["AutoModelForCausalLM"]
    assert seen["continuation"].startswith("Once upon a") and len(seen["continuation"].split()) > 10
    assert not seen["missing_keys"] + seen["unexpected_keys"] + seen["mismatched_keys"]


@pytest.mark.slow
@pytest.mark.usefixtures("real_start")
def test_mybert_classifies_held_out_passages_in_a_clean_process() -> None:
    texts, labels = zip(*passages(load_sample_text("held_out")))
    _, outputs = load_in_clean_process(HUB_REPO / "mybert", ["AutoModelForSequenceClassification"], texts=list(texts))
    right = sum(LABELS[guess] == label for guess, label in zip(outputs.popitem()[1].argmax(-1), labels))
    assert len(LABELS) == 2 and right / len(labels) > 0.8  # the majority class has 0.55


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_mygpt2, make_mybert])
def test_the_documented_command_makes_such_a_folder(make, tmp_path: Path) -> None:
    repo = make(tmp_path / "repo", num_train_epochs=1)
    committed = HUB_REPO / repo.model.config.model_type
    assert sorted(path.name for path in repo.path.iterdir()) == sorted(path.name for path in committed.iterdir())

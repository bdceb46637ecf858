"""`mymodels demo`: what it shows, its exit code, one sentence for what goes wrong."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mymodels import cli, demo


def test_an_output_folder_with_something_else_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mybert").mkdir()
    (tmp_path / "mybert" / "notes.txt").write_text("dear")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("mymodels demo: ") and captured.err.count("\n") == 1
    assert "mybert exists and its manifest.json does not list" in captured.err
    assert not (tmp_path / "mygpt2").exists()


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with 4 of its 112 documents, so that it takes seconds."""
    load = demo.load_sample_text
    monkeypatch.setattr(demo, "load_sample_text", lambda split: load(split)[:: 37 if split == "train" else 9])


def test_the_demo_shows_what_happened(small_demo: None, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), record=True, width=160)
    demo.run_demo(tmp_path, console)
    shown = console.export_text()
    assert "model.safetensors.index.json" in shown and "modeling_mygpt2.py" in shown
    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel"):
        assert f"{name}: no tensor missing, mismatched" in shown
        assert f"{name}: largest difference between its outputs there and here" in shown
    assert "held-out loss" in shown and "majority class" in shown and demo.PROMPT in shown


@pytest.mark.slow
def test_the_demo_fails_when_the_saved_weights_are_not_the_model_s(
    small_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = demo.build_repo

    def build_and_change(model, *args, **kwargs):
        folder = build(model, *args, **kwargs)
        with torch.no_grad():
            model.get_input_embeddings().weight[5:] += 0.01
        return folder

    monkeypatch.setattr(demo, "build_repo", build_and_change)
    console = Console(file=io.StringIO(), record=True, width=160)
    monkeypatch.setattr("mymodels.cli.demo.console", lambda: console)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert "FAILED" in console.export_text()

"""Exporting as such, by the quickest kind: what the folder holds, what is refused, what a wrong graph does."""

import json
import sys
from pathlib import Path

import pytest
import torch
from exports import COMBINED, mybert, mygpt2
from tiny import MODERN, SWITCHES, stock_bert_config, stock_gpt2_config
from transformers import AutoTokenizer, BertForMaskedLM, GPT2LMHeadModel, PreTrainedModel, T5Config, ViTConfig
from transformers import T5ForConditionalGeneration as T5
from transformers import ViTForImageClassification as ViT

from mymodels import cli, export_model
from mymodels.export import ParityError, exporting, parity, programs

ROOT = Path(__file__).parents[2]


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_the_combinations_hold_every_switch() -> None:
    wanted = {(name, str(value)) for changes in SWITCHES.values() for name, value in changes.items()}
    there = {(name, str(value)) for changes in COMBINED.values() for name, value in changes.items()}
    assert {name for name, _ in wanted} == {name for name, _ in there}
    assert {"rope", "none"} == {value for name, value in there if name == "position_embedding_type"}


@pytest.mark.parametrize("name", ["stock", "everything"])
def test_torchscript_takes_any_batch_and_length(name: str, tmp_path: Path) -> None:
    model = mygpt2(**SWITCHES[name])
    exported = export_model(saved(model, tmp_path / "model"), "torchscript", tmp_path / "out")
    assert exported.differences["logits"] < 1e-5 and exported.task == "text-generation"
    traced = torch.jit.load(exported.file)
    for rows, length in ((1, 1), (5, 3), (2, 41)):  # none of them traced or compared before
        ids = torch.randint(2, 97, (rows, length))
        mask = torch.ones_like(ids)
        mask[1:, : length // 2] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            expected = model(**inputs).logits[mask.bool()]
        assert (traced(**inputs)["logits"][mask.bool()] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("stock", [GPT2LMHeadModel(stock_gpt2_config()), BertForMaskedLM(stock_bert_config())])
def test_stock_models_are_exported_too(stock: PreTrainedModel, tmp_path: Path) -> None:
    exported = export_model(saved(stock, tmp_path / "model"), "torchscript", tmp_path / "out")
    assert exported.differences["logits"] < 1e-5


def test_the_folder_stands_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["export", str(ROOT / "hub_repo" / "mygpt2"), "--to", "torchscript", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "model_torchscript.pt" in shown and "legacy" in shown and "fixed by the trace" in shown
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("README.md", "config.json", "generation_config.json", "model_torchscript.pt"),
        *("tokenizer.json", "tokenizer_config.json", "configuration_mygpt2.py", "base.py", "compat.py"),
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_mygpt2.MyGPT2Config"  # a runtime reads the config, and there is no model to load
    }
    text = "Once upon a time"
    one, other = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", ROOT / "hub_repo" / "mygpt2"))
    assert one(text).input_ids == other(text).input_ids
    assert cli.main(arguments) == 1
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_wrong_graph_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def write_wrong(graph, folder):
        with torch.no_grad():
            graph.model.lm_head.weight[3] *= 1.01
        return programs.write_torchscript(graph, folder)

    monkeypatch.setitem(exporting.WRITERS, "torchscript", write_wrong)
    folder = saved(mygpt2(tie_word_embeddings=False), tmp_path / "model")
    assert cli.main(["export", str(folder), "--to", "torchscript", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("mymodels export: logits differs from torch's by")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_graph_for_one_length_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_fixed(graph, folder):
        forward = graph.model.forward
        length = graph.example()["input_ids"].shape[1]
        graph.model.forward = lambda **inputs: forward(
            **{name: value[:, :length] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        )
        return programs.write_torchscript(graph, folder)

    monkeypatch.setitem(exporting.WRITERS, "torchscript", write_fixed)
    with pytest.raises(ParityError, match="logits has the shape"):
        export_model(saved(mygpt2(), tmp_path / "model"), "torchscript", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_sees_padding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_unmasked(graph, folder):
        forward = graph.model.forward
        graph.model.forward = lambda attention_mask, **inputs: forward(
            attention_mask=torch.ones_like(attention_mask), **inputs
        )
        return programs.write_torchscript(graph, folder)

    monkeypatch.setitem(exporting.WRITERS, "torchscript", write_unmasked)
    with pytest.raises(ParityError, match="in a batch of 2 rows of 12 tokens"):
        export_model(saved(mybert("SequenceClassification"), tmp_path / "model"), "torchscript", tmp_path / "out")


def test_not_a_number_is_no_parity() -> None:
    inputs = {"attention_mask": torch.ones(2, 3, dtype=torch.long)}
    expected = torch.zeros(2, 3, 5)
    case = parity.Case(inputs, [3], {"logits": expected}, {"logits": expected.clone()})
    assert parity.check([case], 1e-4) == {"logits": 0.0}
    case.found["logits"][1, 2, 4] = torch.nan
    with pytest.raises(ParityError, match="logits differs"):
        parity.check([case], 1e-4)
    inputs["attention_mask"][1, 2] = 0  # at padding it says nothing
    assert parity.check([case], 1e-4) == {"logits": 0.0}


def test_quality_counts_decisions_at_tokens() -> None:
    inputs = {"attention_mask": torch.tensor([[1, 1], [1, 0]])}
    expected = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 0.0]]])
    found = torch.tensor([[[2.0, 0.0], [2.0, 0.0]], [[1.0, 0.0], [9.0, 0.0]]])
    case = parity.Case(inputs, [2], {"logits": expected}, {"logits": found})
    quality = parity.measure_quality([case], object(), "text-generation")
    p = torch.tensor([0.0, 2.0]).softmax(0)
    kl = (p * (p.log() - p.flip(0).log())).sum().item() / 3
    assert quality.decisions == 3 and quality.agreement == pytest.approx(2 / 3) and quality.kl == pytest.approx(kl)
    with pytest.raises(ParityError, match="int8 changes the answers too much"):
        parity.check_quality(quality)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"to": "tflite"}, "choose one of onnx, pt2, aoti, torchscript"),
        ({"task": "summarization"}, "task='summarization' is not known: choose one of text-generation"),
        ({"task": "text-classification"}, "has no weights for score.weight, which text-classification needs"),
        ({"int8": True}, "int8 is for ONNX"),
        ({"opset": 18}, "opset is for ONNX"),
        ({"texts": ["a text"]}, "texts are only used to measure int8"),
        ({"to": "onnx", "int8": True, "dtype": "float16"}, "int8 quantises float32 weights"),
        ({"to": "onnx", "dtype": "bfloat16"}, "no CPU kernels for bfloat16"),
        ({"dtype": "int4"}, "'int4' is not a floating-point dtype"),
    ],
)
def test_impossible_exports_raise_one_sentence(options: dict, message: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime") if options.get("to") == "onnx" else None
    folder = saved(mygpt2(), tmp_path / "model")
    with pytest.raises(ValueError, match=message) as caught:
        export_model(folder, **{"to": "torchscript", "out": tmp_path / "out", **options})
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_other_models_and_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config.json"):
        export_model(tmp_path / "empty", "pt2", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        export_model(tmp_path / "nothing", "pt2", tmp_path / "out")
    small = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    folder = saved(T5(T5Config(**small, decoder_start_token_id=0)), tmp_path / "t5")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    pictures = saved(ViT(ViTConfig(**sizes, image_size=8, patch_size=4)), tmp_path / "vit")
    with pytest.raises(ValueError, match="is a ViTForImageClassification, so its task is not known: pass task=, one"):
        export_model(pictures, "pt2", tmp_path / "out")
    with pytest.raises(ValueError, match="T5Model cannot be exported to torchscript: You must specify"):
        export_model(folder, "torchscript", tmp_path / "out", task="feature-extraction")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs the package onnxruntime: run .*pip install 'onnx>="):
        export_model(saved(mygpt2(**MODERN), tmp_path / "model"), "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_folder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = saved(mygpt2(), tmp_path / "model")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"model has damaged weights \(.*\): `mymodels check .*` lists the files"):
        export_model(folder, "torchscript", tmp_path / "out")
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))
    with pytest.raises(ValueError, match=r"has the shape \[97, \d+\], but \[90, \d+\] by config.json"):
        export_model(folder, "torchscript", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

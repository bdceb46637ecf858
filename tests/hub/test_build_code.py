"""`build SOURCE --code my_model.py`: weights saved without code, and the file that its author has, to a Hub folder."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import warm_python
from own_models.make import make
from safetensors.torch import load_file, save_file

from mymodels import build_repo, cli
from mymodels.checkpoints import CheckpointError
from mymodels.hub.auto_class_names import _auto_classes_by_suffix, auto_class_of
from mymodels.hub.static import static_checks

CODE = Path(__file__).parents[1] / "own_models"
LOAD = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
for folder, auto_class, inputs, out in json.loads(sys.argv[1]):
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
    outputs = model(**load_file(inputs))
    save_file({"logits": (outputs[0] if isinstance(outputs, tuple) else outputs.logits).contiguous()}, out)
assert "mymodels" not in sys.modules
"""


def save_without_code(name: str, folder: Path):
    """What a training script leaves: a config, and one file of `torch.save`."""
    model = make(name)
    model.config.save_pretrained(folder)
    torch.save({"model": model.state_dict(), "epoch": 3}, folder / "net.pt")
    return model


def test_every_ending_of_transformers_own_classes_leads_to_an_auto_class_that_has_such_classes() -> None:
    for ending, counts in _auto_classes_by_suffix().items():
        assert auto_class_of(f"My{ending}") in counts, ending
    for name, arguments, auto_class in [
        ("MyForConditionalGeneration", ("input_ids",), "AutoModelForSeq2SeqLM"),
        ("MyForConditionalGeneration", ("input_features",), "AutoModelForSpeechSeq2Seq"),
        ("MyForConditionalGeneration", ("input_ids", "pixel_values"), "AutoModelForImageTextToText"),
        ("MyForSpeechSeq2Seq", (), "AutoModelForSpeechSeq2Seq"),
        ("MyForImageClassification", ("pixel_values",), "AutoModelForImageClassification"),
        ("MyForSemanticSegmentation", ("pixel_values",), "AutoModelForSemanticSegmentation"),
        ("MyForCTC", ("input_values",), "AutoModelForCTC"),
        ("MyForPrediction", (), "AutoModelForTimeSeriesPrediction"),
        ("MyLMHeadModel", (), "AutoModelForCausalLM"),
        ("MyPreTrainedModel", (), ""),
        ("TransformerNet", (), ""),
    ]:
        assert auto_class_of(name, arguments) == auto_class, (name, arguments)


@pytest.mark.slow
def test_weights_and_a_code_file_become_a_folder_that_auto_classes_load(tmp_path: Path, capfd) -> None:
    ids = torch.arange(2, 14).reshape(2, 6)
    given = {
        "moe_gpt2": {"input_ids": ids},
        "conv_bert": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "small_t5": {"input_ids": ids, "decoder_input_ids": ids[:, :3].contiguous()},
        "tiny_cnn": {"pixel_values": torch.rand(2, 3, 8, 8)},
    }
    wanted = {
        "moe_gpt2": {
            "AutoConfig": "MoeGPT2Config",
            "AutoModel": "MoeGPT2Model",
            "AutoModelForCausalLM": "MoeGPT2LMHeadModel",
        },
        "conv_bert": {"AutoModelForSequenceClassification": "ConvBert"},
        "small_t5": {"AutoConfig": "ScaledT5Config", "AutoModelForSeq2SeqLM": "ScaledT5ForConditionalGeneration"},
        "tiny_cnn": {"AutoConfig": "TinyCnnConfig", "AutoModelForImageClassification": "TinyCnnForImageClassification"},
    }
    jobs, wanted_logits = [], {}
    for name, auto_map in wanted.items():
        model = save_without_code(name, tmp_path / name)
        out, last = tmp_path / f"{name}-repo", list(auto_map)[-1]
        options = ["--auto-class", f"{last}={auto_map[last]}"] if name == "conv_bert" else []
        source = tmp_path / name / ("net.pt" if name != "tiny_cnn" else "")
        if name == "tiny_cnn":  # the code lies in the folder
            shutil.copy(CODE / "tiny_cnn.py", source)
        else:
            options += ["--code", str(CODE / f"{name}.py")]
        assert cli.main(["build", str(source), *options, "--out", str(out), "--no-golden"]) == 0, capfd.readouterr().err
        config = json.loads((out / "config.json").read_text())
        assert config["auto_map"] == {auto: f"{name}.{target}" for auto, target in auto_map.items()}
        assert config["architectures"] == [auto_map[last]]
        save_file(given[name], tmp_path / f"{name}-in")
        expected = model(**given[name])
        expected = expected[0] if isinstance(expected, tuple) else expected.logits
        jobs.append([str(out), last, str(tmp_path / f"{name}-in"), str(tmp_path / f"{name}-out")])
        wanted_logits[name] = expected.detach()
    warm_python.run([sys.executable, "-c", LOAD, json.dumps(jobs)], check=True)
    for name, expected in wanted_logits.items():
        assert torch.equal(load_file(tmp_path / f"{name}-out")["logits"], expected), name


def test_missing_or_wrong_code_raises_one_sentence(tmp_path: Path) -> None:
    save_without_code("moe_gpt2", tmp_path / "moe")
    save_without_code("conv_bert", tmp_path / "bert")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("net.pt", "model-00001-of-00003.safetensors", "net-2-of-2.pt"):
        shutil.copy(tmp_path / "moe" / "net.pt", alone / name)
    (tmp_path / "two.py").write_text(
        (CODE / "conv_bert.py").read_text().replace("ConvBert", "AForSequenceClassification")
        + "\n\nclass BForTokenClassification(BertPreTrainedModel):\n    pass\n"
    )
    code = CODE / "moe_gpt2.py"
    for source, options, message in [
        (tmp_path / "moe", {}, "has the model_type 'moe_gpt2_of_one_file', which transformers does not know.* --code"),
        (alone / "net.pt", {"code": code}, "is a file of weights alone, and .* has no config.json"),
        (alone / "model-00001-of-00003.safetensors", {"code": code}, "is shard 1 of 3 of a model, model-00002-of-00003.safetensors, .* missing: name a folder with all"),
        (alone / "net-2-of-2.pt", {"code": code}, "is shard 2 of 2 of a model, net-1-of-2.pt is missing: name a folder with all"),
        (tmp_path / "moe", {"code": CODE / "absent.py"}, r"absent\.py does not exist"),
        (tmp_path / "moe", {"code": CODE / "plain_net.py"}, "defines no class derived from PreTrainedModel: `mymodels adopt`"),
        (tmp_path / "moe", {"code": code, "auto_classes": {"AutoModelForCausalLm": "X"}}, "has no AutoModelForCausalLm: .*AutoModelForCausalLM"),
        (tmp_path / "moe", {"code": code, "auto_classes": {"AutoModel": "MoeGPT2"}}, "defines no class MoeGPT2: .*MoeGPT2Model"),
        (tmp_path / "moe", {"code": code, "auto_classes": {"AutoModel": "Experts"}}, r"moe_gpt2\.py:\d+: Experts does not derive from PreTrainedModel"),
        (tmp_path / "moe", {"auto_classes": {"AutoModel": "Experts"}}, r"no \.py file that defines a model: name it by --code"),
        (tmp_path / "bert", {"code": CODE / "conv_bert.py"}, r"conv_bert\.py:\d+: the Auto class of ConvBert cannot be determined .* --auto-class AutoModelFor…=ConvBert"),
        (tmp_path / "bert", {"code": tmp_path / "two.py"}, "defines AForSequenceClassification, BForTokenClassification, and config.json does not name the class of the weights"),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match=message) as caught:
            build_repo(source, None, tmp_path / "out", golden=False, **options)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="the code of a model in memory is found"):
        build_repo(make("moe_gpt2"), None, tmp_path / "out", card="# x", code=code)


def test_the_card_promises_no_pipeline_that_the_folder_cannot_serve(tmp_path: Path) -> None:
    save_without_code("tiny_cnn", tmp_path / "cnn")
    build = {"code": CODE / "tiny_cnn.py", "golden": False}
    folder = build_repo(tmp_path / "cnn", None, tmp_path / "repo", **build)
    assert "pipeline_tag" not in (folder / "README.md").read_text()
    assert not [check for check in static_checks(folder) if check.status == "failed"]
    (tmp_path / "cnn" / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    folder = build_repo(tmp_path / "cnn", None, tmp_path / "repo", **build)
    assert "pipeline_tag: image-classification" in (folder / "README.md").read_text()

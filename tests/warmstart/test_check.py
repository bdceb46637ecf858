"""`report.check`: what is called exact has been run, what differs is named, what could not be run is said."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny import batch, largest_difference, mygpt2_config, stock_gpt2_config
from warmstart.random_stock_models import randomised, roberta, stock_model

from mymodels import MyGPT2ForCausalLM, cli, warm_start
from mymodels.checkpoints import CheckpointError
from mymodels.warmstart import checking


class Scaled(transformers.GPT2LMHeadModel):
    """Weights that say nothing of what its forward does beside them."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output["logits"] = output["logits"] * 1.01
        return output


class OtherLayer(transformers.GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer.h[1].mlp.act = torch.nn.ReLU()


def like_stock(model_class):
    return randomised(model_class(stock_gpt2_config()))


def test_a_difference_that_no_row_shows_is_found_and_placed() -> None:
    source = like_stock(OtherLayer)
    report = warm_start("mygpt2", source)
    assert not report.is_exact and not report.checked.agrees and report.checked.difference > 1e-3
    assert "the steps are not exact, from layer 1 on" in report.notes[-1] and "logits" in report.notes[-1]
    marked = {name for row in report.rows if row.kind != "exact" for name in row.targets}
    assert marked and all(name.startswith("model.layers.1.") for name in marked)
    assert "Every step is exact" not in str(report) and report.to_dict()["exact"] is False

    report = warm_start("mygpt2", like_stock(Scaled))
    assert not report.is_exact and "after the layers" in report.notes[-1]
    assert [row.targets for row in report.rows if row.kind != "exact"] == [
        ("model.embed_tokens.weight", "lm_head.weight")
    ]


def test_what_is_measured_is_what_a_run_gives() -> None:
    stock = stock_model("GPT2LMHeadModel")
    report = warm_start("mygpt2", stock, overrides={"num_key_value_heads": 2})
    assert not report.is_exact and report.checked.ran and report.checked.difference > 1e-2
    inputs = batch("right")
    check = report.check(inputs)
    with torch.no_grad():
        shown = inputs["attention_mask"].bool()
        expected = largest_difference(report.model(**inputs).logits[shown], stock(**inputs).logits[shown])
    assert check is report.checked and check.difference == pytest.approx(expected, rel=1e-3)
    assert f"Checked: {check}" in " ".join(str(report).split())
    with pytest.raises(CheckpointError, match=r"could not be run on these inputs: .*vocab_size=97"):
        report.check({"input_ids": torch.full((1, 3), 500)})
    for wrong, words in (
        (inputs["input_ids"], "needs input_ids"),
        ("hello", "needs input_ids"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "needs input_ids"),
        ({"input_ids": torch.arange(3)}, r"shape \(3,\)"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"shape \(1, 0\)"),
    ):
        with pytest.raises(CheckpointError, match=words):
            report.check(wrong)


def test_tokens_of_another_tokenizer_are_compared_with_their_own_rows(tmp_path: Path) -> None:
    from mymodels.warmstart.vocabulary import load_tokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(92))]
    stock = stock_model("BertForMaskedLM")
    stock.save_pretrained(tmp_path / "old")
    for name, vocabulary in (("old", words), ("new", [*words[:5], *reversed(words[5:60])])):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    new = load_tokenizer(tmp_path / "new")
    report = warm_start("mybert", tmp_path / "old", tokenizer=new, overrides={"vocab_size": 60})
    assert report.is_exact and report.checked.agrees and report.checked.ran


def test_models_and_modes_stay_as_they_are() -> None:
    stock = stock_model("GPT2LMHeadModel").train()
    target = MyGPT2ForCausalLM(mygpt2_config()).train()
    target.model.eval()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    report = warm_start(target, stock)
    assert torch.equal(torch.rand(2), expected)
    assert report.is_exact and report.checked.agrees
    assert stock.training and stock.transformer.training and target.training and not target.model.training
    half = warm_start("mygpt2", stock_model("GPT2LMHeadModel").bfloat16(), dtype="bfloat16")
    assert half.checked.agrees and half.model.dtype == torch.bfloat16


def test_skipped_runs_are_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stock = stock_model("GPT2LMHeadModel")
    stock.save_pretrained(tmp_path / "stock")
    monkeypatch.setattr(checking, "SMALL", 1000)
    report = warm_start("mygpt2", stock)
    assert report.is_exact and not report.checked.ran and "exact by construction; not run: " in str(report)
    assert report.to_dict()["check"]["ran"] is False
    assert report.check().agrees and "Every step is exact: the target gives the outputs of the source." in str(report)
    command = ["warm-start", str(tmp_path / "stock"), "--to", "mygpt2"]
    assert cli.main([*command, "--json", str(tmp_path / "r.json")]) == 0
    assert "--check runs both" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*command, "--check", "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["check"]["agrees"] is True
    monkeypatch.undo()
    report = warm_start("mygpt2", stock, skip="wpe")
    assert not report.checked.ran and "are newly initialised, such as model.embed_positions.weight" in str(
        report.checked
    )


def test_roberta_says_for_which_padding_it_holds() -> None:
    report = warm_start("mybert", roberta("RobertaModel"))
    assert report.is_exact and report.checked.agrees
    assert "padded on the right (RoBERTa numbers rows that are padded on the left otherwise)" in str(report.checked)


def test_a_classifier_without_padding_token() -> None:
    stock = stock_model("GPT2ForSequenceClassification")
    stock.config.pad_token_id = None
    report = warm_start("mygpt2", stock)
    assert report.is_exact and report.checked.agrees


@pytest.mark.parametrize("kind", ["dict", "state dict", "file"])
def test_a_config_of_another_model_beside_the_weights(kind: str, tmp_path: Path) -> None:
    stock = stock_model("GPT2LMHeadModel")
    saved = {"model": stock.state_dict(), "config": {"n_layer": 12, "n_head": 12, "n_embd": 768}}
    torch.save(saved, tmp_path / "a.pt")
    source = saved if kind == "dict" else torch.load(tmp_path / "a.pt") if kind == "state dict" else tmp_path / "a.pt"
    target = MyGPT2ForCausalLM(mygpt2_config())
    report = warm_start(target, source)
    assert any("belongs to another model" in note for note in report.notes) and report.checked.agrees

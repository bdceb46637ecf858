"""MyBert with default switches is stock BERT, whose checkpoints load into it by themselves."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny import batch, largest_difference, mybert_config, stock_bert_config

import mymodels

HEADS = ["Model", "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering"]


def pair(folder: Path, head: str, **changes):
    """A stock model, and ours loaded from what the stock model saved."""
    stock = getattr(transformers, "Bert" + head)(stock_bert_config(**changes)).eval()
    stock.save_pretrained(folder)
    mine, loading = getattr(mymodels, "MyBert" + head).from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return stock, mine.eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("head", HEADS)
def test_outputs(tmp_path: Path, head: str, padding: str, implementation: str) -> None:
    stock, mine = pair(tmp_path, head)
    stock.set_attn_implementation(implementation)
    mine.set_attn_implementation(implementation)
    inputs = batch(padding)
    inputs["token_type_ids"] = (torch.arange(11) > 5).long().expand(3, -1)
    shown = inputs["attention_mask"].bool()
    ours, theirs = mine(**inputs, output_hidden_states=True), stock(**inputs, output_hidden_states=True)
    assert list(ours) == list(theirs)  # the order of a tuple, too
    for name in ours.keys() - {"hidden_states"}:
        a, b = ours[name], theirs[name]
        if a.shape[:2] == shown.shape:
            a, b = a[shown], b[shown]
        assert largest_difference(a, b) <= 1e-5, name
    for a, b in zip(ours.hidden_states, theirs.hidden_states):
        assert largest_difference(a[shown], b[shown]) <= 1e-5


LABELS = {
    ("ForSequenceClassification", "regression"): {"labels": torch.tensor([0.5, -1.0, 2.0])},
    ("ForSequenceClassification", "single_label_classification"): {"labels": torch.tensor([0, 2, 1])},
    ("ForSequenceClassification", "multi_label_classification"): {"labels": torch.eye(3)},
    ("ForMaskedLM", None): {"labels": torch.randint(0, 97, (3, 11)).index_fill(1, torch.arange(3), -100)},
    ("ForTokenClassification", None): {"labels": torch.randint(0, 3, (3, 11)).index_fill(1, torch.arange(3), -100)},
    ("ForQuestionAnswering", None): {
        "start_positions": torch.tensor([1, 2, 3]),
        "end_positions": torch.tensor([4, 5, 12]),
    },
}


@pytest.mark.parametrize(("head", "problem"), LABELS, ids=str)
def test_loss_and_gradients(tmp_path: Path, head: str, problem: str | None) -> None:
    num_labels = 1 if problem == "regression" else 2 if head == "ForQuestionAnswering" else 3
    stock, mine = pair(tmp_path, head, num_labels=num_labels)
    inputs = {**batch("right"), **LABELS[head, problem]}
    ours, theirs = mine(**inputs).loss, stock(**inputs).loss
    assert largest_difference(ours, theirs) <= 1e-5
    ours.backward()
    theirs.backward()
    gradients = {name: p.grad for name, p in stock.named_parameters()}
    for name, parameter in mine.named_parameters():
        assert largest_difference(parameter.grad, gradients[name]) <= 1e-5, name
    if head == "ForSequenceClassification":
        assert mine.config.problem_type == stock.config.problem_type == problem


def test_attentions(tmp_path: Path) -> None:
    stock, mine = pair(tmp_path, "Model")
    stock.set_attn_implementation("eager")
    mine.set_attn_implementation("eager")
    inputs = batch("right")
    ours, theirs = mine(**inputs, output_attentions=True), stock(**inputs, output_attentions=True)
    assert len(ours.attentions) == 3
    for a, b in zip(ours.attentions, theirs.attentions):
        assert largest_difference(a, b) <= 1e-5


def test_old_stock_checkpoint_with_positions_and_a_second_bias(tmp_path: Path) -> None:
    stock = transformers.BertForMaskedLM(stock_bert_config()).eval()
    torch.nn.init.normal_(stock.cls.predictions.bias)
    stock.config.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]
    assert "cls.predictions.decoder.bias" in tensors
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    mine, loading = mymodels.MyBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    inputs = batch("right")
    shown = inputs["attention_mask"].bool()
    assert largest_difference(mine(**inputs).logits[shown], stock(**inputs).logits[shown]) <= 1e-5


def test_new_weights_have_the_stock_distribution() -> None:
    stock = transformers.BertForMaskedLM(stock_bert_config(hidden_size=256)).state_dict()
    mine = mymodels.MyBertForMaskedLM(mybert_config(hidden_size=256)).state_dict()
    assert stock.keys() - mine.keys() == {"cls.predictions.decoder.bias"}
    for name, tensor in mine.items():
        assert abs(tensor.std() - stock[name].std()) < 0.02, name
        assert abs(tensor.mean() - stock[name].mean()) < 0.02, name
    assert not mine["bert.embeddings.word_embeddings.weight"][0].any()  # the padding row

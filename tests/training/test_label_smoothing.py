"""`label_smoothing_factor` of transformers' Trainer: stock's loss and gradients, whatever the model is loaded as."""

import json
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
import warm_python
from tiny import BERT, batch, gpt2_pair, largest_difference, mybert_config, mygpt2_config
from transformers import BertForSequenceClassification, BertForTokenClassification, TrainingArguments

import mymodels
from mymodels import MyBertForQuestionAnswering, MyBertForSequenceClassification, MyGPT2ForCausalLM

TRAINERS = {"transformers": transformers.Trainer, "mymodels": mymodels.Trainer}
ROOT = Path(mymodels.__file__).parents[1]


def trainer_of(kind: str, model, folder: Path, **changes):
    arguments = TrainingArguments(
        str(folder), label_smoothing_factor=0.3, report_to="none", use_cpu=True, save_strategy="no"
    )
    return TRAINERS[kind](model=model, args=arguments, **changes)


def loss_and_gradient(trainer, inputs: dict, parameter: str, items: int | None = None):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=items)
    loss.backward()
    return loss.detach(), trainer.model.get_parameter(parameter).grad


def causal_inputs(padding: str, all_labels: bool) -> dict[str, torch.Tensor]:
    inputs = batch(padding)
    labels = inputs["input_ids"] if all_labels else inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return {**inputs, "labels": labels}


class Renamed(MyGPT2ForCausalLM):
    """A subclass of which no name says what it is."""


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_next_label_is_smoothed_as_in_stock(kind: str, tmp_path: Path) -> None:
    stock, mine = gpt2_pair()
    renamed = Renamed(mine.config).eval()
    renamed.load_state_dict(mine.state_dict())
    assert repr(mine).startswith("MyGPT2ForCausalLM(") and repr(renamed).startswith("Renamed(")
    for padding in ("none", "left", "right"):
        for all_labels in (True, False):  # counted at padding too, or not
            inputs = causal_inputs(padding, all_labels)
            wanted = loss_and_gradient(
                trainer_of("transformers", stock, tmp_path), inputs, "transformer.wte.weight", items=20
            )
            for model in (mine, renamed):
                found = loss_and_gradient(trainer_of(kind, model, tmp_path), inputs, "model.embed_tokens.weight", 20)
                assert largest_difference(found[0], wanted[0]) <= 1e-5
                assert largest_difference(found[1], wanted[1]) <= 1e-5


def test_labels_are_counted_as_for_any_causal_model(tmp_path: Path) -> None:
    """What a step's loss is divided by: also for a subclass of another name."""
    for model in (MyGPT2ForCausalLM(mygpt2_config()), Renamed(mygpt2_config())):
        trainer = trainer_of("transformers", model, tmp_path)
        assert int(trainer._get_num_items_in_batch([{"labels": torch.ones(2, 7, dtype=torch.long)}], "cpu")) == 12


METHODS = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=2),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("method", METHODS)
def test_under_peft(method: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(MyGPT2ForCausalLM(mygpt2_config()), METHODS[method]).eval()
    inputs = causal_inputs("none", True)
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), label_smoothing=0.3
        )
        for kind in TRAINERS:
            found = trainer_of(kind, model, tmp_path).compute_loss(model, dict(inputs))
            assert largest_difference(found, expected) <= 1e-5


REMOTE = """
import json, sys
sys.modules["mymodels"] = sys.modules["datasets"] = None
sys.path[:0] = sys.argv[3:]
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules.")
arguments = transformers.TrainingArguments(sys.argv[2], label_smoothing_factor=0.3, report_to=[], use_cpu=True)
trainer = transformers.Trainer(model=model, args=arguments)
ids = torch.arange(2, 16).view(2, 7)
mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
print(json.dumps([transformers.__version__, trainer.compute_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": ids}).item()]))
"""


def test_as_remote_code(tmp_path: Path) -> None:
    stock, mine = gpt2_pair()
    mine.save_pretrained(tmp_path / "smoothed")
    inputs = {"input_ids": torch.arange(2, 16).view(2, 7)}
    inputs |= {"attention_mask": torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]]), "labels": inputs["input_ids"]}
    expected = trainer_of("transformers", stock, tmp_path).compute_loss(stock, dict(inputs))
    command = [sys.executable, "-I", "-c", REMOTE, tmp_path / "smoothed", tmp_path / "out"]
    run = warm_python.run(command, env={"HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert run.returncode == 0, run.stderr[-2000:]
    assert abs(json.loads(run.stdout.splitlines()[-1])[1] - expected.item()) <= 1e-5


def test_a_bert_without_a_loss_of_its_own_is_smoothed_as_stock(tmp_path: Path) -> None:
    inputs = batch("right")
    cases = {
        "SequenceClassification": (BertForSequenceClassification, torch.tensor([0, 1, 1])),
        "TokenClassification": (BertForTokenClassification, inputs["input_ids"] % 2),  # padding counts too
    }
    for name, (stock_class, labels) in cases.items():
        stock = stock_class(transformers.BertConfig(**BERT)).eval()
        mine = getattr(mymodels, f"MyBertFor{name}")(mybert_config()).eval()
        mine.load_state_dict(stock.state_dict())
        results = [
            loss_and_gradient(
                trainer_of(kind, model, tmp_path),
                {**inputs, "labels": labels},
                "bert.embeddings.word_embeddings.weight",
            )
            for kind, model in (("transformers", stock), ("transformers", mine), ("mymodels", mine))
        ]
        for found in results[1:]:
            assert largest_difference(found[0], results[0][0]) <= 1e-5
            assert largest_difference(found[1], results[0][1]) <= 1e-5


OWN_LOSSES = [
    {"class_weights": [1.0, 3.0]},
    {"focal_gamma": 2.0},
    {"label_smoothing": 0.1},
    {"multi_sample_dropout": 3},
]


@pytest.mark.parametrize("switch", OWN_LOSSES, ids=lambda switch: next(iter(switch)))
def test_a_loss_of_the_models_own_is_not_dropped(switch: dict, tmp_path: Path) -> None:
    model = MyBertForSequenceClassification(mybert_config(**switch)).train()
    (name,) = switch
    inputs = {**batch("right"), "labels": torch.tensor([0, 1, 1])}
    with pytest.raises(ValueError, match=rf"config\.{name}=.* would have no effect") as refused:
        trainer_of("transformers", model, tmp_path).training_step(model, inputs)
    assert "label_smoothing_factor" in str(refused.value)
    with pytest.raises(ValueError, match=rf"label_smoothing_factor=0\.3 would replace the loss .* {name}="):
        trainer_of("mymodels", model, tmp_path)
    assert model(**inputs).loss.requires_grad
    model.eval()
    assert torch.isfinite(model(input_ids=inputs["input_ids"]).logits).all()


def test_smoothing_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    model = MyBertForQuestionAnswering(mybert_config())
    with pytest.raises(
        ValueError, match=r"label_smoothing_factor=0\.3 has no effect: MyBertForQuestionAnswering takes no"
    ):
        trainer_of("mymodels", model, tmp_path)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.3 has no effect with compute_loss_func"):
        trainer_of("mymodels", MyGPT2ForCausalLM(mygpt2_config()), tmp_path, compute_loss_func=lambda *a, **k: None)

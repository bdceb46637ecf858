"""Fine-tuning, held against the stock Trainer, scikit-learn, PEFT and a process that knows nothing of mymodels."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import warm_python
from tiny import mybert_config, mygpt2_config, stock_bert_config, stock_gpt2_config
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mymodels import MyBertForSequenceClassification, MyGPT2ForCausalLM, cli, finetune
from mymodels.training.arguments import checked_options, make_arguments
from mymodels.training.load_base import load_base as start_model
from mymodels.training.parameters import add_lora, decayed_groups, freeze
from mymodels.training.plots import class_table, draw_confusion_matrix, draw_loss_curve
from mymodels.training.run_record import checkpoint_to_resume, write_run_record
from mymodels.training.tokenizers import train_bert_tokenizer, train_gpt2_tokenizer
from mymodels.training.tuner import FineTuner, apply_class_weights

WORDS = {"animal": ["cat", "dog", "horse", "bird"], "tool": ["saw", "drill", "axe", "file"], "food": ["bread", "rice"]}
TEXTS = [f"we saw the {word} number {i}" for words in WORDS.values() for word in words for i in range(6)]
LABELS = [label for label, words in WORDS.items() for _ in words for _ in range(6)]  # 24, 24, 12
QUICK = {"max_length": 16, "num_train_epochs": 2, "learning_rate": 3e-3, "bf16": False, "golden": False}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock folders `bert` and `gpt2` with tokenizers of 97 tokens and fewer, and data in `data.csv`."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    for name, make, model in (
        ("bert", train_bert_tokenizer, BertForMaskedLM(stock_bert_config(num_hidden_layers=2))),
        (
            "gpt2",
            train_gpt2_tokenizer,
            GPT2LMHeadModel(stock_gpt2_config(n_layer=2, vocab_size=300, pad_token_id=None)),
        ),
    ):
        model.save_pretrained(folder / name)
        make(TEXTS, 97 if name == "bert" else 300, 64).save_pretrained(folder / name)
    lines = [f"{text},{label}" for text, label in zip(TEXTS, LABELS)]
    (folder / "data.csv").write_text("\n".join(["text,label", *lines]))
    return folder


@pytest.mark.usefixtures("real_pictures")
def test_the_folder_loads_elsewhere_with_the_reported_accuracy(start: Path, tmp_path: Path) -> None:
    tuned = finetune(
        start / "bert",
        start / "data.csv",
        tmp_path / "out",
        to="mybert",
        overrides={"pooling": "mean"},
        **{**QUICK, "golden": True},
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "confusion_matrix.png",
        "loss_curve.png",
        "golden.safetensors",
        "manifest.json",
        "modeling_mybert.py",
    } <= names
    assert sorted(path.name for path in (tmp_path / "out-checkpoints").iterdir()) == ["finetune.json", "metrics.json"]
    rows = {
        "text": list(tuned.data.validation["text"]),
        "label": [tuned.data.labels[i] for i in tuned.data.validation["label"]],
    }
    script = (
        "import json, sys; sys.modules['mymodels'] = None\n"
        "from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T\n"
        "where, rows = sys.argv[1], json.loads(sys.argv[2])\n"
        "t, m = (c.from_pretrained(where, trust_remote_code=True) for c in (T, M))\n"
        "logits = m(**t(rows['text'], padding=True, return_tensors='pt')).logits\n"
        "print(sum(m.config.id2label[int(i)] == l for i, l in zip(logits.argmax(-1), rows['label'])) / len(rows['label']))\n"
    )  # fmt: skip
    command = [sys.executable, "-I", "-c", script, str(tmp_path / "out"), json.dumps(rows)]
    run = warm_python.run(command, check=True, cwd=tmp_path, env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "m")})
    assert float(run.stdout) == pytest.approx(tuned.metrics["validation"]["accuracy"])
    assert tuned.confusion_matrix.trace() / tuned.confusion_matrix.sum() == pytest.approx(float(run.stdout))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "](confusion_matrix.png)" in card and f"| accuracy | {float(run.stdout):.4f} |" in card


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_losses_are_the_stock_trainer_s(start: Path, tmp_path: Path, accumulation: int) -> None:
    how = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": accumulation, "logging_steps": 1, "seed": 3}
    once = {"max_steps": 6, "eval_steps": 6}  # an evaluation draws a random number
    tuned = finetune(start / "bert", start / "data.csv", tmp_path / "out", **{**QUICK, **once}, **how)

    set_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(start / "bert")
    model = BertForSequenceClassification.from_pretrained(start / "bert", num_labels=3)
    rows = [{**tokenizer(row["text"]), "labels": row["label"]} for row in tuned.data.train]
    arguments = TrainingArguments(
        str(tmp_path / "stock"), max_steps=6, learning_rate=3e-3, weight_decay=0.01, warmup_steps=1, report_to="none",
        save_strategy="no", **how,
    )  # fmt: skip
    stock = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), train_dataset=rows)
    stock.train()
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (tuned.history, stock.state.log_history)]
    assert len(losses[0]) == 6 and losses[0] == losses[1]


def test_class_weights_are_scikit_learn_s_in_both_families(start: Path, tmp_path: Path) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    tuned = finetune(
        start / "bert",
        start / "data.csv",
        tmp_path / "a",
        to="mybert",
        class_weights="balanced",
        **{**QUICK, "max_steps": 1},
    )
    truth = compute_class_weight("balanced", classes=np.arange(3), y=np.array(list(tuned.data.train["label"])))
    assert tuned.data.labels == ["animal", "food", "tool"] and truth[1] > 1.5
    saved = json.loads((tmp_path / "a" / "config.json").read_text())
    assert saved["class_weights"] == pytest.approx(list(truth))
    tuned = finetune(
        start / "gpt2", start / "data.csv", tmp_path / "b", class_weights="balanced", **{**QUICK, "max_steps": 1}
    )
    logits, labels = torch.tensor(tuned.logits), torch.tensor(list(tuned.data.validation["label"]))
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (losses * torch.tensor(truth, dtype=losses.dtype)[labels]).mean()  # one batch
    assert tuned.metrics["validation"]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_weighted_loss_does_not_depend_on_gradient_accumulation() -> None:
    model = AutoModelForSequenceClassification.from_config(stock_bert_config(num_labels=3))
    loss = apply_class_weights(model, [1.0, 2.0, 0.5])
    logits, labels = torch.randn(8, 3), torch.randint(0, 3, (8,))
    whole = loss({"logits": logits}, labels, num_items_in_batch=8)
    parts = [loss({"logits": logits[i : i + 2]}, labels[i : i + 2], num_items_in_batch=8) for i in range(0, 8, 2)]
    torch.testing.assert_close(sum(parts), whole)


# 3 layers, factor 0.5: the head and all above the layers 1, layer 3 half of it, …, the embeddings 1/16
RATES = {
    "bert.embeddings.word_embeddings.weight": 1 / 16,
    "bert.embeddings.LayerNorm.bias": 1 / 16,
    "bert.encoder.layer.0.attention.self.query.weight": 1 / 8,
    "bert.encoder.layer.1.output.dense.bias": 1 / 4,
    "bert.encoder.layer.2.output.LayerNorm.weight": 1 / 2,
    "bert.pooler.dense.weight": 1,
    "classifier.bias": 1,
    "model.embed_tokens.weight": 1 / 16,
    "model.embed_positions.weight": 1 / 16,
    "model.layers.0.mlp.up_proj.weight": 1 / 8,
    "model.layers.2.self_attn.q_proj.bias": 1 / 2,
    "model.norm.weight": 1,
    "transformer.wte.weight": 1 / 16,
    "transformer.wpe.weight": 1 / 16,
    "transformer.h.0.attn.c_attn.weight": 1 / 8,
    "transformer.h.2.mlp.c_proj.bias": 1 / 2,
    "transformer.ln_f.weight": 1,
}


def test_layer_decay_against_a_table() -> None:
    seen = set()
    for model in (
        MyBertForSequenceClassification(mybert_config()),
        MyGPT2ForCausalLM(mygpt2_config()),
        GPT2LMHeadModel(stock_gpt2_config()),
    ):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = decayed_groups(model, ["classifier.weight"], learning_rate=1.0, weight_decay=0.1, layer_decay=0.5)
        rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
        assert rates.keys() == set(names.values()) and groups[0]["lr"] == 1.0
        assert all(rates[name] == rate for name, rate in RATES.items() if name in rates)
        seen |= rates.keys()
        assert [names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]] in (
            [], ["classifier.weight"],
        )  # fmt: skip
    assert seen >= RATES.keys()


def test_layer_decay_reaches_the_optimizer(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a, **k: (rates.append({round(g["lr"], 9) for g in self.param_groups}), step(self, *a, **k))[1],
    )
    how = {**QUICK, "max_steps": 1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    finetune(start / "gpt2", start / "data.csv", tmp_path / "out", layer_decay=0.1, **how)
    assert rates == [{3e-3, 3e-4, 3e-5, 3e-6}]


def test_frozen_parameters_do_not_move(start: Path, tmp_path: Path) -> None:
    before = BertForSequenceClassification.from_pretrained(start / "bert", num_labels=3).state_dict()
    tuned = finetune(
        start / "bert",
        start / "data.csv",
        tmp_path / "out",
        freeze_embeddings=True,
        freeze_layers=1,
        **{**QUICK, "max_steps": 3},
    )
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    for name in after:
        still = "embeddings" in name or "layer.0." in name
        new = name.startswith(("classifier", "bert.pooler"))  # start at random, not in the stock folder
        assert new or torch.equal(before[name], after[name]) == still or name.endswith("key.bias"), name
    assert tuned.model.bert.encoder.layer[1].output.dense.weight.requires_grad
    with pytest.raises(ValueError, match="freeze_layers=3, but BertForSequenceClassification has 2 layers"):
        freeze(tuned.model, layers=3)


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("bert", "mybert"),
        ("gpt2", None),
        pytest.param("bert", None, marks=pytest.mark.slow),
        pytest.param("gpt2", "mygpt2", marks=pytest.mark.slow),
    ],
)
def test_merged_lora_computes_what_the_adapter_does(start: Path, tmp_path: Path, name: str, to: str | None) -> None:
    from peft import PeftModel

    pooling = {"overrides": {"pooling": "attention"}} if to == "mybert" else {}  # new, so trained whole
    tuned = finetune(
        start / name,
        start / "data.csv",
        tmp_path / "out",
        to=to,
        lora_r=2,
        load_best_model_at_end=False,
        **pooling,
        **{**QUICK, "max_steps": 4},
    )
    base = finetune(
        start / name,
        start / "data.csv",
        tmp_path / "base",
        to=to,
        **pooling,
        **{**QUICK, "max_steps": 1, "learning_rate": 0.0},
    ).model  # the same seed, nothing learnt
    adapted = PeftModel.from_pretrained(base, tmp_path / "out-checkpoints" / "adapter").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert not any("lora" in key for key in merged.state_dict())
    batch = tuned.tokenizer(TEXTS[:5], padding=True, return_tensors="pt")
    with torch.no_grad():
        with adapted.disable_adapter():
            without = adapted(**batch).logits
        torch.testing.assert_close(merged(**batch).logits, adapted(**batch).logits, atol=1e-5, rtol=1e-4)
        assert (merged(**batch).logits - without).abs().max() > 1e-3


def test_lora_names_the_matrices_there_are() -> None:
    model = MyGPT2ForCausalLM(mygpt2_config())
    with pytest.raises(ValueError, match=r"no such matrix, but down_proj, k_proj, o_proj, q_proj, up_proj, v_proj"):
        add_lora(model, r=2, alpha=None, target_modules=["query"], new=[])
    adapted = add_lora(model, r=2, alpha=None, target_modules=["q_proj"], new=[])
    trained = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"q_proj"}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_perplexity_is_that_of_the_saved_model(start: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    tuned = finetune(start / name, tmp_path / "text.txt", tmp_path / "out", task="lm", **{**QUICK, "max_length": 8})
    loss = tuned.metrics["validation"]["loss"]
    assert tuned.metrics["validation"]["perplexity"] == pytest.approx(np.exp(loss))
    assert loss < tuned.history[0]["loss"]
    if name == "gpt2":
        text = "".join(text + "\n\n" for text in tuned.data.validation["text"])
        ids = tuned.tokenizer(text, return_tensors="pt").input_ids[0]
        blocks = ids[: len(ids) // 8 * 8].view(-1, 8)
        with torch.no_grad():
            truth = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=blocks, labels=blocks).loss
        assert loss == pytest.approx(truth.item(), rel=1e-5)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"]


def test_a_classifier_goes_on_with_its_own_label_order(start: Path, tmp_path: Path) -> None:
    model = MyBertForSequenceClassification(mybert_config(num_labels=3, num_hidden_layers=1))
    model.config.id2label = {0: "tool", 1: "animal", 2: "food"}
    tokenizer = AutoTokenizer.from_pretrained(start / "bert")
    tuned = finetune(model, start / "data.csv", tmp_path / "a", tokenizer=tokenizer, **{**QUICK, "max_steps": 1})
    assert tuned.data.labels == ["tool", "animal", "food"]
    again = finetune(tmp_path / "a", start / "data.csv", tmp_path / "b", **{**QUICK, "max_steps": 1})
    assert again.model.config.id2label == {0: "tool", 1: "animal", 2: "food"}


def test_a_head_of_other_labels_is_not_taken_over(start: Path, tmp_path: Path) -> None:
    model = MyBertForSequenceClassification(
        mybert_config(num_labels=2, num_hidden_layers=1, class_weights=[1.0, 3.0], vocab_size=97)
    )
    model.config.id2label = {0: "adult", 1: "children"}
    torch.nn.init.ones_(model.classifier.bias)
    model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(start / "bert")
    tokenizer.save_pretrained(tmp_path)
    for source, how in ((tmp_path, {}), (tmp_path, {"to": "mybert"}), (model, {"tokenizer": tokenizer})):
        same = start_model(source, "classification", labels=["adult", "children"], **how)
        assert all(torch.equal(tensor, before[name]) for name, tensor in same.model.state_dict().items())
        other = start_model(source, "classification", labels=["neg", "pos"], **how)
        changed = {name for name, tensor in other.model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {"classifier.weight", "classifier.bias"} and other.model.config.class_weights is None
        assert other.how.endswith("but with a new head, as its labels were adult, children")
        assert other.model.config.id2label == {0: "neg", 1: "pos"}


def test_early_stopping_and_the_best_weights(start: Path, tmp_path: Path) -> None:
    how = {**QUICK, "learning_rate": 0.0, "max_steps": 20}  # nothing gets better
    tuned = finetune(start / "bert", start / "data.csv", tmp_path / "out", early_stopping_patience=2, **how)
    assert [entry["step"] for entry in tuned.history if "eval_loss" in entry] == [2, 4, 6]
    assert tuned.best_step == 2


def test_tensorboard_gets_the_losses(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", ModuleType("notf"))  # without TensorFlow, where it is
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    how = {**QUICK, "max_steps": 4, "logging_steps": 1, "report_to": "tensorboard"}
    tuned = finetune(start / "bert", start / "data.csv", tmp_path / "out", **how)
    (log,) = {path.parent for path in tuned.checkpoint_dir.glob("runs/**/events*")}
    events = EventAccumulator(str(log)).Reload().Scalars("train/loss")
    logged = [entry["loss"] for entry in tuned.history if "loss" in entry]
    assert [event.step for event in events] == [1, 2, 3, 4]
    assert [event.value for event in events] == pytest.approx(logged)


def test_options_are_checked_before_anything_is_read(start: Path, tmp_path: Path) -> None:
    for how, sentence in (
        ({"task": "summary"}, "task='summary' is none of"),
        ({"learning_rat": 1}, "learning_rat: .* no such option"),
        ({"metric_for_best_model": "f2"}, "'f2' is none of accuracy, f1_macro, loss"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "early stopping needs evaluations"),
        ({"lora_r": 2, "freeze_layers": 1}, "LoRA trains only"),
        ({"max_length": 65}, "max_length=65, but this model takes 3 to 64 tokens"),
        ({"class_weights": [1.0]}, "one positive number for each of 3 labels"),
        ({"layer_decay": 2.0}, "layer_decay=2.0 is not between"),
        ({"to": "mygpt3"}, "mygpt2 and mybert"),
        ({"overrides": {"poolig": "mean"}}, "bert, whose config has no field poolig"),
        ({"overrides": {"pooling": "mode"}, "to": "mybert"}, "pooling='mode', but it must be"),
        ({"freeze_layers": 9}, "has 2 layers"),
    ):
        with pytest.raises(ValueError, match=sentence) as caught:
            finetune(start / "bert", start / "data.csv", tmp_path / "out", **how)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_broken_weights_are_refused_in_a_sentence(start: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(start / "bert", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"broken has damaged weights .*mymodels check") as caught:
        finetune(broken, start / "data.csv", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_refused_before_training(start: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "notes.txt").write_text("dear")
    arguments = ["--model", str(start / "bert"), "--data", str(start / "data.csv"), "--out", str(tmp_path)]
    assert cli.main(["finetune", *arguments]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "how, sentence",
    [
        (["--per-device-train-batch-size", "0"], "per_device_train_batch_size=0, but it must be a number above 0"),
        (["--gradient-accumulation-steps", "0"], "gradient_accumulation_steps=0, but"),
        (["--arg", "per_device_eval_batch_size=many"], "per_device_eval_batch_size='many', but"),
        (["--class-weights", "a"], "--class-weights 'a': write balanced, or one number per label, separated by commas"),
        (["--seed", "1", "--arg", "seed=2"], "--arg seed=2: use the option --seed"),
        (["--arg", "save_strategy=steps", "--arg", "eval_strategy=epoch"], "transformers.TrainingArguments rejects"),
    ],
)
def test_bad_options_get_one_sentence(how: list[str], sentence: str, start: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--model", str(start / "bert"), "--data", str(start / "data.csv"), "--out", str(tmp_path / "out")]
    assert cli.main(["finetune", *arguments, "--max-length", "16", *how]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("mymodels finetune: ") and sentence in told
    assert not list(tmp_path.iterdir())


def test_nothing_of_others_in_the_checkpoint_folder_is_lost(start: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-mine/a.txt", "finished/thesis.txt", "checkpoint-x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("years of work")
    how = {**QUICK, "max_steps": 1, "checkpoint_dir": tmp_path}
    finetune(start / "bert", start / "data.csv", tmp_path / "out", **how)
    names = ["checkpoint-mine", "checkpoint-x.txt", "finetune.json", "finished", "metrics.json", "out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert len([path for path in tmp_path.rglob("*.txt") if path.read_text() == "years of work"]) == 3
    record = json.loads((tmp_path / "finetune.json").read_text())
    assert record["bf16"] is False and {"tokenizer", "revision", "data", "learning_rate"} <= record.keys()
    (tmp_path / "finetune.json").unlink()  # so that metrics.json is somebody else's
    with pytest.raises(FileExistsError, match=r"holds metrics.json, but no finetune.json: choose another"):
        finetune(start / "bert", start / "data.csv", tmp_path / "out", **how)


def test_only_a_checkpoint_of_the_same_training_is_resumed(tmp_path: Path) -> None:
    record = {"task": "lm", "bf16": False, "data": "0" * 64, "eval_steps": 2}
    for folder in ("run", "other", "bare"):
        (tmp_path / folder / "checkpoint-2").mkdir(parents=True)
        (tmp_path / folder / "checkpoint-2" / "trainer_state.json").write_text("{}")
    write_run_record(tmp_path / "run", record)
    write_run_record(tmp_path / "other", record)
    where, named = tmp_path / "run", tmp_path / "run" / "checkpoint-2"
    assert checkpoint_to_resume(where, tmp_path / "out", record, named) == str(named)
    assert checkpoint_to_resume(tmp_path / "new", tmp_path / "out", record, named) == str(named)
    for resume in (True, named):
        for changed, told in (
            ({"bf16": True}, "bf16 was False, now True"),
            ({"data": "1" * 64}, "data differs"),
            ({"eval_steps": None}, "eval_steps was 2, now None"),
        ):
            with pytest.raises(ValueError, match=rf"is of another training \({told}\): use the same"):
                checkpoint_to_resume(where, tmp_path / "out", record | changed, resume)
    with pytest.raises(FileExistsError, match="run holds checkpoints of an earlier training"):
        checkpoint_to_resume(where, tmp_path / "out", record, tmp_path / "other" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"no finetune.json beside it"):
        checkpoint_to_resume(tmp_path / "new", tmp_path / "out", record, tmp_path / "bare" / "checkpoint-2")
    with pytest.raises(FileExistsError, match=r"holds checkpoint-2, but no finetune.json"):
        checkpoint_to_resume(tmp_path / "bare", tmp_path / "out", record, True)


def test_an_interrupted_training_says_how_to_go_on(start: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def interrupted(self: FineTuner, **_) -> None:
        (Path(self.args.output_dir) / "checkpoint-4").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(FineTuner, "train", interrupted)
    arguments = ["--model", str(start / "bert"), "--data", str(start / "data.csv"), "--out", str(tmp_path / "out")]
    assert cli.main(["finetune", *arguments, "--max-length", "16"]) == 130
    assert "out-checkpoints/checkpoint-4: the same command with --resume resumes" in capsys.readouterr().out


def test_a_missing_package_is_named(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs the package peft: run .*pip install 'peft>="):
        finetune(start / "bert", start / "data.csv", tmp_path / "out", lora_r=2, **QUICK)


KILLED = """
import os, sys
from transformers import TrainerCallback
from mymodels import finetune
from mymodels.training import tuner
class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[4]): os.kill(os.getpid(), 9)
init = tuner.FineTuner.__init__
def killing(self, *args, callbacks=(), **kwargs):
    init(self, *args, callbacks=[*callbacks, Kill()], **kwargs)
tuner.FineTuner.__init__ = killing
finetune(sys.argv[1], sys.argv[2], sys.argv[3], max_length=16, max_steps=8, eval_steps=2, learning_rate=3e-3, bf16=False, golden=False)
"""


@pytest.mark.slow
def test_a_killed_training_goes_on(start: Path, tmp_path: Path) -> None:
    how = {"max_length": 16, "max_steps": 8, "eval_steps": 2, "learning_rate": 3e-3, "bf16": False, "golden": False}
    model, data, out = start / "bert", start / "data.csv", tmp_path / "killed"
    run = warm_python.run([sys.executable, "-c", KILLED, str(model), str(data), str(out), "5"])
    assert run.returncode == -9 and not out.exists()
    with pytest.raises(FileExistsError, match=r"the newest is checkpoint-4: pass --resume"):
        finetune(model, data, out, **how)
    with pytest.raises(ValueError, match=r"is of another training \(learning_rate was 0.003, now 0.001\)"):
        finetune(model, data, out, resume_from_checkpoint=True, **{**how, "learning_rate": 1e-3})
    resumed = finetune(model, data, out, resume_from_checkpoint=True, **how)
    whole = finetune(model, data, tmp_path / "whole", **how)
    told = [[(e["step"], e["eval_loss"]) for e in t.history if "eval_loss" in e] for t in (resumed, whole)]
    assert [step for step, _ in told[1]] == [2, 4, 6, 8] and told[0] == told[1]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="is finished"):
        finetune(model, data, out, resume_from_checkpoint=True, **how)


@pytest.mark.usefixtures("real_pictures")
@pytest.mark.parametrize("classes", [2, 30])
def test_pictures_and_table(classes: int, tmp_path: Path) -> None:
    from PIL import Image

    names = [f"class with a name {i}" for i in range(classes)]
    matrix = np.random.default_rng(0).integers(0, 9, (classes, classes)) + 40 * np.eye(classes, dtype=int)
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        draw_confusion_matrix(matrix, names, path)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    width, height = Image.open(tmp_path / "a.png").size
    assert 400 < width < 3000 and 400 < height < 3000
    draw_loss_curve([{"loss": 1.0, "step": 1}, {"eval_loss": 1.1, "step": 1}], tmp_path / "curve.png", 1)
    table = class_table(matrix, names, "title")
    assert table.row_count == classes
    first = [next(iter(column.cells)) for column in table.columns]
    right, total, guessed = matrix[0, 0], matrix[0].sum(), matrix[:, 0].sum()
    assert first[1:5] == [
        str(total),
        f"{right / guessed:.3f}",
        f"{right / total:.3f}",
        f"{2 * right / (total + guessed):.3f}",
    ]


def test_the_options_stay_those_of_transformers() -> None:
    options = checked_options("classification", {"max_steps": 50, "save_steps": 10}, lora=False)
    assert (options["eval_strategy"], options["eval_steps"], options["save_steps"]) == ("steps", 5, 10)
    TrainingArguments("x", **options)
    options = checked_options("classification", {"save_strategy": "no"}, lora=False)
    arguments = make_arguments(Path("x"), options, 60, 0.1, False)
    assert arguments.save_strategy == "no" and not arguments.load_best_model_at_end
    assert arguments.dataloader_pin_memory == torch.accelerator.is_available()  # torch warns of it elsewhere


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ["--model", "bert", "--to", "mybert", "--set", "pooling=attention", "--class-weights", "balanced"],
        ["--model", "gpt2", "--to", "mygpt2", "--task", "lm", "--report-to", "tensorboard"],
        ["--model", "bert", "--task", "lm", "--layer-decay", "0.9"],
        ["--model", "gpt2", "--lora-r", "4", "--early-stopping-patience", "2"],
    ],
)
def test_the_command_on_the_sample_text(
    start: Path, tmp_path: Path, how: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    how = [str(start / word) if word in ("bert", "gpt2") else word for word in how]
    common = [
        "--data",
        "sample_text",
        "--out",
        "out",
        "--max-steps",
        "20",
        "--max-length",
        "32",
        "--learning-rate",
        "1e-3",
    ]
    if "tensorboard" in how:  # once as a process of its own
        command = [sys.executable, "-m", "mymodels.cli", "finetune", *how, *common]
        run = subprocess.run(command, capture_output=True, text=True)
        code, told = run.returncode, run.stdout
    else:
        code, told = cli.main(["finetune", *how, *common]), capsys.readouterr().out
    assert code == 0 and "measured on" in told and "README.md" in told, told
    assert bool(list((tmp_path / "out-checkpoints").rglob("*tfevents*"))) == ("tensorboard" in how)
    assert cli.main(["verify", "out", "--quick"]) == 0 and "every check held" in capsys.readouterr().out

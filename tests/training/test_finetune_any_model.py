"""`finetune` of models of a file of one's own and of encoder-decoders, against the stock Trainer and a second process."""

import json
import sys
from pathlib import Path

import pytest
import torch
import warm_python
from own_models.make import make
from safetensors.torch import load_file
from tokenizers import processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mymodels import build_repo, finetune, predict
from mymodels.forward_calls import as_mapping
from mymodels.predicting.load_task import load_task
from mymodels.training.data import DataError, load_data
from mymodels.training.generated import compare_texts, generate_texts
from mymodels.training.load_base import load_base
from mymodels.training.preprocessing import encode_pairs
from mymodels.training.tokenizers import train_bert_tokenizer, train_gpt2_tokenizer

WORDS = {"animal": ["cat", "dog", "horse"], "tool": ["saw", "drill", "axe"]}
TEXTS = [f"we saw the {word} number {i}" for words in WORDS.values() for word in words for i in range(5)]
LABELS = [label for label, words in WORDS.items() for _ in words for _ in range(5)]
CODE = Path(__file__).parents[1] / "own_models"
QUICK = {"max_length": 16, "max_steps": 4, "learning_rate": 3e-3, "bf16": False, "golden": False, "eval_steps": 2}


def text_to_text_tokenizer() -> PreTrainedTokenizerFast:
    """Words, and `[SEP]` at the end, as T5 and BART want it."""
    bert = train_bert_tokenizer(TEXTS, 97, 64)
    bert.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A $B [SEP]", special_tokens=[("[SEP]", bert.sep_token_id)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=bert.backend_tokenizer, model_max_length=64, **special)


def tiny_bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    config = BartConfig(vocab_size=97, forced_eos_token_id=3, dropout=0.0, **special, **sizes, **heads)
    return BartForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of own models, built from weights and a code file, and data."""
    folder = tmp_path_factory.mktemp("own")
    for name, tokenizer, auto_class in (
        ("conv_bert", train_bert_tokenizer(TEXTS, 97, 64), {"AutoModelForSequenceClassification": "ConvBert"}),
        ("small_t5", text_to_text_tokenizer(), {}),
        ("moe_gpt2", train_gpt2_tokenizer(TEXTS, 300, 64), {}),
    ):
        changes = {"conv_bert": {}, "small_t5": {"pad_token_id": 0, "eos_token_id": 3}, "moe_gpt2": {"vocab_size": 300}}
        model = make(name, **changes[name])
        model.config.save_pretrained(folder / "source" / name)
        torch.save(model.state_dict(), folder / "source" / name / "net.pt")
        tokenizer.save_pretrained(folder / "source" / name)
        how = {"code": CODE / f"{name}.py", "auto_classes": auto_class, "golden": False}
        build_repo(folder / "source" / name / "net.pt", None, folder / name, **how)
    rows = [f"{text},{label},{text.split()[3]}" for text, label in zip(TEXTS, LABELS)]
    (folder / "data.csv").write_text("\n".join(["text,label,target", *rows]))
    lines = [json.dumps({"text": text}) for text in ("we saw the cat", "we saw the axe number 3", "the dog")]
    (folder / "in.jsonl").write_text("\n".join(lines))
    return folder


def answers(folder, own: Path, tmp_path: Path, **options) -> list[dict]:
    predict(folder, own / "in.jsonl", tmp_path / "answers.jsonl", trust_remote_code=True, **options)
    return [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_class_with_a_tuple_and_no_kwargs_is_tuned_saved_and_answers(own: Path, tmp_path: Path) -> None:
    tuned = finetune(own / "conv_bert", own / "data.csv", tmp_path / "out", trust_remote_code=True, **QUICK)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForSequenceClassification": "conv_bert.ConvBert"}
    assert (tmp_path / "out" / "conv_bert.py").read_text() == (CODE / "conv_bert.py").read_text()
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in tuned.model.state_dict().items())
    before = load_file(own / "conv_bert" / "model.safetensors")
    assert not torch.equal(saved["conv.weight"], before["conv.weight"])
    script = (
        "import sys, json; sys.modules['mymodels'] = None\n"
        "from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T\n"
        "t, m = T.from_pretrained(sys.argv[1]), M.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "for line in open(sys.argv[2]):\n"
        "    x = t(json.loads(line)['text'], return_tensors='pt')\n"
        "    p = m(x.input_ids, x.attention_mask)[0].softmax(-1)[0]\n"
        "    print(json.dumps([m.config.id2label[int(p.argmax())], float(p.max())]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out"), str(own / "in.jsonl")]
    run = warm_python.run(command, check=True, cwd=tmp_path)
    wanted = [json.loads(line) for line in run.stdout.splitlines()]
    for answer, (label, score) in zip(answers(tmp_path / "out", own, tmp_path), wanted, strict=True):
        assert answer["label"] == label and abs(answer["score"] - score) < 1e-5


def test_seq2seq_is_what_the_stock_trainer_does(own: Path, tmp_path: Path) -> None:
    tokenizer, stock = text_to_text_tokenizer(), tiny_bart()
    tuned = finetune(
        tiny_bart(), own / "data.csv", tmp_path / "out", task="seq2seq", tokenizer=tokenizer, validation=0.2, **QUICK
    )
    data = load_data(own / "data.csv", task="seq2seq", validation=0.2, seed=42)
    examples = encode_pairs(data, tokenizer, 16)
    assert tokenizer.decode(examples["train"][0]["labels"]) == f"{data.train[0]['target']} [SEP]"
    set_seed(42)
    arguments = TrainingArguments(
        str(tmp_path / "stock"), max_steps=4, learning_rate=3e-3, per_device_train_batch_size=16, weight_decay=0.01,
        warmup_steps=1, report_to="none", seed=42, save_strategy="no", remove_unused_columns=False, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        stock, arguments, DataCollatorForSeq2Seq(tokenizer, model=stock), examples["train"], examples["validation"]
    )
    trainer.train()
    assert tuned.best_step == 4
    assert abs(trainer.evaluate()["eval_loss"] - tuned.metrics["validation"]["loss"]) < 1e-5
    for name, tensor in stock.state_dict().items():
        torch.testing.assert_close(tensor, tuned.model.state_dict()[name], atol=1e-5, rtol=0)
    texts = generate_texts(tuned.model, tokenizer, list(data.validation["text"]), 16)
    measured = tuned.metrics["validation"]
    assert measured["exact_match"] == compare_texts(texts, list(data.validation["target"]))["exact_match"]
    assert compare_texts(["a b", "c"], ["a c", "c"]) == {"exact_match": 0.5, "token_f1": 0.75}
    stock.eval()  # predict, against generate of one text at a time
    lines = (own / "in.jsonl").read_text().splitlines()
    for line, answer in zip(lines, answers(tuned.path, own, tmp_path, max_new_tokens=5), strict=True):
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids
        tokens = tuned.model.generate(ids, do_sample=False, num_beams=1, max_new_tokens=5)
        assert answer["generated"] == tokenizer.decode(tokens[0], skip_special_tokens=True)


@pytest.mark.slow
def test_own_decoders_and_encoder_decoders_are_tuned_and_answer(own: Path, tmp_path: Path) -> None:
    for name, task, answer in (("moe_gpt2", "lm", "continuation"), ("small_t5", "seq2seq", "generated")):
        out = tmp_path / f"{name}-out"
        tuned = finetune(own / name, own / "data.csv", out, task=task, trust_remote_code=True, **QUICK)
        assert json.loads((out / "config.json").read_text())["auto_map"]["AutoConfig"].startswith(f"{name}.")
        found = answers(out, own, tmp_path, max_new_tokens=3)
        assert found == answers(tuned.model, own, tmp_path, max_new_tokens=3, tokenizer=tuned.tokenizer)
        assert len(found) == 3 and all(answer in row for row in found)
        losses = [entry["loss"] for entry in tuned.history if "loss" in entry]
        assert losses[-1] < losses[0]


def test_invalid_requests_are_refused_before_training(own: Path, tmp_path: Path) -> None:
    class NoLoss(type(make("conv_bert"))):
        def forward(self, input_ids, attention_mask, labels=None):
            return super().forward(input_ids, attention_mask)

    for model, task, options, message in [
        (own / "conv_bert", "lm", {}, "has code of its own, for AutoModelForSequenceClassification, but none for AutoModelForMaskedLM"),
        (own / "moe_gpt2", "seq2seq", {}, "is a moe_gpt2_of_one_file, which has no class for AutoModelForSeq2SeqLM"),
        (own / "small_t5", "lm", {}, "have no language-model head"),
        (own / "small_t5", "seq2seq", {"to": "mygpt2"}, "is not an encoder-decoder"),
        (make("conv_bert"), "lm", {"tokenizer": train_bert_tokenizer(TEXTS, 97, 64)}, "ConvBert is not a model for --task lm by its name"),
        (own / "small_t5", "seq2seq", {"text_column": "text", "target_column": "text"}, "named as text and as target"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message) as caught:
            finetune(model, own / "data.csv", tmp_path / "x", task=task, trust_remote_code=True, **QUICK, **options)
        assert (
            not (tmp_path / "x").exists()
            and not list(tmp_path.glob("x-checkpoints/*"))
            and "\n" not in str(caught.value)
        )
    with pytest.raises(DataError, match="name the one with the targets by --target-column"):
        (tmp_path / "c.csv").write_text("text,a,b\nx,y,z\n")
        load_data(tmp_path / "c.csv", task="seq2seq")
    headed = load_base(own / "moe_gpt2", "classification", labels=["a", "b"], trust_remote_code=True)
    assert "a new head on the base model" in headed.how and headed.new == ["classifier.bias", "classifier.weight"]
    with pytest.raises(ValueError, match="has no AutoModelForSequenceClassification: choose another --task"):
        load_task(own / "small_t5", "text-classification", trust_remote_code=True)
    with pytest.raises(ValueError, match="pass tokenizer="):
        load_task(make("moe_gpt2"))
    NoLoss._auto_class = "AutoModelForSequenceClassification"
    begun = load_base(NoLoss(make("conv_bert").config), "classification", tokenizer=train_bert_tokenizer(TEXTS, 97, 64))
    assert begun.kind == "classification"


def test_the_answer_to_a_question_is_the_span_of_stock_logits(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForQuestionAnswering(BertConfig(vocab_size=97, initializer_range=0.5, **sizes)).eval()
    tokenizer = train_bert_tokenizer(TEXTS, 97, 64)
    rows = [("the dog", "we saw the horse number 3"), ("number 1", "the axe")]
    (tmp_path / "in.jsonl").write_text(
        "\n".join(json.dumps({"text": q, "text_pair": c}) for q, c in rows) + '\n{"text": "a"}'
    )
    said: list[str] = []
    counts = predict(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", tokenizer=tokenizer, report=said.append)
    assert counts.answered == 2 and said == [
        "line 3 skipped: it has no context: add it as text_pair, or name its field by --pair-column"
    ]
    for (question, context), line in zip(rows, (tmp_path / "out.jsonl").read_text().splitlines(), strict=True):
        found, row = json.loads(line), tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
        offsets, parts = row.pop("offset_mapping")[0].tolist(), row.sequence_ids(0)
        outputs = as_mapping(model(**row))
        inside = [i for i, part in enumerate(parts) if part == 1]
        first, last = (torch.log_softmax(outputs[f"{end}_logits"][0][inside], 0) for end in ("start", "end"))
        spans = [(float(first[i] + last[j]), i, j) for i in range(len(inside)) for j in range(i, len(inside))]
        best, i, j = max(spans)
        start_at, end_at = offsets[inside[i]][0], offsets[inside[j]][1]
        assert (found["start"], found["end"], found["answer"]) == (start_at, end_at, context[start_at:end_at])
        assert abs(found["score"] - float(torch.tensor(best).exp())) < 1e-5

"""`mymodels predict` against transformers' pipelines and plain loops of one text at a time; bad lines, pipes, memory."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import mybert_config, mygpt2_config, stock_bert_config, stock_gpt2_config
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    pipeline,
)

from mymodels import (
    MyBertForMaskedLM,
    MyBertForSequenceClassification,
    MyBertForTokenClassification,
    MyGPT2ForCausalLM,
    cli,
)
from mymodels.predicting import predict
from mymodels.predicting.jsonl import read_lines
from mymodels.training.sample_text import load_sample_text
from mymodels.training.tokenizers import train_bert_tokenizer, train_gpt2_tokenizer

HUB = Path(__file__).parents[2] / "hub_repo"
WORDS = " ".join(document.text for document in load_sample_text("held_out")[:4]).split()
LENGTHS = (2, 11, 1, 8, 5, 10, 2, 3, 9, 6, 1)
TEXTS = [" ".join(WORDS[5 * i : 5 * i + n]) for i, n in enumerate(LENGTHS)]


def jsonl(rows: list) -> io.BytesIO:
    return io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())


def run(model: Path, texts=TEXTS, **options) -> list[dict]:
    """The answers, with batches and windows that leave rests."""
    out, problems = io.BytesIO(), []
    rows = [text if isinstance(text, dict) else {"id": f"no {i}", "text": text} for i, text in enumerate(texts)]
    options = {"batch_size": 3, "window": 2, "report": problems.append, **options}
    counts = predict(model, jsonl(rows), out, **options)
    answers = [json.loads(line) for line in out.getvalue().splitlines()]
    assert counts.answered == len(answers) == len(texts) and not counts.skipped and not problems
    assert [answer.get("id") for answer in answers] == [row.get("id") for row in rows]
    return answers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a model with a tokenizer of its family, and gives the folder."""

    def save(model, **tokenizer_changes) -> Path:
        folder = tmp_path_factory.mktemp("folder") / "model"
        model.save_pretrained(folder)
        train = train_bert_tokenizer if "ert" in type(model).__name__ else train_gpt2_tokenizer
        size = 97 if "ert" in type(model).__name__ else 290
        tokenizer = train(TEXTS, vocab_size=size, model_max_length=64)
        for name, value in tokenizer_changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def gpt2(model_class, config_of, **changes):
    return model_class(config_of(vocab_size=290, bos_token_id=0, eos_token_id=0, **changes))


@pytest.mark.parametrize(
    ("problem_type", "num_labels"),
    [("single_label_classification", 3), ("multi_label_classification", 3), ("regression", 1), (None, 1)],
)
def test_classification_is_the_pipeline_s(saved, problem_type: str | None, num_labels: int) -> None:
    config = mybert_config(problem_type=problem_type, num_labels=num_labels, pooling="mean")
    folder = saved(MyBertForSequenceClassification(config))
    answers = run(folder, top_k=0)
    classify = pipeline("text-classification", model=folder, top_k=None)
    for answer, text in zip(answers, TEXTS):
        expected = classify([text])[0]
        if problem_type == "regression":
            assert answer["score"] == pytest.approx(expected[0]["score"], abs=1e-5)
            continue
        assert [found["label"] for found in answer["scores"]] == [row["label"] for row in expected]
        assert [found["score"] for found in answer["scores"]] == pytest.approx([r["score"] for r in expected], abs=1e-5)
        assert answer["label"] == expected[0]["label"] and answer["score"] == answer["scores"][0]["score"]


def test_the_best_label_alone_and_so_many(saved) -> None:
    whole = run(HUB / "mybert", top_k=0)
    assert {answer["label"] for answer in whole} == {"adult", "children"}
    assert [a | {"scores": w["scores"]} for a, w in zip(run(HUB / "mybert"), whole)] == whole
    one = run(HUB / "mybert", top_k=1)
    assert all(set(answer) == {"id", "label", "score", "scores"} and len(answer["scores"]) == 1 for answer in one)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_stock_classifiers_padded_as_if_alone(saved, kind: str) -> None:
    """GPT-2 has learned positions, no token to pad with, and reads the last token."""
    if kind == "bert":
        folder = saved(BertForSequenceClassification(stock_bert_config(num_labels=3)))
    else:
        model = gpt2(GPT2ForSequenceClassification, stock_gpt2_config, num_labels=3, pad_token_id=None)
        folder = saved(model, pad_token=None)
    classify = pipeline("text-classification", model=folder, top_k=None)
    for answer, text in zip(run(folder, top_k=0), TEXTS):
        expected = {row["label"]: row["score"] for row in classify([text])[0]}
        found = {row["label"]: row["score"] for row in answer["scores"]}
        assert found == pytest.approx(expected, abs=1e-5)


def test_pairs_and_texts_in_one_batch(saved) -> None:
    folder = saved(MyBertForSequenceClassification(mybert_config(num_labels=3)))
    rows = [{"text": TEXTS[0], "text_pair": TEXTS[1]}, {"text": TEXTS[2]}, {"text": TEXTS[3], "text_pair": TEXTS[4]}]
    classify = pipeline("text-classification", model=folder)
    for answer, row in zip(run(folder, rows), rows):
        expected = classify(row)
        assert answer["label"] == expected["label"] and answer["score"] == pytest.approx(expected["score"], abs=1e-5)
    renamed = [{"premise": row["text"], "claim": row["text_pair"]} for row in rows if "text_pair" in row]
    again = run(folder, renamed, column="premise", pair_column="claim")
    assert [a["score"] for a in again] == pytest.approx([a["score"] for a in run(folder, [rows[0], rows[2]])])


def test_token_classification_is_the_pipeline_s(saved) -> None:
    folder = saved(MyBertForTokenClassification(mybert_config(num_labels=4)))
    tag = pipeline("token-classification", model=folder, ignore_labels=[])
    for answer, text in zip(run(folder), TEXTS):
        expected = tag(text)
        assert [(t["start"], t["end"], t["label"]) for t in answer["tokens"]] == [
            (row["start"], row["end"], row["entity"]) for row in expected
        ]
        assert [t["score"] for t in answer["tokens"]] == pytest.approx([float(r["score"]) for r in expected], abs=1e-5)
        assert all(t["text"] == text[t["start"] : t["end"]] for t in answer["tokens"])


@torch.no_grad()
def embedding_alone(folder: Path, text: str, mean: bool) -> list[float]:
    encoded = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    outputs = AutoModel.from_pretrained(folder).eval()(**encoded)
    return (outputs.last_hidden_state.mean(dim=1) if mean else outputs.pooler_output)[0].tolist()


def test_embeddings(saved) -> None:
    headless = saved(MyBertForMaskedLM(mybert_config(pooling="attention")))
    for folder, mean in ((HUB / "mybert", False), (HUB / "mygpt2", True)):
        for answer, text in list(zip(run(folder, task="feature-extraction"), TEXTS))[::3]:
            assert answer["embedding"] == pytest.approx(embedding_alone(folder, text, mean), abs=1e-5)
    out, notes = io.BytesIO(), []
    predict(headless, jsonl([{"text": TEXTS[1]}]), out, task="feature-extraction", report=notes.append)
    assert notes == [f"{headless}: it has no weights of a pooler: embeddings are the mean of the hidden states"]
    expected = embedding_alone(headless, TEXTS[1], mean=True)
    assert json.loads(out.getvalue())["embedding"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["mine", "mine with learned positions", "stock"])
@torch.no_grad()
def test_generation_and_loss_of_a_language_model(saved, kind: str) -> None:
    folder = HUB / "mygpt2"
    if kind == "mine with learned positions":
        folder = saved(gpt2(MyGPT2ForCausalLM, mygpt2_config))
    elif kind == "stock":
        folder = saved(gpt2(GPT2LMHeadModel, stock_gpt2_config, pad_token_id=None), pad_token=None)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = [text[:60] for text in TEXTS]
    written, losses = run(folder, texts, max_new_tokens=7), run(folder, texts, task="loss")
    for text, continued, measured in zip(texts, written, losses):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :64]
        known = torch.ones_like(ids)
        tokens = model.generate(ids, attention_mask=known, do_sample=False, max_new_tokens=7, pad_token_id=0)
        assert continued["continuation"] == tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        assert measured["tokens"] == ids.shape[1] - 1
        if measured["tokens"]:
            assert measured["loss"] == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)


def test_long_texts_are_cut_and_counted() -> None:
    long = " ".join(WORDS[:600])
    out = io.BytesIO()
    rows = [{"text": long}, {"text": TEXTS[0]}, {"text": f"{long} and more"}]
    counts = predict(HUB / "mybert", jsonl(rows), out)
    first, _, third = (json.loads(line) for line in out.getvalue().splitlines())
    assert counts.cut == 2 and first["score"] == third["score"]
    with pytest.raises(ValueError, match="max_length=300, but it must be between 1 and 256"):
        predict(HUB / "mybert", jsonl(rows), out, max_length=300)
    with pytest.raises(ValueError, match="max_new_tokens=256 leaves no positions"):
        predict(HUB / "mygpt2", jsonl(rows), out, max_new_tokens=256)


BAD = {
    b"{'text': 1}": "it is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
    b"caf\xe9": "it is not UTF-8 (byte 4 is 0xe9)",
    b"": "it is empty",
    b'["a", "b"]': "it is a list, not a JSON object with the field 'text'",
    b'{"id": 7, "body": "x"}': "it has no field 'text', but 'id', 'body'",
    b"{}": "it has no field 'text', but none at all",
    b'{"text": null}': "its field 'text' is null, not a text",
    b'{"text": ["a"]}': "its field 'text' is a list, not a text",
    b'{"text": " "}': "its field 'text' is empty",
    b'{"text": "a", "text_pair": 3}': "its field 'text_pair' is a number, not a text",
    b'{"text": "\\ud83d"}': "it has half of a character (\\ud83d)",
    b'{"id": 1e999, "text": "a"}': "its field 'id' has a number too large for JSON, which is read as infinite",
    b'{"id": NaN, "text": "a"}': "it is not JSON (NaN is not a JSON number)",
    b'{"text":' + b"[" * 100_000: "it is not JSON (maximum recursion depth exceeded while decoding a JSON array",
}


def test_bad_lines_are_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = [
        b'\xef\xbb\xbf{"text": "one"}\r',
        *[b'{"id": {"a": 1}, "text": "two"}'] * (len(BAD) - 1),
        b'{"text": "last"}',
    ]
    lines = [line for pair in zip(good, BAD) for line in pair] + [good[-1]]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))  # the last one without an end
    options = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--batch-size", "2"]
    assert cli.main(["predict", str(HUB / "mybert"), *options]) == 3
    said = capsys.readouterr().err.splitlines()
    skipped = [line for line in said if "skipped: " in line]
    for i, (line, reason) in enumerate(zip(skipped, BAD.values()), 1):
        assert line.startswith(f"line {2 * i} skipped: {reason}")
    assert len(skipped) == len(BAD) and said[-1] == f"{len(good)} lines answered, {len(BAD)} skipped"
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers[0]["line"] == 1 and answers[-1]["line"] == 2 * len(BAD) + 1 and len(answers) == len(good)
    assert all(answer["id"] == {"a": 1} for answer in answers[1:-1])
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_an_output_that_is_no_plain_file_stays_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A file that takes the place of /dev/null would break the machine, one over a link the link."""
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n' * 3)
    predict_to = [*("predict", str(HUB / "mybert"), "--input", str(tmp_path / "in.jsonl")), "--output"]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert cli.main([*predict_to, str(pipe)]) == 0
    assert os.read(reader, 10_000).count(b"\n") == 3 and pipe.is_fifo()
    os.close(reader)
    (tmp_path / "link.jsonl").symlink_to("answers.jsonl")
    assert cli.main([*predict_to, str(tmp_path / "link.jsonl")]) == 0
    assert (tmp_path / "link.jsonl").is_symlink() and (tmp_path / "answers.jsonl").read_bytes().count(b"\n") == 3
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.jsonl.partial").write_text('{"text": "a"}\n')
    for arguments, sentence in (
        ([tmp_path / "folder"], "folder is a folder: name a file for the output"),
        ([tmp_path / "none" / "out.jsonl"], "out.jsonl is in a folder that does not exist"),
        ([tmp_path / "old.jsonl", "--input", tmp_path / "old.jsonl.partial"], "is also the input"),
        ([tmp_path / "old.jsonl", "--task", "loss"], "choose another --task"),
    ):
        capsys.readouterr()
        assert cli.main([*predict_to, *map(str, arguments)]) == 1
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mymodels predict: ")]
        assert len(told) == 1 and sentence in told[0], told
    left = ["answers.jsonl", "folder", "in.jsonl", "link.jsonl", "old.jsonl.partial", "pipe"]
    assert sorted(os.listdir(tmp_path)) == left
    assert (tmp_path / "old.jsonl.partial").read_text() == '{"text": "a"}\n'


def test_plain_lines_of_text(capsysbinary: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "\n".join(TEXTS).encode() + b"\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert cli.main(["predict", str(HUB / "mybert"), "--text"]) == 0
    out, err = capsysbinary.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer.pop("line") for answer in answers] == list(range(1, len(TEXTS) + 1))
    assert [a["label"] for a in answers] == [a["label"] for a in run(HUB / "mybert")]
    assert err.decode().splitlines()[-1] == f"{len(TEXTS)} lines answered, 0 skipped"


def test_no_line_is_read_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes memory constant, and a pipe answer as it goes."""

    class Pipe(io.RawIOBase):
        given, answered, most_ahead = 0, 0, 0

        def readline(self, limit: int = -1) -> bytes:
            Pipe.most_ahead = max(Pipe.most_ahead, Pipe.given + 1 - Pipe.answered)
            Pipe.given += 1
            return b'{"text": "the cat sat"}\n' if Pipe.given <= 50 else b""

        def write(self, data: bytes) -> int:
            Pipe.answered += data.count(b"\n")
            return len(data)

    assert predict(HUB / "mybert", Pipe(), Pipe(), batch_size=4, window=2).answered == 50
    assert Pipe.answered == 50 and Pipe.most_ahead == 8


def test_a_line_without_end_is_not_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mymodels.predicting.jsonl.LONGEST", 64)
    long = b'{"text": "' + b"a" * 500 + b'"}\n'
    first, second, third = read_lines(io.BytesIO(b'{"text": "a"}\n' + long + b'{"text": "b"}\n'))
    assert (first.text, third.text, third.number) == ("a", "b", 3)
    assert second.problem == "it is longer than 0 MB" and second.size == len(long)


FOREIGN = """
from transformers import PretrainedConfig, BertForSequenceClassification, BertConfig
class ForeignConfig(BertConfig):
    model_type = "foreign-to-predict"
class ForeignForSequenceClassification(BertForSequenceClassification):
    config_class = ForeignConfig
"""


def test_code_of_a_folder_runs_only_if_trusted(saved) -> None:
    torch.manual_seed(1)
    folder = saved(BertForSequenceClassification(stock_bert_config(num_labels=3)))
    expected = run(folder)
    config = json.loads((folder / "config.json").read_text())
    classes = (
        ("AutoConfig", "ForeignConfig"),
        ("AutoModelForSequenceClassification", "ForeignForSequenceClassification"),
    )
    config |= {"model_type": "foreign-to-predict", "auto_map": {name: f"foreign_model.{of}" for name, of in classes}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "foreign_model.py").write_text(FOREIGN)
    with pytest.raises(ValueError, match=r"has code of its own, which would run: read it, then pass --trust-remote"):
        run(folder)
    assert run(folder, trust_remote_code=True) == expected


NO_SUCH_PACKAGE = {"quant_method": "torchao", "quant_type": "int8_weight_only"}


def test_invalid_requests_raise_one_sentence(
    saved, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked = saved(MyBertForMaskedLM(mybert_config()))
    small = saved(MyBertForSequenceClassification(mybert_config(vocab_size=50)))
    broken = MyBertForSequenceClassification(mybert_config())
    torch.nn.init.constant_(broken.classifier.weight, float("nan"))
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    mine = str(HUB / "mygpt2")
    cut = saved(MyBertForSequenceClassification(mybert_config()))
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    wider, quantised = (saved(MyBertForSequenceClassification(mybert_config())) for _ in range(2))
    for folder, change in ((wider, {"intermediate_size": 200}), (quantised, {"quantization_config": NO_SUCH_PACKAGE})):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    monkeypatch.setitem(sys.modules, "torchao", None)
    cases = [
        ([str(cut)], f"{cut} has damaged weights ("),
        ([str(wider)], "intermediate.dense.bias has the shape [64], but [200] by config.json (and "),
        ([str(quantised)], f"{quantised} needs a package that is not installed: "),
        ([mine, "--device", "cuda:77"], "device='cuda:77' cannot be used here: "),
        ([mine, "--device", "gpu"], "device='gpu' cannot be used here: "),
        (
            [mine, "--task", "text-classification"],
            "no weights for score.weight, so the answers of MyGPT2ForSequenceClassification would",
        ),
        ([mine, "--task", "token-classification"], "has no AutoModelForTokenClassification: choose another --task"),
        ([str(masked)], "is a MyBertForMaskedLM, whose task cannot be determined: choose --task"),
        ([str(small)], "the tokenizer has 97 tokens, but MyBertForSequenceClassification has embeddings for 50"),
        ([str(saved(broken))], "line 1: the model's answer is NaN or infinite"),
        ([str(tmp_path / "adapter")], "has no config.json: merge the adapter into its model first"),
        ([str(tmp_path / "nowhere" / "at" / "all")], "there is no file or folder"),
        ([mine, "--batch-size", "0"], "batch_size=0: it must be 1 or more"),
        ([mine, "--input", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (
            [mine, "--output", str(tmp_path / "in.jsonl")],
            "in.jsonl is also the input: name another file for the output",
        ),
    ]
    for arguments, sentence in cases:
        options = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
        assert cli.main(["predict", *options, *arguments]) == 1, arguments
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mymodels predict: ")]
        assert len(told) == 1 and sentence in told[0], (arguments, told)
        assert not (tmp_path / "out.jsonl").exists()
    assert (tmp_path / "in.jsonl").read_text() == '{"text": "a"}\n'


COMMAND = [sys.executable, "-m", "mymodels.cli", "predict"]


@pytest.mark.slow
def test_in_a_shell_pipe_that_is_closed_early(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 20_000)
    command = f"{' '.join(COMMAND)} {HUB / 'mybert'} < {tmp_path / 'in.jsonl'} | head -n 2; echo ${{PIPESTATUS[0]}}"
    shell = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    *answers, code = shell.stdout.splitlines()
    assert [json.loads(answer)["line"] for answer in answers] == [1, 2] and code == "141"
    assert "Traceback" not in shell.stderr and "Error" not in shell.stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_lines(saved, tmp_path: Path) -> None:
    folder = saved(MyBertForSequenceClassification(mybert_config(num_hidden_layers=1, num_labels=2)))
    peaks = {}
    for count in (2_000, 200_000):
        with (tmp_path / "in.jsonl").open("w") as file:
            for i in range(count):
                start, length = i * 7 % (len(WORDS) - 20), i % 8 + 1
                file.write(json.dumps({"id": i, "text": f"{i} " + " ".join(WORDS[start : start + length])}) + "\n")
        options = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--batch-size", "64"]
        child = subprocess.Popen([*COMMAND, str(folder), *options], stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        ids = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").open()]
        assert ids == list(range(count))
        peaks[count] = used.ru_maxrss / 1024
    assert peaks[200_000] < peaks[2_000] + 45, peaks  # MB, of some 450; the lines alone would take more

"""Checkpoint files as Google's BERT and OpenAI's GPT-2 came: TensorFlow's format and names, beside a config."""

import json
from pathlib import Path

import pytest
import torch
from warmstart.random_stock_models import difference, stock_model
from warmstart.test_sources import bert_in_tensorflow, gpt2_in_tensorflow

from mymodels import warm_start

pytestmark = pytest.mark.formats


def write(tensors: dict[str, torch.Tensor], folder: Path, name: str = "model.ckpt") -> None:
    import tensorflow as tf

    values = [tf.constant(tensor.numpy()) for tensor in tensors.values()]
    tf.raw_ops.SaveV2(
        prefix=str(folder / name),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=values,
    )


@pytest.mark.parametrize(
    ("name", "kind", "rename"),
    [("GPT2LMHeadModel", "mygpt2", gpt2_in_tensorflow), ("BertForMaskedLM", "mybert", bert_in_tensorflow)],
)
def test_from_a_file(name: str, kind: str, rename, tmp_path: Path) -> None:
    stock = stock_model(name)
    write(rename(stock), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stock.config.to_dict(), default=str))
    report = warm_start(kind, tmp_path)
    assert report.is_exact, report
    assert difference(report.model, stock) <= 1e-5


GOOGLE = [
    "attention_probs_dropout_prob",
    "hidden_act",
    "hidden_dropout_prob",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "type_vocab_size",
    "vocab_size",
]


def test_googles_folder_as_distributed(tmp_path: Path) -> None:
    import tensorflow as tf

    stock = stock_model("BertForPreTraining", num_attention_heads=2)
    tensors = bert_in_tensorflow(stock)
    write(tensors, tmp_path, "bert_model.ckpt")
    (tmp_path / "bert_config.json").write_text(json.dumps({name: getattr(stock.config, name) for name in GOOGLE}))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", *(f"w{i}" for i in range(91))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    report = warm_start("mybert", tmp_path)
    assert type(report.model).__name__ == "MyBertForMaskedLM" and report.is_exact and report.checked.agrees
    assert report.tokenizer("Hello w3").input_ids == [2, 5, 9, 3] and not report.notes
    written = tf.train.load_checkpoint(str(tmp_path / "bert_model.ckpt"))
    state, compared = report.model.state_dict(), 0
    for row in report.rows:
        for source in row.sources if row.targets else ():
            value = torch.from_numpy(written.get_tensor(source))
            assert torch.equal(state[row.targets[0]], value.t() if source.endswith("kernel") else value), source
            compared += 1
    assert compared > 50
    report.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert warm_start("mybert", tmp_path / "bert_model.ckpt").is_exact


def test_openais_folder_as_distributed(tmp_path: Path) -> None:
    stock = stock_model("GPT2LMHeadModel", n_head=2)
    write(gpt2_in_tensorflow(stock), tmp_path)
    hparams = {"n_vocab": 97, "n_ctx": 64, "n_embd": 32, "n_head": 2, "n_layer": 3}
    (tmp_path / "hparams.json").write_text(json.dumps(hparams))
    words = {f"{i}" if i < 10 else f"<{i}>": i for i in range(96)} | {"<|endoftext|>": 96}
    (tmp_path / "encoder.json").write_text(json.dumps(words))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    report = warm_start("mygpt2", tmp_path)
    assert report.is_exact and report.checked.agrees and difference(report.model, stock) <= 1e-5
    assert report.tokenizer("12").input_ids == [1, 2]

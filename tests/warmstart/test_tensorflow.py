"""Checkpoint files as Google's BERT and OpenAI's GPT-2 came: TensorFlow's format and names, beside a config."""

import json
from pathlib import Path

import pytest
import torch
from warmstart.random_stock_models import difference, stock_model
from warmstart.test_sources import bert_in_tensorflow, gpt2_in_tensorflow

from mymodels import warm_start

pytestmark = pytest.mark.formats


def write(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    import tensorflow as tf

    values = [tf.constant(tensor.numpy()) for tensor in tensors.values()]
    tf.raw_ops.SaveV2(
        prefix=str(folder / "model.ckpt"),
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

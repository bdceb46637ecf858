"""Stock BERT and GPT-2 as OpenVINO models, with dynamic shapes; GPT-2 with its keys and values as a state.

BERT's int8 is NNCF's post-training quantisation, calibrated on documents of the training set; GPT-2's is its compression
of the weights, with activations quantised dynamically by the plugin, as OpenVINO documents for language models.
"""

from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import nn
from transformers import AutoTokenizer, BertForSequenceClassification, DynamicCache, GPT2LMHeadModel, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from . import Rows, models, padded

CALIBRATION = 128  # documents


class _Bert(nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def bert(folder: Path, precision: str) -> Any:
    stock = BertForSequenceClassification.from_pretrained(folder, attn_implementation="sdpa").eval()
    ids = torch.ones(2, 8, dtype=torch.long)
    example = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3])}
    model = openvino.convert_model(_Bert(stock), example_input=example, input=[(name, [-1, -1]) for name in example])
    if precision == "int8":
        rows = _calibration(folder)
        batches = [dict(zip(example, padded([row]))) for row in rows]
        model = nncf.quantize(
            model, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows)
        )
    return model


def _calibration(folder: Path) -> Rows:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(models.reuters_texts("train")[:CALIBRATION], truncation=True, max_length=512).input_ids


class _GPT2(nn.Module):
    """One step: ids, their positions, keys and values so far → logits of the last token, keys and values with the new ones."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor) -> tuple:
        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2]):
            layer = DynamicLayer()
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device = keys.dtype, keys.device
            cache.layers.append(layer)
        seen = torch.arange(past[0].shape[2] + input_ids.shape[1])[None, None]
        mask = (seen <= position_ids[..., None])[:, None]  # [batch, 1, new, all]
        given = {"attention_mask": mask, "position_ids": position_ids, "past_key_values": cache}
        outputs = self.model(input_ids, **given, use_cache=True, logits_to_keep=1)
        layers = outputs.past_key_values.layers
        return (outputs.logits[:, -1], *(states for layer in layers for states in (layer.keys, layer.values)))


def gpt2(folder: Path, precision: str) -> Any:
    stock = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    config = stock.config
    heads, width = config.n_head, config.n_embd // config.n_head
    ids = torch.ones(2, 3, dtype=torch.long)
    past = [torch.zeros(2, heads, 4, width) for _ in range(2 * config.n_layer)]
    example = (ids, torch.arange(4, 7).repeat(2, 1), *past)
    model = openvino.convert_model(_GPT2(stock), example_input=example)
    names = ["input_ids", "position_ids", *(f"past.{number}" for number in range(len(past)))]
    shapes = [[-1, -1]] * 2 + [[-1, heads, -1, width]] * len(past)
    for port, name, shape in zip(model.inputs, names, shapes):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    results = ["logits", *(f"present.{number}" for number in range(len(past)))]
    for port, name in zip(model.outputs, results):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    _reorder_by_beam(model, names[2:])
    apply_make_stateful_transformation(model, dict(zip(names[2:], results[1:])))
    _begin_empty(model, heads, width)
    if precision == "int8":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    return model


def _reorder_by_beam(model: Any, pasts: list[str]) -> None:
    """The input `beam_idx`, by which rows of the cache are picked: the form in which the plugin fuses cache and attention."""
    beam = ops.parameter(openvino.PartialShape([-1]), openvino.Type.i32, name="beam_idx")
    beam.output(0).get_tensor().set_names({"beam_idx"})
    for name in pasts:
        port = model.input(name)
        consumers = list(port.get_target_inputs())
        picked = ops.gather(port, beam, ops.constant(0))
        for consumer in consumers:
            consumer.replace_source_output(picked.output(0))
    model.add_parameters([beam])
    model.validate_nodes_and_infer_types()


def _begin_empty(model: Any, heads: int, width: int) -> None:
    """Give each state its first value: no keys and values, for as many rows as there are ids."""
    rows = ops.gather(ops.shape_of(model.input("input_ids"), "i64"), ops.constant([0]), ops.constant(0))
    shape = ops.concat([rows, ops.constant(np.array([heads, 0, width], dtype=np.int64))], 0)
    for operation in model.get_ops():
        if operation.get_type_name() == "ReadValue":
            operation.set_arguments([ops.broadcast(ops.constant(np.float32(0)), shape)])
    model.validate_nodes_and_infer_types()

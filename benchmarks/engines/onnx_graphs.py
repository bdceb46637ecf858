"""BERT and GPT-2 as ONNX graphs of ONNX Runtime's fused operators, the ones that its transformers optimizer aims at.

Written directly, as that optimizer finds no attention in what today's exporters make of sdpa. GPT-2 keeps keys and values
in buffers of a fixed size that are both input and output (`GroupQueryAttention`), as ONNX Runtime recommends for decoding.
"""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
OPSET = 17


class _Graph:
    """Nodes and weights, added one by one; each `add` returns the names of its outputs."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}

    def weight(self, name: str, values: np.ndarray) -> str:
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(values.copy(order="C"), name)
        return name

    def add(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        names = [f"{op}_{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, f"{op}_{len(self.nodes)}", domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def fused(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        return self.add(op, *inputs, outputs=outputs, domain=MICROSOFT, **attributes)

    def rename(self, name: str, wanted: str) -> None:
        self.nodes.append(helper.make_node("Identity", [name], [wanted]))

    def model(self, inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "model", inputs, outputs, list(self.weights.values()))
        domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=domains, ir_version=8)


def _input(name: str, *shape: Any, kind: int = TensorProto.INT64) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def bert(weights: dict[str, np.ndarray], config: dict[str, Any]) -> onnx.ModelProto:
    """A stock `BertForSequenceClassification`: input_ids, attention_mask → logits."""
    graph = _Graph()
    epsilon, heads = config["layer_norm_eps"], config["num_attention_heads"]

    def held(name: str) -> str:
        return graph.weight(name, weights[name])

    def turned(name: str) -> str:
        return graph.weight(f"{name}.t", weights[name].T)

    def norm(states: str, before: str, part: str, bias: str) -> str:
        named = (held(f"{part}.weight"), held(f"{part}.bias"))
        return graph.fused("SkipLayerNormalization", states, before, *named, held(bias), epsilon=epsilon)

    tables = [held(f"bert.embeddings.{kind}_embeddings.weight") for kind in ("word", "position", "token_type")]
    named = (held("bert.embeddings.LayerNorm.weight"), held("bert.embeddings.LayerNorm.bias"))
    zeros = graph.add("Sub", "input_ids_32", "input_ids_32")
    graph.nodes.insert(0, helper.make_node("Cast", ["input_ids"], ["input_ids_32"], to=TensorProto.INT32))
    graph.nodes.insert(1, helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.INT32))
    embedded = graph.fused(
        "EmbedLayerNormalization", "input_ids_32", zeros, *tables, *named, outputs=2, epsilon=epsilon
    )
    states = embedded[0]
    for number in range(config["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{number}"
        parts = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        packed = graph.weight(f"{layer}.qkv", np.concatenate([weights[f"{part}.weight"].T for part in parts], 1))
        biases = graph.weight(f"{layer}.qkv.bias", np.concatenate([weights[f"{part}.bias"] for part in parts]))
        mixed = graph.fused("Attention", states, packed, biases, "mask", num_heads=heads)
        out = f"{layer}.attention.output"
        mixed = graph.add("MatMul", mixed, turned(f"{out}.dense.weight"))
        states = norm(mixed, states, f"{out}.LayerNorm", f"{out}.dense.bias")
        inner = graph.add("MatMul", states, turned(f"{layer}.intermediate.dense.weight"))
        inner = graph.fused("BiasGelu", inner, held(f"{layer}.intermediate.dense.bias"))
        inner = graph.add("MatMul", inner, turned(f"{layer}.output.dense.weight"))
        states = norm(inner, states, f"{layer}.output.LayerNorm", f"{layer}.output.dense.bias")
    first = graph.add("Gather", states, graph.weight("zero", np.array(0)), axis=1)
    for name in ("bert.pooler.dense", "classifier"):
        first = graph.add("MatMul", first, turned(f"{name}.weight"))
        first = graph.add("Add", first, held(f"{name}.bias"))
        first = graph.add("Tanh", first) if name != "classifier" else first
    graph.rename(first, "logits")
    inputs = [_input(name, "batch", "length") for name in ("input_ids", "attention_mask")]
    return graph.model(inputs, [_input("logits", "batch", "labels", kind=TensorProto.FLOAT)])


def gpt2(weights: dict[str, np.ndarray], config: dict[str, Any]) -> onnx.ModelProto:
    """A stock `GPT2LMHeadModel`, one step of it.

    Inputs: input_ids `[batch, new]`, position_ids `[batch, new]`, last_key (tokens seen so far less one, a row), length
    (tokens seen so far), and the buffers past.N.key and .value `[batch, heads, room, head_dim]`. Outputs: next_id
    `[batch, 1]` and logits `[batch, vocab]` of the last token, and the same buffers as present.N.key and .value.
    """
    graph = _Graph()
    heads, epsilon = config["n_head"], config["layer_norm_epsilon"]
    width = config["n_embd"] // heads
    weights = {name.removeprefix("transformer."): values for name, values in weights.items()}

    def held(name: str) -> str:
        return graph.weight(name, weights[name])

    def norm(states: str, skipped: str, part: str, bias: str) -> list[str]:
        """The normed sum of both, and the sum itself."""
        named = (held(f"{part}.weight"), held(f"{part}.bias"), held(bias))
        found = graph.fused("SkipLayerNormalization", states, skipped, *named, outputs=4, epsilon=epsilon)
        return [found[0], found[3]]

    words = graph.add("Gather", held("wte.weight"), "input_ids")
    skipped = graph.add("Add", words, graph.add("Gather", held("wpe.weight"), "position_ids"))
    named = (held("h.0.ln_1.weight"), held("h.0.ln_1.bias"))
    states = graph.add("LayerNormalization", skipped, *named, axis=-1, epsilon=epsilon)
    buffers = []
    for number in range(config["n_layer"]):
        layer = f"h.{number}"
        packed = graph.add("MatMul", states, held(f"{layer}.attn.c_attn.weight"))
        packed = graph.add("Add", packed, held(f"{layer}.attn.c_attn.bias"))
        past = [f"past.{number}.{part}" for part in ("key", "value")]
        mixed = graph.fused(
            "GroupQueryAttention", packed, "", "", *past, "last_key", "length", outputs=3, num_heads=heads, kv_num_heads=heads
        )  # fmt: skip
        for name, found in zip(past, mixed[1:]):
            present = name.replace("past", "present")
            graph.nodes[-1].output[graph.nodes[-1].output[:].index(found)] = present
            buffers += [(name, present)]
        out = graph.add("MatMul", mixed[0], held(f"{layer}.attn.c_proj.weight"))
        states, skipped = norm(out, skipped, f"{layer}.ln_2", f"{layer}.attn.c_proj.bias")
        inner = graph.add("MatMul", states, held(f"{layer}.mlp.c_fc.weight"))
        inner = graph.fused("FastGelu", inner, held(f"{layer}.mlp.c_fc.bias"))
        inner = graph.add("MatMul", inner, held(f"{layer}.mlp.c_proj.weight"))
        following = f"h.{number + 1}.ln_1" if number + 1 < config["n_layer"] else "ln_f"
        states, skipped = norm(inner, skipped, following, f"{layer}.mlp.c_proj.bias")
    last = graph.add("Gather", states, graph.weight("last", np.array(-1)), axis=1)
    logits = graph.add("MatMul", last, graph.weight("head", weights["wte.weight"].T))
    graph.rename(logits, "logits")
    graph.rename(graph.add("ArgMax", logits, axis=-1, keepdims=1), "next_id")
    inputs = [_input(name, "batch", "new") for name in ("input_ids", "position_ids")]
    inputs += [_input("last_key", "batch", kind=TensorProto.INT32), _input("length", 1, kind=TensorProto.INT32)]
    outputs = [_input("next_id", "batch", 1), _input("logits", "batch", "vocab", kind=TensorProto.FLOAT)]
    for names in buffers:
        for where, name in zip((inputs, outputs), names):
            where.append(_input(name, "batch", heads, "room", width, kind=TensorProto.FLOAT))
    return graph.model(inputs, outputs)

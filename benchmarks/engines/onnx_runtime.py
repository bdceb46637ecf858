"""ONNX Runtime: fused graphs, every graph optimisation, buffers bound once; int8 by its dynamic quantisation.

Weights per channel in eight bits; activations dynamically, as its documentation recommends for transformers on a CPU.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.numpy import load_file

from . import Rows, files_of, log_softmax, onnx_graphs, padded

FILE = "model.onnx"


def _session(folder: Path, precision: str, threads: int, make: Callable[[dict, dict], Any]) -> Any:
    def write(made: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        model = make(load_file(folder / "model.safetensors"), config)
        onnx.save_model(model, made / FILE)
        if precision == "int8":
            logging.disable(logging.WARNING)  # it recommends a pre-processing for graphs that are not fused yet
            quantize_dynamic(
                made / FILE, made / FILE, per_channel=True, weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Attention"],
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
            )  # fmt: skip
            logging.disable(logging.NOTSET)

    made = files_of(folder, f"onnxruntime-{precision}", "onnxruntime", write)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(made / FILE, options, ["CPUExecutionProvider"])


class Classifier:
    def __init__(self, folder: Path, precision: str, threads: int):
        self.session = _session(folder, precision, threads, onnx_graphs.bert)

    def logits(self, batches: list[Rows]) -> list[np.ndarray]:
        given = (dict(zip(("input_ids", "attention_mask"), padded(rows))) for rows in batches)
        return [self.session.run(["logits"], inputs)[0] for inputs in given]


class Generator:
    def __init__(self, folder: Path, precision: str, threads: int):
        self.session = _session(folder, precision, threads, onnx_graphs.gpt2)
        self.pasts = {i.name: i.shape for i in self.session.get_inputs() if i.name.startswith("past.")}

    def _steps(self, prompts: Rows, tokens: int, output: str) -> list[np.ndarray]:
        """What `output` was at each of `tokens` steps; keys and values stay in buffers of the final size."""
        batch, seen = len(prompts), len(prompts[0])
        binding, found = self.session.io_binding(), []
        for name, (_, heads, _, width) in self.pasts.items():
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((batch, heads, seen + tokens - 1, width), dtype=np.float32)
            )
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past", "present"), buffer)
        ids = np.array(prompts, dtype=np.int64)
        for _ in range(tokens):
            positions = np.arange(seen - ids.shape[1], seen, dtype=np.int64)
            binding.bind_cpu_input("input_ids", ids)
            binding.bind_cpu_input("position_ids", np.repeat(positions[None], batch, 0))
            binding.bind_cpu_input("last_key", np.full(batch, seen - 1, dtype=np.int32))
            binding.bind_cpu_input("length", np.array([seen], dtype=np.int32))
            binding.bind_output("next_id")
            binding.bind_output("logits")
            self.session.run_with_iobinding(binding)
            results = dict(zip(("next_id", "logits"), binding.get_outputs()[-2:]))
            found.append(results[output].numpy())
            ids = results["next_id"].numpy()
            seen += 1
        return found

    def generate(self, prompts: Rows, tokens: int) -> list[list[int]]:
        return np.concatenate(self._steps(prompts, tokens, "next_id"), 1).tolist()

    def log_probs(self, prompts: Rows) -> np.ndarray:
        return log_softmax(self._steps(prompts, 1, "logits")[0])

"""OpenVINO: the LATENCY hint, float32 kept float32, GPT-2 as a stateful model; int8 by NNCF.

How the models are made, and made int8, is in open_vino_models.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import openvino

from . import Rows, files_of, log_softmax, padded

FILE = "model.xml"


def _compiled(folder: Path, precision: str, threads: int, kind: str) -> Any:
    def write(made: Path) -> None:
        from . import open_vino_models  # imports torch

        model = getattr(open_vino_models, kind)(folder, precision)
        openvino.save_model(model, made / FILE, compress_to_fp16=False)

    made = files_of(folder, f"openvino-{precision}", "openvino", write)
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    if precision == "float32":
        options["KV_CACHE_PRECISION"] = "f32"  # by default the plugin keeps them in eight bits
    return openvino.Core().compile_model(made / FILE, "CPU", options)


class Classifier:
    def __init__(self, folder: Path, precision: str, threads: int):
        self.request = _compiled(folder, precision, threads, "bert").create_infer_request()

    def logits(self, batches: list[Rows]) -> list[np.ndarray]:
        given = (dict(zip(("input_ids", "attention_mask"), padded(rows))) for rows in batches)
        return [np.array(self.request.infer(inputs)[0]) for inputs in given]


class Generator:
    def __init__(self, folder: Path, precision: str, threads: int):
        self.request = _compiled(folder, precision, threads, "gpt2").create_infer_request()

    def _step(self, ids: np.ndarray, seen: int) -> np.ndarray:
        batch, new = ids.shape
        given = {
            "input_ids": ids,
            "position_ids": np.arange(seen, seen + new, dtype=np.int64)[None].repeat(batch, 0),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        self.request.infer(given, share_inputs=True, share_outputs=True)
        return self.request.get_output_tensor(0).data

    def generate(self, prompts: Rows, tokens: int) -> list[list[int]]:
        self.request.reset_state()
        ids, seen, found = np.array(prompts, dtype=np.int64), 0, []
        for _ in range(tokens):
            logits = self._step(ids, seen)
            seen += ids.shape[1]
            ids = logits.argmax(-1)[:, None]
            found.append(ids)
        return np.concatenate(found, 1).tolist()

    def log_probs(self, prompts: Rows) -> np.ndarray:
        self.request.reset_state()
        return log_softmax(self._step(np.array(prompts, dtype=np.int64), 0))

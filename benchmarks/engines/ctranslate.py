"""CTranslate2: its own converter, then one replica with all threads, as its documentation has it for latency.

Rows are given unpadded, and it pads as it sees fit. Its encoder ends at BERT's pooler; the classifier, one
small product, is numpy's, as in the documentation's example.
"""

from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from safetensors import safe_open

from . import Rows, files_of, log_softmax


def _converted(folder: Path, precision: str) -> str:
    def write(made: Path) -> None:
        from ctranslate2.converters import TransformersConverter  # imports torch
        from transformers import BertConfig, logging

        logging.set_verbosity_error()  # a classifier's head is no news
        BertConfig.position_embedding_type = "absolute"  # the converter asks; transformers 5 knows no other
        TransformersConverter(str(folder)).convert(str(made), quantization=precision, force=True)

    return str(files_of(folder, f"ctranslate2-{precision}", "ctranslate2", write))


def _options(precision: str, threads: int) -> dict:
    return {"device": "cpu", "compute_type": precision, "inter_threads": 1, "intra_threads": threads}


class Classifier:
    def __init__(self, folder: Path, precision: str, threads: int):
        self.encoder = ctranslate2.Encoder(_converted(folder, precision), **_options(precision, threads))
        with safe_open(folder / "model.safetensors", "np") as weights:
            self.weight, self.bias = (weights.get_tensor(f"classifier.{name}") for name in ("weight", "bias"))

    def logits(self, batches: list[Rows]) -> list[np.ndarray]:
        pooled = (np.array(self.encoder.forward_batch(rows).pooler_output) for rows in batches)
        return [states @ self.weight.T + self.bias for states in pooled]


class Generator:
    def __init__(self, folder: Path, precision: str, threads: int):
        self.generator = ctranslate2.Generator(_converted(folder, precision), **_options(precision, threads))

    def _run(self, prompts: Rows, tokens: int, **options: Any) -> list:
        words = [[f"t{token}" for token in row] for row in prompts]  # see `models.spelled`
        given = {"max_length": tokens, "sampling_topk": 1, "include_prompt_in_result": False}
        return self.generator.generate_batch(words, **given, **options)

    def generate(self, prompts: Rows, tokens: int) -> list[list[int]]:
        return [result.sequences_ids[0] for result in self._run(prompts, tokens, min_length=tokens)]

    def log_probs(self, prompts: Rows) -> np.ndarray:
        results = self._run(prompts, 1, return_logits_vocab=True)
        return log_softmax(np.stack([np.array(result.logits[0][0]).reshape(-1) for result in results]))

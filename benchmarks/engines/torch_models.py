"""Our models and the stock ones, in torch, from the same folders."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, BertForSequenceClassification, GPT2LMHeadModel, PreTrainedModel

import mymodels
from mymodels import MyBertForSequenceClassification, MyGPT2ForCausalLM

from . import PADDING, Rows, padded


def quantizes() -> bool:
    """Whether mymodels can quantise a model to int8 by itself."""
    return hasattr(mymodels, "quantize")


def _load(kind: type[PreTrainedModel], folder: Path, precision: str, threads: int) -> PreTrainedModel:
    torch.set_num_threads(threads)
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    if precision == "float32":
        return model
    quantized = mymodels.quantize(model)
    return model if quantized is None else quantized


class Classifier:
    def __init__(self, folder: Path, precision: str, threads: int, ours: bool = False):
        kind = MyBertForSequenceClassification if ours else BertForSequenceClassification
        self.model = _load(kind, folder, precision, threads)

    @torch.inference_mode()
    def logits(self, batches: list[Rows]) -> list[np.ndarray]:
        return [self._logits(rows) for rows in batches]

    def _logits(self, rows: Rows) -> np.ndarray:
        ids, mask = map(torch.from_numpy, padded(rows))
        return self.model(input_ids=ids, attention_mask=mask).logits.numpy()


class Generator:
    def __init__(self, folder: Path, precision: str, threads: int, ours: bool = False):
        self.model = _load(MyGPT2ForCausalLM if ours else GPT2LMHeadModel, folder, precision, threads)
        assert AutoConfig.from_pretrained(folder).eos_token_id is None, "generation could stop early"

    @torch.inference_mode()
    def generate(self, prompts: Rows, tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": PADDING}
        return self.model.generate(ids, max_new_tokens=tokens, **given)[:, ids.shape[1] :].tolist()

    @torch.inference_mode()
    def log_probs(self, prompts: Rows) -> np.ndarray:
        return self.model(torch.tensor(prompts), logits_to_keep=1).logits[:, -1].log_softmax(-1).numpy()

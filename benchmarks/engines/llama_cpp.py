"""llama.cpp through xllamacpp: GGUF files of float32 and of Q8_0, one slot a prompt, all decoded as one batch.

The wheel of xllamacpp is compiled for AVX2; llama.cpp's documentation recommends a build for the very processor. What
was compiled in is in `build`, and goes into the results.
"""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp
from gguf import GGMLQuantizationType, LlamaFileType
from safetensors.numpy import load_file

from . import Rows, files_of

# stock GPT-2's name → GGUF's
OUTER = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
INNER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def build() -> str:
    """The instruction sets that llama.cpp was compiled for."""
    return xllamacpp.get_system_info().strip(" |")


def write_gguf(folder: Path, target: Path, precision: str) -> None:
    """The stock GPT-2 in `folder` as a GGUF file; its tokens are called t0, t1, … (see `models.spelled`)."""
    config = json.loads((folder / "config.json").read_text())
    int8 = precision == "int8"
    writer = gguf.GGUFWriter(target, "gpt2")
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0 if int8 else LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["t 0"])  # it wants one; no text is ever given to it
    writer.add_eos_token_id(config["vocab_size"] - 1)
    writer.add_add_bos_token(False)
    for name, tensor in load_file(folder / "model.safetensors").items():
        where, kind = name.removeprefix("transformer.").rsplit(".", 1)
        if where in OUTER:
            renamed = OUTER[where]
        else:
            number, part = re.fullmatch(r"h\.(\d+)\.(.+)", where).groups()  # type: ignore[union-attr]
            renamed = f"blk.{number}.{INNER[part]}"
        if ".c_" in where and kind == "weight":  # stock GPT-2 keeps these as [in, out]
            tensor = np.ascontiguousarray(tensor.T)
        if int8 and tensor.ndim == 2 and where != "wpe":
            packed = gguf.quants.quantize(tensor, GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{renamed}.{kind}", packed, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{renamed}.{kind}", tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Generator:
    def __init__(self, folder: Path, precision: str, threads: int):
        self.threads = threads
        self.vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        made = files_of(
            folder, f"gguf-{precision}", "gguf", lambda to: write_gguf(folder, to / "model.gguf", precision)
        )
        self.file = made / "model.gguf"
        self.slots: tuple[int, int] = (0, 0)
        self.server: Any = None

    def _for(self, rows: int, length: int) -> Any:
        """A server with a slot for each of `rows`, each of at least `length` tokens; the last one is kept."""
        length = -(-length // 256) * 256
        if self.slots != (rows, length):
            self.server = None  # the old one's memory first
            params = xllamacpp.CommonParams()
            params.model.path = str(self.file)
            params.n_parallel, params.n_ctx = rows, rows * length
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
            params.fit_params = False
            params.verbosity = -1
            self.server, self.slots = xllamacpp.Server(params), (rows, length)
        return self.server

    def _complete(self, prompts: Rows, tokens: int, **options: Any) -> list[dict]:
        greedy = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "cache_prompt": False}
        server = self._for(len(prompts), len(prompts[0]) + tokens)
        found = server.handle_completions({"prompt": prompts, "n_predict": tokens, **greedy, **options})
        if "choices" not in found:
            raise RuntimeError(f"llama.cpp answers {found}")
        return sorted(found["choices"], key=lambda choice: choice["index"])

    def generate(self, prompts: Rows, tokens: int) -> list[list[int]]:
        return [[int(n) for n in choice["text"].split("t")[1:]] for choice in self._complete(prompts, tokens)]

    def log_probs(self, prompts: Rows) -> np.ndarray:
        found = np.full((len(prompts), self.vocab_size), -np.inf)
        for number, prompt in enumerate(prompts):
            (choice,) = self._complete([prompt], 1, logprobs=self.vocab_size)
            for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
                found[number, entry["id"]] = entry["logprob"]
        return found

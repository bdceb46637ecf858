"""A second reader of MyGPT2 folders, written from the config's documentation with torch and safetensors alone."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

ACTIVATIONS = {
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * torch.sigmoid(x),
    "relu": torch.relu,
}


class PlainGPT2:
    """Reads `config.json`, the shard index and the shards of a folder; computes logits one sequence at a time."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self.weights = {}
        for shard in sorted(set(index["weight_map"].values())):
            with safe_open(folder / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    assert index["weight_map"][name] == shard
                    self.weights[name] = file.get_tensor(name)
        assert self.weights.keys() == index["weight_map"].keys()

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = x @ self.weights[f"{name}.weight"].t()
        bias = self.weights.get(f"{name}.bias")
        return x if bias is None else x + bias

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        epsilon = self.config["layer_norm_epsilon"]
        if self.config["norm_type"] == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * self.weights[f"{name}.weight"]
        return x + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else x

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions as complex numbers: `[heads, length, head_dim]`."""
        length, width = x.shape[1:]
        frequencies = self.config["rope_theta"] ** (-torch.arange(0, width, 2).float() / width)
        angles = torch.arange(length).float()[:, None] * frequencies
        turned = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * torch.polar(torch.ones(()), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def attention(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        name, config = f"model.layers.{layer}.self_attn", self.config
        length, width = x.shape[0], config["head_dim"]
        query, key, value = (self.linear(x, f"{name}.{part}_proj").view(length, -1, width) for part in "qkv")
        if config["qk_norm"]:
            query, key = self.norm(query, f"{name}.q_norm"), self.norm(key, f"{name}.k_norm")
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)  # [heads, length, width]
        if config["position_embedding_type"] == "rope":
            query, key = self.rotate(query), self.rotate(key)

        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = distance >= 0
        if config["layer_types"][layer] == "sliding_attention":
            seen &= distance < config["sliding_window"]
        scale = 1 / math.sqrt(width) if config["scale_attn_weights"] else 1.0
        if config["scale_attn_by_inverse_layer_idx"]:
            scale /= layer + 1
        heads = []
        for head in range(query.shape[0]):
            shared = head * key.shape[0] // query.shape[0]
            scores = (query[head] @ key[shared].t() * scale).masked_fill(~seen, -math.inf)
            heads.append(F.softmax(scores, dim=-1) @ value[shared])
        return self.linear(torch.cat(heads, dim=-1), f"{name}.o_proj")

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        act = ACTIVATIONS[self.config["activation_function"]]
        up = self.linear(x, f"{name}.up_proj")
        inner = act(self.linear(x, f"{name}.gate_proj")) * up if self.config["mlp_type"] == "gated" else act(up)
        return self.linear(inner, f"{name}.down_proj")

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """`tokens` `[length]` → logits `[length, vocab_size]`."""
        x = self.weights["model.embed_tokens.weight"][tokens]
        if self.config["position_embedding_type"] == "learned":
            x = x + self.weights["model.embed_positions.weight"][: len(tokens)]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), layer)
            x = x + self.mlp(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
        x = self.norm(x, "model.norm")
        head = "model.embed_tokens" if self.config.get("tie_word_embeddings", True) else "lm_head"
        logits = x @ self.weights[f"{head}.weight"].t()
        if self.config["lm_head_bias"]:
            logits = logits + self.weights["lm_head.bias"]
        cap = self.config["final_logit_softcapping"]
        return logits if cap is None else cap * torch.tanh(logits / cap)

"""Tiny random models of stock families, and by hand how each of them names what all of them have."""

import torch
import transformers
from warmstart.random_stock_models import randomised

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64, "bos_token_id": 1,
    "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
_OPT = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "init_std": 0.2,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip
_DISTIL = {
    "vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64,
    "initializer_range": 0.2,
}  # fmt: skip
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "gpt_neox", "phi", "opt")
ENCODERS = ("bert", "roberta", "distilbert", "electra", "modernbert")
_CONFIGS = {
    "gpt2": _GPT2, "llama": SIZES, "mistral": GROUPED, "qwen2": GROUPED, "gpt_neox": SIZES, "phi": SIZES, "opt": _OPT,
    "phi3": GROUPED, "bert": SIZES, "roberta": {**SIZES, "max_position_embeddings": 66, "pad_token_id": 1},
    "distilbert": _DISTIL, "electra": {**SIZES, "embedding_size": 32},
    "modernbert": {**SIZES, "cls_token_id": 1, "sep_token_id": 2}, "mixtral": {**GROUPED, "num_local_experts": 4},
    "bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
}  # fmt: skip


def family(name: str, head: str = "", **changes) -> torch.nn.Module:
    """A model in which no bias is 0 and no norm 1."""
    config = transformers.AutoConfig.for_model(name, **{**_CONFIGS[name], **changes})
    auto = head or ("AutoModelForMaskedLM" if name in ENCODERS else "AutoModelForCausalLM")
    return randomised(getattr(transformers, auto).from_config(config))


# role → the matrix of layer `i` as [out, in], written by hand for each family: name, and what to take of it
def _fused(name: str, part: int):
    return lambda w: w[name].chunk(3)[part]


def _by_head(name: str, part: int):  # [heads, (q, k, v), head_dim, in]
    return lambda w: w[name].view(4, 3, 8, -1)[:, part].reshape(32, -1)


def _named(front: str, q: str, k: str, v: str, o: str, up: str, down: str, gate: str = ""):
    names = {"q": q, "k": k, "v": v, "o": o, "up": up, "down": down} | ({"gate": gate} if gate else {})
    return {role: (lambda w, n=f"{front}{name}.weight": w[n]) for role, name in names.items()}


def matrices(name: str, i: int) -> dict:
    """Role → a function that takes the matrix out of a state dict."""
    llama = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    bert = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    front = f"transformer.h.{i}."
    if name == "gpt2":
        turned = {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
        qkv = {r: (lambda w, p=p: w[f"{front}attn.c_attn.weight"].t().chunk(3)[p]) for p, r in enumerate("qkv")}
        return qkv | {role: (lambda w, n=f"{front}{own}.weight": w[n].t()) for role, own in turned.items()}
    if name == "gpt_neox":
        front = f"gpt_neox.layers.{i}."
        rest = {"o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
        qkv = {r: _by_head(f"{front}attention.query_key_value.weight", p) for p, r in enumerate("qkv")}
        return qkv | {role: (lambda w, n=f"{front}{own}.weight": w[n]) for role, own in rest.items()}
    if name == "modernbert":
        front = f"model.layers.{i}."
        qkv = {r: _fused(f"{front}attn.Wqkv.weight", p) for p, r in enumerate("qkv")}
        wi = {r: (lambda w, p=p: w[f"{front}mlp.Wi.weight"].chunk(2)[p]) for p, r in enumerate(("gate", "up"))}
        return qkv | wi | {"o": lambda w: w[f"{front}attn.Wo.weight"], "down": lambda w: w[f"{front}mlp.Wo.weight"]}
    if name == "phi":
        return _named(f"model.layers.{i}.", *llama[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")
    if name == "opt":
        return _named(f"model.decoder.layers.{i}.", *llama[:3], "self_attn.out_proj", "fc1", "fc2")
    if name == "distilbert":
        own = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")
        return _named(f"distilbert.transformer.layer.{i}.", *own)
    if name in ENCODERS:
        return _named(f"{name}.encoder.layer.{i}.", *bert, "intermediate.dense", "output.dense")
    return _named(f"model.layers.{i}.", *llama, gate="mlp.gate_proj")


TOKENS = {
    "gpt2": "transformer.wte.weight", "gpt_neox": "gpt_neox.embed_in.weight", "opt": "model.decoder.embed_tokens.weight",
    "bert": "bert.embeddings.word_embeddings.weight", "roberta": "roberta.embeddings.word_embeddings.weight",
    "distilbert": "distilbert.embeddings.word_embeddings.weight", "modernbert": "model.embeddings.tok_embeddings.weight",
    "electra": "electra.embeddings.word_embeddings.weight",
}  # fmt: skip


def tokens(name: str) -> str:
    return TOKENS.get(name, "model.embed_tokens.weight")


def norms(name: str, i: int) -> tuple[str, str] | None:
    """The norms before attention and before the MLP, where both are so."""
    both = ("input_layernorm", "post_attention_layernorm")
    if name == "gpt2":
        return f"transformer.h.{i}.ln_1", f"transformer.h.{i}.ln_2"
    if name == "opt":
        return f"model.decoder.layers.{i}.self_attn_layer_norm", f"model.decoder.layers.{i}.final_layer_norm"
    if name in ("gpt_neox", "llama", "mistral", "qwen2"):
        front = "gpt_neox" if name == "gpt_neox" else "model"
        return f"{front}.layers.{i}.{both[0]}", f"{front}.layers.{i}.{both[1]}"
    return None


RMS = ("llama", "mistral", "qwen2")

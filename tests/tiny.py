"""Small models and inputs for the tests, and stock GPT-2's weights under MyGPT2's names."""

import re

import torch
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel

from mymodels import MyBertConfig, MyGPT2Config, MyGPT2ForCausalLM

GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # larger than usual, so that differences show
}
BERT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
MODERN = {
    "position_embedding_type": "rope",
    "norm_type": "rmsnorm",
    "mlp_type": "gated",
    "activation_function": "silu",
    "num_key_value_heads": 2,
    "qk_norm": True,
    "attention_bias": False,
    "mlp_bias": False,
}

# every switch of MyGPT2 at least once, alone and together
SWITCHES = {
    "stock": {},
    "rope": {"position_embedding_type": "rope", "rope_theta": 500.0},
    "no-positions": {"position_embedding_type": "none"},
    "rmsnorm": {"norm_type": "rmsnorm"},
    "gated": {"mlp_type": "gated", "activation_function": "silu"},
    "grouped-query": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "head-dim": {"head_dim": 16},
    "qk-norm": {"qk_norm": True},
    "no-bias": {"attention_bias": False, "mlp_bias": False},
    "sliding": {"sliding_window": 4},
    "sliding-mixed": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "position_embedding_type": "rope",
    },
    "softcap": {"final_logit_softcapping": 3.0},
    "untied": {"tie_word_embeddings": False},
    "head-bias": {"lm_head_bias": True},
    "inverse-layer": {"scale_attn_by_inverse_layer_idx": True},
    "modern": MODERN,
    "everything": {
        **MODERN,
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": False,
        "lm_head_bias": True,
    },
}


def stock_gpt2_config(**changes) -> GPT2Config:
    return GPT2Config(**{**GPT2, **changes})


def mygpt2_config(**changes) -> MyGPT2Config:
    return MyGPT2Config(**{**GPT2, **changes})


def stock_bert_config(**changes) -> BertConfig:
    return BertConfig(**{**BERT, **changes})


def mybert_config(**changes) -> MyBertConfig:
    return MyBertConfig(**{**BERT, **changes})


GPT2_NAMES = [
    (r"^transformer\.h\.", "model.layers."),
    (r"^transformer\.wte", "model.embed_tokens"),
    (r"^transformer\.wpe", "model.embed_positions"),
    (r"^transformer\.ln_f", "model.norm"),
    (r"\.ln_1\.", ".input_layernorm."),
    (r"\.ln_2\.", ".post_attention_layernorm."),
    (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.up_proj."),
    (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
]


def from_stock_gpt2(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stock GPT-2 tensors under MyGPT2's names: fused QKV split, `Conv1D` matrices transposed."""
    converted = {}
    for name, tensor in state_dict.items():
        if re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):
            tensor = tensor.t().contiguous()
        for pattern, replacement in GPT2_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.c_attn." in name:
            for part, rows in zip("qkv", tensor.chunk(3)):
                converted[name.replace(".attn.c_attn.", f".self_attn.{part}_proj.")] = rows
        else:
            converted[name] = tensor
    return converted


def gpt2_pair(**changes) -> tuple[GPT2LMHeadModel, MyGPT2ForCausalLM]:
    """A stock GPT-2 and a MyGPT2 with the same random weights, both in eval mode."""
    stock = GPT2LMHeadModel(stock_gpt2_config(**changes)).eval()
    mine = MyGPT2ForCausalLM(mygpt2_config(**changes)).eval()
    mine.load_state_dict(from_stock_gpt2(stock.state_dict()))
    return stock, mine


def batch(padding: str = "none", rows: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    """Random tokens with `padding` on the `left`, on the `right`, or `none`."""
    input_ids = torch.randint(2, 97, (rows, length))
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, rows):
        if padding == "left":
            attention_mask[row, : 2 * row] = 0
        elif padding == "right":
            attention_mask[row, -2 * row :] = 0
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()

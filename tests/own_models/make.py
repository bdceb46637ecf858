"""The models of this folder, tiny, as `name → model`."""

import torch

from own_models import conv_bert, moe_gpt2, small_t5, tiny_cnn

GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BERT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
T5 = {
    "vocab_size": 97,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def make(name: str, **changes):
    """One of them, with the weights of seed 0."""
    torch.manual_seed(0)
    if name == "moe_gpt2":
        special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
        return moe_gpt2.MoeGPT2LMHeadModel(moe_gpt2.MoeGPT2Config(**{**GPT2, **special, **changes})).eval()
    if name == "conv_bert":
        return conv_bert.ConvBert(conv_bert.BertConfig(**{**BERT, "num_labels": 2, **changes})).eval()
    if name == "small_t5":
        return small_t5.ScaledT5ForConditionalGeneration(small_t5.ScaledT5Config(**{**T5, **changes})).eval()
    return tiny_cnn.TinyCnnForImageClassification(tiny_cnn.TinyCnnConfig(num_labels=3, **changes)).eval()

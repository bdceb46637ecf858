"""Hub repo folders to verify: stock models, and a small decoder with custom code; all healthy.

The custom folders are written as files, weights included, so that making one runs none of their code.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

CONFIG_CODE = """
from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "tiny_decoder"

    def __init__(self, vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        super().__init__(tie_word_embeddings=tie_word_embeddings, pad_token_id=pad_token_id, **kwargs)
"""
PARTS_CODE = """
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


class TinyAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.heads = config.num_attention_heads
        self.scaling = (config.hidden_size // self.heads) ** -0.5
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x, attention_mask, past_key_values=None, **kwargs):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        attend = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        mixed, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.flatten(2))


class TinyBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = TinyAttention(config, layer_idx)
        self.up_proj = nn.Linear(config.hidden_size, 64)
        self.down_proj = nn.Linear(64, config.hidden_size)

    def forward(self, x, **kwargs):
        x = x + self.self_attn(self.norm(x), **kwargs)
        return x + self.down_proj(torch.relu(self.up_proj(x)))
"""
MODEL_CODE = """
import inspect

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class TinyPreTrainedModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["TinyBlock"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)


class TinyModel(TinyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([TinyBlock(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, position_ids=None,
                inputs_embeds=None, use_cache=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(seen, seen + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        known = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,  # its name since 5.2
            "input_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
            "cache_position": torch.arange(seen, seen + inputs_embeds.size(1)),  # needed through 5.3
        }
        names = inspect.signature(create_causal_mask).parameters
        mask = create_causal_mask(**{name: value for name, value in known.items() if name in names})
        x = inputs_embeds + self.embed_positions(position_ids)
        for layer in self.layers:
            x = layer(x, attention_mask=mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)


class TinyForCausalLM(TinyPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = TinyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new):
        self.lm_head = new

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, position_ids=None,
                inputs_embeds=None, use_cache=None, **kwargs):
        outputs = self.model(input_ids, attention_mask, past_key_values, position_ids, inputs_embeds, use_cache, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)
"""


def weights(tied: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (97, 32), "model.embed_positions.weight": (64, 32)}
    for layer in range(2):
        block = f"model.layers.{layer}."
        for name in "qkvo":
            shapes[f"{block}self_attn.{name}_proj.weight"] = (32, 32)
            shapes[f"{block}self_attn.{name}_proj.bias"] = (32,)
        shapes |= {f"{block}up_proj.weight": (64, 32), f"{block}up_proj.bias": (64,)}
        shapes |= {f"{block}down_proj.weight": (32, 64), f"{block}down_proj.bias": (32,)}
        shapes |= {f"{block}norm.weight": (32,), f"{block}norm.bias": (32,)}
    if not tied:
        shapes["lm_head.weight"] = (97, 32)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def tiny_repo(folder: Path, *, tied: bool = True, files: int = 1) -> Path:
    """A healthy.custom-code folder: one code file, or three that import each other."""
    folder.mkdir(parents=True)
    if files == 1:
        code = {"modeling_tiny": CONFIG_CODE + PARTS_CODE + MODEL_CODE}
        config_file = "modeling_tiny"
    else:
        imports = "from .configuration_tiny import TinyConfig\nfrom .parts import TinyBlock\n"
        code = {"configuration_tiny": CONFIG_CODE, "parts": PARTS_CODE, "modeling_tiny": imports + MODEL_CODE}
        config_file = "configuration_tiny"
    for name, text in code.items():
        (folder / f"{name}.py").write_text(text.lstrip())
    auto_map = {
        "AutoConfig": f"{config_file}.TinyConfig",
        "AutoModel": "modeling_tiny.TinyModel",
        "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
    }
    config = {"model_type": "tiny_decoder", "architectures": ["TinyForCausalLM"], "auto_map": auto_map}
    config |= {"tie_word_embeddings": tied, "dtype": "float32", "eos_token_id": 1, "bos_token_id": 1, "vocab_size": 97}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(tied), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stock(folder: Path, name: str) -> Path:
    """A tiny random model of the library, saved by the library."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1}
    t5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    gpt2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    made = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2, bos_token_id=1, eos_token_id=1)),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**sizes)),
        "llama-untied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)),
        "llama-tied-bf16": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
        ).bfloat16(),
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**t5, decoder_start_token_id=0)),
        "whisper": lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                vocab_size=97,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_source_positions=50,
                max_target_positions=32,
                num_mel_bins=8,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=3,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        ),
        "vit": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=32,
                patch_size=8,
            )
        ),
    }
    made[name]().save_pretrained(folder, max_shard_size="20KB")
    return folder

"""Hub repo folders to verify: stock models, and a small decoder with custom code, healthy or with one fault.

The custom folders are written as files, weights included, so that making one runs none of their code.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file

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
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
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
    """A healthy custom-code folder: one code file, or three that import each other."""
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


class Fault(NamedTuple):
    """One thing that is wrong with a folder, and how it must be reported."""

    break_it: Callable[[Path], None]
    check: str  # the check that fails, the only one
    says: str  # pattern of what it says
    where: str = ""  # pattern of the place it names
    how: dict = {}


def code(*edits: tuple[str, str], before: str = "", after: str = "") -> Callable[[Path], None]:
    """Replace texts in the one code file; each must be there once."""

    def apply(folder: Path) -> None:
        path = folder / "modeling_tiny.py"
        text = path.read_text()
        for old, new in edits:
            assert text.count(old) == 1, (old, text.count(old))
            text = text.replace(old, new)
        path.write_text(before + text + after)

    return apply


def config(**changes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], object], name: str = "model.safetensors"):
    def apply(folder: Path) -> None:
        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name, metadata={"format": "pt"})

    return apply


def all_of(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for step in steps:
            step(folder)

    return apply


def golden_with(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Record golden outputs, then falsify them."""

    def apply(folder: Path) -> None:
        from safetensors import safe_open

        from mymodels.hub import record_golden

        path = record_golden(folder)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        held = load_file(path)
        change(held)
        save_file(held, path, metadata=metadata)

    return apply


def big_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(120)} | {"[UNK]": 120}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def auto_map_with(**entries: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        held = json.loads(path.read_text())
        held["auto_map"].update(entries)
        path.write_text(json.dumps(held))

    return apply


_INIT = "            nn.init.normal_(module.weight, std=0.02)\n"
_END_OF_MODEL_INIT = (
    "        self.layers = nn.ModuleList([TinyBlock(config, i) for i in range(config.num_hidden_layers)])\n"
)
_EMBED = "        if inputs_embeds is None:\n"
FULL = {"quick": False}

FAULTS: dict[str, Fault] = {
    # weights
    "init writes .data, 5.0": Fault(
        code((_INIT, "            module.weight.data.normal_(std=0.02)\n")),
        "weights",
        "overwritten or initialised anew after loading",
        "AutoModel",
        {"releases": "5.0"},
    ),
    "init of a parent writes .data": Fault(
        code(
            (
                "    def _init_weights(self, module):\n        if",
                """    def _init_weights(self, module):
        if isinstance(module, TinyAttention):
            module.register_buffer("scale", torch.ones(1), persistent=False)
            module.o_proj.weight.data.normal_(std=0.02)
        if""",
            ),
            (
                '        for name in ("q_proj"',
                '        self.register_buffer("scale", torch.ones(1), persistent=False)\n        for name in ("q_proj"',
            ),
        ),
        "weights",
        r"anew after loading: (model\.)?layers\.0\.self_attn\.o_proj\.weight",
    ),
    "head untied": Fault(
        code(('    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}\n\n', "")),
        "tied",
        "they are two tensors",
    ),
    "saved tied, config untied": Fault(
        config(tie_word_embeddings=False), "weights", r"not in the files, so started at random: lm_head\.weight"
    ),
    "missing tensor": Fault(
        tensors(lambda held: held.pop("model.layers.1.up_proj.bias")),
        "weights",
        r"not in the files, so started at random: model\.layers\.1\.up_proj\.bias",
        "AutoModelForCausalLM",
    ),
    "unexpected tensor": Fault(
        tensors(lambda held: held.update({"model.layers.2.up_proj.bias": torch.ones(64)})),
        "weights",
        r"in the files but not in the model: model\.layers\.2\.up_proj\.bias",
    ),
    "dtype changed": Fault(
        tensors(lambda held: held.update({name: tensor.bfloat16() for name, tensor in held.items()})),
        "weights",
        "loaded as float32, but bfloat16 in the files",
    ),
    "plain tensor attribute": Fault(
        code((_END_OF_MODEL_INIT, _END_OF_MODEL_INIT + "        self.table = torch.arange(64)\n")),
        "weights",
        r"left on the meta device, without data: (model\.)?table",
    ),
    "base_model_prefix": Fault(
        code(('base_model_prefix = "model"', 'base_model_prefix = "decoder"')),
        "weights",
        "in the files under another prefix, so started at random",
        "^AutoModel$",
    ),
    "buffer that is not saved": Fault(
        code(
            (
                _END_OF_MODEL_INIT,
                _END_OF_MODEL_INIT + '        self.register_buffer("table", torch.arange(64), persistent=False)\n',
            )
        ),
        "buffers",
        r"not what __init__ computes: (model\.)?table",
    ),
    # code that does not load
    "module that is not there": Fault(code(before="import flash_attention_nine\n"), "load", "flash_attention_nine"),
    "post_init missing": Fault(
        code(
            ("        self.post_init()\n\n    def get_output", "\n    def get_output"),
            (_END_OF_MODEL_INIT + "        self.post_init()\n", _END_OF_MODEL_INIT),
        ),
        "load",
        "AttributeError",
    ),
    "class that is not there": Fault(
        auto_map_with(AutoModelForCausalLM="modeling_tiny.TinyForCausalLMs"), "load", "TinyForCausalLMs"
    ),
    "hangs": Fault(
        code(before="import time\n\nwhile True:\n    time.sleep(0.1)\n"),
        "load",
        "did not end within 15 s",
        r"modeling_tiny\.py:4",
        {"time_limit": 15},
    ),
    "eats memory": Fault(
        code(before="hoard = [bytes(2**26)]\nwhile True:\n    hoard.append(bytes(2**26))\n"),
        "load",
        "MemoryError",
        r"modeling_tiny\.py:3",
        {"memory_limit": 1_500_000_000},
    ),
    # code that does what it should not
    "opens a connection": Fault(
        code(
            before='import urllib.request\n\ntry:\n    urllib.request.urlopen("http://127.0.0.1:9/stats", timeout=1)\nexcept OSError:\n    pass\n'
        ),
        "network",
        "opens a network connection|looks up '127.0.0.1'",
        r"modeling_tiny\.py:4",
    ),
    "writes elsewhere": Fault(
        code(before='try:\n    open("/var/tmp/tiny.log", "a").close()\nexcept OSError:\n    pass\n'),
        "file writes",
        "/var/tmp/tiny.log",
        r"modeling_tiny\.py:2",
    ),
    # numbers
    "wrong golden output": Fault(
        golden_with(lambda held: held["output.AutoModelForCausalLM.logits"].add_(0.01)),
        "golden",
        "logits differs by up to 0.01",
        "AutoModelForCausalLM",
    ),
    "wrong golden tokens": Fault(
        golden_with(lambda held: held["greedy.AutoModelForCausalLM"][0, -1:].add_(1)),
        "generation",
        r"differs from the recorded tokens in row 0 at position \d+",
    ),
    "golden file damaged": Fault(
        all_of(golden_with(lambda held: None), lambda f: (f / "golden.safetensors").write_bytes(b"nothing")),
        "golden",
        "the header claims",
    ),
    "dropout in eval mode": Fault(
        code(
            ("return self.o_proj(mixed.flatten(2))", "return nn.functional.dropout(self.o_proj(mixed.flatten(2)), 0.1)")
        ),
        "forward",
        "two runs on the same inputs in eval mode are not the same",
    ),
    "crashes": Fault(
        code((_EMBED, "        import ctypes\n        ctypes.string_at(0)\n" + _EMBED)),
        "forward",
        "crashed with SIGSEGV",
        r"modeling_tiny\.py:\d+",
    ),
    "attention mask ignored": Fault(
        code(('"attention_mask": attention_mask,', '"attention_mask": None,')),
        "padding",
        "padding on the left changes",
    ),
    "cache forgotten in the positions": Fault(
        code(
            (
                "        if position_ids is None:\n            position_ids = torch.arange(seen, seen + inputs_embeds.shape[1],",
                "        if position_ids is None or seen:\n            position_ids = torch.arange(inputs_embeds.shape[1],",
            )
        ),
        "cached generation",
        "generation with the cache is not generation without it: at token 2",
    ),
    "eager forgets the scaling": Fault(
        code(("key.transpose(2, 3) * scaling", "key.transpose(2, 3)")),
        "eager = sdpa",
        "eager attention gives other outputs",
    ),
    "weights read past the module": Fault(
        code(
            (
                "self.down_proj(torch.relu(self.up_proj(x)))",
                "self.down_proj(torch.relu(nn.functional.linear(x, self.up_proj.weight, self.up_proj.bias)))",
            )
        ),
        "device map",
        "meta",
    ),
    ".item() in __init__": Fault(
        code((_END_OF_MODEL_INIT, _END_OF_MODEL_INIT + "        self.rate = torch.linspace(0, 1, 3)[1].item()\n")),
        "meta",
        "item",
        r"modeling_tiny\.py:\d+",
    ),
    "init looks at values": Fault(
        code((_INIT, "            if module.weight.abs().max().item() != 0.123:\n    " + _INIT)),
        "device map",
        "item",
        r"modeling_tiny\.py:\d+",
    ),
    "processor that is not there": Fault(
        auto_map_with(AutoImageProcessor="processing_tiny.TinyProcessor"),
        "load",
        "image processor for .repo.",
        "AutoImageProcessor",
    ),
    "tokenizer larger than the embeddings": Fault(
        big_tokenizer, "tokenizer", "has 121 tokens, the model's vocab_size is 97"
    ),
    # saving, processes
    "save_pretrained forgets the code": Fault(
        code(
            (
                "    def get_output_embeddings",
                """    def save_pretrained(self, folder, **kwargs):
        super().save_pretrained(folder, **kwargs)
        import os
        os.remove(os.path.join(folder, "modeling_tiny.py"))

    def get_output_embeddings""",
            )
        ),
        "save",
        "does not write modeling_tiny.py",
        r"modeling_tiny\.py",
    ),
    "save_pretrained rounds": Fault(
        code(
            (
                "    def get_output_embeddings",
                """    def save_pretrained(self, folder, **kwargs):
        rounded = {name: tensor.half().float() for name, tensor in self.state_dict().items() if name != "lm_head.weight"}
        super().save_pretrained(folder, state_dict=rounded, **kwargs)

    def get_output_embeddings""",
            )
        ),
        "reload",
        "tensors are not what was saved",
    ),
    "class that cannot be pickled": Fault(
        code(("self.scaling = ", "self.split = lambda y: y\n        self.scaling = ")),
        "pickle",
        "pickle",
        "",
        FULL,
    ),
    "spawned worker": Fault(
        code(
            (
                "    def get_output_embeddings",
                """    def __setstate__(self, state):
        assert SEEN, "no model was made in this process"
        super().__setstate__(state)

    def get_output_embeddings""",
            ),
            (
                "        self.model = TinyModel(config)\n",
                "        SEEN.append(1)\n        self.model = TinyModel(config)\n",
            ),
            before="SEEN = []\n",
        ),
        "spawned worker",
        "exited unexpectedly|no model was made",
        "",
        FULL,
    ),
    "parallel load": Fault(
        code(before='import os, time\nos.mkdir("building")\ntime.sleep(0.5)\nos.rmdir("building")\n'),
        "parallel load",
        "of 8 processes that load at once fail, the first with FileExistsError",
        "",
        FULL,
    ),
}

"""Healthy Hub folders of different shapes, made small and from nothing: `make_<kind>(folder)` fills a new folder."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HUB_REPO = Path(__file__).parents[2] / "hub_repo"
TINY = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12\n"

CONFIGURATION = '''"""A small language model: its configuration."""

from transformers import PretrainedConfig


class {Name}Config(PretrainedConfig):
    model_type = "{name}"

    def __init__(
        self,
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
'''

LAYERS = '''"""A small language model: attention and block."""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def attention_function(name):
    # 5.0 and newer, and before: ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    return eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


class {Name}Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, cache_position=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, {{"cache_position": cache_position}})
        attend = attention_function(self.config._attn_implementation)
        mixed, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1))


class {Name}Block(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = {Name}Attention(config, layer_idx)

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.self_attn(self.norm(hidden_states), **kwargs)
'''

MODELING = '''"""A small language model."""

import inspect

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters


def causal_mask(**arguments):
    arguments["input_embeds"] = arguments["inputs_embeds"]
    return create_causal_mask(**{{name: value for name, value in arguments.items() if name in MASK_ARGUMENTS}})


class {Name}PreTrainedModel(PreTrainedModel):
    config_class = {Name}Config
    base_model_prefix = "model"
    _no_split_modules = ["{Name}Block"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def tie_weights(self, missing_keys=None, **kwargs):
        if missing_keys is not None:  # 5.3 forgets that a tied head is missing
            tied = getattr(self, "all_tied_weights_keys", {{}})
            missing_keys.update(name for name in tied if self.get_parameter(name).is_meta)
            kwargs["missing_keys"] = missing_keys
        return super().tie_weights(**kwargs)


class {Name}Model({Name}PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([{Name}Block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        cache_position = kwargs.pop("cache_position", None)
        if cache_position is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            cache_position = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past
        if position_ids is None:
            position_ids = cache_position[None]
        mask = causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache_position=cache_position,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds + self.embed_positions(position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                cache_position=cache_position,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class {Name}ForCausalLM({Name}PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {{"lm_head.weight": "model.embed_tokens.weight"}}

    def __init__(self, config):
        super().__init__(config)
        self.model = {Name}Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = self.model(input_ids=input_ids, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
'''

TOKENIZATION = '''"""A tokenizer of characters."""

import json
import os

from transformers import PreTrainedTokenizer


class {Name}Tokenizer(PreTrainedTokenizer):
    vocab_files_names = {{"vocab_file": "vocab.json"}}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **kwargs):
        with open(vocab_file, encoding="utf-8") as file:
            self.vocab = json.load(file)
        self.characters = {{number: character for character, number in self.vocab.items()}}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.vocab)

    def get_vocab(self):
        return dict(self.vocab, **self.added_tokens_encoder)

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.vocab.get(token, 0)

    def _convert_id_to_token(self, index):
        return self.characters.get(index, "?")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = os.path.join(save_directory, (filename_prefix + "-" if filename_prefix else "") + "vocab.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.vocab, file)
        return (path,)
'''


def make_mygpt2(folder: Path) -> Path:
    """Our GPT-2, sharded, with tokenizer, card and manifest."""
    return Path(shutil.copytree(HUB_REPO / "mygpt2", folder))


def make_mybert(folder: Path) -> Path:
    """Our BERT, likewise."""
    return Path(shutil.copytree(HUB_REPO / "mybert", folder))


def _stock(folder: Path, model: transformers.PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    return folder


def make_stock_gpt2(folder: Path) -> Path:
    """GPT-2 as transformers saves it: tied, no code."""
    return _stock(folder, transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **TINY)))


def make_stock_bert(folder: Path) -> Path:
    """BERT with a classifier, as transformers saves it."""
    config = transformers.BertConfig(vocab_size=97, **LLAMA)
    return _stock(folder, transformers.BertForSequenceClassification(config))


def make_stock_llama(folder: Path) -> Path:
    """Llama, untied, in several shards."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=False, **LLAMA, **TINY))
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


def make_stock_llama_tied(folder: Path) -> Path:
    """Llama whose head is its embedding."""
    return _stock(
        folder, transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **LLAMA, **TINY))
    )


def make_stock_t5(folder: Path) -> Path:
    """T5: an encoder and a decoder."""
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return _stock(folder, transformers.T5ForConditionalGeneration(config))


def make_single_file(folder: Path) -> Path:
    """Custom code in one file, tied."""
    name = "tinyone"
    bodies = [text.partition("\n\n")[2] for text in (CONFIGURATION, LAYERS, MODELING)]  # without their docstrings
    return _custom(folder, name, {f"modeling_{name}.py": "\n\n".join(bodies)}, f"modeling_{name}", tied=True)


def make_multi_file(folder: Path) -> Path:
    """Custom code in three files, untied, with a requirements file."""
    name, files = "tinymany", {}
    files[f"configuration_{name}.py"] = CONFIGURATION
    files[f"layers_{name}.py"] = LAYERS
    siblings = "\n\nfrom .configuration_{name} import {Name}Config\nfrom .layers_{name} import {Name}Block\n\nMASK_ARG"
    files[f"modeling_{name}.py"] = MODELING.replace("\n\nMASK_ARG", siblings, 1)
    _custom(folder, name, files, f"configuration_{name}", tied=False)
    (folder / "requirements.txt").write_text("torch\ntransformers>=4.56\n")
    return folder


def make_with_tokenizer(folder: Path) -> Path:
    """Custom code with a tokenizer of its own, which writes a file when it is saved."""
    make_multi_file(folder)
    (folder / "tokenization_tinymany.py").write_text(TOKENIZATION.format(Name="Tinymany"))
    tokenizer = {
        "auto_map": {"AutoTokenizer": ["tokenization_tinymany.TinymanyTokenizer", None]},
        "eos_token": "!",
        "pad_token": "?",
        "tokenizer_class": "TinymanyTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
    vocab = {character: number for number, character in enumerate("?!abcdefghijklmnopqrstuvwxyz ")}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    return folder


def _custom(folder: Path, name: str, files: dict[str, str], config_module: str, tied: bool) -> Path:
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(text.format(name=name, Name=name.capitalize()))
    cap = name.capitalize()
    config = {
        "architectures": [f"{cap}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{config_module}.{cap}Config",
            "AutoModel": f"modeling_{name}.{cap}Model",
            "AutoModelForCausalLM": f"modeling_{name}.{cap}ForCausalLM",
        },
        "dtype": "float32",
        "model_type": name,
        "tie_word_embeddings": tied,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    tensors = {key: value.contiguous() for key, value in model.state_dict().items() if not (tied and "lm_head" in key)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


KINDS = {name.removeprefix("make_"): make for name, make in sorted(globals().items()) if name.startswith("make_")}

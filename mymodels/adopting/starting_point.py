"""`mymodels new`: write the files of a new model as a starting point."""

import keyword
import os
import re
import textwrap
from pathlib import Path

from ..checkpoints import CheckpointError, replace_folder
from .write_modeling import TIE_WEIGHTS

_MODELS = Path(__file__).parents[1] / "models"
_BASES = {"gpt2": "MyGPT2", "bert": "MyBert"}
_SIZES = {
    "gpt2": "vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=0",
    "bert": "vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64",
    "blank": "vocab_size=97, hidden_size=32, num_hidden_layers=2, pad_token_id=0",
}
_CLASSES = {
    "gpt2": ("Model", "ForCausalLM", "ForSequenceClassification"),
    "bert": ("Model", "ForMaskedLM", "ForSequenceClassification"),
    "blank": ("Model", "ForCausalLM"),
}

_BLANK_CONFIGURATION = '''"""Configuration of {Name}."""

from typing import Any

from transformers import PretrainedConfig


class {Name}Config(PretrainedConfig):
    """Sizes of {Name}.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the states.
        num_hidden_layers: number of blocks.
        initializer_range: standard deviation of new weights.
        tie_word_embeddings: whether the head shares the embeddings' weight.
    """

    model_type = "{name}"

    def __init__(
        self,
        vocab_size: int = 50257,
        hidden_size: int = 256,
        num_hidden_layers: int = 4,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.initializer_range = initializer_range
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


{Name}Config.register_for_auto_class()
'''

_BLANK_MODELING = '''"""{Name}: a language model to fill in. Its blocks process each token separately: add attention, a convolution or a state."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.utils import can_return_tuple

try:  # in a folder that `save_pretrained` wrote
    from .configuration_{name} import {Name}Config
except ImportError:  # here, where the folder is no package
    from configuration_{name} import {Name}Config


class {Name}Block(GradientCheckpointingLayer):
    """One block: `hidden_states` [batch, length, hidden_size] to the same shape."""

    def __init__(self, config: {Name}Config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up_proj = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.down_proj = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.down_proj(nn.functional.gelu(self.up_proj(self.norm(hidden_states))))


class {Name}PreTrainedModel(PreTrainedModel):
    config_class = {Name}Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["{Name}Block"]

    def _init_weights(self, module: nn.Module) -> None:
        # `nn.init` on the parameter itself: the loader guards these calls, so that they touch no loaded weight
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class {Name}Model({Name}PreTrainedModel):
    """Embeddings, blocks, norm."""

    def __init__(self, config: {Name}Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([{Name}Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:  # attention_mask is for blocks that mix tokens
            hidden_states = layer(hidden_states)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class {Name}ForCausalLM({Name}PreTrainedModel, GenerationMixin):
    """The next token at each position."""

    _tied_weights_keys = {{"lm_head.weight": "model.embed_tokens.weight"}}

    def __init__(self, config: {Name}Config):
        super().__init__(config)
        self.model = {Name}Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

{tie}
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        states = self.model(input_ids, attention_mask, inputs_embeds, return_dict=True).last_hidden_state
        logits = self.lm_head(states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # no cache; with attention, use past_key_values instead

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return {{"input_ids": input_ids, "attention_mask": attention_mask}}


{Name}Model.register_for_auto_class("AutoModel")
{Name}ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
'''

_TESTS = '''"""Tests of {Name}: run `python -m pytest` in this folder, after `pip install pytest`."""

from configuration_{name} import {Name}Config
from modeling_{name} import {imports}

from mymodels.testing import ModelBattery


class Small(ModelBattery):
    __test__ = False

    def make_config(self):
        return {Name}Config({sizes})
{classes}'''

_README = """# {Name}

{origin}

| file | what it is |
|---|---|
| `configuration_{name}.py` | `{Name}Config`: every size and switch is a field of it |
| `modeling_{name}.py` | the model |
| `test_{name}.py` | its tests, to run after every change |

```
pip install pytest
python -m pytest                            # in this folder, after each change
```
```python
from configuration_{name} import {Name}Config
from modeling_{name} import {main}
from mymodels import build_repo

model = {main}({Name}Config())
build_repo(model, None, "{name}-hub")       # then: mymodels verify {name}-hub
```
"""


def write_starting_point(name: str, base: str = "gpt2", output_dir: str | os.PathLike | None = None) -> Path:
    """Write configuration, modeling file, tests and README of a new model.

    Args:
        name: prefix of the classes, such as `Whale` for `WhaleConfig`; in lower case for the files.
        base: `gpt2` or `bert`, the code of MyGPT2 or MyBert under this name; `blank`, a model to fill in.
        output_dir: a new or empty folder; default: `name` in lower case.

    Returns:
        the folder.

    Raises:
        CheckpointError: the name is not valid for a class, or is taken.
        FileExistsError: the folder is not empty.

    Example:
        >>> write_starting_point("Whale", "gpt2")
        PosixPath('whale')
    """
    import transformers
    from transformers import CONFIG_MAPPING

    if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", name) or keyword.iskeyword(name):
        raise CheckpointError(
            f"{name!r} is not a class name: use a capital letter followed by letters and digits, such as Whale"
        )
    if base not in _SIZES:
        raise CheckpointError(f"{base!r} is not a base: use one of {', '.join(_SIZES)}")
    lower = name.lower()
    if lower in CONFIG_MAPPING:
        raise CheckpointError(
            f"{name}: the model_type {lower!r} is taken in transformers or mymodels: choose another name"
        )
    classes = [f"{name}{ending}" for ending in _CLASSES[base]]
    if taken := set(dir(transformers)) & {f"{name}Config", f"{name}PreTrainedModel", *classes}:
        raise CheckpointError(f"{name}: transformers has a class {min(taken)} already: choose another name")
    target = Path(output_dir or lower).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty: choose another folder with --out")
    files = _blank(name) if base == "blank" else _renamed(_BASES[base], name)
    tests = "".join(
        f"\n\nclass Test{cls}(Small):\n    __test__ = True\n    model_class = {cls}\n"
        + ("    packs = True\n" if base != "blank" and "Classification" not in cls else "")
        for cls in classes
    )
    values = {
        "Name": name,
        "name": lower,
        "imports": ", ".join(sorted(classes)),
        "sizes": _SIZES[base],
        "main": classes[1],
    }
    files[f"test_{lower}.py"] = _TESTS.format(classes=tests, **values)
    origin = (
        "A model to fill in: its blocks process each token separately."
        if base == "blank"
        else f"A copy of {_BASES[base]} to change, with all of its switches."
    )
    files["README.md"] = _README.format(origin=origin, **values)
    with replace_folder(target, overwrite=False) as folder:
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
    return target


def _blank(name: str) -> dict[str, str]:
    values = {
        "Name": name,
        "name": name.lower(),
        "tie": textwrap.indent(TIE_WEIGHTS, " " * 4, lambda line: bool(line.strip())),
    }
    return {
        f"configuration_{name.lower()}.py": _BLANK_CONFIGURATION.format(**values),
        f"modeling_{name.lower()}.py": _BLANK_MODELING.format(**values),
    }


def _renamed(old: str, name: str) -> dict[str, str]:
    """Configuration and modeling file of MyGPT2 or MyBert under another name; shared files are imported from mymodels."""
    files = {}
    for kind in ("configuration", "modeling"):
        text = (_MODELS / f"{kind}_{old.lower()}.py").read_text(encoding="utf-8")
        text = re.sub(rf"from \.(configuration_{old.lower()}) import", r"from \1 import", text)
        text = re.sub(r"^from \.(\w+) import", r"from mymodels.models.\1 import", text, flags=re.M)
        copied = "A Hub repo gets a copy of it, with the files of mymodels that it imports."
        text = re.sub(r"Copied as it is into Hub repos: [^.\n]*\.", copied, text, count=1)
        text = _replace_names(text, old, name)
        files[f"{kind}_{name.lower()}.py"] = text
    return files


def _replace_names(text: str, old: str, name: str) -> str:
    """The text with the family's name replaced; classes imported from mymodels keep theirs."""
    shared = " ".join(re.findall(r"^from mymodels\.models\.\w+ import (\([^)]*\)|.*)$", text, flags=re.M))
    kept = set(re.findall(r"\w+", shared))

    def new(word: re.Match) -> str:
        if word[0] in kept:
            return word[0]
        # in one pass: the new name may contain the old one
        return re.sub(f"{old}|{old.lower()}", lambda part: name if part[0] == old else name.lower(), word[0])

    return re.sub(rf"\w*({old}|{old.lower()})\w*", new, text)

"""The faults that only running shows: how a healthy folder gets one, and how it must be reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mymodels.hub import record_golden


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
        path = record_golden(folder)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        held = load_file(path)
        change(held)
        save_file(held, path, metadata=metadata)

    return apply


def big_tokenizer(folder: Path) -> None:
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
        "overwritten or initialised after loading",
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
        r"initialised after loading: (model\.)?layers\.0\.self_attn\.o_proj\.weight",
    ),
    "head untied": Fault(
        code(('    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}\n\n', "")),
        "tied",
        "they are two tensors",
    ),
    "head tied without an override, 5.3": Fault(
        lambda folder: None, "tied", "they are two tensors", "AutoModelForCausalLM", {"releases": "5.3"}
    ),
    "saved tied, config untied": Fault(
        config(tie_word_embeddings=False), "weights", r"not in the files, so initialised at random: lm_head\.weight"
    ),
    "missing tensor": Fault(
        tensors(lambda held: held.pop("model.layers.1.up_proj.bias")),
        "weights",
        r"not in the files, so initialised at random: model\.layers\.1\.up_proj\.bias",
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
        "in the files under another prefix, so initialised at random",
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
        r"different from what __init__ computes: (model\.)?table",
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
    "leaves": Fault(code(before="import os\n\nos._exit(0)\n"), "load", r"exited before it was done, as by os\._exit"),
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
    # what else changes in the process
    "settings changed at import": Fault(
        code(
            before="import os, random\nimport torch\n\nrandom.seed(0)\ntorch.manual_seed(0)\nos.environ['TINY'] = '1'\n"
            "torch.nn.Linear.reset_parameters = lambda self: None\ntorch.nn.Module.tiny = lambda self: None\n"
        ),
        "side effects",
        r"the environment variable TINY; torch's random seed \(set to 0\); the random seed of Python's random; "
        r"(?=.*Linear\.reset_parameters was replaced \(modeling_tiny\.py:7\))(?=.*Module\.tiny was added \(modeling_tiny\.py:8\))",
        "import and load",
    ),
    "seed in forward": Fault(
        code((_EMBED, "        torch.manual_seed(0)\n" + _EMBED)),
        "side effects",
        r"the first forward changes the process: torch's random seed \(set to 0\)",
        "forward",
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
        "generation with the cache differs from generation without it: at token 2",
    ),
    "eager forgets the scaling": Fault(
        code(("key.transpose(2, 3) * scaling", "key.transpose(2, 3)")),
        "eager = sdpa",
        "eager attention gives different outputs",
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
        big_tokenizer, "tokenizer", "returns the token id 120, but the model has only 97 embeddings"
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
        "tensors differ from those saved",
    ),
    "class that cannot be pickled": Fault(
        code(("self.scaling = ", "self.split = lambda y: y\n        self.scaling = ")),
        "pickle",
        "pickle",
        "",
        FULL,
    ),
    "forked worker": Fault(
        code(
            (_EMBED, '        assert not FORKED, "the handle did not survive the fork"\n' + _EMBED),
            before="import os\nFORKED = []\nos.register_at_fork(after_in_child=lambda: FORKED.append(1))\n",
        ),
        "forked worker",
        "AssertionError",
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

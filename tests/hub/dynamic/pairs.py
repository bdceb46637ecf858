"""Faults, each with a healthy twin that differs in the one thing: for single stages, many in one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from faults import auto_map_with, code, config, tensors
from tokenizers import Tokenizer, models, pre_tokenizers

Step = Callable[[Path], None]


class Pair(NamedTuple):
    """`base` makes a tiny folder the healthy twin, `fault` makes the twin faulty."""

    base: list[Step]
    fault: list[Step]
    check: str
    says: str
    stages: list[str] = ["outputs"]
    golden: bool = False  # recorded of the twin
    status: str = "failed"
    kind: str = "text"  # what is made first: `tiny_repo`, or one of `families.TASKS`


def edit(*edits: tuple[str, str], before: str = "", after: str = "") -> list[Step]:
    return [code(*edits, before=before, after=after)]


# ---- weights

OWN_LOADING = """
    @classmethod
    def from_pretrained(cls, folder, *args, config=None, **kwargs):
        from pathlib import Path
        from safetensors.torch import load_file
        model = cls(config or TinyConfig.from_pretrained(folder))
        held = load_file(Path(folder) / "model.safetensors")
        held = {RENAME: tensor for name, tensor in held.items()}
        own = model.state_dict()
        held = {name: tensor for name, tensor in held.items() if name not in own or own[name].shape == tensor.shape}
        model.load_state_dict(held, strict=False)
        model.tie_weights()
        AFTER
        return model
"""


def own_loading(rename: str = "name", after: str = "pass", body: str = OWN_LOADING) -> list[Step]:
    text = body.replace("RENAME", rename).replace("AFTER", after)
    return edit(
        ("class TinyModel(TinyPreTrainedModel):\n", "class TinyModel(TinyPreTrainedModel):\n    own = 1\n\n"),
        ('    _no_split_modules = ["TinyBlock"]\n', '    _no_split_modules = ["TinyBlock"]\n' + text),
    )


def renamed(change: Callable[[str], str]) -> list[Step]:
    def apply(held: dict[str, torch.Tensor]) -> None:
        new = {change(name): tensor for name, tensor in held.items()}
        held.clear()
        held.update(new)

    return [tensors(apply)]


def transposed(*names: str) -> list[Step]:
    return [tensors(lambda held: held.update({n: held[n].T.contiguous() for n in held if n.endswith(names)}))]


FUSED = OWN_LOADING.replace(
    "        own = model.state_dict()\n",
    """        for name in [name for name in held if name.endswith("qkv")]:
            for part, value in zip("qkv", held.pop(name).chunk(3)):
                held[name.replace("qkv", f"{part}_proj.weight")] = value
        held = {name: (tensor.T if "up_proj.weight" in name else tensor) for name, tensor in held.items()}
        own = model.state_dict()
""",
)


def fuse(held: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        start = f"model.layers.{layer}.self_attn."
        held[f"{start}qkv"] = torch.cat([held.pop(f"{start}{part}_proj.weight") for part in "qkv"])
        up = held.pop(f"model.layers.{layer}.up_proj.weight")
        held[f"net.layers.{layer}.up_proj.weight"] = up.T.contiguous()


NOT_FROM_FILES = "not found to come from the files"
WEIGHTS = {
    "keys that do not match": Pair(own_loading(), renamed(lambda n: f"net.{n}"), "weights", NOT_FROM_FILES),
    "half of the keys do not match": Pair(
        own_loading(), renamed(lambda n: n.replace("layers.1", "blocks.1")), "weights", NOT_FROM_FILES
    ),
    "one key does not match": Pair(
        own_loading(), renamed(lambda n: n.replace("layers.1.norm.bias", "layers.1.norm.beta")), "weights", "norm.bias"
    ),
    "of another layout, so passed over": Pair(own_loading(), transposed("up_proj.weight"), "weights", "up_proj.weight"),
    "renamed and converted on loading": Pair(
        [*own_loading('name.replace("net.", "model.")', body=FUSED), tensors(fuse)],
        renamed(lambda n: n.replace("net.layers.1", "net.layer.1")),
        "weights",
        "up_proj.weight",
    ),
    "initialised after loading": Pair(
        own_loading(),
        edit(("        pass\n        return model", "        model.apply(model._init_weights)\n        return model")),
        "weights",
        "initialised after loading",
    ),
    "initialised anew in forward": Pair(
        edit(("        seen = past_key_values", "        self.norms = 2\n        seen = past_key_values")),
        edit(("self.norms = 2", "nn.init.ones_(self.layers[0].norm.weight)")),
        "forward",
        "forward changes a loaded tensor",
    ),
}

# ---- outputs

RETURN = "        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)\n"
EXTRA = """        x = outputs.last_hidden_state
        mask = torch.ones_like(x[..., :1]) if attention_mask is None else attention_mask[:, -x.shape[1]:, None]
        pooled = (x * mask).sum(1) / mask.sum(1)
        output = CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)
        output["MORE"] = VALUE
        return output
"""


def extra(name: str, value: str) -> list[Step]:
    return edit((RETURN, EXTRA.replace("MORE", name).replace("VALUE", value)))


LAZY = """        if not hasattr(self, "lazy"):
            self.register_buffer("lazy", torch.ones(3), persistent=False)
"""
ROUNDS = """    def save_pretrained(self, folder, **how):
        held = {name: tensor.half().float() for name, tensor in self.state_dict().items() if "lm_head" not in name}
        super().save_pretrained(folder, state_dict=held, **how)

    def get_output_embeddings"""
SEEN = "        seen = past_key_values.get_seq_length() if past_key_values is not None else 0\n"
OUTPUTS = {
    "buffer made in forward, and weights rounded on saving": Pair(
        edit(("        seen = past_key_values", LAZY + "        seen = past_key_values")),
        edit(("    def get_output_embeddings", ROUNDS)),
        "reload",
        "tensors differ from those saved",
        ["outputs", "reload"],
    ),
    "pooled otherwise": Pair(
        extra("pooler", "pooled"), edit(("= pooled", "= (x * mask).sum(1)")), "golden", "pooler differs", golden=True
    ),
    "no longer normalised": Pair(
        extra("embedding", "nn.functional.normalize(pooled, dim=-1)"),
        edit(('output["embedding"] = nn.functional.normalize(pooled, dim=-1)', 'output["embedding"] = pooled')),
        "golden",
        "embedding differs",
        golden=True,
    ),
    "second head, nested": Pair(
        extra("heads", '(pooled, {"value": pooled[:, 0]})'),
        edit(("pooled[:, 0]", "pooled[:, 1]")),
        "golden",
        r"heads\.1\.value differs",
        golden=True,
    ),
    "writes into what it is given": Pair(
        edit((SEEN, SEEN + "        input_ids = None if input_ids is None else input_ids.clone()\n")),
        edit(("input_ids.clone()", "input_ids.fill_(5)")),
        "forward",
        "forward writes into input_ids",
    ),
    "an index": Pair(
        extra("choice", "output.logits[:, -1].argmax(-1)"),
        edit(("argmax(-1)", "argmin(-1)")),
        "golden",
        "choice differs",
        golden=True,
    ),
    "padding counted in the pooling": Pair(
        extra("pooler", "pooled"), edit(("= pooled", "= x.mean(1)")), "padding", "pooler differs"
    ),
    "other values at the last positions": Pair(
        edit((" x = inputs_embeds + self", " x = inputs_embeds + 1 * self")),
        edit(("1 * self.embed_positions(position_ids)", "self.embed_positions(position_ids.clamp(max=40))")),
        "golden",
        "at the last positions",
        golden=True,
    ),
}

# ---- inputs and generation

CACHE = """

class TinyCache(DynamicCache):
    def reorder_cache(self, beam_idx):
        return super().reorder_cache(beam_idx)
"""


def word_tokenizer(*names: str) -> Step:
    def apply(folder: Path) -> None:
        made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)} | {"[UNK]": 96}, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, unk_token="[UNK]", pad_token="w0", model_input_names=list(names)
        )
        tokenizer.save_pretrained(folder)

    return apply


def generation_config(**values: object) -> Step:
    def apply(folder: Path) -> None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0, **values}))

    return apply


STRICT = edit(
    (
        "        if inputs_embeds is None:\n            inputs_embeds = self.embed",
        '        assert "token_type_ids" not in kwargs\n        if inputs_embeds is None:\n            inputs_embeds = self.embed',
    )
)
WITH_CACHE = edit(("past_key_values = DynamicCache(config=self.config)", "past_key_values = TinyCache()"), after=CACHE)
GENERATION = {
    "wrong past the window": Pair(
        [config(local_window=24)],
        edit(
            (
                SEEN,
                SEEN
                + "        if seen + inputs_embeds.shape[1] > 36 and seen:\n            position_ids = None\n            seen -= 1\n",
            )
        ),
        "cached generation",
        "generation with the cache differs from generation without it",
    ),
    "fewer positions than promised": Pair(
        [
            *edit(("nn.Embedding(config.max_position_embeddings, config", "nn.Embedding(56, config")),
            tensors(lambda held: held.update({k: v[:56].clone() for k, v in held.items() if "positions" in k})),
            config(max_position_embeddings=56),
        ],
        [config(max_position_embeddings=64)],
        "last position",
        "the config allows 64 positions, but",
    ),
    "beams on a cache that stays": Pair(
        [
            *WITH_CACHE,
            *edit(
                (
                    "    def get_output_embeddings(self)",
                    "    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *rest, **more):\n        if generation_config.use_cache:\n            model_kwargs['past_key_values'] = TinyCache()\n\n    def get_output_embeddings(self)",
                )
            ),
        ],
        edit(("        return super().reorder_cache(beam_idx)\n", "        return None\n")),
        "beams",
        "the cache is not reordered",
    ),
    "static cache": Pair(
        edit(("    _supports_sdpa = True\n", "    _supports_sdpa = True\n    _can_compile_fullgraph = True\n")),
        edit(
            (
                SEEN,
                SEEN
                + '        if type(past_key_values).__name__ == "StaticCache":\n            inputs_embeds = inputs_embeds * 1.1\n',
            )
        ),
        "static cache",
        "generation with a static cache differs from generation with a dynamic one",
    ),
    "embeddings scaled for ids only": Pair(
        edit(
            (
                "        if use_cache and past",
                "        inputs_embeds = inputs_embeds * 2\n        if use_cache and past",
            )
        ),
        edit(
            ("        inputs_embeds = inputs_embeds * 2\n        if use", "        if use"),
            ("inputs_embeds = self.embed_tokens(input_ids)", "inputs_embeds = self.embed_tokens(input_ids) * 2"),
        ),
        "inputs_embeds",
        "inputs_embeds of the same tokens give different outputs",
    ),
    "does not end at eos": Pair(
        [generation_config(eos_token_id=list(range(48)), num_beams=2, num_return_sequences=2)],
        edit(
            (
                "    def get_output_embeddings(self)",
                "    def generate(self, *args, **how):\n        return super().generate(*args, **{**how, 'eos_token_id': None})\n\n    def get_output_embeddings(self)",
            )
        ),
        "generation config",
        "generate continues after the eos token",
    ),
    "other generation config than recorded": Pair(
        [generation_config(no_repeat_ngram_size=1)],
        [generation_config(repetition_penalty=0.2)],
        "generation",
        "differs from the recorded tokens",
        golden=True,
    ),
    "token types that forward does not take": Pair(
        [*STRICT, word_tokenizer("input_ids", "attention_mask")],
        [word_tokenizer("input_ids", "attention_mask", "token_type_ids")],
        "tokenizer output",
        "AssertionError",
    ),
    "entries of auto_map exchanged": Pair(
        [],
        [auto_map_with(AutoModel="modeling_tiny.TinyForCausalLM", AutoModelForCausalLM="modeling_tiny.TinyModel")],
        "auto_map",
        "exchanges AutoModel and AutoModelForCausalLM",
    ),
    "no module of that class": Pair(
        [],
        edit(('_no_split_modules = ["TinyBlock"]', '_no_split_modules = ["TinyLayer"]')),
        "no split",
        "names TinyLayer, but the model has no module",
        ["outputs", "placement"],
    ),
}

SERIES = """

class TinySeries(TinyPreTrainedModel):
    main_input_name = "series"

    def __init__(self, config):
        super().__init__(config)
        self.model = TinyModel(config)
        self.post_init()

    def forward(self, series):
        x = self.model(inputs_embeds=series).last_hidden_state
        return {"logits": x.mean(1)}
"""
UNUSUAL = [
    *edit(after=SERIES),
    config(
        architectures=["TinySeries"],
        auto_map={"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinySeries"},
    ),
]
PIPELINE = """

from transformers import Pipeline


class TinyPipeline(Pipeline):
    def _sanitize_parameters(self, **how):
        return {}, {}, {}

    def preprocess(self, text):
        assert isinstance(text, str), "this pipeline takes a text"
        return {"input_ids": torch.tensor([[len(text) % 90, 5]])}

    def _forward(self, inputs):
        return self.model(**inputs)

    def postprocess(self, outputs):
        return outputs.logits[0, -1].argmax().item()
"""
PIPELINES = {"tiny-task": {"impl": "modeling_tiny.TinyPipeline", "pt": ["AutoModelForCausalLM"], "tf": []}}
UNUSUAL_INPUTS = {
    "raises whatever it is given": Pair(
        UNUSUAL,
        edit(("        x = self.model(inputs_embeds=series).last", "        x = self.model(series=self.lost).last")),
        "forward",
        "lost",
    ),
    "pipeline that raises whatever it is given": Pair(
        [*edit(after=PIPELINE), config(custom_pipelines=PIPELINES), word_tokenizer("input_ids", "attention_mask")],
        edit(
            ("        return self.model(**inputs)\n", "        return self.model(**inputs, **self.lost)\n"),
            ('        assert isinstance(text, str), "this pipeline takes a text"\n', ""),
        ),
        "pipeline",
        "lost",
    ),
    "inputs that cannot be made up": Pair(
        UNUSUAL,
        edit(
            (
                "        x = self.model(inputs_embeds=series)",
                "        assert series.shape[1] == 77, series.shape\n        x = self.model(inputs_embeds=series)",
            )
        ),
        "forward",
        "no inputs could be generated for a model that takes series",
        status="skipped",
    ),
}

# ---- training

LOSS = (
    RETURN,
    """        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
""",
)
SIGNATURE = (
    "                inputs_embeds=None, use_cache=None, **kwargs):\n        outputs = self.model(",
    "                inputs_embeds=None, use_cache=None, labels=None, **kwargs):\n        outputs = self.model(",
)
TRAINS = edit(LOSS, SIGNATURE)
CHECKPOINTS = [
    *TRAINS,
    *edit(
        ("class TinyBlock(nn.Module):", "class TinyBlock(GradientCheckpointingLayer):"),
        ("    _supports_sdpa = True\n", "    _supports_sdpa = True\n    supports_gradient_checkpointing = True\n"),
        before="from transformers.modeling_layers import GradientCheckpointingLayer\n",
    ),
]
TRAINING_STAGES = ["outputs", "training"]


def training(fault: list[Step], check: str, says: str, base: list[Step] = TRAINS) -> Pair:
    return Pair(base, fault, check, says, TRAINING_STAGES)


TRAINING = {
    "no loss": training(edit(("loss=loss, logits", "loss=None, logits")), "training loss", "the loss is None though"),
    "labels not shifted": training(
        edit(("logits[:, :-1].flatten(0, 1), labels[:, 1:]", "logits.flatten(0, 1), labels")),
        "training loss",
        "the labels are not shifted",
    ),
    "labels shifted twice": training(
        edit(("logits[:, :-1].flatten(0, 1), labels[:, 1:]", "logits[:, :-2].flatten(0, 1), labels[:, 2:]")),
        "training loss",
        "shifted twice",
    ),
    "crash in train mode": training(
        edit((SEEN, SEEN + "        if self.training:\n            inputs_embeds = inputs_embeds + self.noise\n")),
        "backward",
        "noise",
    ),
    "detached": training(
        edit(
            (
                "x + self.down_proj(torch.relu(self.up_proj(x)))",
                "x + self.down_proj(torch.relu(self.up_proj(x)).detach())",
            )
        ),
        "backward",
        "up_proj.weight and 3 more changes the loss, but gets no gradient",
    ),
    "no gradient at all": training(
        edit(
            ("        outputs = self.model(", "        with torch.no_grad():\n            outputs = self.model("),
            (
                "logits = self.lm_head(outputs.last_hidden_state)",
                "logits = self.lm_head(outputs.last_hidden_state).detach()",
            ),
        ),
        "backward",
        "the loss has no gradient",
    ),
    "gradient checkpointing": training(
        edit(
            (
                "        x = x + self.self_attn(",
                "        x = x * (1.1 if self.gradient_checkpointing else 1)\n        x = x + self.self_attn(",
            )
        ),
        "gradient checkpointing",
        "gradient checkpointing changes the loss",
        CHECKPOINTS,
    ),
    "uphill": training(
        edit(
            (
                "        loss = None\n",
                "        if logits.requires_grad:\n            logits.register_hook(lambda gradient: -gradient)\n        loss = None\n",
            )
        ),
        "optimizer step",
        "does not lower the loss",
    ),
    "padding trained on": training(
        edit(("labels[:, 1:].flatten())", "labels[:, 1:].flatten().clamp(min=0))")),
        "training loss",
        "-100 are not ignored, but count as token 0",
    ),
    "softmax twice": training(
        edit(("cross_entropy(logits[:, :-1]", "cross_entropy(logits.softmax(-1)[:, :-1]")),
        "training loss",
        "of the softmax of the logits",
    ),
    "loss of a fixed vocabulary": training(
        edit(
            ("logits[:, :-1].flatten(0, 1), labels", "logits[:, :-1].reshape(-1, SIZE), labels"), before="SIZE = 97\n"
        ),
        "resize",
        "after resize_token_embeddings the loss raises",
    ),
    "wrong sign": training(
        edit(("            loss = nn.functional", "            loss = -nn.functional")),
        "training loss",
        "the wrong sign",
    ),
    "head left behind": training(
        edit(
            (
                "    def get_output_embeddings(self):\n        return self.lm_head",
                "    def get_output_embeddings(self):\n        return None",
            )
        ),
        "resize",
        "the head was not resized",
        [
            *TRAINS,
            config(tie_word_embeddings=False),
            tensors(lambda h: h.update({"lm_head.weight": h["model.embed_tokens.weight"] * 2})),
        ],
    ),
}
PAIRS: dict[str, Pair] = WEIGHTS | OUTPUTS | GENERATION | UNUSUAL_INPUTS | TRAINING

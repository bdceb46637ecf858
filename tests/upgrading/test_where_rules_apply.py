"""Where rules apply, where they do not, what their definitions do, and that `verify` knows them."""

import json
from pathlib import Path
from textwrap import dedent, indent

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from mymodels.hub.static.check_model import tied_weights
from mymodels.hub.static.repo_snapshot import Folder, parse_text, read_folder
from mymodels.hub.upgrading.edit_engine import Edited, apply_rules, apply_to_source
from mymodels.hub.upgrading.rule import Rule
from mymodels.hub.upgrading.rules import (
    beams,
    devices_of_parameters,
    generation_inputs,
    own_config,
    parameters_of_parts,
    ties_in_5_3,
)

HEAD = (
    "import torch\nimport torch.nn.functional as F\nfrom torch import nn\nfrom transformers import PreTrainedModel\n\n"
)


def applied(rule: Rule, source: str, **config: object) -> Edited:
    edited = apply_to_source(rule, HEAD + dedent(source), config=config)
    assert not edited.refused
    for text in edited.texts.values():
        again = apply_to_source(rule, text, config=edited.config or config)
        assert not again.changes and not again.edits
    return edited


# ---- parameters of parts

BLOCK = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
{forward}

    def tie(self, other):
        self.proj.weight = other.proj.weight


class Model(PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(8, 4)
        self.layers = {layers}

    def forward(self, ids):
        return F.linear(self.layers[0](self.embed(ids)), self.embed.weight)
"""
LISTED = "nn.ModuleList([Block() for _ in range(2)])"


@pytest.mark.parametrize(
    ("forward", "layers", "count"),
    [
        ("return F.linear(x, self.proj.weight, self.proj.bias)", LISTED, 2),
        ("w = self.proj.weight.t()\nreturn x @ w", LISTED, 1),
        ("return F.linear(x, self.proj.weight, self.proj.bias)", "[Block()]", 0),  # no list of blocks to split
        ("return self.proj(x.to(self.proj.weight.dtype)) * self.scale", LISTED, 0),
        ("return self.proj(x).view(self.proj.weight.shape)", LISTED, 0),
        ("return self.proj(x) + self.proj.in_features", LISTED, 0),
        ("x += self.proj.weight\ny: object = self.proj.bias\nreturn x", LISTED, 2),
        ("self.proj.weight, y = x, 1\nfor self.proj.bias in x: pass\nreturn x", LISTED, 0),  # what is set is not read
    ],
)
def test_parameters_that_a_block_reads_of_its_parts(forward: str, layers: str, count: int) -> None:
    source = BLOCK.format(forward=indent(forward, " " * 8), layers=layers)
    edited = applied(parameters_of_parts.RULE, source)
    assert len(edited.edits) == count
    for text in edited.texts.values():
        assert text.count("parameter_of(self.proj, ") == count and "other.proj.weight\n" in text


def test_parameters_are_found_through_methods_and_parts_of_parts() -> None:
    source = """
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("gate", nn.Parameter(torch.ones(4)))


    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()


    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer = Outer()

        def gated(self, x):
            return x * self.outer.inner.gate

        def forward(self, x):
            return self.gated(x)

        def reset(self):
            nn.init.ones_(self.outer.inner.gate)


    KINDS = {"plain": Block}


    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([KINDS["plain"]() for _ in range(2)])
    """
    (text,) = applied(parameters_of_parts.RULE, source).texts.values()
    assert 'return x * parameter_of(self.outer.inner, "gate")' in text and "ones_(self.outer.inner.gate)" in text


def test_a_parameter_is_brought_in_and_sent_back() -> None:
    scope: dict = {}
    exec(parameters_of_parts._HELPER, scope)
    layer = nn.Linear(2, 2)
    weight, value = layer.weight, layer.weight.detach().clone()
    assert scope["parameter_of"](layer, "weight") is weight  # with its gradient
    cpu_offload(layer, torch.device("cpu"))
    assert layer.weight.is_meta
    assert torch.equal(scope["parameter_of"](layer, "weight"), value) and layer.weight.is_meta


# ---- devices of parameters

MODEL = """
class Rotary(nn.Module):
    def __init__(self, device=None):
        super().__init__()
        self.register_buffer("t", torch.arange(4, device=device), persistent=False)


class MLP(nn.Module):
    def __init__(self, device=None):
        super().__init__()
        self.up = nn.Linear(4, 4, device=device)


class Model(PreTrainedModel):
    def __init__(self, config, device=None, place="cpu"):
        super().__init__(config)
        factory = config.init_device
        self.part = {made}
"""


@pytest.mark.parametrize(
    ("made", "config", "count"),
    [
        ('nn.Linear(4, 4, device="cpu")', {}, 1),
        ('nn.Linear(4, 4, device=torch.device("cuda:0"))', {}, 1),
        ("nn.Linear(4, 4, device=place)", {}, 1),
        ("nn.Linear(4, 4, device=factory)", {"init_device": "cpu"}, 1),
        ("nn.Parameter(torch.empty(4, device=factory))", {"init_device": "cpu"}, 1),
        ("MLP(device=config.init_device)", {"init_device": "cpu"}, 1),
        ("nn.Parameter(torch.FloatTensor(4).normal_())", {}, 1),
        ("nn.Parameter(torch.from_numpy(numbers))", {}, 1),
        ("nn.Linear(4, 4, device=device)", {}, 0),
        ("nn.Linear(4, 4, device=factory)", {}, 0),
        ("nn.Linear(4, 4, device=factory)", {"init_device": "meta"}, 0),
        ("Rotary(device=config.init_device)", {"init_device": "cpu"}, 0),  # its buffer needs the data
        ("nn.Parameter(torch.ones(4))", {"init_device": "cpu"}, 0),
        ("torch.Tensor(4)", {}, 0),
    ],
)
def test_devices_of_parameters(made: str, config: dict, count: int) -> None:
    edited = applied(devices_of_parameters.RULE, MODEL.format(made=made), **config)
    assert len(edited.edits) == count, edited.texts


def test_parameters_have_no_data_under_meta_alone() -> None:
    scope: dict = {}
    exec(devices_of_parameters._DEVICE, scope)
    exec(devices_of_parameters._MOVED, scope)
    tensor = torch.Tensor(3)
    assert scope["device_of_new"]("cpu") == "cpu" and scope["made_like_others"](tensor) is tensor
    with torch.device("meta"):
        assert scope["device_of_new"]("cpu") is None
        made = nn.Parameter(scope["made_like_others"](torch.Tensor(3)))
        assert made.is_meta and made.shape == (3,)


# ---- a config of one's own

REWARD = """
from transformers import LlamaModel, LlamaPreTrainedModel{more}


class Reward({base}):
    {line}

    def __init__(self, config):
        super().__init__(config)
        self.model = {part}
        self.post_init()


class RewardForScores(Reward):
    pass
"""


@pytest.mark.parametrize(
    ("given", "stock"),
    [
        ({}, "LlamaConfig"),
        ({"more": ", MistralConfig", "line": "config_class = MistralConfig"}, "MistralConfig"),
        ({"base": "PreTrainedModel"}, ""),  # which config it has is not known
        ({"more": ", MistralPreTrainedModel", "base": "MistralPreTrainedModel, LlamaPreTrainedModel"}, ""),
        ({"more": ", AutoModel", "part": "AutoModel.from_config(config)"}, ""),
    ],
)
def test_a_config_of_ones_own(given: dict[str, str], stock: str) -> None:
    usual = {"more": "", "base": "LlamaPreTrainedModel", "line": "wide = True", "part": "LlamaModel(config)"}
    source = REWARD.format(**{**usual, **given})
    edited = applied(own_config.RULE, source, model_type="llama")
    if not stock:
        assert not edited.edits
        return
    (text,) = edited.texts.values()
    assert f'class RewardForScoresConfig({stock}):\n    model_type = "reward_for_scores"\n\n\nclass Reward(' in text
    assert text.count("config_class = ") == 1 and text.count("import LlamaConfig") == (stock == "LlamaConfig")
    assert edited.config is not None and edited.config["model_type"] == "reward_for_scores"
    assert edited.config["auto_map"]["AutoConfig"] == "modeling_example.RewardForScoresConfig"
    assert [edit.file for edit in edited.edits] == ["modeling_example.py", "config.json", "config.json"]


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"preprocessor_config.json": {"do_resize": True}}, True),
        ({"preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"}}, False),
        (
            {
                "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"},
                "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer"},
            },
            True,  # AutoProcessor finds CLIPProcessor by the model type, and a tokenizer alone without it
        ),
        (
            {
                "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"},
                "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "processor_class": "CLIPProcessor"},
            },
            False,
        ),
    ],
)
def test_a_model_type_that_processors_go_by_is_left(files: dict[str, dict], left: bool, tmp_path: Path) -> None:
    source = REWARD.format(more="", base="LlamaPreTrainedModel", line="wide = True", part="LlamaModel(config)")
    (tmp_path / "modeling_example.py").write_text(HEAD + dedent(source))
    config = {"model_type": "llama", "auto_map": {"AutoModel": "modeling_example.RewardForScores"}}
    for name, values in {"config.json": config, **files}.items():
        (tmp_path / name).write_text(json.dumps(values))
    assert apply_rules(read_folder(tmp_path), [own_config.RULE]).changes != left


@pytest.mark.parametrize(
    ("listed", "left"), [(["LlamaForCausalLM"], ["Reward"]), (["Reward"], ["Reward"]), (None, None)]
)
def test_architectures_that_name_the_stock_base(listed: list[str] | None, left: list[str] | None) -> None:
    """Under its own model type, a class is no longer found by the name of the class of transformers that it extends."""
    source = """
from transformers import LlamaForCausalLM


class Reward(LlamaForCausalLM):
    def extra(self):
        return 1
"""
    auto_map = {"AutoModelForCausalLM": "modeling_example.Reward"}
    edited = applied(own_config.RULE, source, model_type="llama", architectures=listed, auto_map=auto_map)
    assert edited.config is not None and edited.config["model_type"] == "reward"
    assert edited.config["architectures"] == left
    assert any("loads with trust_remote_code only" in edit.what for edit in edited.edits)


def test_a_config_that_auto_map_names_is_left() -> None:
    auto_map = {"AutoConfig": "modeling_example.Other", "AutoModel": "modeling_example.Reward"}
    source = REWARD.format(more="", base="LlamaPreTrainedModel", line="wide = True", part="LlamaModel(config)")
    assert not applied(own_config.RULE, source, model_type="llama", auto_map=auto_map).changes


# ---- beams over tuples, and what 5.3 passes

LANGUAGE = """
from transformers import DynamicCache, GenerationMixin


class Language(PreTrainedModel, GenerationMixin):
    def forward(self, input_ids, past_key_values=None):
        cache = past_key_values or DynamicCache()
        return {made}

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        return {{"input_ids": input_ids, "past_key_values": past_key_values}}
{more}
"""
OWN = "    def generate(self, input_ids):\n        return {}\n"


@pytest.mark.parametrize(
    ("made", "more", "count"),
    [
        ("cache.to_legacy_cache()", "", 1),
        ("cache_to_tuples(cache)", OWN.format("super().generate(input_ids)"), 1),
        ("cache.to_legacy_cache()", OWN.format("input_ids"), 0),
        ("cache", "", 0),
    ],
)
def test_tuples_that_are_handed_on_can_be_reordered(made: str, more: str, count: int) -> None:
    edited = applied(beams.RULE, LANGUAGE.format(made=made, more=more))
    assert len(edited.edits) == count
    scope: dict = {}
    exec("class A:\n" + indent(beams._TUPLES, "    "), scope)
    past = ((torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])),)
    ((keys, values),) = scope["A"]._reorder_cache(past, torch.tensor([1, 1]))
    assert keys.tolist() == [[2.0], [2.0]] and values.tolist() == [[4.0], [4.0]]
    assert scope["A"]._reorder_cache(None, torch.tensor([1, 1])) is None


def test_positions_of_the_whole_text_are_cut_to_the_new_tokens() -> None:
    scope: dict = {}
    exec(generation_inputs._HELPER, scope)

    @scope["as_generate_called_it"]
    def prepare(self, input_ids, past_key_values=None, cache_position=None, **kwargs):
        assert not kwargs
        return cache_position.tolist()

    class Model:
        config = None

    ids, places = torch.zeros(1, 12, dtype=torch.long), torch.arange(12)
    assert prepare(Model(), ids, cache_position=places, next_sequence_length=1) == [11]
    assert prepare(Model(), ids, cache_position=places, next_sequence_length=None) == list(range(12))
    assert prepare(Model(), ids, cache_position=places[-1:]) == [11]


def test_verify_knows_the_ties_that_are_filled_under_5_3(tmp_path: Path) -> None:
    def warned(source: str) -> list[str]:
        text = parse_text("modeling_toy.py", dedent(source))
        folder = Folder(tmp_path, files={"modeling_toy.py": tmp_path}, code={"modeling_toy.py": text})
        folder.values["config.json"] = {"auto_map": {"AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}}
        return [finding.what for finding in tied_weights(folder) if "5.3" in finding.what]

    assert len(warned(ties_in_5_3.RULE.before)) == 1 and not warned(ties_in_5_3.RULE.after)
    other = ties_in_5_3.RULE.after.replace("model_class.tie_weights = tie_weights", "pass")
    assert len(warned(other)) == 1

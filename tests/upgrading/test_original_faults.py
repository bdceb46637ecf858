"""Faults that originals have under every release: what the rules repair, what they leave alone, and what is named."""

import json
from pathlib import Path
from typing import Any

import batch
import folders
import pytest
import torch
import transformers
from load_incomplete import load
from safetensors.torch import save_file

from mymodels.hub.clean_process import describe_folder
from mymodels.hub.isolated.inputs import ordinary_token_ids
from mymodels.hub.static.repo_snapshot import read_folder
from mymodels.hub.upgrading import upgrade
from mymodels.hub.upgrading.edit_engine import Edited, apply_rules
from mymodels.hub.upgrading.left_faults import masks_not_passed
from mymodels.hub.upgrading.plan_releases import span_of, target_releases
from mymodels.hub.upgrading.report import left_lines
from mymodels.hub.upgrading.rules import all_rules
from mymodels.hub.upgrading.upgrade import Upgrade
from mymodels.hub.upgrading.write_folder import write_copy

STAGES = ["outputs", "other classes", "training"]
REPAIRS = {"output embeddings", "saved class", "base model prefix", "resized vocabulary"}
CODE = """
import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers import GenerationMixin, PreTrainedModel, PretrainedConfig


class OldConfig(PretrainedConfig):
    model_type = "old"


class OldPreTrainedModel(PreTrainedModel):
    config_class = OldConfig
    base_model_prefix = "transformer"


class OldModel(OldPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    def forward(self, input_ids, attention_mask=None):
        return self.wte(input_ids)


class OldForCausalLM(OldPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = OldModel(config)
        self.output_layer = skip_init(nn.Linear, config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return self.output_layer(self.transformer(input_ids, attention_mask=attention_mask))
"""
GETTERS = """
    def get_output_embeddings(self):
        return self.output_layer

    def set_output_embeddings(self, value):
        self.output_layer = value
"""
WEIGHTS = {"transformer.wte.weight": (8, 4), "output_layer.weight": (8, 4)}
AUTO = {"AutoConfig": "modeling_old.OldConfig", "AutoModelForCausalLM": "modeling_old.OldForCausalLM"}
CONFIG: dict[str, Any] = {
    "model_type": "old",
    "architectures": ["OldForCausalLM"],
    "auto_map": AUTO,
    "vocab_size": 8,
    "hidden_size": 4,
    "tie_word_embeddings": False,
    "transformers_version": "4.36.2",
}


def edit(path: Path, code: str = CODE, weights: dict[str, tuple[int, ...]] = WEIGHTS, **config: Any) -> Edited:
    """What the repairs of this module make of a folder; a setting of None is left out of its config."""
    path.mkdir()
    (path / "modeling_old.py").write_text(code)
    values = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (path / "config.json").write_text(json.dumps(values))
    save_file({name: torch.zeros(shape) for name, shape in weights.items()}, path / "model.safetensors")
    return apply_rules(read_folder(path), [rule for rule in all_rules() if rule.name in REPAIRS])


def test_a_healthy_folder_is_left_alone(tmp_path: Path) -> None:
    assert not edit(tmp_path / "getters", CODE + GETTERS).changes
    named = CODE.replace("output_layer", "lm_head")  # transformers finds this head by itself
    assert not edit(tmp_path / "lm_head", named, {"transformer.wte.weight": (8, 4), "lm_head.weight": (8, 4)}).changes
    biased = (CODE + GETTERS).replace(", bias=False", "")  # transformers resizes the bias of such a head
    assert not edit(tmp_path / "bias", biased).changes


@pytest.mark.parametrize("method", ["", "\n    def get_output_embeddings(self):\n        return None\n"])
def test_a_head_that_nothing_names_is_named(method: str, tmp_path: Path) -> None:
    edited = edit(tmp_path / "old", CODE + method)
    text = edited.texts["modeling_old.py"]
    assert text.count("def get_output_embeddings") == text.count("def set_output_embeddings") == 1
    assert "return self.output_layer\n" in text and "self.output_layer = new_embeddings" in text
    assert edited.config is None


def test_an_untied_head_is_never_tied_by_being_named(tmp_path: Path) -> None:
    edited = edit(tmp_path / "default", tie_word_embeddings=None)  # ties are on by default under 4.x
    assert edited.config is not None and edited.config["tie_word_embeddings"] is False
    assert "return self.output_layer" in edited.texts["modeling_old.py"]
    stored = {"transformer.wte.weight": (8, 4)}  # nothing shows that the head is untied
    assert not edit(tmp_path / "tied", CODE, stored, tie_word_embeddings=True).changes
    both = CODE + GETTERS + CODE[CODE.index("class OldForCausalLM") :].replace("OldForCausalLM", "OtherForCausalLM")
    assert edit(tmp_path / "both", both, tie_word_embeddings=True).config is None  # the first class goes by it


def test_what_is_no_head_is_not_named(tmp_path: Path) -> None:
    classifier = CODE.replace("config.hidden_size, config.vocab_size", "config.hidden_size, config.num_labels")
    weights = {"transformer.wte.weight": (8, 4), "output_layer.weight": (2, 4)}
    assert not edit(tmp_path / "classifier", classifier, weights).changes
    two = CODE.replace(
        "        self.post_init()\n\n    def forward(self, input_ids, attention_mask=None):\n        return self.output",
        "        self.second = nn.Linear(config.hidden_size, config.vocab_size)\n        self.post_init()\n\n"
        "    def forward(self, input_ids, attention_mask=None):\n        self.second(input_ids)\n        return self.output",
    )
    assert "self.second(" in two and not edit(tmp_path / "two", two).changes


@pytest.mark.parametrize(
    ("named", "auto_map", "weights", "architectures", "entry"),
    [
        ("OldModel", AUTO, WEIGHTS, "OldForCausalLM", None),
        ("GPT2LMHeadModel", AUTO, WEIGHTS, "OldForCausalLM", None),
        ("OldModel", AUTO, {"wte.weight": (8, 4)}, "OldModel", "modeling_old.OldModel"),
        ("OldModel", AUTO | {"AutoModel": "modeling_old.OldModel"}, WEIGHTS, "OldModel", None),
        ("GPT2LMHeadModel", AUTO, {"strange.weight": (8, 4)}, "GPT2LMHeadModel", None),
    ],
)
def test_the_saved_class_is_found_by_its_weights(
    named: str, auto_map: dict, weights: dict, architectures: str, entry: str | None, tmp_path: Path
) -> None:
    edited = edit(tmp_path / "old", CODE + GETTERS, weights, architectures=[named], auto_map=auto_map)
    config = edited.config or CONFIG | {"architectures": [named], "auto_map": auto_map}
    assert config["architectures"] == [architectures]
    assert config["auto_map"] == auto_map | ({"AutoModel": entry} if entry else {})
    assert bool(edited.config) == any(edit.rule == "saved class" for edit in edited.edits)


def test_a_prefix_that_some_class_keeps_is_left_alone(tmp_path: Path) -> None:
    wrong = (CODE + GETTERS).replace('prefix = "transformer"', 'prefix = "model"')
    text = edit(tmp_path / "wrong", wrong).texts["modeling_old.py"]
    assert text == CODE + GETTERS
    second = "\n\nclass OldForTokenClassification(OldPreTrainedModel):\n    def __init__(self, config):\n        {}\n"
    one = second.format("super().__init__(config)\n        self.model = OldModel(config)")
    other = second.format("super().__init__(config)\n        self.backbone = OldModel(config)")
    for number, more in enumerate((one, other)):
        assert not edit(tmp_path / str(number), wrong + more).changes


@pytest.mark.parametrize(
    "made",
    [
        "self.model: OldModel = OldModel(config)",
        "self.model, self.drop = OldModel(config), nn.Identity()",
        'self.add_module("model", OldModel(config))',
        "setattr(self, self.base_model_prefix, OldModel(config))",
    ],
)
def test_a_prefix_is_kept_however_its_part_is_made(made: str, tmp_path: Path) -> None:
    """A second model beside it must not be taken for the base model."""
    code = (CODE + GETTERS).replace('prefix = "transformer"', 'prefix = "model"')
    code = code.replace("self.transformer = OldModel(config)", f"{made}\n        self.teacher = OldModel(config)")
    assert not edit(tmp_path / "old", code.replace("self.transformer(", "self.model(")).changes


@pytest.mark.parametrize("values", [{"transformers_version": "4"}, {"architectures": [{"name": "OldForCausalLM"}]}])
def test_strange_values_of_a_config_raise_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    code = CODE.replace("output_layer", "lm_head") + "\n    def get_output_embeddings(self):\n        return None\n"
    weights = {"transformer.wte.weight": (8, 4), "lm_head.weight": (8, 4)}
    edit(tmp_path / "old", code, weights, **{"tie_word_embeddings": True, **values})


def test_the_class_with_a_head_is_the_main_one(tmp_path: Path) -> None:
    auto_map = {"AutoModel": AUTO["AutoModelForCausalLM"], **AUTO}
    edit(tmp_path / "old", auto_map=auto_map)
    assert describe_folder(tmp_path / "old")["classes"] == ["AutoModelForCausalLM", "AutoModel"]


def test_a_bias_of_tied_logits_is_resized(tmp_path: Path) -> None:
    """`forward` multiplies with the embeddings themselves: there is no head, but a bias with one value a token."""
    tied = CODE.replace(
        "self.output_layer = skip_init(nn.Linear, config.hidden_size, config.vocab_size, bias=False)", "{}"
    )
    tied = tied.replace("self.output_layer(", "nn.functional.linear(").replace(
        "=attention_mask))", "=attention_mask), *w)"
    )
    tied = tied.replace(
        "        return nn.f", "        w = self.transformer.wte.weight, self.score_bias\n        return nn.f"
    )
    tied = tied.replace("{}", "self.score_bias = nn.Parameter(torch.zeros(config.vocab_size))")
    text = edit(tmp_path / "old", tied, {"transformer.wte.weight": (8, 4), "score_bias": (8,)}).texts["modeling_old.py"]
    assert 'fit_to_embeddings(self, embeddings, tensors=("score_bias",))' in text
    assert "get_output_embeddings" not in text
    classes = tied.replace("torch.zeros(config.vocab_size)", "torch.zeros(config.num_labels)")
    assert not edit(tmp_path / "classes", classes).changes


@pytest.mark.parametrize(("inner", "named"), [("config", True), ("config.text_config", False)])
def test_a_setting_of_a_config_inside_the_config_is_not_said_to_be_resized(
    inner: str, named: bool, tmp_path: Path
) -> None:
    """The head and the embeddings are sized by `config` of a part, which may be another config than the model's."""
    part = (CODE + GETTERS).replace("vocab_size", "padded_vocab_size").replace("OldForCausalLM(", "Decoder(")
    part = part.replace("OldPreTrainedModel, GenerationMixin", "nn.Module").replace("self.post_init()", "pass")
    code = f"""{part}
    def get_input_embeddings(self):
        return self.transformer.wte


class OldForCausalLM(OldPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.bias_of_scores = nn.Parameter(torch.zeros(config.num_labels))
        self.decoder = Decoder({inner})
        self.post_init()

    def get_input_embeddings(self):
        return self.decoder.transformer.wte

    def get_output_embeddings(self):
        return self.decoder.output_layer

    def forward(self, input_ids):
        return self.decoder(input_ids)
"""
    weights = {f"decoder.{name}": shape for name, shape in WEIGHTS.items()}
    sizes = {"vocab_size": None, "padded_vocab_size": 8}
    text = "".join(edit(tmp_path / "old", code, weights, **sizes).texts.values())
    assert ('settings=("padded_vocab_size",)' in text) == named


def test_what_sizes_the_embeddings_is_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    code = (CODE + GETTERS).replace("vocab_size", "alphabet")
    init = "    def __init__(self, alphabet=8, **kwargs):\n        self.alphabet = alphabet\n        super().__init__(**kwargs)\n"
    code = code.replace('model_type = "old"\n', f'model_type = "old"\n\n{init}')
    edit(tmp_path / "old", code, vocab_size=None, alphabet=8)
    found = apply_rules(
        read_folder(tmp_path / "old"), [rule for rule in all_rules() if rule.name == "names in the config"]
    )
    assert 'attribute_map = {"vocab_size": "alphabet"}' in found.texts["modeling_old.py"]


def test_token_ids_of_a_model_that_does_not_lead_to_its_embeddings() -> None:
    """As under an old release, with a `base_model_prefix` that names no part."""

    class Inner(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.wte = torch.nn.Embedding(12, 4)

        def get_input_embeddings(self):
            return self.wte

    class Outer(Inner):
        def __init__(self, config):
            super().__init__(config)
            self.wte, self.part = None, Inner(config)

        def get_input_embeddings(self):
            raise NotImplementedError

    ids = ordinary_token_ids(Outer(transformers.PretrainedConfig()))
    assert len(ids) >= 10 and max(ids) == 11


PREPARES = """
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {}
"""
GENERATES = """
    def generate(self, input_ids, attention_mask=None, **kwargs):
        return self.transformer.generate({})
"""


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (PREPARES.format('{"input_ids": input_ids}'), True),
        (PREPARES.format('{"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}'), False),
        (PREPARES.format('{"input_ids": input_ids, **kwargs}'), False),
        (PREPARES.format("dict(kwargs)"), False),
        (GENERATES.format("input_ids, **kwargs"), True),
        (GENERATES.format("input_ids, attention_mask=attention_mask"), False),
        (GENERATES.format("input_ids, attention_mask, **kwargs"), False),
    ],
)
def test_a_mask_that_is_dropped_is_named(method: str, named: bool, tmp_path: Path) -> None:
    edit(tmp_path / "old", CODE + GETTERS + method)
    found = masks_not_passed(read_folder(tmp_path / "old"))
    place = f"modeling_old.py:{(CODE + GETTERS).count(chr(10)) + 2}"
    assert [fault.where for fault in found] == ([place] if named else [])
    lines = left_lines(Upgrade("old", left=found))
    assert [line.startswith(f"fault of the original, at {place}: OldForCausalLM.") for line in lines] == [True] * named


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatglm", "florence", "nomic_bert", "esm"])
def test_an_extended_vocabulary_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """In the installed transformers: all logits, the old ones unchanged, and a saved model that loads again."""
    targets = target_releases(None)
    folder = batch.read(name, tmp_path, targets)
    rules = [rule for rule in all_rules() if not rule.option]
    new = write_copy(folder, apply_rules(folder, rules, releases=span_of(targets)), tmp_path / f"resized_{name}")
    auto = next(name for name in folder.config["auto_map"] if name.startswith("AutoModelFor"))
    model = load(new, auto)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.resize_token_embeddings(before.shape[-1] + 8, mean_resizing=False)
        after = model(input_ids=ids).logits
        assert after.shape[-1] == before.shape[-1] + 8
        assert torch.allclose(after[..., :-8], before, atol=1e-5)
        model.save_pretrained(tmp_path / f"saved_{name}")
        for file in new.glob("*.py"):
            (tmp_path / f"saved_{name}" / file.name).write_text(file.read_text())
        again = load(tmp_path / f"saved_{name}", auto)
        assert torch.allclose(again(input_ids=ids).logits, after, atol=1e-5)


@pytest.mark.versions
def test_what_verify_fails_on_is_in_the_report(tmp_path: Path) -> None:
    folder = folders.make("florence", tmp_path / "left_florence")
    result = upgrade(folder, tmp_path / "new", to="5.23", cache_dir=batch.CACHE)
    assert result.proven
    assert [fault.what.partition(":")[0] for fault in result.verify] == ["padding"]
    assert [fault.where for fault in result.left] == ["modeling_mini_florence.py:336"]
    report, card = (Path(tmp_path, "new", name).read_text() for name in ("upgrade.json", "README.md"))
    assert len(json.loads(report)["verify"]) == len(json.loads(report)["left"]) == 1
    assert len(left_lines(result)) == 2 and all(line in card for line in left_lines(result))

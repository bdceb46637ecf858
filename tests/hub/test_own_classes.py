"""A subclass, wherever it is written, is saved by `save_pretrained` with its code, and answers as itself where mymodels is not."""

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
import warm_python
from tiny import GPT2, largest_difference, mybert_config, mygpt2_config
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mymodels import MyGPT2Config, MyGPT2ForCausalLM, build_repo
from mymodels.checkpoints import CheckpointError
from mymodels.hub.own_classes import CodeNotSaved

IDS = [[2, 3, 4, 5]]
SCALES = "def scale(logits):\n    return logits * 3.0\n"
CONFIG = """
class ScaledConfig(MyGPT2Config):
    model_type = "scaledgpt"

    def __init__(self, factor=2.0, **kwargs):
        self.factor = factor
        super().__init__(**kwargs)

"""
MODEL = """
class Scaled(MyGPT2ForCausalLM):
{config_class}
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = {value}
        return outputs
"""
BOTH = CONFIG + MODEL.format(
    config_class="    config_class = ScaledConfig\n", value="outputs.logits * self.config.factor"
)
MODEL_ONLY = MODEL.format(config_class="", value="outputs.logits * 2.0")
SHORT = "from mymodels import MyGPT2Config, MyGPT2ForCausalLM\n"
LONG = (
    "from mymodels.models.configuration_mygpt2 import MyGPT2Config\n"
    "from mymodels.models.modeling_mygpt2 import MyGPT2ForCausalLM\n"
)
OWN_BODY = """from mymodels import (
    MyGPT2ForCausalLM,
    MyGPT2Model,
)


class DoubledModel(MyGPT2Model):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state * 2.0
        return outputs


class DoubledForCausalLM(MyGPT2ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = DoubledModel(config)
        self.post_init()
"""
RANKER = """from mymodels.models.modeling_mybert import MyBertModel, MyBertPreTrainedModel
from torch import nn


class Ranker(MyBertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.bert = MyBertModel(config)
        self.rank = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        return (self.rank(self.bert(input_ids).last_hidden_state[:, 0]),)
"""
SCALED = MODEL.format(config_class="", value="scale(outputs.logits)")
# module → its text; the first holds the class
KINDS = {
    "a file": {"kind_a": LONG + MODEL_ONLY},
    "a file, short imports": {"kind_b": SHORT + MODEL_ONLY},
    "config and model": {"kind_c": SHORT + BOTH},
    "config and model apart": {
        "kind_d.modeling": "from mymodels import MyGPT2ForCausalLM\nfrom .config import ScaledConfig\n"
        + MODEL.format(config_class="    config_class = ScaledConfig\n", value="outputs.logits * self.config.factor"),
        "kind_d.config": "from mymodels import MyGPT2Config\n" + CONFIG,
    },
    "a sibling": {"kind_e.modeling": f"{SHORT}from .scales import scale\n{SCALED}", "kind_e.scales": SCALES},
    "one level up": {
        "kind_f.models.own": f"{SHORT}from ..scales import scale\n{SCALED}",
        "kind_f.scales": SCALES,
    },
    "two levels up": {
        "kind_g.models.gpt.own": f"{SHORT}from ...util.scales import scale\n{SCALED}",
        "kind_g.util.scales": SCALES,
    },
    "three levels up": {
        "kind_h.a.b.c.own": f"{SHORT}from ....util.scales import scale\n{SCALED}",
        "kind_h.util.scales": SCALES,
    },
    "absolute": {
        "kind_i.models.own": f"{SHORT}from kind_i.util.scales import scale\n{SCALED}",
        "kind_i.util.scales": SCALES,
    },
    "a script's neighbour": {"kind_j": f"{SHORT}from kind_j_scales import scale\n{SCALED}", "kind_j_scales": SCALES},
    "a body of its own": {"kind_k": OWN_BODY},
}


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes modules and imports the first of them."""
    root = tmp_path / "code"
    root.mkdir()
    monkeypatch.syspath_prepend(root)
    before = set(sys.modules)

    def write(files: dict[str, str]):
        for name, text in files.items():
            path = root / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            for parent in path.relative_to(root).parents[:-1]:
                (root / parent / "__init__.py").touch()
            path.write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module(next(iter(files)))

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("kind_"):
            del sys.modules[name]


def model_of(module) -> torch.nn.Module:
    config_class = getattr(module, "ScaledConfig", MyGPT2Config)
    model_class = getattr(module, "Scaled", None) or module.DoubledForCausalLM
    return model_class(config_class(**GPT2)).eval()


def loaded_elsewhere(folders: list[tuple[Path, str]]) -> list[torch.Tensor]:
    """The first outputs in one process where neither mymodels nor the subclasses' own modules can be imported."""
    code = f"""
import sys, json; sys.modules["mymodels"] = None
import torch, transformers
for folder, auto_class in {[(str(folder), auto_class) for folder, auto_class in folders]}:
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    print(json.dumps(model.eval()(torch.tensor({IDS}))[0].tolist()))
"""
    run = warm_python.run([sys.executable, "-I", "-c", code])
    assert run.returncode == 0, run.stderr[-2000:]
    return [torch.tensor(json.loads(line)) for line in run.stdout.splitlines()]


def auto_map_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text())["auto_map"]


def trained(model: torch.nn.Module, folder: Path) -> Path:
    """The checkpoint that transformers' Trainer leaves."""
    rows = [{"input_ids": torch.tensor(IDS[0]), "labels": torch.tensor(IDS[0])}] * 2
    how = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False}
    Trainer(model, TrainingArguments(str(folder), max_steps=1, save_steps=1, **how), train_dataset=rows).train()
    model.eval()
    return folder / "checkpoint-1"


def test_every_kind_of_place(imported, tmp_path: Path) -> None:
    folders: list[tuple[Path, str]] = []
    expected: list[torch.Tensor] = []

    def expect(folder: Path, model: torch.nn.Module, auto_class: str = "AutoModelForCausalLM") -> None:
        folders.append((folder, auto_class))
        with torch.no_grad():
            expected.append(model(torch.tensor(IDS))[0])

    for kind, files in KINDS.items():
        model = model_of(imported(files))
        saved = (
            tmp_path / kind / f"saved-{len(folders)}"
        )  # where a name comes twice, transformers takes the first's code
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(saved)
        expect(saved, model)
        here = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True).eval()  # where mymodels is
        again = type(model).from_pretrained(saved).eval()
        assert type(here).__name__ == type(model).__name__
        with torch.no_grad():
            assert here(torch.tensor(IDS)).logits.equal(expected[-1]) and again(torch.tensor(IDS)).logits.equal(
                expected[-1]
            )
        if kind not in ("a file, short imports", "config and model apart", "two levels up"):
            continue
        built = build_repo(model, None, tmp_path / kind / "built", card="# Own", golden=False)
        twice = build_repo(built, None, tmp_path / kind / "twice" / "built", golden=False)
        for file in built.iterdir():  # what is built twice stays as it is
            assert file.read_bytes() == (twice / file.name).read_bytes(), (kind, file.name)
        for other in (built, build_repo(saved, None, tmp_path / kind / "again", golden=False)):
            assert auto_map_of(other) == auto_map_of(saved)
            for file in saved.glob("*.py"):
                assert file.read_bytes() == (other / file.name).read_bytes(), (kind, file.name)
        if kind == "two levels up":
            expect(trained(model, tmp_path / "run"), model)

    body = {"AutoModel": "kind_k.DoubledModel", "AutoModelForCausalLM": "kind_k.DoubledForCausalLM"}
    assert auto_map_of(saved) == {"AutoConfig": "configuration_mygpt2.MyGPT2Config", **body}
    folders.append((saved, "AutoModel"))
    with torch.no_grad():
        expected.append(model.model(torch.tensor(IDS))[0])

    ranker = imported({"kind_n": RANKER}).Ranker
    model = ranker(mybert_config()).eval()
    with pytest.warns(
        CodeNotSaved, match=r"the Auto class of Ranker cannot be determined: call Ranker\.register_for_auto_class"
    ):
        model.save_pretrained(tmp_path / "silent")
    ranker.register_for_auto_class("AutoModelForSequenceClassification")
    model.save_pretrained(tmp_path / "registered")
    expect(tmp_path / "registered", model, "AutoModelForSequenceClassification")

    for folder, found, right in zip(folders, loaded_elsewhere(folders), expected, strict=True):
        assert largest_difference(found, right) <= 1e-6, folder


def test_what_it_serves(imported, tmp_path: Path) -> None:
    def served(kind: str) -> dict[str, str]:
        model_of(imported(KINDS[kind])).save_pretrained(tmp_path / kind)
        return auto_map_of(tmp_path / kind)

    both = {"AutoConfig": "kind_c.ScaledConfig", "AutoModelForCausalLM": "kind_c.Scaled"}
    assert served("config and model") == both  # our other heads take no ScaledConfig
    assert served("a file") == {**MyGPT2Config.AUTO_MAP, "AutoModelForCausalLM": "kind_a.Scaled"}


def test_our_own_heads_do_not_inherit_another_folder_s_classes(imported, tmp_path: Path) -> None:
    model = model_of(imported(KINDS["a file"]))
    model.save_pretrained(tmp_path / "own")
    assert model.config.auto_map == MyGPT2Config.AUTO_MAP  # saving changes nothing in memory
    config = MyGPT2Config.from_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"the config names kind_a\.Scaled for AutoModelForCausalLM"):
        AutoModelForCausalLM.from_config(config)
    MyGPT2ForCausalLM(config).save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["auto_map"] == MyGPT2Config.AUTO_MAP


def test_what_cannot_be_saved_with_its_code(imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(MyGPT2ForCausalLM):
        pass

    here = type("InNotebook", (MyGPT2ForCausalLM,), {"__module__": "__main__"})
    config_only = imported({"kind_l": SHORT + CONFIG}).ScaledConfig
    nested = imported({"kind_m.own": f"{SHORT}from . import scales\n{MODEL_ONLY}", "kind_m.scales": SCALES}).Scaled
    impossible = {
        "Local is not at the top level": Local(mygpt2_config()),
        "InNotebook is defined in __main__, a notebook or script: put it into a .py file": here(mygpt2_config()),
        "has config_class = MyGPT2Config, so Auto classes reject a ScaledConfig: subclass it with config_class = ScaledConfig": (
            MyGPT2ForCausalLM(config_only(**GPT2))
        ),
        "`from . import …` cannot be made flat": nested(mygpt2_config()),
    }
    for number, (sentence, model) in enumerate(impossible.items()):
        folder = tmp_path / str(number)
        with pytest.warns(CodeNotSaved) as caught:
            model.save_pretrained(folder)
        assert (
            len(caught) == 1 and sentence in str(caught[0].message) and "mymodels.build_repo" in str(caught[0].message)
        )
        assert "auto_map" not in json.loads((folder / "config.json").read_text())
        with torch.no_grad():
            again = type(model).from_pretrained(folder, config=model.config).eval()(torch.tensor(IDS)).logits
        assert again.equal(model.eval()(torch.tensor(IDS)).logits)
        with pytest.raises(CheckpointError) as refused:
            build_repo(model, None, tmp_path / "out", card="# Own", golden=False)
        assert sentence in str(refused.value) and not (tmp_path / "out").exists()
    for way in (MyGPT2ForCausalLM, AutoModelForCausalLM):  # our class does not answer in its place
        with pytest.raises(ValueError, match=r"was saved from the class Local, whose code is not in the folder"):
            way.from_pretrained(tmp_path / "0")
    with pytest.raises(CheckpointError, match=r"was saved from the class Local, whose code is not in the folder"):
        build_repo(tmp_path / "0", None, tmp_path / "out", golden=False)


def test_a_class_called_like_ours_is_not_loaded_as_ours(imported, tmp_path: Path) -> None:
    """Saved without its code, it is named in full; beside our class of that name it answers as itself or not at all."""
    named = MODEL_ONLY.replace("class Scaled(MyGPT2ForCausalLM)", "class MyGPT2ForCausalLM(mymodels.MyGPT2ForCausalLM)")
    model = imported({"kind_n": f"import mymodels\n{named}"}).MyGPT2ForCausalLM(mygpt2_config()).eval()
    with pytest.warns(CodeNotSaved, match=r"`import mymodels` cannot be made flat"):
        model.save_pretrained(tmp_path / "own")
    assert model.config.architectures == ["MyGPT2ForCausalLM"]
    for way in (MyGPT2ForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"was saved from the class kind_n\.MyGPT2ForCausalLM, whose code is not"):
            way.from_pretrained(tmp_path / "own")
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path / "own")(torch.tensor(IDS)).logits
    assert again.equal(model(torch.tensor(IDS)).logits)


def test_a_file_that_auto_map_cannot_name(tmp_path: Path) -> None:
    file = tmp_path / "my-model.v2.py"
    file.write_text(SHORT + MODEL_ONLY)
    spec = importlib.util.spec_from_file_location("kind_o", file)
    module = sys.modules["kind_o"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        with pytest.warns(
            CodeNotSaved, match=r"my-model\.v2\.py: auto_map cannot name a file with such a name: rename it"
        ):
            module.Scaled(mygpt2_config()).save_pretrained(tmp_path / "own")
    finally:
        del sys.modules["kind_o"]
    assert "auto_map" not in json.loads((tmp_path / "own" / "config.json").read_text())

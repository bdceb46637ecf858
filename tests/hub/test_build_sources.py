"""`build` from whatever people have: a folder of any format, what a Trainer left, a package with code of its own."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import warm_python
from tiny import batch, largest_difference, mygpt2_config, stock_gpt2_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from mymodels import MyGPT2ForCausalLM, cli
from mymodels.checkpoints import CheckpointError, check_checkpoint
from mymodels.hub import build_repo
from mymodels.hub.code_files import auto_class_of, auto_map_of_files, collect_code
from mymodels.training.tokenizers import train_gpt2_tokenizer

MODELING = '''"""A model of one's own."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from {up}configs.configuration_own import OwnConfig
from {up}parts.blocks import Block


class OwnPreTrainedModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"


class OwnModel(OwnPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.block = Block(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return (self.block(self.embed(input_ids)),)


class OwnForSequenceClassification(OwnPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return (self.score(self.model(input_ids)[0].mean(1)),)
'''
CONFIG = """from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=20, hidden_size=8, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)
"""
BLOCKS = """import torch

from .gates import gate


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = torch.nn.Linear(width, width)

    def forward(self, x):
        return gate(self.inner(x))
"""
GATES = "def gate(x):\n    return x * x.sigmoid()\n"


@pytest.fixture(params=["relative", "absolute"])
def package(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package with its code in several folders, imported."""
    name = f"own_{request.param}"
    up = ".." if request.param == "relative" else f"{name}."
    files = {
        "__init__.py": "",
        "configs/__init__.py": "",
        "configs/configuration_own.py": CONFIG,
        "parts/__init__.py": "",
        "parts/blocks.py": BLOCKS,
        "parts/gates.py": GATES,
        "models/__init__.py": "",
        "models/modeling_own.py": MODELING.format(up=up),
    }
    for file, text in files.items():
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(f"{name}.models.modeling_own")
    yield module
    for loaded in [key for key in sys.modules if key.startswith(name)]:
        del sys.modules[loaded]


def loaded_elsewhere(folder: Path, auto_class: str, ids: list[list[int]]) -> list:
    """The first output under transformers alone, where neither mymodels nor the package can be imported."""
    code = f"""
import sys, json; sys.modules["mymodels"] = None
import torch, transformers
model = transformers.{auto_class}.from_pretrained({str(folder)!r}, trust_remote_code=True)
print(json.dumps(model.eval()(torch.tensor({ids}))[0].tolist()))
"""
    run = warm_python.run([sys.executable, "-I", "-c", code])
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_package_becomes_flat_files(package, tmp_path: Path) -> None:
    model = package.OwnForSequenceClassification(package.OwnConfig()).eval()
    folder = build_repo(model, None, tmp_path / "repo", card="# Own", golden=False)
    code = {path.name for path in folder.glob("*.py")}
    assert code == {"modeling_own.py", "configuration_own.py", "blocks.py", "gates.py"}
    text = (folder / "modeling_own.py").read_text()
    assert "from .blocks import Block" in text and "from .configuration_own import OwnConfig" in text
    assert "from .gates import gate  # noqa: F401  needed indirectly" in text
    assert text.index("from __future__") < text.index("from .gates")
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModel": "modeling_own.OwnModel",
        "AutoModelForSequenceClassification": "modeling_own.OwnForSequenceClassification",
    }
    ids = [[1, 2, 3], [4, 5, 6]]
    expected = model(torch.tensor(ids))[0]
    assert (
        largest_difference(torch.tensor(loaded_elsewhere(folder, "AutoModelForSequenceClassification", ids)), expected)
        <= 1e-6
    )


def test_a_subclass_of_ours_travels_with_what_it_builds_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modeling_fancy.py").write_text(
        "from mymodels.models.modeling_mygpt2 import MyGPT2ForCausalLM\n\n\n"
        "class FancyForCausalLM(MyGPT2ForCausalLM):\n    def forward(self, input_ids=None, **kwargs):\n"
        "        outputs = super().forward(input_ids, **kwargs)\n        outputs.logits = outputs.logits + 1.0\n        return outputs\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fancy = importlib.import_module("modeling_fancy")
    model = fancy.FancyForCausalLM(mygpt2_config()).eval()
    folder = build_repo(model, None, tmp_path / "repo", card="# Fancy", golden=False)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_fancy.FancyForCausalLM"
    assert config["auto_map"]["AutoModel"] == "modeling_mygpt2.MyGPT2Model"
    assert {p.name for p in folder.glob("*.py")} == {
        "modeling_fancy.py",
        "modeling_mygpt2.py",
        "configuration_mygpt2.py",
        "attention.py",
        "base.py",
        "compat.py",
        "cpu_kernels.py",
        "decode_step.py",
        "decoding.py",
        "heads.py",
        "int8.py",
        "int8_layers.py",
        "int8_products.py",
        "losses.py",
        "padding.py",
        "products.py",
        "tokenwise.py",
        "vllm_adapter.py",
    }
    ids = [[2, 3, 4]]
    expected = model(torch.tensor(ids)).logits
    assert largest_difference(torch.tensor(loaded_elsewhere(folder, "AutoModelForCausalLM", ids)), expected) <= 1e-5
    del sys.modules["modeling_fancy"]


@pytest.mark.parametrize("form", ["safetensors", "bin", "pt"])
def test_a_stock_folder_of_any_format(form: str, tmp_path: Path) -> None:
    stock = GPT2LMHeadModel(stock_gpt2_config()).eval()
    source = tmp_path / "source"
    stock.save_pretrained(source)
    if form != "safetensors":
        (source / "model.safetensors").unlink()
        torch.save(stock.state_dict(), source / ("pytorch_model.bin" if form == "bin" else "weights.pt"))
    (source / "notes.txt.bak").write_text("x")
    folder = build_repo(source, None, tmp_path / "repo", max_shard_size="20KB", golden=False)
    names = {path.name for path in folder.iterdir() if path.suffix != ".safetensors"}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors.index.json",
    }
    assert check_checkpoint(folder, full=True) == []
    again, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    inputs = batch()
    assert largest_difference(again(**inputs).logits, stock(**inputs).logits) == 0
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "custom_code" not in card and "trust_remote_code" not in card


def test_what_a_trainer_left(tmp_path: Path) -> None:
    source = tmp_path / "run"
    MyGPT2ForCausalLM(mygpt2_config()).save_pretrained(source)
    tokenizer = train_gpt2_tokenizer(["the cat sat on the mat"], vocab_size=97 + 200, model_max_length=64)
    tokenizer.save_pretrained(source)
    for code in source.glob("*.py"):  # an older version left none
        code.unlink()
    torch.save({"lr": 1}, source / "training_args.bin")
    torch.save({}, source / "optimizer.pt")
    (source / "checkpoint-10").mkdir()
    log = [
        {"eval_loss": 2.0, "epoch": 1.0},
        {"loss": 1.0},
        {"eval_loss": 1.5, "eval_accuracy": 0.75, "eval_runtime": 3.0, "epoch": 2.0},
    ]
    (source / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": 40, "epoch": 2.0}))
    folder = build_repo(source, None, tmp_path / "repo", golden=False)
    assert not {path.name for path in folder.iterdir()} & {
        "training_args.bin",
        "optimizer.pt",
        "trainer_state.json",
        "checkpoint-10",
    }
    code = {"modeling_mygpt2.py", "configuration_mygpt2.py", "attention.py", "base.py", "compat.py", "cpu_kernels.py"}
    code |= {
        "decode_step.py",
        "decoding.py",
        "heads.py",
        "int8.py",
        "int8_layers.py",
        "int8_products.py",
        "losses.py",
        "padding.py",
        "products.py",
        "tokenwise.py",
        "vllm_adapter.py",
    }
    assert {path.name for path in folder.glob("*.py")} == code
    card = (folder / "README.md").read_text()
    assert "| accuracy | 0.7500 |" in card and "| loss | 1.5000 |" in card and "runtime" not in card
    assert "Fine-tuned for 40 steps (2 epochs)" in card
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("the cat").input_ids


def test_a_folder_is_a_fixed_point(tmp_path: Path) -> None:
    model = MyGPT2ForCausalLM(mygpt2_config())
    first = build_repo(model, None, tmp_path / "repo", card="# Mine", max_shard_size="20KB", golden=False)
    second = build_repo(first, None, tmp_path / "again" / "repo", max_shard_size="20KB", golden=False)
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_what_cannot_be_built(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"has no config\.json, without which the model cannot be loaded"):
        build_repo(tmp_path, None, tmp_path / "out", golden=False)
    with pytest.raises(CheckpointError, match=r"build_repo needs card= for a model in memory: pass"):
        build_repo(MyGPT2ForCausalLM(mygpt2_config()), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("from . import parts\n", r"main\.py:1: `from \. import …` cannot be made flat"),
        (
            "import os\nfrom .gone import x\n",
            r"main\.py:2: `from \.gone import …` cannot be made flat, or its file does not exist",
        ),
        ("import mymodels.hub\n", r"main\.py:1: `import mymodels\.hub` cannot be made flat"),
        (
            "from mymodels.hub import build_repo\n",
            r"main\.py:1 imports mymodels\.hub, which is not installed on other machines",
        ),
        ("def broken(:\n", r"main\.py is not valid Python"),
        ("from .folder import x\n", r"main\.py:1: `from \.folder import …` cannot be made flat"),
        ("from \\\n    .sibling import x\n", r"the import of sibling\.py cannot be rewritten"),
    ],
)
def test_code_that_cannot_be_flat(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(text)
    (tmp_path / "sibling.py").write_text("x = 1\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__init__.py").write_text("x = 1\n")
    with pytest.raises(CheckpointError, match=sentence):
        collect_code([tmp_path / "main.py"])


def test_imports_are_rewritten_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("x", "y"):
        (tmp_path / "a" / f"{name}.py").write_text(f"{name} = 1\n")
    text = '"""Æ\x0c"""\nfrom .a.x import x; from .a.y import y\nif x:\n    é = 1; from .a.y import y as z\n'
    (tmp_path / "main.py").write_text(text)
    flat = collect_code([tmp_path / "main.py"])["main.py"]
    assert flat == '"""Æ\x0c"""\nfrom .x import x; from .y import y\nif x:\n    é = 1; from .y import y as z\n'


class TestHostileSources:
    """Nothing from elsewhere on this machine gets into a folder that will be pushed."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        GPT2LMHeadModel(stock_gpt2_config()).save_pretrained(tmp_path / "deep" / "source")
        (tmp_path / "deep" / "private.py").write_text("password = 'dear'\n\n\nclass X: ...\n")
        return tmp_path / "deep" / "source"

    def refused(self, source: Path, sentence: str, **config) -> None:
        data = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**data, "model_type": "other", **config}))
        out = source.parent.parent / "out"
        with pytest.raises(CheckpointError, match=sentence) as caught:
            build_repo(source, None, out, golden=False)
        assert not out.exists() and "\x1b" not in str(caught.value)

    def test_a_path_in_auto_map(self, source: Path) -> None:
        for target in (f"{source.parent}/private.X", "../private.X", "a b.X", "x.\x1b[31mX", "X"):
            self.refused(source, r"the auto_map entry .* is not file\.Class", auto_map={"AutoModel": target})

    def test_a_link(self, source: Path) -> None:
        (source / "modeling_x.py").symlink_to(source.parent / "private.py")
        self.refused(source, r"leads out of the folder", auto_map={"AutoModel": "modeling_x.X"})

    @pytest.mark.parametrize("statement", ["from ..private import X", "from ...deep.private import X"])
    def test_an_import_that_climbs(self, source: Path, statement: str) -> None:
        (source / "modeling_x.py").write_text(f"{statement}\n\n\nclass Y: ...\n")
        self.refused(
            source,
            r"modeling_x\.py:1 imports .*private\.py, which is outside the folder",
            auto_map={"AutoModel": "modeling_x.Y"},
        )

    def test_an_import_of_a_link(self, source: Path) -> None:
        (source / "modeling_x.py").write_text("from .other import X\n")
        (source / "other.py").symlink_to(source.parent / "private.py")
        self.refused(source, r"leads out of the folder", auto_map={"AutoModel": "modeling_x.Y"})

    def test_a_linked_readme(self, source: Path) -> None:
        (source / "README.md").symlink_to(source.parent / "private.py")
        self.refused(source, r"leads out of the folder")


def test_what_a_folder_has_beside_the_model_comes_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    GPT2LMHeadModel(stock_gpt2_config()).save_pretrained(source)
    train_gpt2_tokenizer(["the cat"], vocab_size=300, model_max_length=64).save_pretrained(source)
    assert json.loads((source / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast): ...\n"
    )
    for name in (
        "1_Pooling/config.json",
        "images/a.png",
        "normalizer.json",
        ".git/config",
        "checkpoint-3/config.json",
        "runs/x.md",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    folder = build_repo(source, None, tmp_path / "repo", golden=False)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names >= {"tokenization_own.py", "1_Pooling/config.json", "images/a.png", "normalizer.json"}
    assert not any(name.startswith((".git", "checkpoint-3", "runs")) for name in names)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert check_checkpoint(folder, full=True) == []


def test_two_files_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(f"x = '{folder}'\n")
    with pytest.raises(CheckpointError, match=r"have the same name, and the Hub has no folders: rename one"):
        collect_code([tmp_path / "a" / "same.py", tmp_path / "b" / "same.py"])


def test_a_model_that_was_loaded_from_its_folders_own_code(tmp_path: Path) -> None:
    """transformers imports a config's code and its model's from two copies."""
    edited = tmp_path / "own-edited"
    shutil.copytree(Path(__file__).parents[2] / "hub_repo" / "mygpt2", edited)
    for name in ("manifest.json", "golden.safetensors"):
        (edited / name).unlink()
    code = edited / "modeling_mygpt2.py"
    code.write_text(code.read_text() + "\n# edited\n")
    model = AutoModelForCausalLM.from_pretrained(edited, trust_remote_code=True)
    assert type(model.config).__module__.split(".")[:-1] != type(model).__module__.split(".")[:-1]
    again = build_repo(model, None, tmp_path / "own-again", card="# Own", golden=False)
    assert {path.name: path.read_bytes() for path in again.glob("*.py")} == {
        path.name: path.read_bytes() for path in edited.glob("*.py")
    }


def test_classes_and_what_they_serve() -> None:
    assert auto_class_of("OwnForCausalLM") == "AutoModelForCausalLM" and auto_class_of("OwnPreTrainedModel") == ""
    code = """
class AConfig(PretrainedConfig): ...
class APreTrainedModel(transformers.PreTrainedModel): ...
class AModel(APreTrainedModel): ...
class AVisionModel(APreTrainedModel): ...
class AForCausalLM(AModel): ...
class ADataModel: ...
class BModel(APreTrainedModel): ...
"""
    ours = {"AutoConfig": "m.AConfig", "AutoModel": "m.AModel", "AutoModelForCausalLM": "m.AForCausalLM"}
    assert (
        auto_map_of_files({"m.py": code}, ["AForImageClassification"]) == ours
    )  # no sub-model, nothing that is not a model
    assert auto_map_of_files({"m.py": code}, ["BModel"]) == {"AutoModel": "m.BModel"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    MyGPT2ForCausalLM(mygpt2_config()).save_pretrained(tmp_path / "source")
    command = [
        "build",
        str(tmp_path / "source"),
        "--out",
        str(tmp_path / "repo"),
        "--license",
        "mit",
        "--metric",
        "loss=1.5",
    ]
    assert cli.main([*command, "--base-model", "openai-community/gpt2"]) == 0
    assert "golden.safetensors" in capsys.readouterr().out
    card = (tmp_path / "repo" / "README.md").read_text()
    assert "license: mit" in card and "base_model: openai-community/gpt2" in card and "| loss | 1.5000 |" in card
    assert check_checkpoint(tmp_path / "repo", full=True) == []

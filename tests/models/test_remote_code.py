"""The folder loads where mymodels does not exist, and what is loaded there can be saved and loaded again."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python
from tiny import SWITCHES, largest_difference, mybert_config, mygpt2_config
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import mymodels
from mymodels import MyBertForMaskedLM, MyBertForSequenceClassification, MyGPT2Config, MyGPT2ForCausalLM
from mymodels.hub import build_repo, load_in_clean_process
from mymodels.training.tokenizers import train_bert_tokenizer, train_gpt2_tokenizer

TEXTS = ["the cat sat on the mat", "a dog", "where did the mat go and why did the dog sit on it"]
MODELS_FOLDER = Path(mymodels.__file__).parent / "models"


def gpt2_repo(folder: Path, **switches) -> tuple[MyGPT2ForCausalLM, Path]:
    tokenizer = train_gpt2_tokenizer(TEXTS, vocab_size=300, model_max_length=64)
    config = mygpt2_config(**switches, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    model = MyGPT2ForCausalLM(config).eval()
    return model, build_repo(model, tokenizer, folder, card="# card", golden=False, max_shard_size="30KB")


def reference(model, folder: Path):
    from transformers import AutoTokenizer

    return model(**AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, truncation=True, return_tensors="pt"))[0]


@pytest.mark.parametrize("switches", ["stock", "modern", "everything"])
def test_mygpt2_in_a_clean_process(switches: str, tmp_path: Path) -> None:
    model, folder = gpt2_repo(tmp_path / "repo", **SWITCHES[switches])
    names = ["AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"]
    report, outputs = load_in_clean_process(folder, names, texts=TEXTS, prompt="the cat")
    for name in names:
        seen = report["models"][name]
        assert seen["class"].startswith("transformers_modules.")
        assert seen["missing_keys"] == (["score.weight"] if "Classification" in name else [])
        assert not seen["mismatched_keys"]
    assert largest_difference(outputs["AutoModelForCausalLM"], reference(model, folder)) <= 1e-5
    assert largest_difference(outputs["AutoModel"], reference(model.model, folder)) <= 1e-5


def test_mybert_in_a_clean_process_through_every_auto_class(tmp_path: Path) -> None:
    tokenizer = train_bert_tokenizer(TEXTS, vocab_size=120, model_max_length=64)
    model = MyBertForMaskedLM(mybert_config(vocab_size=len(tokenizer))).eval()
    folder = build_repo(model, tokenizer, tmp_path / "repo", card="# card", golden=False, max_shard_size="30KB")
    names = [name for name in model.config.auto_map if name != "AutoConfig"]
    assert len(names) == 5
    report, outputs = load_in_clean_process(folder, names, texts=TEXTS)
    assert not report["models"]["AutoModelForMaskedLM"]["missing_keys"]
    assert largest_difference(outputs["AutoModelForMaskedLM"], reference(model, folder)) <= 1e-5
    assert largest_difference(outputs["AutoModel"], reference(model.bert, folder)) <= 1e-5


def test_saved_again_from_remote_code_and_loaded_again(tmp_path: Path) -> None:
    model, folder = gpt2_repo(tmp_path / "first", **SWITCHES["modern"])
    script = """
import sys
sys.modules["mymodels"] = None
from transformers import AutoModelForSequenceClassification, AutoTokenizer
source, target = sys.argv[1:]
AutoTokenizer.from_pretrained(source).save_pretrained(target)
AutoModelForSequenceClassification.from_pretrained(source, trust_remote_code=True).save_pretrained(target)
"""
    again = tmp_path / "second"
    warm_python.run([sys.executable, "-I", "-c", script, folder, again], check=True)
    for name in (
        "configuration_mygpt2.py",
        "modeling_mygpt2.py",
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
    ):
        assert (again / name).read_bytes() == (MODELS_FOLDER / name).read_bytes()
    saved = json.loads((again / "config.json").read_text())
    assert saved["auto_map"] == MyGPT2Config.AUTO_MAP  # every class, though another head was saved
    report, outputs = load_in_clean_process(again, ["AutoModel", "AutoModelForSequenceClassification"], texts=TEXTS)
    assert not report["models"]["AutoModelForSequenceClassification"]["missing_keys"]
    assert largest_difference(outputs["AutoModel"], reference(model.model, folder)) <= 1e-5


def test_inside_the_package_no_trust_is_needed_and_its_own_classes_are_used(tmp_path: Path) -> None:
    MyBertForSequenceClassification(mybert_config()).save_pretrained(tmp_path / "bert")
    assert (
        type(AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")) is MyBertForSequenceClassification
    )
    assert type(AutoModel.from_pretrained(tmp_path / "bert")) is mymodels.MyBertModel
    assert type(AutoModelForCausalLM.from_config(mygpt2_config())) is MyGPT2ForCausalLM


def test_a_clean_process_that_fails_says_why(tmp_path: Path) -> None:
    _, folder = gpt2_repo(tmp_path / "repo")
    (folder / "heads.py").unlink()
    with pytest.raises(RuntimeError, match=r"(?s)did not load in a clean process.*heads\.py"):
        load_in_clean_process(folder, ["AutoModel"], texts=TEXTS)


@pytest.mark.parametrize("path", sorted(MODELS_FOLDER.glob("[!_]*.py")), ids=lambda path: path.name)
def test_the_rule_of_the_models_room(path: Path) -> None:
    tree = ast.parse(path.read_text())
    siblings = {p.stem for p in MODELS_FOLDER.glob("*.py")}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in siblings, ast.unparse(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
                top = name.split(".")[0]
                assert top in {"torch", "transformers"} | set(sys.stdlib_module_names), name
        elif isinstance(node, ast.Attribute) and node.attr in ("register_buffer", "data"):
            pytest.fail(f"{ast.unparse(node)} at line {node.lineno}")


def test_too_old_a_transformers_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text('__version__ = "4.55.4"')
    shutil.copy(MODELS_FOLDER / "compat.py", tmp_path)
    process = subprocess.run([sys.executable, "-c", "import compat"], capture_output=True, text=True, cwd=tmp_path)
    assert process.stderr.strip().splitlines()[-1] == (
        "ImportError: this model needs transformers 4.56 or newer (tested from 4.56 to 5.23), but transformers 4.55.4 "
        "is installed: run `pip install --upgrade transformers`"
    )


@pytest.mark.parametrize("name", ["modeling_mygpt2.py", "modeling_mybert.py"])
def test_older_releases_find_the_texts_that_let_them_switch_attention(name: str) -> None:
    """transformers 4.56 to 5.3 refuses `set_attn_implementation` for a file without them."""
    code = (Path(mymodels.__file__).parent / "models" / name).read_text()
    for text in ("eager_attention_forward", "[self.config._attn_implementation]", ".get_interface("):
        assert text in code


DILLED = """
import sys
sys.modules["mymodels"] = None
import dill, transformers
from datasets.fingerprint import Hasher
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
again = dill.loads(dill.dumps(model))
assert type(again) is type(model) and len(again.state_dict()) == len(model.state_dict())
for recurse in (False, True):
    assert dill.loads(dill.dumps(type(model), recurse=recurse)) is type(model)
assert Hasher.hash(model) == Hasher.hash(model)
print(Hasher.hash(type(model)), Hasher.hash(model.config), Hasher.hash(model.model))
"""


@pytest.mark.slow
def test_a_remote_model_can_be_dilled_and_hashed_for_a_cache(tmp_path: Path) -> None:
    """`datasets.map` looks for what it has already computed by a hash of what the function holds."""
    MyGPT2ForCausalLM(mygpt2_config()).save_pretrained(tmp_path / "dilled")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    found = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", DILLED, tmp_path / "dilled"]
        run = subprocess.run(command, capture_output=True, text=True, env={**environment, "PYTHONHASHSEED": seed})
        assert run.returncode == 0, run.stderr[-2000:]
        found.append(run.stdout.splitlines()[-1])
    assert found[0] == found[1]

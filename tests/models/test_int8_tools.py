"""int8 folders in the other tools: each works, or refuses in one sentence."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import transformers
import warm_python
from tiny import batch, mygpt2_config, stock_gpt2_config
from transformers import GPT2LMHeadModel, TrainingArguments

import mymodels
from mymodels import Int8Config, MyGPT2ForCausalLM
from mymodels.checkpoints import CheckpointError
from mymodels.checkpoints.inspecting import inspect_checkpoint
from mymodels.hub import build_repo
from mymodels.hub.verifying import verify
from mymodels.models.int8_layers import Int8Linear
from mymodels.training.tokenizers import train_gpt2_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`float`, and the same model in `int8`; `stock`, a stock GPT-2."""
    where = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    model = MyGPT2ForCausalLM(mygpt2_config()).eval()
    model.save_pretrained(where / "float")
    mymodels.quantize(model).save_pretrained(where / "int8")
    GPT2LMHeadModel(stock_gpt2_config()).save_pretrained(where / "stock")
    return where


def logits(model) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(**batch()).logits


def test_a_stock_folder_is_loaded_in_int8(folders: Path) -> None:
    loaded = MyGPT2ForCausalLM.from_pretrained(
        folders / "stock", quantization_config=Int8Config(activation_bits=8, modules_to_not_convert=["o_proj"])
    )
    expected = MyGPT2ForCausalLM.from_pretrained(folders / "stock")
    mymodels.quantize(expected, activation_bits=8, modules_to_not_convert=["o_proj"])
    assert isinstance(loaded.lm_head, Int8Linear) and type(loaded.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    assert torch.equal(logits(loaded), logits(expected))


def test_weights_are_placed_in_a_model_of_the_same_form_only(folders: Path) -> None:
    model = mymodels.quantize(MyGPT2ForCausalLM(mygpt2_config()).eval())
    expected = MyGPT2ForCausalLM.from_pretrained(folders / "int8")
    mymodels.load_checkpoint_and_dispatch(model, folders / "int8")
    assert torch.equal(logits(model), logits(expected))
    with pytest.raises(CheckpointError, match="19 tensors do not fit the model"):
        mymodels.load_checkpoint_and_dispatch(model, folders / "float")
    with pytest.raises(CheckpointError, match="is quantised, int8"):
        mymodels.load_checkpoint_and_dispatch(MyGPT2ForCausalLM(mygpt2_config()), folders / "int8")
    assert torch.equal(logits(model), logits(expected))


def test_tools_for_float_weights_refuse(folders: Path, tmp_path: Path) -> None:
    model = MyGPT2ForCausalLM.from_pretrained(folders / "int8")
    for source in (folders / "int8", model):
        with pytest.raises(CheckpointError, match=r"is quantised: int8 by mymodels\.quantize"):
            mymodels.warm_start("mygpt2", source)
        with pytest.raises(ValueError, match="is quantised: export the model that it was made from"):
            mymodels.export_model(source, "pt2", tmp_path / "graph")
    for trainer in (transformers.Trainer, mymodels.Trainer):
        with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
            trainer(model, TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[]))
    with pytest.raises(TypeError, match="not an instance of"):
        model.resize_token_embeddings(120)
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match=r"Int8Linear.* is not supported"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(MyGPT2ForCausalLM.from_pretrained(folders / "float").state_dict())
    assert inspect_checkpoint(folders / "int8")["quantisation"] == "int8 by mymodels.quantize"


def test_a_model_with_an_adapter_is_refused(folders: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        MyGPT2ForCausalLM.from_pretrained(folders / "float"), LoraConfig(target_modules=["q_proj"])
    )
    with pytest.raises(ValueError, match=r"quantize was called on a PeftModel\w* with an adapter: merge it first"):
        mymodels.quantize(adapted)
    with pytest.raises(ValueError, match=r"quantize was called on a MyGPT2ForCausalLM with an adapter: merge it first"):
        mymodels.quantize(adapted.base_model.model)
    merged = mymodels.quantize(adapted.merge_and_unload())
    assert isinstance(merged.model.layers[0].self_attn.q_proj, Int8Linear)


OWN = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class PlainConfig(PretrainedConfig):
    model_type = "plain-int8"
    vocab_size = 97


class PlainForSequenceClassification(PreTrainedModel):
    config_class = PlainConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(97, 64)
        self.dense = torch.nn.Linear(64, 64)
        self.score = torch.nn.Linear(64, 2)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def forward(self, input_ids, attention_mask=None):
        return SequenceClassifierOutput(logits=self.score(self.dense(self.embed(input_ids)).mean(1)))
"""
REMOTE = """
import sys
sys.modules["mymodels"] = None
import torch, transformers
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    print(type(model.dense).__name__, model(torch.arange(11)[None]).logits.tolist())
"""


def test_code_of_ones_own_loads_int8_where_mymodels_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain_int8.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("plain_int8")
    model = mymodels.quantize(module.PlainForSequenceClassification(module.PlainConfig()).eval())
    folder = build_repo(model, None, tmp_path / "from-memory", card="# card", golden=False)
    model.save_pretrained(tmp_path / "saved")
    code = [tmp_path / "plain_int8.py"]
    other = build_repo(tmp_path / "saved", None, tmp_path / "from-files", card="# card", golden=False, code=code)
    with torch.no_grad():
        expected = f"Int8Linear {model(torch.arange(11)[None]).logits.tolist()}"
    for built in (folder, other):
        done = warm_python.run([sys.executable, "-I", "-c", REMOTE, built], check=True)
        assert done.stdout.splitlines()[-1] == expected
    own = {"base.py", "compat.py", "int8.py", "int8_layers.py", "int8_products.py", "plain_int8.py", "products.py"}
    assert own == {path.name for path in folder.glob("*.py")}


def test_a_stock_model_cannot_be_built_in_int8(folders: Path, tmp_path: Path) -> None:
    model = mymodels.quantize(GPT2LMHeadModel.from_pretrained(folders / "stock"))
    model.save_pretrained(tmp_path / "saved")
    for source in (model, tmp_path / "saved"):
        with pytest.raises(CheckpointError, match=r"GPT2LMHeadModel is a class of transformers.*`import mymodels`"):
            build_repo(source, None, tmp_path / "built", card="# card", golden=False)
        assert not (tmp_path / "built").exists()


@pytest.mark.slow
def test_a_built_folder_is_verified(tmp_path: Path) -> None:
    tokenizer = train_gpt2_tokenizer(["the cat sat on the mat", "a dog"], vocab_size=300, model_max_length=64)
    config = mygpt2_config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    model = mymodels.quantize(MyGPT2ForCausalLM(config).eval())
    report = verify(build_repo(model, tokenizer, tmp_path / "repo", card="# card"), quick=True)
    assert not report.failed, report
    assert not report.skipped, report

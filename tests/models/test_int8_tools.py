"""int8 folders in the other tools: each works, or refuses in one sentence."""

from pathlib import Path

import pytest
import torch
import transformers
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
    merged = mymodels.quantize(adapted.merge_and_unload())
    assert isinstance(merged.model.layers[0].self_attn.q_proj, Int8Linear)


@pytest.mark.slow
def test_a_built_folder_is_verified(tmp_path: Path) -> None:
    tokenizer = train_gpt2_tokenizer(["the cat sat on the mat", "a dog"], vocab_size=300, model_max_length=64)
    config = mygpt2_config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    model = mymodels.quantize(MyGPT2ForCausalLM(config).eval())
    report = verify(build_repo(model, tokenizer, tmp_path / "repo", card="# card"), quick=True)
    assert not report.failed, report
    assert {check.name for _, check in report.skipped} == {"device map"}

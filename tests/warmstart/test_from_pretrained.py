"""`from_pretrained` of our classes on folders that stock models saved: the stock model's outputs, nothing left random."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny import batch, mygpt2_config
from transformers.utils import logging
from warmstart.random_stock_models import difference, distilbert, roberta, stock_model

import mymodels
from mymodels import MyBertForMaskedLM, MyBertModel, MyGPT2ForCausalLM, MyGPT2Model
from mymodels.checkpoints import CheckpointError

GPT2_HEADS = {
    "Model": "GPT2Model",
    "ForCausalLM": "GPT2LMHeadModel",
    "ForSequenceClassification": "GPT2ForSequenceClassification",
}
BERT_HEADS = ["Model", "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering"]
CASES = [("MyGPT2" + ours, stock) for ours, stock in GPT2_HEADS.items()]
CASES += [("MyBert" + head, "Bert" + head) for head in BERT_HEADS]


def write(model, folder: Path, form: str, strip: str = "") -> Path:
    """The model as `safetensors` or `.bin`, in one file or several, `strip` taken off the names."""
    if form == "safetensors":
        model.save_pretrained(folder)
    elif form == "sharded":
        model.save_pretrained(folder, max_shard_size="20KB")
        assert (folder / "model.safetensors.index.json").is_file()
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        tensors = {name.removeprefix(strip): tensor for name, tensor in model.state_dict().items()}
        if form == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            names = list(tensors)
            parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
            for file, inside in parts.items():
                torch.save({name: tensors[name].clone() for name in inside}, folder / file)
            index = {"metadata": {}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def same_outputs(mine, stock) -> None:
    assert difference(mine, stock) <= 1e-5


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin", "sharded bin"])
@pytest.mark.parametrize(("ours", "stock_name"), CASES)
def test_stock_folder(ours: str, stock_name: str, form: str, tmp_path: Path) -> None:
    stock = stock_model(stock_name)
    mine, loading = getattr(mymodels, ours).from_pretrained(write(stock, tmp_path, form), output_loading_info=True)
    assert not any(loading.values()), loading
    assert not mine.training
    same_outputs(mine, stock)


@pytest.mark.parametrize("prefix", ["with", "without"])
@pytest.mark.parametrize(("ours", "stock_name"), [CASES[0], CASES[3], CASES[1]])
def test_names_with_and_without_prefix(ours: str, stock_name: str, prefix: str, tmp_path: Path) -> None:
    stock = stock_model(stock_name)
    head = stock_name == "GPT2LMHeadModel"
    write(stock, tmp_path, "bin", strip="transformer." if head and prefix == "without" else "")
    if prefix == "with" and not head:
        tensors = torch.load(tmp_path / "pytorch_model.bin")
        name = "transformer." if "GPT2" in stock_name else "bert."
        torch.save({name + key: tensor for key, tensor in tensors.items()}, tmp_path / "pytorch_model.bin")
    same_outputs(getattr(mymodels, ours).from_pretrained(tmp_path), stock)


def test_base_weights_into_a_head_and_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm = stock_model("GPT2LMHeadModel")
    same_outputs(MyGPT2Model.from_pretrained(write(lm, tmp_path / "lm", "safetensors")), lm.transformer)
    base = stock_model("GPT2Model")
    mine = MyGPT2ForCausalLM.from_pretrained(
        write(base, tmp_path / "base", "safetensors")
    )  # the head is tied: complete
    same_outputs(mine.model, base)
    masked = stock_model("BertForMaskedLM")
    same_outputs(
        mymodels.MyBertForTokenClassification.from_pretrained(write(masked, tmp_path / "m", "bin")).bert, masked.bert
    )


def test_generation_is_stock_generation(tmp_path: Path) -> None:
    stock = stock_model("GPT2LMHeadModel")
    stock.generation_config.update(repetition_penalty=1.5, max_new_tokens=15)
    mine = MyGPT2ForCausalLM.from_pretrained(write(stock, tmp_path, "safetensors"))
    assert mine.generation_config.repetition_penalty == 1.5
    inputs = batch("left")
    assert torch.equal(mine.generate(**inputs), stock.generate(**inputs))


def test_saved_again_it_loads_by_itself(tmp_path: Path) -> None:
    stock = stock_model("GPT2LMHeadModel")
    MyGPT2ForCausalLM.from_pretrained(write(stock, tmp_path / "stock", "safetensors")).save_pretrained(
        tmp_path / "mine"
    )
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert config["model_type"] == "mygpt2" and config["architectures"] == ["MyGPT2ForCausalLM"]
    loaded, loading = MyGPT2ForCausalLM.from_pretrained(tmp_path / "mine", output_loading_info=True)
    assert not any(loading.values())
    same_outputs(loaded, stock)


def test_untied_stock_head(tmp_path: Path) -> None:
    stock = stock_model("GPT2LMHeadModel", tie_word_embeddings=False)
    mine = MyGPT2ForCausalLM.from_pretrained(write(stock, tmp_path / "gpt2", "safetensors"))
    assert mine.lm_head.weight is not mine.model.embed_tokens.weight
    same_outputs(mine, stock)
    stock = stock_model("BertForMaskedLM", tie_word_embeddings=False)
    folder = write(stock, tmp_path / "bert", "bin")
    same_outputs(MyBertForMaskedLM.from_pretrained(folder), stock)


def test_places_and_dtypes(tmp_path: Path) -> None:
    stock = stock_model("GPT2LMHeadModel")
    folder = write(stock, tmp_path / "stock", "sharded")
    half = MyGPT2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    copy.deepcopy(stock).bfloat16().save_pretrained(tmp_path / "half")
    assert MyGPT2ForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16  # as transformers 5 does
    assert MyGPT2ForCausalLM.from_pretrained(tmp_path / "half", dtype="float32").dtype == torch.float32
    same_outputs(MyGPT2ForCausalLM.from_pretrained(folder, device_map="auto"), stock)
    places = {"model.embed_tokens": "cpu", "model.embed_positions": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.norm": "cpu", "lm_head": "cpu"}  # fmt: skip
    offloaded = MyGPT2ForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "off")
    assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta
    same_outputs(offloaded, stock)
    eager = MyGPT2ForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"


def test_variant_subfolder_and_file_kind(tmp_path: Path) -> None:
    stock, other = stock_model("GPT2LMHeadModel"), stock_model("GPT2LMHeadModel")
    stock.save_pretrained(tmp_path / "deep")
    other.save_pretrained(tmp_path / "deep", variant="other")
    torch.save(other.state_dict(), tmp_path / "deep" / "pytorch_model.bin")
    same_outputs(MyGPT2ForCausalLM.from_pretrained(tmp_path, subfolder="deep"), stock)
    same_outputs(MyGPT2ForCausalLM.from_pretrained(tmp_path / "deep", variant="other"), other)
    same_outputs(MyGPT2ForCausalLM.from_pretrained(tmp_path / "deep", use_safetensors=False), other)
    with pytest.raises(CheckpointError, match=r"has none of model\.fp16\.safetensors"):
        MyGPT2ForCausalLM.from_pretrained(tmp_path / "deep", variant="fp16")


class TestSwitches:
    """A switch that leaves a tensor without a place is logged in one table, which names `warm_start`."""

    @pytest.fixture
    def logged(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:

        from mymodels.warmstart import pretrained

        logged: list[str] = []
        monkeypatch.setattr(pretrained.logger, "warning", logged.append)
        return logged

    def test_nothing_is_logged_when_all_fits(self, tmp_path: Path, logged: list[str]) -> None:
        MyGPT2ForCausalLM.from_pretrained(write(stock_model("GPT2LMHeadModel"), tmp_path, "safetensors"))
        assert not logged

    def test_key_value_heads_and_norms(self, tmp_path: Path, logged: list[str]) -> None:
        stock = stock_model("GPT2LMHeadModel")
        folder = write(stock, tmp_path, "safetensors")
        mine, loading = MyGPT2ForCausalLM.from_pretrained(
            folder, num_key_value_heads=2, norm_type="rmsnorm", output_loading_info=True
        )
        assert len(logged) == 1
        for words in (
            "{k,v}_proj",
            "ln_1.bias",
            "32×32",
            "warm_start",
            "random, normal",
        ):
            assert words in logged[0], words
        assert "self_attn.k_proj.weight" in " ".join(loading["missing_keys"])
        assert "transformer.ln_f.bias" in loading["unexpected_keys"]
        assert torch.equal(mine.model.embed_tokens.weight, stock.transformer.wte.weight)

    def test_a_note_alone_comes_without_a_count_of_nothing(self, tmp_path: Path, logged: list[str]) -> None:
        stock = stock_model("GPT2LMHeadModel")
        tensors = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
        tensors["lm_head.weight"] += 1
        write(stock, tmp_path, "bin")
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        MyGPT2ForCausalLM.from_pretrained(tmp_path)
        assert len(logged) == 1 and "both are stored with different values" in logged[0]
        assert "0 parameters" not in logged[0] and "warm_start" not in logged[0]

    def test_a_config_says_the_switches_too(self, tmp_path: Path, logged: list[str]) -> None:
        folder = write(stock_model("GPT2LMHeadModel"), tmp_path, "safetensors")
        config = mygpt2_config(position_embedding_type="rope")
        mine = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config)
        assert type(mine) is MyGPT2ForCausalLM
        assert len(logged) == 1 and "transformer.wpe.weight" in logged[0] and "has no embed_positions" in logged[0]

    def test_a_new_head_starts_as_the_library_would(self, tmp_path: Path, logged: list[str]) -> None:
        folder = write(stock_model("BertModel"), tmp_path, "safetensors")
        mine = mymodels.MyBertForSequenceClassification.from_pretrained(folder, num_labels=5)
        assert len(logged) == 1 and "classifier.weight" in logged[0]
        assert mine.classifier.weight.shape == (5, 32) and not mine.classifier.bias.any()
        assert abs(mine.classifier.weight.std() - mine.config.initializer_range) < 0.05

    def test_other_pooling_and_fewer_layers(self, tmp_path: Path, logged: list[str]) -> None:
        folder = write(stock_model("BertModel"), tmp_path, "safetensors")
        mine = MyBertModel.from_pretrained(folder, pooling="mean", num_hidden_layers=2)
        assert len(logged) == 1 and "pooling='mean'" in logged[0] and "encoder.layer.2.output.dense" in logged[0]
        assert len(mine.encoder.layer) == 2


def test_stays_with_the_library_where_it_must(tmp_path: Path) -> None:
    folder = write(stock_model("GPT2LMHeadModel"), tmp_path / "gpt2", "safetensors")
    with pytest.raises(CheckpointError, match=r"gpt2 checkpoint, which MyBertModel cannot load"):
        MyBertModel.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"quantization_config= is not supported for a stock checkpoint"):
        MyGPT2ForCausalLM.from_pretrained(folder, quantization_config=object())
    with pytest.raises(CheckpointError, match=r"no field 'num_key_value_head': did you mean num_key_value_heads"):
        MyGPT2ForCausalLM.from_pretrained(folder, num_key_value_head=2)
    with pytest.raises(OSError, match="nowhere"):
        MyGPT2ForCausalLM.from_pretrained(tmp_path / "nowhere")
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
        )
    ).save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match=r"is a llama checkpoint, which MyGPT2ForCausalLM cannot load"):
        MyGPT2ForCausalLM.from_pretrained(tmp_path / "llama")
    logging.set_verbosity_error()


def test_a_folder_of_ours_needs_nothing_that_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mymodels.warmstart import pretrained as converting

    theirs, mine = stock_model("GPT2LMHeadModel"), MyGPT2ForCausalLM(mygpt2_config()).eval()
    mine.save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "deep")
    same_outputs(MyGPT2ForCausalLM.from_pretrained(tmp_path, subfolder="deep"), theirs)  # beside it a stock one
    monkeypatch.delattr(converting, "from_pretrained")
    again = MyGPT2ForCausalLM.from_pretrained(str(tmp_path))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in mine.state_dict().items())
    with pytest.raises(ImportError):
        MyGPT2ForCausalLM.from_pretrained(tmp_path / "deep")


def test_roberta_and_distilbert_too(tmp_path: Path) -> None:
    stock = distilbert("DistilBertForMaskedLM")
    same_outputs(MyBertForMaskedLM.from_pretrained(write(stock, tmp_path / "distilbert", "safetensors")), stock)
    stock = roberta("RobertaForMaskedLM")
    mine = MyBertForMaskedLM.from_pretrained(write(stock, tmp_path / "roberta", "safetensors"))
    inputs = {"input_ids": torch.randint(2, 97, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    assert difference(mine, stock, inputs=inputs) <= 1e-5


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    write(stock_model("GPT2LMHeadModel"), tmp_path / "stock", "safetensors")
    mine = MyGPT2ForCausalLM.from_pretrained(tmp_path / "stock")
    mine.save_pretrained(tmp_path / "mine")
    lora = peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(MyGPT2ForCausalLM.from_pretrained(tmp_path / "mine"), lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = MyGPT2ForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    inputs = batch("right")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, adapted(**inputs).logits)
        assert not torch.equal(again(**inputs).logits, mine(**inputs).logits)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "stock")  # its names are GPT-2's
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"is an adapter of PEFT for .*stock"):
        MyGPT2ForCausalLM.from_pretrained(tmp_path / "adapter")

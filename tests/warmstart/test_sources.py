"""Whatever people have: families, wrappers, training checkpoints, TensorFlow's names. The truth is the stock model."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from tiny import batch, mygpt2_config
from warmstart.random_stock_models import difference, distilbert, roberta, stock_model

from mymodels import MyBertForMaskedLM, MyBertModel, MyGPT2ForCausalLM, open_checkpoint, save_checkpoint, warm_start
from mymodels.checkpoints import CheckpointError


def no_padding() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(2, 97, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}


@pytest.mark.parametrize(
    "head",
    ["RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification", "RobertaForTokenClassification", "RobertaForQuestionAnswering"],
)  # fmt: skip
def test_roberta(head: str) -> None:
    stock = roberta(head)
    report = warm_start("mybert", stock)
    assert type(report.model).__name__ == head.replace("Roberta", "MyBert")
    assert report.model.config.max_position_embeddings == 64 and report.model.config.pad_token_id == 1
    assert report.is_exact, report
    assert difference(report.model, stock, inputs=no_padding()) <= 1e-5


@pytest.mark.parametrize("head", ["DistilBertModel", "DistilBertForMaskedLM", "DistilBertForTokenClassification", "DistilBertForQuestionAnswering"])  # fmt: skip
def test_distilbert(head: str) -> None:
    stock = distilbert(head)
    report = warm_start("mybert", stock)
    assert type(report.model).__name__ == head.replace("DistilBert", "MyBert")
    assert report.is_exact or head == "DistilBertModel", report  # MyBertModel has a pooler, DistilBERT has none
    assert difference(report.model, stock) <= 1e-5
    zeros = [row for row in report.rows if row.targets == ("bert.embeddings.token_type_embeddings.weight",)]
    assert head == "DistilBertModel" or zeros[0].how == "zeros, as distilbert has none"


def test_distilbert_classifier_has_another_way_to_pool() -> None:
    report = warm_start("mybert", distilbert("DistilBertForSequenceClassification"))
    how = {row.sources[0]: row.how for row in report.rows if row.status == "unused"}
    assert how["pre_classifier.weight"] == "it is followed by ReLU, MyBert's pooler by tanh"
    assert how["classifier.weight"] == "its input is pre_classifier's output, which is not used"


def test_distilgpt2_is_a_shallow_gpt2() -> None:
    stock = stock_model("GPT2LMHeadModel", n_layer=2)
    deep = warm_start("mygpt2", stock, overrides={"num_hidden_layers": 4})
    assert deep.is_exact and difference(deep.model, stock) <= 1e-5


def gpt2_in_tensorflow(model) -> dict[str, torch.Tensor]:
    """The names and shapes of OpenAI's own GPT-2 checkpoints."""
    renamed = {}
    for name, tensor in model.transformer.state_dict().items():
        name = re.sub(r"^h\.(\d+)", r"h\1", name).replace(".", "/")
        name = re.sub(r"(c_attn|c_proj|c_fc)/weight$", r"\1/w", name)
        name = re.sub(r"(ln_\w)/weight$", r"\1/g", name)
        name = re.sub(r"(wte|wpe)/weight$", r"\1", name)
        renamed[f"model/{re.sub(r'/bias$', '/b', name)}"] = tensor[None] if name.endswith("/w") else tensor
    return renamed


def bert_in_tensorflow(model) -> dict[str, torch.Tensor]:
    """The names and shapes of Google's own BERT checkpoints, an optimizer's slots among them."""
    renamed = {"global_step": torch.tensor(7), "cls/seq_relationship/output_weights": torch.zeros(2, 32)}
    for name, tensor in model.state_dict().items():
        if name.endswith("decoder.weight") or name.endswith("decoder.bias"):
            continue
        matrix = tensor.ndim == 2 and "embeddings" not in name
        name = re.sub(r"layer\.(\d+)", r"layer_\1", name).replace(".", "/")
        name = name.replace("LayerNorm/weight", "LayerNorm/gamma").replace("LayerNorm/bias", "LayerNorm/beta")
        name = name.replace("cls/predictions/bias", "cls/predictions/output_bias")
        name = re.sub(r"_embeddings/weight$", "_embeddings", name)
        renamed[re.sub(r"/weight$", "/kernel", name)] = tensor.t() if matrix else tensor
    renamed["bert/pooler/dense/kernel/adam_m"] = torch.zeros(32, 32)
    return renamed


def test_tensorflow_names() -> None:
    stock = stock_model("GPT2LMHeadModel")
    report = warm_start("mygpt2", gpt2_in_tensorflow(stock), config=stock.config)
    assert report.is_exact and difference(report.model, stock) <= 1e-5
    stock = stock_model("BertForMaskedLM")
    report = warm_start("mybert", bert_in_tensorflow(stock), config=stock.config)
    assert isinstance(report.model, MyBertForMaskedLM) and difference(report.model, stock) <= 1e-5
    why = {row.sources[0]: row.how for row in report.rows if row.status == "unused"}
    assert why["global_step"] == why["bert/pooler/dense/kernel/adam_m"] == "it belongs to the optimizer"
    assert report.is_exact


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.encoder."]
)
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_wrappers(name: str, wrapper: str) -> None:
    stock = stock_model(name)
    state_dict = {wrapper + key: tensor for key, tensor in stock.state_dict().items()}
    report = warm_start("mygpt2" if "GPT2" in name else "mybert", state_dict, config=stock.config)
    assert report.is_exact and difference(report.model, stock) <= 1e-5
    assert {name for row in report.rows for name in row.sources} == set(state_dict)


@pytest.mark.parametrize("key", ["model", "model_state_dict", "state_dict", "encoder"])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_training_checkpoints(key: str, wrapper: str, tmp_path: Path) -> None:
    stock = stock_model("GPT2LMHeadModel")
    weights = {wrapper + name: tensor for name, tensor in stock.state_dict().items()}
    optimizer = torch.optim.AdamW(stock.parameters())
    torch.save(
        {"epoch": 3, key: weights, "optimizer_state_dict": optimizer.state_dict(), "loss": 0.5}, tmp_path / "a.pt"
    )
    report = warm_start(MyGPT2ForCausalLM(mygpt2_config()).eval(), tmp_path / "a.pt")
    assert difference(report.model, stock) <= 1e-5
    assert any("num_attention_heads=4, activation_function" in note for note in report.notes)


def test_encoder_beside_its_own_classifier(tmp_path: Path) -> None:
    stock = stock_model("BertForSequenceClassification", num_labels=2)
    parts = {"encoder": stock.bert.state_dict(), "classifier": stock.classifier.state_dict()}
    torch.save(parts, tmp_path / "a.pt")
    stock.config.save_pretrained(tmp_path)
    report = warm_start("mybert", tmp_path / "a.pt")
    assert report.is_exact and difference(report.model, stock) <= 1e-5


def test_two_models_in_one_file(tmp_path: Path) -> None:
    stock, averaged = stock_model("GPT2LMHeadModel"), stock_model("GPT2LMHeadModel")
    torch.save({"model": stock.state_dict(), "ema": averaged.state_dict()}, tmp_path / "a.pt")
    stock.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"a\.pt holds several models: 'ema', 'model': name one with section="):
        warm_start("mygpt2", tmp_path / "a.pt")
    assert difference(warm_start("mygpt2", tmp_path / "a.pt", section="ema").model, averaged) <= 1e-5


@pytest.mark.parametrize("prefixed", [True, False])
def test_bare_state_dicts(prefixed: bool) -> None:
    stock = stock_model("BertModel")
    state_dict = {("bert." if prefixed else "") + name: tensor for name, tensor in stock.state_dict().items()}
    target = MyBertModel(warm_start("mybert", stock).model.config).eval()
    report = warm_start(target, state_dict)
    assert report.model is target and difference(target, stock) <= 1e-5


def test_bare_state_dict_of_roberta_is_recognised_by_its_one_token_type() -> None:
    stock = roberta("RobertaModel")
    report = warm_start("mybert", stock.state_dict(), config={"num_attention_heads": 4, "layer_norm_eps": 1e-5})
    assert difference(report.model, stock, inputs=no_padding()) <= 1e-5


def test_an_untied_head_is_seen_without_a_config() -> None:
    stock = stock_model("GPT2LMHeadModel", tie_word_embeddings=False)
    report = warm_start("mygpt2", stock.state_dict(), config={"n_head": 4})
    assert not report.model.config.tie_word_embeddings and difference(report.model, stock) <= 1e-5


def test_own_checkpoints_of_every_format(tmp_path: Path) -> None:
    source = MyGPT2ForCausalLM(mygpt2_config(position_embedding_type="rope", norm_type="rmsnorm", head_dim=16)).eval()
    source.save_pretrained(tmp_path / "folder", max_shard_size="20KB")
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    save_checkpoint(source.state_dict(), tmp_path / "bin", format="bin")
    for path in (tmp_path / "folder", open_checkpoint(tmp_path / "folder"), source):
        report = warm_start("mygpt2", path)
        assert report.is_exact and difference(report.model, source) <= 1e-5
    for path in (tmp_path / "weights.pt", tmp_path / "bin", source.state_dict()):
        report = warm_start("mygpt2", path, config=source.config)
        assert report.is_exact and difference(report.model, source) <= 1e-5


def test_rename() -> None:
    stock = stock_model("GPT2LMHeadModel")
    odd = {
        name.replace("transformer.h.", "blocks/").replace("attn", "mixer"): t for name, t in stock.state_dict().items()
    }
    rules = {r"^blocks\.": "h.", r"mixer\.": "attn.", r"c_mixer": "c_attn"}
    report = warm_start("mygpt2", odd, rename=rules, config=stock.config)
    assert report.is_exact and difference(report.model, stock) <= 1e-5
    assert "blocks/0.mixer.c_mixer.weight" in {name for row in report.rows for name in row.sources}
    with pytest.raises(CheckpointError, match=r"has tensor names of no known family .* map them with rename="):
        warm_start("mygpt2", odd, config={"n_head": 4})


def test_skip_and_only() -> None:
    stock = stock_model("GPT2LMHeadModel")
    target = MyGPT2ForCausalLM(mygpt2_config()).eval()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    report = warm_start(target, stock, skip=[r"layers\.1\.", r"ln_f"])
    for name, tensor in target.state_dict().items():
        skipped = "layers.1." in name or name.startswith("model.norm")
        assert torch.equal(tensor, before[name]) == skipped, name
    kept = [row for row in report.rows if row.status == "new"]
    assert kept and all("left out on request" in row.how and "kept as the model had it" in row.how for row in kept)
    target = MyGPT2ForCausalLM(mygpt2_config()).eval()
    report = warm_start(target, stock, only=[r"embed"])
    assert [row.targets[0] for row in report.rows if row.status == "loaded"] == ["model.embed_tokens.weight", "model.embed_positions.weight"]  # fmt: skip


def test_freeze_loaded() -> None:
    stock = stock_model("BertModel")
    report = warm_start("mybert", stock, head="ForSequenceClassification", overrides={"num_labels": 3, "vocab_size": 110}, freeze_loaded=True)  # fmt: skip
    free = {name for name, parameter in report.model.named_parameters() if parameter.requires_grad}
    assert free == {
        "classifier.weight",
        "classifier.bias",
        "bert.embeddings.word_embeddings.weight",
    }  # some rows are new
    frozen = {name for row in report.rows if row.frozen for name in row.targets}
    assert frozen == {name for name, parameter in report.model.named_parameters() if not parameter.requires_grad}


def test_a_model_keeps_its_parameters_ties_and_mode() -> None:
    stock = stock_model("GPT2LMHeadModel")
    target = MyGPT2ForCausalLM(mygpt2_config()).train()
    identities = {name: id(parameter) for name, parameter in target.named_parameters()}
    optimizer = torch.optim.AdamW(target.parameters())
    warm_start(target, stock)
    assert target.training and {n: id(p) for n, p in target.named_parameters()} == identities
    assert target.lm_head.weight is target.model.embed_tokens.weight
    inputs = batch()
    target(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.equal(target.lm_head.weight, stock.lm_head.weight)


def test_half_precision_sources(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        stock = stock_model("GPT2LMHeadModel").to(dtype)
        stock.save_pretrained(tmp_path / str(dtype))
        wide = warm_start("mygpt2", tmp_path / str(dtype))
        assert wide.model.dtype == torch.float32
        assert torch.equal(wide.model.lm_head.weight.to(dtype), stock.lm_head.weight)
        same = warm_start("mygpt2", tmp_path / str(dtype), dtype=dtype)
        assert same.model.dtype == dtype and torch.equal(same.model.lm_head.weight, stock.lm_head.weight)


def test_a_stock_class_for_old_gpt2_files_with_masks(tmp_path: Path) -> None:
    stock = stock_model("GPT2LMHeadModel")
    stock.config.save_pretrained(tmp_path)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril().bool() for i in range(3)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    torch.save({**stock.state_dict(), **masks}, tmp_path / "pytorch_model.bin")
    report = warm_start("mygpt2", tmp_path, strict=True, allow=["lm_head"])
    assert report.is_exact and difference(report.model, stock) <= 1e-5
    assert {name for row in report.rows if row.constant for name in row.sources} == set(masks)
    assert transformers.__version__

"""int8 folders that do not have all of the model that is loaded: another head, other sizes, a part, blocks on a disk."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import mybert_config, mygpt2_config
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    MarianConfig,
    MarianForCausalLM,
    MarianMTModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
    XLNetConfig,
    XLNetForSequenceClassification,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import mymodels
from mymodels import Int8Config, MyBertForSequenceClassification, MyGPT2ForCausalLM
from mymodels.models.int8_layers import Int8Embedding, Int8Linear, is_valid

ROOT = Path(__file__).parents[2]
IDS = torch.arange(5, 14)[None]
SEQ2SEQ = {
    "vocab_size": 97,
    "d_model": 32,
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BITS = pytest.mark.parametrize("bits", [8, 16])


@pytest.fixture(autouse=True)
def filled_memory():
    """New tensors hold NaN, and integers their largest value."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def saved(model: PreTrainedModel, folder: Path, bits: int = 16) -> PreTrainedModel:
    model = mymodels.quantize(model.eval(), activation_bits=bits)
    model.save_pretrained(folder)
    return model


def is_written(model: nn.Module) -> bool:
    """Whether each tensor has values that a model can have; NaN and the largest integers are those of `filled_memory`."""
    for name, tensor in model.state_dict().items():
        if tensor.dtype is torch.int8:
            good = is_valid(tensor)
        elif name.endswith("outliers"):
            good = bool((tensor < 10_000).all())
        else:
            good = bool(tensor.isfinite().all())
        if not good:
            print("not written:", name)
            return False
    return True


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found = model(IDS)
    return found.logits if "logits" in found else found[0]


@BITS
@pytest.mark.parametrize("labels", [3, 50])
def test_a_head_of_another_size(bits: int, labels: int, tmp_path: Path) -> None:
    model = saved(MyBertForSequenceClassification(mybert_config(num_labels=40)), tmp_path, bits)
    assert isinstance(model.classifier, Int8Linear)
    again, info = MyBertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=labels, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert type(again.classifier) is nn.Linear and is_written(again) and logits(again).shape == (1, labels)
    assert 0.5 < again.classifier.weight.std() / again.config.initializer_range < 1.5
    query = again.bert.encoder.layer[0].attention.self.query
    assert torch.equal(query.weight, model.bert.encoder.layer[0].attention.self.query.weight)
    with pytest.raises(RuntimeError, match="size"):
        MyBertForSequenceClassification.from_pretrained(tmp_path, num_labels=labels)


@BITS
def test_another_vocabulary_or_width(bits: int, tmp_path: Path) -> None:
    saved(MyGPT2ForCausalLM(mygpt2_config()), tmp_path, bits)
    more = MyGPT2ForCausalLM.from_pretrained(tmp_path, vocab_size=120, ignore_mismatched_sizes=True)
    assert type(more.get_input_embeddings()) is nn.Embedding and type(more.lm_head) is nn.Linear
    assert more.lm_head.weight is more.get_input_embeddings().weight and logits(more).shape[-1] == 120
    wide = MyGPT2ForCausalLM.from_pretrained(tmp_path, intermediate_size=200, ignore_mismatched_sizes=True)
    assert type(wide.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(wide.model.layers[0].self_attn.q_proj, Int8Linear)
    assert is_written(more) and is_written(wide)


@BITS
def test_heads_that_are_tied_on_one_side_only(bits: int, tmp_path: Path) -> None:
    model = saved(MyGPT2ForCausalLM(mygpt2_config()), tmp_path / "tied", bits)
    untied, info = MyGPT2ForCausalLM.from_pretrained(
        tmp_path / "tied", tie_word_embeddings=False, output_loading_info=True
    )
    assert info["missing_keys"] == {"lm_head.weight"} and type(untied.lm_head) is nn.Linear and is_written(untied)
    assert torch.equal(untied.get_input_embeddings().weight, model.get_input_embeddings().weight)
    saved(MarianForCausalLM(MarianConfig(**SEQ2SEQ)), tmp_path / "decoder", bits)
    translates, info = MarianMTModel.from_pretrained(tmp_path / "decoder", output_loading_info=True)
    shared = translates.model.shared
    assert isinstance(shared, Int8Embedding) and shared.weight is translates.lm_head.weight and is_written(translates)
    assert info["missing_keys"] and all(".encoder." in name for name in info["missing_keys"] - {"final_logits_bias"})
    base = saved(T5Model(T5Config(**T5)), tmp_path / "base", bits)
    assert all(isinstance(part, Int8Embedding) for part in (base.shared, base.encoder.embed_tokens))
    head = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert isinstance(head.lm_head, Int8Linear) and head.lm_head.weight is head.shared.weight and is_written(head)


@BITS
def test_what_the_files_lack_with_blocks_on_a_disk(bits: int, tmp_path: Path) -> None:
    model = saved(MyGPT2ForCausalLM(mygpt2_config()), tmp_path, bits)
    blocks = {f"model.layers.{n}": "disk" if n else "cpu" for n in range(model.config.num_hidden_layers)}
    parts = dict.fromkeys(("model.embed_tokens", "model.embed_positions", "model.norm", "lm_head"), "cpu")
    how: dict[str, Any] = {"device_map": parts | blocks, "offload_folder": tmp_path / "offload"}
    placed = MyGPT2ForCausalLM.from_pretrained(tmp_path, **how)
    assert torch.equal(logits(placed), logits(model))
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    for own in ["weight", "bias", "outliers"][: 3 if bits == 8 else 2]:
        left = {name: tensor for name, tensor in tensors.items() if name != f"{layer}.{own}"}
        save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
        placed, info = MyGPT2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **how)
        assert info["missing_keys"] == {f"{layer}.{own}"} - {f"{layer}.outliers"}
        assert type(placed.get_submodule(layer)) is (nn.Linear if own == "weight" else Int8Linear)
        assert logits(placed).isfinite().all()
    base = saved(MyBertForSequenceClassification(mybert_config(num_labels=40)), tmp_path / "whole", bits).base_model
    base.save_pretrained(tmp_path / "base")
    parts = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    placed, info = MyBertForSequenceClassification.from_pretrained(
        tmp_path / "base", **how | {"device_map": parts}, num_labels=40, output_loading_info=True
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"} and logits(placed).isfinite().all()


def test_a_config_is_not_shared(tmp_path: Path) -> None:
    config = mygpt2_config()
    one, other = MyGPT2ForCausalLM(config).eval(), MyGPT2ForCausalLM(config).eval()
    before = copy.deepcopy(config.to_dict())
    mymodels.quantize(one)
    assert config.to_dict() == before == other.config.to_dict()
    holders = [module.config for module in one.modules() if hasattr(module, "config")]
    assert len(holders) > 3 and all(each is one.config for each in holders)
    other.save_pretrained(tmp_path)
    assert torch.equal(logits(MyGPT2ForCausalLM.from_pretrained(tmp_path)), logits(other))
    assert mymodels.quantize(other) is other


def test_a_part_of_a_model_is_saved_and_loaded(tmp_path: Path) -> None:
    bart = mymodels.quantize(BartForConditionalGeneration(BartConfig(**SEQ2SEQ)).eval())
    t5 = mymodels.quantize(T5ForConditionalGeneration(T5Config(**T5)).eval())
    for part in (bart.model.encoder, bart.model.decoder, t5.encoder, t5.decoder):
        part.save_pretrained(tmp_path)
        again, info = type(part).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        with torch.no_grad():
            assert torch.equal(again(IDS)[0], part(IDS)[0])
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, "vocab_size": 97, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**shape, "image_size": 8, "patch_size": 4}))
    clip = saved(clip, tmp_path / "clip", bits=16)  # transformers reads the config of the part
    clip.text_model.save_pretrained(tmp_path / "text")
    for folder in ("clip", "text"):
        again = CLIPTextModel.from_pretrained(tmp_path / folder)
        assert any(isinstance(module, Int8Linear) for module in again.modules())
        with torch.no_grad():
            assert torch.equal(again(IDS)[0], clip.text_model(IDS)[0])
    whole, info = CLIPModel.from_pretrained(tmp_path / "clip", output_loading_info=True)
    assert not any(info.values()) and is_written(whole)
    t5.dequantize()
    t5.encoder.save_pretrained(tmp_path)
    again = type(t5.encoder).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], t5.encoder(IDS)[0]) and type(again.embed_tokens) is nn.Embedding


def test_a_config_and_tensors_in_memory(tmp_path: Path) -> None:
    model = saved(MyGPT2ForCausalLM(mygpt2_config()), tmp_path)
    for how in ((tmp_path, {}), (None, {"state_dict": model.state_dict()})):
        again = MyGPT2ForCausalLM.from_pretrained(how[0], config=model.config, **how[1]).eval()
        assert torch.equal(logits(again), logits(model))


def test_stock_models_after_the_code_of_a_folder(tmp_path: Path) -> None:
    saved(MyGPT2ForCausalLM.from_pretrained(ROOT / "hub_repo" / "mygpt2"), tmp_path / "own")
    kind = get_class_from_dynamic_module("modeling_mygpt2.MyGPT2ForCausalLM", tmp_path / "own")
    remote = kind.from_pretrained(tmp_path / "own")
    assert type(remote).__module__.startswith("transformers_modules")
    assert type(remote.lm_head).__module__ == type(remote).__module__.replace("modeling_mygpt2", "int8_layers")
    saved(T5Model(T5Config(**T5)), tmp_path / "stock")
    assert isinstance(T5Model.from_pretrained(tmp_path / "stock").shared, Int8Embedding)


def test_what_a_device_map_placed_is_refused(tmp_path: Path) -> None:
    MyGPT2ForCausalLM(mygpt2_config(n_layer=2)).save_pretrained(tmp_path)
    parts = ("model.embed_tokens", "model.embed_positions", "model.norm", "lm_head", "model.layers.0")
    how: dict[str, Any] = {"device_map": dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}}
    with pytest.raises(ValueError, match="was placed by a device_map: quantise and save it without one"):
        MyGPT2ForCausalLM.from_pretrained(
            tmp_path, quantization_config=Int8Config(), offload_folder=tmp_path / "offload", **how
        )


def test_a_weight_that_is_read_through_an_argument_stays_in_float() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = DebertaV2ForMaskedLM(DebertaV2Config(**shape, vocab_size=97, legacy=False)).eval()
    before = logits(model)
    mymodels.quantize(model)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert (logits(model) - before).norm() < 0.05 * before.norm()


def test_the_largest_states_of_all_kinds_of_models_are_found(caplog: pytest.LogCaptureFixture) -> None:
    models = (
        BartForSequenceClassification(BartConfig(**SEQ2SEQ)),
        MarianMTModel(MarianConfig(**SEQ2SEQ)),
        T5Model(T5Config(**T5)),
        XLNetForSequenceClassification(XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=64)),
        GPT2ForSequenceClassification(
            GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
        ),
    )
    for model in models:
        mymodels.quantize(model.eval(), activation_bits=8)
    assert "could not be run" not in caplog.text

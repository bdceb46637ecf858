"""LoRA adapters merged into their base; the truth is PEFT's own `merge_and_unload`."""

import json
from pathlib import Path

import pytest
import torch
from states import one_sentence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mymodels.checkpoints import CheckpointError, open_checkpoint
from mymodels.checkpoints.converting import convert_checkpoint
from mymodels.checkpoints.inspecting import inspect_checkpoint
from mymodels.cli import main

peft = pytest.importorskip("peft")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=20))


def llama(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": 1, **changes}))


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**SMALL))


CASES = {
    "plain": (llama, {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 7}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "rslora": (llama, {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"k_proj": 5},
        },
    ),
    "embedding": (llama, {"target_modules": ["embed_tokens", "o_proj"]}),
    "saved": (bert, {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}),
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora conv1d": (gpt2, {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "bias": (bert, {"target_modules": ["query"], "bias": "lora_only"}),
}


def adapted(case: str, folder: Path):
    make, options = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(folder / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    wrapped.save_pretrained(folder / "adapter")
    return wrapped


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_merged_as_peft_merges(case: str, tmp_path: Path) -> None:
    truth = adapted(case, tmp_path).merge_and_unload().state_dict()
    convert_checkpoint(tmp_path / "adapter", tmp_path / "out", merge_adapter=tmp_path / "base")
    opened, before = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "base")
    assert set(opened) == set(before)
    changed = [name for name in opened if not torch.equal(opened[name], before[name])]
    assert changed and all("bias" in name or "weight" in name for name in changed)
    for name in opened:
        torch.testing.assert_close(opened[name], truth[name], rtol=1e-5, atol=1e-6, msg=name)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "config.json" in names and "adapter_config.json" not in names
    loaded = type(CASES[case][0]()).from_pretrained(tmp_path / "out")
    assert all(torch.equal(loaded.state_dict()[name], opened[name]) for name in opened)


@pytest.mark.filterwarnings("ignore")
def test_in_half_precision_rounded_once(tmp_path: Path) -> None:
    adapted("plain", tmp_path)
    convert_checkpoint(tmp_path / "base", tmp_path / "half", dtype="bfloat16")
    convert_checkpoint(tmp_path / "adapter", tmp_path / "out", merge_adapter=tmp_path / "half")
    half, adapter, merged = (open_checkpoint(tmp_path / name) for name in ("half", "adapter", "out"))
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB")
    assert torch.equal(merged[f"{name}.weight"], (half[f"{name}.weight"].float() + b @ a * 7 / 4).bfloat16())


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_was_trained_apart_is_untied(tmp_path: Path) -> None:
    CASES["tied"] = (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    )
    truth = adapted("tied", tmp_path).merge_and_unload()
    del CASES["tied"]
    convert_checkpoint(tmp_path / "adapter", tmp_path / "out", merge_adapter=tmp_path / "base")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded(ids).logits, truth(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_inspect_names_the_base_and_the_command_merges(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    adapted("plain", tmp_path)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "someone/base"}))
    assert "someone/base" in inspect_checkpoint(tmp_path / "adapter")["adapter"]
    assert main(["inspect", str(tmp_path / "adapter")]) == 0 and "someone/base" in capsys.readouterr().out
    command = ["convert", str(tmp_path / "adapter"), str(tmp_path / "out"), "--merge-adapter", str(tmp_path / "base")]
    assert main(command) == 0 and "4 LoRA matrices" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"r": 8}, "rank 4"),
    ],
)
def test_what_is_not_merged_is_refused(change: dict, words: str, tmp_path: Path) -> None:
    adapted("plain", tmp_path)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(tmp_path / "adapter", tmp_path / "out", merge_adapter=tmp_path / "base")
    assert words in one_sentence(caught.value, str(tmp_path / "adapter")) and not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_another_base_is_refused(tmp_path: Path) -> None:
    adapted("plain", tmp_path)
    llama(hidden_size=32).save_pretrained(tmp_path / "wide")
    bert().save_pretrained(tmp_path / "other")
    for other, words in (("wide", "(16, 16)"), ("other", "has not")):
        with pytest.raises(CheckpointError, match="name the base it was trained on") as caught:
            convert_checkpoint(tmp_path / "adapter", tmp_path / "out", merge_adapter=tmp_path / other)
        assert words in str(caught.value) or other == "other"
    with pytest.raises(CheckpointError, match="is not an adapter"):
        convert_checkpoint(tmp_path / "base", tmp_path / "out", merge_adapter=tmp_path / "base")

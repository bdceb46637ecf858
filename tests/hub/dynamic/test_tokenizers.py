"""Tokenizer and processor against the model, in this process: every fault beside a twin that differs in the one thing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from mymodels.hub.isolated import causality, processors, tokenizers
from mymodels.hub.isolated.stages import Outcome

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *["Hello", ",", "!", ".", "How", "are", "you", "world", "needle", "between", "haystack"],
]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def make_tokenizer(words: list[str] = WORDS, **how: Any) -> transformers.PreTrainedTokenizerFast:
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | how
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, **special)


def gpt2(**how: Any) -> Any:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | how
    config = transformers.GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=32, **ids)
    return transformers.GPT2LMHeadModel(config).eval()


def t5(**how: Any) -> Any:
    sizes = {"vocab_size": 97, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0} | how
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **ids)).eval()


def bert(**how: Any) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertModel(transformers.BertConfig(vocab_size=97, **sizes, **how)).eval()


def outcome(folder: Path, model: Any, tokenizer: Any, recorded: dict | None = None) -> Outcome:
    tokenizer.save_pretrained(folder)
    check = Outcome()
    tokenizers.check_tokenizer(check, {"folder": str(folder), "tokenizer": True}, model, recorded or {})
    return check


@pytest.mark.parametrize(
    ("model", "tokenizer", "status", "says"),
    [
        (gpt2, {}, "ok", ""),
        (lambda: gpt2(eos_token_id=5), {}, "failed", r"eos_token_id in config.json is 5 \(','\), but the eos token"),
        (lambda: gpt2(eos_token_id=[5, 2]), {}, "ok", ""),
        (lambda: gpt2(eos_token_id=5), {"eos_token": None}, "ok", ""),
        (lambda: gpt2(bos_token_id=4), {}, "failed", r"bos_token_id in config.json is 4 \('Hello'\)"),
        (lambda: gpt2(pad_token_id=3), {}, "failed", "pad_token_id in config.json is 3"),
        (lambda: gpt2(pad_token_id=None), {}, "ok", ""),
        (lambda: bert(pad_token_id=0), {}, "ok", ""),
        (lambda: bert(pad_token_id=1), {}, "failed", "pad_token_id in config.json is 1"),
        (t5, {}, "ok", ""),
        (lambda: t5(decoder_start_token_id=7), {}, "failed", "decoder_start_token_id is 7 .* not a special token"),
        (gpt2, {"words": [*WORDS, *(f"w{i}" for i in range(90))]}, "failed", "tokens, the model's vocab_size is 97"),
        (gpt2, {"chat_template": TEMPLATE}, "ok", ""),
        (
            gpt2,
            {"chat_template": "Hello{% for m in messages %}{{ m.role }}{% endfor %}"},
            "failed",
            "leaves out the user's message",
        ),
        (
            gpt2,
            {"chat_template": "{{ messages[0].content[0].text.nothing.more }}"},
            "failed",
            "fails on a user's message",
        ),
        (gpt2, {"chat_template": "{{ messages[-1].content }}"}, "ok", ""),
        (gpt2, {"chat_template": "{{ messages[0].content }}"}, "failed", "leaves out the user's last message"),
        (
            gpt2,
            {"chat_template": "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE},
            "ok",
            "",
        ),
        (
            gpt2,
            {"chat_template": "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE},
            "ok",
            "",
        ),
    ],
)
def test_a_tokenizer_belongs_to_the_model(tmp_path: Path, model, tokenizer: dict, status: str, says: str) -> None:
    import re

    seen = outcome(tmp_path, model(), make_tokenizer(**tokenizer))
    assert seen.status == status and re.search(says, seen.what), seen.what


def test_another_tokenizer_than_the_recorded_one(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "first")
    recorded = tokenizers.record({"folder": str(tmp_path / "first"), "tokenizer": True})
    assert recorded["tokens"]["ids"] and tokenizers.record({"folder": "", "tokenizer": False}) == {}
    assert outcome(tmp_path / "same", gpt2(), make_tokenizer(), recorded).status == "ok"
    other = [*WORDS[:4], *reversed(WORDS[4:])]  # the same tokens under other ids
    seen = outcome(tmp_path / "other", gpt2(), make_tokenizer(other), recorded)
    assert seen.status == "failed" and "not the tokenizer that the golden outputs were recorded with" in seen.what


def tried(folder: Path, model: Any) -> Outcome:
    """The outcome of the check of a folder's one processor."""
    (name,) = processors.processor_names({"folder": str(folder), "companions": []})
    made = processors.run_processor(getattr(transformers, name).from_pretrained(folder))
    check = Outcome()
    processors.check_processed(check, model, made)
    return check


@pytest.mark.parametrize(("size", "status"), [(32, "ok"), (48, "failed")])
def test_what_the_processor_makes_the_model_takes(tmp_path: Path, size: int, status: str) -> None:
    values = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=size, patch_size=8, **sizes)
    check = tried(tmp_path, transformers.ViTModel(config).eval())
    assert check.status == status, check.what
    assert status == "ok" or "pixel_values of shape (2, 3, 32, 32), on which forward raises" in check.what


@pytest.mark.parametrize(("bins", "status"), [(80, "ok"), (40, "failed")])
def test_sounds_too(tmp_path: Path, bins: int, status: str) -> None:
    transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=2).save_pretrained(tmp_path)
    sizes = {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = transformers.WhisperConfig(
        vocab_size=97, d_model=16, num_mel_bins=bins, max_source_positions=100, max_target_positions=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **sizes,
    )  # fmt: skip
    check = tried(tmp_path, transformers.WhisperModel(config).eval())
    assert check.status == status, check.what


def test_a_token_that_sees_the_next_one_is_named() -> None:
    assert causality.future_leak(gpt2()) == ""
    model = gpt2()
    plain = model.transformer.forward

    def leaking(*args: Any, **kwargs: Any) -> Any:
        made = plain(*args, **kwargs)
        made.last_hidden_state = made.last_hidden_state + made.last_hidden_state.mean(1, keepdim=True)
        return made

    model.transformer.forward = leaking
    assert "the mask is not causal" in causality.future_leak(model)


def test_what_peft_takes_has_a_name() -> None:
    from mymodels.hub.isolated.facts import _is_head, target_module_names

    assert target_module_names(["model.layers.0.mlp.0", "model.layers.0.mlp.2", "a.q_proj"]) == [
        "mlp.0",
        "mlp.2",
        "q_proj",
    ]
    model = bert().base_model
    with_head = transformers.BertForSequenceClassification(model.config)
    heads = [n for n, m in with_head.named_modules() if isinstance(m, torch.nn.Linear) and _is_head(with_head, n, m)]
    assert heads == ["classifier"]
    language = gpt2()
    assert _is_head(language, "lm_head", language.lm_head) and not _is_head(
        language, "transformer.h.0", torch.nn.Linear(1, 1)
    )


def test_a_vocabulary_of_other_ids_is_found_where_no_recorded_text_shows_it(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "first")
    recorded = tokenizers.record({"folder": str(tmp_path / "first"), "tokenizer": True})
    assert outcome(tmp_path / "same", gpt2(), make_tokenizer(), recorded).status == "ok"
    assert outcome(tmp_path / "longer", gpt2(), make_tokenizer([*WORDS, "more"]), recorded).status == "ok"
    exchanged = [*WORDS[:-2], WORDS[-1], WORDS[-2]]
    check = outcome(tmp_path / "exchanged", gpt2(), make_tokenizer(exchanged), recorded)
    assert check.status == "failed" and "recorded tokens differ" in check.what
    older = {"tokens": {name: recorded["tokens"][name] for name in ("text", "ids")}}
    assert outcome(tmp_path / "older", gpt2(), make_tokenizer(exchanged), older).status == "ok"

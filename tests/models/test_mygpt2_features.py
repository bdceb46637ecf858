"""What a library model does, for every switch: cache, packing, save and load, training, resize, placement."""

from pathlib import Path

import pytest
import torch
from tiny import MODERN, SWITCHES, batch, largest_difference, mygpt2_config
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from mymodels import MyGPT2ForCausalLM, MyGPT2ForSequenceClassification, MyGPT2Model


def make(**changes) -> MyGPT2ForCausalLM:
    return MyGPT2ForCausalLM(mygpt2_config(**changes)).eval()


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
class TestEverySwitch:
    def test_generation_with_every_cache_is_generation_without(self, switches: dict) -> None:
        model = make(**switches)
        inputs = batch("left")
        how = {"do_sample": False, "max_new_tokens": 12}
        expected = model.generate(**inputs, **how, use_cache=False)
        assert torch.equal(model.generate(**inputs, **how), expected)
        assert torch.equal(model.generate(**inputs, **how, cache_implementation="static"), expected)

    def test_left_padding_changes_nothing(self, switches: dict) -> None:
        model = make(**switches)
        inputs = batch("left")
        position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        together = model(**inputs, position_ids=position_ids).logits
        for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"])):
            alone = model(input_ids=ids[mask.bool()][None]).logits[0]
            assert largest_difference(together[row, mask.bool()], alone) <= 1e-5

    def test_eager_is_sdpa(self, switches: dict) -> None:
        model = make(**switches)
        inputs = batch("right")
        shown = inputs["attention_mask"].bool()
        sdpa = model(**inputs).logits[shown]
        model.set_attn_implementation("eager")
        assert largest_difference(model(**inputs).logits[shown], sdpa) <= 1e-5

    def test_save_and_load(self, switches: dict, tmp_path: Path) -> None:
        model = make(**switches)
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) >= 2
        loaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(loading.values()), loading
        assert type(loaded) is MyGPT2ForCausalLM
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert tied == model.config.tie_word_embeddings

    def test_every_parameter_gets_a_gradient(self, switches: dict) -> None:
        model = make(**switches).train()
        inputs = batch(length=20)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            if not name.endswith("k_proj.bias"):  # softmax does not see a constant added to all scores
                assert parameter.grad.any(), name

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing(self, switches: dict, use_reentrant: bool) -> None:
        model = make(**switches, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
        inputs = batch()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        for name, parameter in model.named_parameters():
            assert largest_difference(parameter.grad, expected[name]) <= 1e-6, name

    def test_packed_sequences(self, switches: dict) -> None:
        model = make(**switches)
        lengths = [7, 1, 9]
        pieces = [torch.randint(2, 97, (1, length)) for length in lengths]
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
        packed = model(input_ids=torch.cat(pieces, dim=1), position_ids=position_ids).logits[0]
        alone = torch.cat([model(input_ids=piece).logits[0] for piece in pieces])
        assert largest_difference(packed, alone) <= 1e-5

    @pytest.mark.parametrize("size", [105, 80])
    def test_resize_token_embeddings(self, switches: dict, size: int) -> None:
        model = make(**switches)
        ids = torch.randint(2, 80, (2, 9))
        with torch.no_grad():  # a graph from before would remember the old shapes
            before = model(input_ids=ids).logits
            model.resize_token_embeddings(size, mean_resizing=False)
            after = model(input_ids=ids).logits
        kept = min(size, 97)
        assert after.shape[-1] == size == model.config.vocab_size
        assert largest_difference(after[..., :kept], before[..., :kept]) <= 1e-5
        model(input_ids=ids, labels=ids).loss.backward()


def test_inputs_embeds_and_logits_to_keep() -> None:
    model = make()
    inputs = batch()
    expected = model(**inputs).logits
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits, expected)
    assert largest_difference(model(**inputs, logits_to_keep=2).logits, expected[:, -2:]) <= 1e-6
    assert largest_difference(model(**inputs, logits_to_keep=torch.tensor([0, 5])).logits, expected[:, [0, 5]]) <= 1e-6
    generated = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=5)
    assert torch.equal(generated, model.generate(**inputs, max_new_tokens=5)[:, 11:])


def test_chunked_prefill_equals_one_pass() -> None:
    model = make(**SWITCHES["everything"])
    ids = torch.randint(2, 97, (2, 20))
    expected = model(input_ids=ids).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(7, dim=1)]
        assert largest_difference(torch.cat(parts, dim=1), expected) <= 1e-5


def test_four_dimensional_mask() -> None:
    model = make()
    inputs = batch("left")
    causal = torch.ones(11, 11).tril().bool()[None, None] & inputs["attention_mask"].bool()[:, None, None]
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    shown = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[shown]
    assert largest_difference(model(inputs["input_ids"], attention_mask=additive).logits[shown], expected) <= 1e-5


def test_tuple_outputs_and_base_model() -> None:
    model = make()
    inputs = batch()
    logits = model(**inputs).logits
    assert torch.equal(model(**inputs, return_dict=False)[0], logits)
    hidden_states = model.model(**inputs, return_dict=False, use_cache=False)
    assert isinstance(hidden_states, tuple) and hidden_states[0].shape == (3, 11, 32)
    assert torch.equal(model.lm_head(hidden_states[0]), logits)


def test_cache_only_when_asked_for_in_training() -> None:
    model = make()
    inputs = batch()
    assert model(**inputs).past_key_values.get_seq_length() == 11
    assert model(**inputs, use_cache=False).past_key_values is None
    model.train()
    assert model(**inputs).past_key_values is None


@pytest.mark.parametrize("name", ["MyGPT2Model", "MyGPT2ForCausalLM", "MyGPT2ForSequenceClassification"])
def test_base_and_head_checkpoints_load_into_each_other(name: str, tmp_path: Path) -> None:
    model = make(**MODERN)
    model.save_pretrained(tmp_path)
    classes = {c.__name__: c for c in (MyGPT2Model, MyGPT2ForCausalLM, MyGPT2ForSequenceClassification)}
    loaded, loading = classes[name].from_pretrained(tmp_path, output_loading_info=True)
    new = {"score.weight"} if name == "MyGPT2ForSequenceClassification" else set()
    assert set(loading["missing_keys"]) == new
    inputs = batch()
    expected = model.model(**inputs).last_hidden_state
    assert torch.equal(loaded.base_model(**inputs).last_hidden_state, expected)
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


def test_ignore_mismatched_sizes_keeps_what_fits(tmp_path: Path) -> None:
    model = MyGPT2ForSequenceClassification(mygpt2_config(num_labels=3))
    model.save_pretrained(tmp_path)
    loaded, loading = MyGPT2ForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [entry[0] for entry in loading["mismatched_keys"]] == ["score.weight"]
    assert loaded.score.weight.shape == (5, 32)
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(loaded.base_model.state_dict()[name], tensor), name


def test_disk_and_cpu_offload_under_a_tight_memory_limit(tmp_path: Path) -> None:
    model = make(**MODERN, n_layer=6)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    size = sum(p.numel() * 4 for p in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in loaded.hf_device_map.values() and "cpu" in map(str, loaded.hf_device_map.values())
    inputs = batch("left")
    how = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(loaded.generate(**inputs, **how), model.generate(**inputs, **how))


def test_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = MyGPT2ForCausalLM(mygpt2_config(**SWITCHES["everything"]))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not list(model.buffers())


@pytest.mark.parametrize("switches", [{}, SWITCHES["everything"]], ids=["stock", "everything"])
def test_bfloat16(switches: dict, tmp_path: Path) -> None:
    model = make(**switches)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    inputs = batch("left")
    shown = inputs["attention_mask"].bool()
    full = model(**inputs).logits[shown]
    assert half(**inputs).logits.dtype == torch.bfloat16
    assert (half(**inputs).logits[shown] - full).abs().mean() < 0.05 * full.abs().mean()
    half.generate(**inputs, max_new_tokens=3)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("switches", [{}, MODERN], ids=["stock", "modern"])
def test_generation_under_autocast(switches: dict, cache: str) -> None:
    model = make(**switches)
    inputs = batch("left")
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=5, cache_implementation=cache)
    assert tokens.shape[0] == 3 and tokens.shape[1] > 11


@pytest.mark.slow
def test_quantised_cache() -> None:
    model = make(**MODERN, head_dim=64, initializer_range=0.02)
    inputs = batch(rows=1)
    how = {"do_sample": False, "max_new_tokens": 8}
    cache_config = {"backend": "quanto", "nbits": 4, "q_group_size": 64}
    tokens = model.generate(**inputs, **how, cache_implementation="quantized", cache_config=cache_config)
    assert torch.equal(tokens, model.generate(**inputs, **how))  # weights this small survive 4 bits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers prefetches an offloaded cache on a CUDA stream")
def test_offloaded_cache() -> None:
    model = make(**MODERN).to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in batch().items()}
    how = {"do_sample": False, "max_new_tokens": 8}
    tokens = model.generate(**inputs, **how, cache_implementation="offloaded")
    assert torch.equal(tokens, model.generate(**inputs, **how))


@pytest.mark.slow
@pytest.mark.parametrize("switches", [{}, SWITCHES["everything"]], ids=["stock", "everything"])
def test_compile(switches: dict) -> None:
    model = make(**switches)
    inputs = batch("left")
    expected = model(**inputs).logits
    compiled = torch.compile(model, fullgraph=True)
    assert largest_difference(compiled(**inputs).logits, expected) <= 1e-5
    compiled_training = torch.compile(make(**switches).train())
    compiled_training(**inputs, labels=inputs["input_ids"]).loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("switches", [{}, SWITCHES["everything"]], ids=["stock", "everything"])
def test_flex_attention(switches: dict) -> None:
    model = make(**{**switches, "head_dim": 16})
    inputs = batch("right", length=32)
    shown = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits[shown]
        model.set_attn_implementation("flex_attention")
        assert largest_difference(model(**inputs).logits[shown], expected) <= 1e-4


def test_a_packed_row_may_be_longer_than_the_learned_table() -> None:
    model = make()
    pieces = torch.randint(2, 97, (2, 50))
    packed = model(pieces.view(1, 100), position_ids=torch.arange(50).repeat(2)[None]).logits[0]
    assert largest_difference(packed, model(pieces).logits.flatten(0, 1)) <= 1e-5


def test_early_exit_assistant() -> None:
    model = make(**MODERN)
    inputs = batch(rows=1)
    how = {"do_sample": False, "max_new_tokens": 8}
    expected = model.generate(**inputs, **how)
    assert torch.equal(model.generate(**inputs, **how, assistant_early_exit=1), expected)
    assert model.config.num_hidden_layers == 3


def test_token_types_out_of_range() -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="token_type_ids contains 97, but this model has vocab_size=97"):
        make()(ids, token_type_ids=ids + 96)

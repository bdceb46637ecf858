"""Configs: GPT-2's old names, round trips, a complete auto_map, and one clear sentence for each impossible value."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import batch, mybert_config, mygpt2_config
from transformers import AutoConfig, BertConfig, GPT2Config

from mymodels import (
    MyBertConfig,
    MyBertForSequenceClassification,
    MyGPT2Config,
    MyGPT2ForCausalLM,
    MyGPT2Model,
)


def test_defaults_are_the_stock_models() -> None:
    stock, mine = GPT2Config(), MyGPT2Config()
    for name in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "activation_function", "resid_pdrop",
                 "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range", "scale_attn_weights",
                 "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "tie_word_embeddings"):  # fmt: skip
        assert getattr(mine, name) == getattr(stock, name), name
    assert mine.intermediate_size == 4 * 768 and mine.num_key_value_heads == 12 and mine.head_dim == 64
    stock, mine = BertConfig(), MyBertConfig()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                 "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings",
                 "type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id", "classifier_dropout",
                 "tie_word_embeddings"):  # fmt: skip
        assert getattr(mine, name) == getattr(stock, name), name


@pytest.mark.parametrize("name", MyGPT2Config.attribute_map)
def test_a_field_has_one_value_under_both_names(name: str) -> None:
    field = MyGPT2Config.attribute_map[name]
    config = MyGPT2Config(**{name: 24, field: 24})
    assert getattr(config, name) == getattr(config, field) == 24
    with pytest.raises(ValueError, match=rf"MyGPT2Config: {name}=24 and {field}=36 name one field: give one of them"):
        MyGPT2Config(**{name: 24, field: 36})
    with pytest.raises(ValueError, match=f"{name}=24"):
        type("Mine", (MyGPT2Config,), {"model_type": "mine"})(**{name: 24, field: 36})


def test_gpt2_names_work_both_ways() -> None:
    config = MyGPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=7, n_inner=50)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 2, 3)
    assert (config.max_position_embeddings, config.intermediate_size) == (7, 50)
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions, config.n_inner) == (24, 2, 3, 7, 50)
    assert (config.head_dim, config.num_key_value_heads, len(config.layer_types)) == (8, 3, 2)
    assert MyGPT2Config.from_dict(GPT2Config(n_embd=24, n_head=3).to_dict()).hidden_size == 24


fields = st.fixed_dictionaries(
    {},
    optional={
        "position_embedding_type": st.sampled_from(["learned", "rope", "none"]),
        "norm_type": st.sampled_from(["layernorm", "rmsnorm"]),
        "mlp_type": st.sampled_from(["dense", "gated"]),
        "activation_function": st.sampled_from(["gelu_new", "silu", "relu"]),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([2, 8, 16]),
        "rope_theta": st.floats(1.0, 1e7),
        "qk_norm": st.booleans(),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "sliding_window": st.integers(2, 50),
        "final_logit_softcapping": st.floats(0.5, 100.0),
        "tie_word_embeddings": st.booleans(),
        "use_cache": st.booleans(),
        "pad_token_id": st.sampled_from([None, 0, 5]),
    },
)


@given(fields)
@settings(deadline=None, max_examples=50)
def test_round_trip_through_json(tmp_path_factory: pytest.TempPathFactory, changes: dict) -> None:
    folder = tmp_path_factory.mktemp("config")
    config = mygpt2_config(**changes)
    config.save_pretrained(folder)
    loaded = AutoConfig.from_pretrained(folder)
    assert type(loaded) is MyGPT2Config
    for name in changes:
        assert getattr(loaded, name) == changes[name], name
    saved, again = config.to_dict(), loaded.to_dict()
    for volatile in ("transformers_version", "_name_or_path"):
        saved.pop(volatile, None), again.pop(volatile, None)
    assert again == saved


def test_every_auto_class_is_in_the_saved_map(tmp_path: Path) -> None:
    MyBertForSequenceClassification(mybert_config()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == MyBertConfig.AUTO_MAP


def test_the_map_keeps_a_user_s_own_class_and_drops_repo_prefixes() -> None:
    config = mygpt2_config(
        auto_map={"AutoModelForCausalLM": "theirs.Theirs", "AutoModel": "me/repo--modeling_mygpt2.MyGPT2Model"}
    )
    assert config.auto_map["AutoModel"].startswith("me/repo--")  # as transformers set it when loading from the Hub
    saved = config.to_dict()["auto_map"]
    assert saved == {**MyGPT2Config.AUTO_MAP, "AutoModelForCausalLM": "theirs.Theirs"}


GPT2_FAULTS = [
    ({"n_embd": 30}, "hidden_size=30 is not divisible by num_attention_heads=4"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3, but it must be a divisor of 4 heads"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
    ({"n_head": 0}, "num_attention_heads=0, but it must be a positive integer"),
    ({"n_layer": 0}, "num_hidden_layers=0"),
    ({"n_positions": 0}, "max_position_embeddings=0"),
    (
        {"position_embedding_type": "rotary"},
        "position_embedding_type='rotary', but it must be one of 'learned', 'rope', 'none'",
    ),
    ({"norm_type": "batchnorm"}, "norm_type='batchnorm', but it must be one of 'layernorm', 'rmsnorm'"),
    ({"mlp_type": "moe"}, "mlp_type='moe', but it must be one of 'dense', 'gated'"),
    ({"activation_function": "gelou"}, "activation_function='gelou'"),
    ({"position_embedding_type": "rope", "head_dim": 7}, "head_dim=7, but it must be even"),
    ({"position_embedding_type": "rope", "rope_theta": 0.0}, "rope_theta=0.0, but it must be positive"),
    ({"sliding_window": 0}, "sliding_window=0"),
    ({"sliding_window": 1}, "sliding_window=1"),
    (
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
        "layer_types names 2 layers, but num_hidden_layers=3",
    ),
    ({"layer_types": ["full_attention", "local", "local"]}, "layer_types=.*'local'"),
    ({"layer_types": ["sliding_attention"] * 3}, "but sliding_window=None"),
    ({"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0"),
    ({"add_cross_attention": True}, "add_cross_attention=True, but it must be False"),
]
BERT_FAULTS = [
    ({"hidden_size": 30}, "hidden_size=30 is not divisible by num_attention_heads=4"),
    ({"pooling": "avg"}, "pooling='avg', but it must be one of 'pooler', 'cls', 'mean', 'max', 'attention'"),
    ({"layer_mix": 4}, "layer_mix=4, but it must be None or a number of layers, 1 to num_hidden_layers=3"),
    ({"layer_mix": True}, "layer_mix=True, but it must be None or a number of layers"),
    ({"layer_mix": "2"}, "layer_mix='2', but it must be None or a number of layers"),
    ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
    ({"focal_gamma": -1.0}, "focal_gamma=-1.0"),
    ({"multi_sample_dropout": 0}, "multi_sample_dropout=0"),
    ({"num_labels": 3, "class_weights": [1.0, 2.0]}, "class_weights=.* one positive number for each of 3 labels"),
    ({"num_labels": 2, "class_weights": [1.0, 0.0]}, "class_weights=.*"),
    ({"hidden_act": "gelou"}, "hidden_act='gelou'"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ({"is_decoder": True}, "is_decoder=True"),
    ({"num_labels": 1, "label_smoothing": 0.1}, "label_smoothing=0.1.*regression"),
    ({"num_labels": 1, "problem_type": "regression", "focal_gamma": 1.0}, "focal_gamma=1.0.*regression"),
]


@pytest.mark.parametrize(("changes", "message"), GPT2_FAULTS, ids=lambda value: str(value)[:40])
def test_impossible_mygpt2_configs(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mygpt2_config(**changes)


@pytest.mark.parametrize(("changes", "message"), BERT_FAULTS, ids=lambda value: str(value)[:40])
def test_impossible_mybert_configs(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mybert_config(**changes)


def test_a_field_changed_afterwards_is_checked_by_the_model() -> None:
    config = mygpt2_config()
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="num_key_value_heads=3"):
        MyGPT2Model(config)


@pytest.mark.parametrize("model", [MyGPT2ForCausalLM, MyBertForSequenceClassification])
def test_inputs_out_of_range(model: type) -> None:
    config = mygpt2_config() if model is MyGPT2ForCausalLM else mybert_config()
    model = model(config).eval()
    ids = batch()["input_ids"]
    ids[0, 0] = 97
    with pytest.raises(ValueError, match="input_ids contains 97, but this model has vocab_size=97"):
        model(ids)
    with pytest.raises(ValueError, match="input_ids contains -"):
        model(ids - 98)
    with pytest.raises(ValueError, match=r"65 tokens long.*max_position_embeddings=64"):
        model(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="position_ids contains 64, but this model has max_position_embeddings=64"):
        model(torch.ones(1, 2, dtype=torch.long), position_ids=torch.tensor([[63, 64]]))
    with pytest.raises(ValueError, match=r"exactly one of input_ids and inputs_embeds"):
        model()


def test_fewer_layers_of_a_saved_model(tmp_path: Path) -> None:
    model = MyGPT2ForCausalLM(mygpt2_config()).eval()
    model.save_pretrained(tmp_path)
    shallow = MyGPT2ForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    assert len(shallow.model.layers) == len(shallow.config.layer_types) == 2
    ids = torch.ones(1, 3, dtype=torch.long)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    assert torch.equal(shallow(ids).logits, model(ids).logits)


def test_generation_beyond_the_learned_table_says_so() -> None:
    model = MyGPT2ForCausalLM(mygpt2_config(n_positions=8, eos_token_id=None)).eval()
    with pytest.raises(ValueError, match="position_ids contains 8, but this model has max_position_embeddings=8"):
        model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=10, do_sample=False)
    rope = MyGPT2ForCausalLM(mygpt2_config(n_positions=8, eos_token_id=None, position_embedding_type="rope")).eval()
    assert rope.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=10, do_sample=False).shape == (1, 14)


def test_mybert_segment_out_of_range() -> None:
    model = MyBertForSequenceClassification(mybert_config())
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="token_type_ids contains 2, but this model has type_vocab_size=2"):
        model(ids, token_type_ids=ids + 1)


@pytest.mark.parametrize("base", [MyGPT2Config, MyBertConfig])
def test_a_subclass_inherits_the_constructor(base: type, tmp_path: Path) -> None:
    own = type("OwnConfig", (base,), {"model_type": "own"})
    config = own(num_hidden_layers=3)
    assert config.num_hidden_layers == 3 and config.vocab_size == base().vocab_size and config.model_type == "own"
    config.save_pretrained(tmp_path)
    assert own.from_pretrained(tmp_path).num_hidden_layers == 3
    with pytest.raises(ValueError, match="OwnConfig: num_hidden_layers=0"):
        own(num_hidden_layers=0)


FULL, SLIDING = ["full_attention"] * 3, ["sliding_attention"] * 3


def test_layers_slide_with_the_window_unless_layer_types_are_given(tmp_path: Path) -> None:
    """As in Mistral; also if the window is set afterwards, or on a config that was saved without one."""
    assert mygpt2_config(sliding_window=4).layer_types == SLIDING
    later = mygpt2_config()
    assert later.layer_types == FULL
    later.sliding_window = 4
    model = MyGPT2Model(later)
    assert later.layer_types == SLIDING and [layer.self_attn.sliding_window for layer in model.layers] == [4] * 3
    again = mygpt2_config()
    again.sliding_window = 4
    assert MyGPT2Config.from_dict(again.to_dict()).layer_types == SLIDING
    later.sliding_window = None
    assert MyGPT2Model(later).config.layer_types == FULL
    mygpt2_config().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["layer_types"] == FULL and not [name for name in written if name.startswith("_")]
    loaded = MyGPT2Config.from_pretrained(tmp_path, sliding_window=4)
    assert MyGPT2Model(loaded).config.layer_types == SLIDING


def test_a_window_has_no_effect_on_layers_that_are_all_full(tmp_path: Path) -> None:
    config = mygpt2_config(layer_types=FULL, sliding_window=4)
    model = MyGPT2Model(config).eval()
    model.save_pretrained(tmp_path)
    plain = MyGPT2Model(mygpt2_config()).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(2, 97, (2, 12))
    again = MyGPT2Model.from_pretrained(tmp_path)
    assert again.config.layer_types == FULL and again.config.sliding_window == 4
    assert torch.equal(again(ids).last_hidden_state, plain(ids).last_hidden_state)
    given = mygpt2_config(sliding_window=4)
    given.layer_types[0] = "full_attention"  # an entry of one's own makes the list one's own
    assert MyGPT2Model(given).config.layer_types == ["full_attention", *SLIDING[1:]]
    assert mygpt2_config(**given.to_dict()).layer_types == given.layer_types

"""What the rules define in a file, compared with transformers' own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import batch
import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_attn_mask_utils import AttentionMaskConverter

from mymodels.hub.static.api_availability import find_releases
from mymodels.hub.static.repo_snapshot import Folder, parse_text
from mymodels.hub.upgrading.edit_engine import apply_rules, apply_to_source
from mymodels.hub.upgrading.mask_definitions import MASKS
from mymodels.hub.upgrading.plan_releases import span_of, target_releases
from mymodels.hub.upgrading.rules import (
    cache_methods,
    config_defaults,
    config_identity,
    generation_inputs,
    imports_gone,
    legacy_caches,
    tensors_in_init,
)

MASK_OF_BLOOM = """from transformers.models.bloom.modeling_bloom import _prepare_4d_causal_attention_mask


class Toy:
    mask = _prepare_4d_causal_attention_mask
"""


def defined(*sources: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for source in sources:
        exec(source, names)
    return names


def pairs(layers: int, length: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    return tuple((torch.randn(2, 3, length, 4), torch.randn(2, 3, length, 4)) for _ in range(layers))


def test_caches_from_and_to_tuples() -> None:
    names = defined(legacy_caches._FROM, legacy_caches._TO, cache_methods._LENGTH, cache_methods._LIMIT)
    given = pairs(2, 5)
    cache = names["cache_from_tuples"](given)
    assert isinstance(cache, DynamicCache)
    for layer, expected in zip(names["cache_to_tuples"](cache), given):
        assert torch.equal(layer[0], expected[0]) and torch.equal(layer[1], expected[1])
    assert names["length_of_cache"](cache) == cache.get_seq_length() == 5 == names["length_of_cache"](given)
    assert names["limit_of_cache"](cache) is None
    assert names["cache_to_tuples"](names["cache_from_tuples"](None)) == ()


def test_an_encoder_decoder_cache_knows_its_crossed_keys() -> None:
    names = defined(legacy_caches._FROM_PAIRS, legacy_caches._TO)
    given = tuple(own + crossed for own, crossed in zip(pairs(2, 5), pairs(2, 7)))
    cache = names["cache_from_four"](given)
    assert isinstance(cache, EncoderDecoderCache)
    assert cache.self_attention_cache.get_seq_length() == 5 and cache.cross_attention_cache.get_seq_length() == 7
    assert all(cache.is_updated[layer] for layer in range(2))
    for layer, expected in zip(names["cache_to_tuples"](cache), given):
        assert all(torch.equal(one, other) for one, other in zip(layer, expected))


@pytest.mark.parametrize("past", [0, 3])
def test_masks_are_those_of_the_library(past: int) -> None:
    names = defined(*MASKS.values())
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = AttentionMaskConverter._expand_mask(mask, torch.float32, tgt_len=4)
    assert torch.equal(names["_expand_mask"](mask, torch.float32, tgt_len=4), expected)
    assert torch.equal(names["_expand_mask"](mask, 4), expected != 0)
    shape = torch.Size([2, 4])
    expected = AttentionMaskConverter._make_causal_mask(shape, torch.float32, torch.device("cpu"), past)
    assert torch.equal(names["_make_causal_mask"](shape, torch.float32, torch.device("cpu"), past), expected)
    assert torch.equal(names["_make_causal_mask"](shape, torch.device("cpu"), past), expected != 0)


def test_prepare_inputs_is_called_as_before() -> None:
    decorate = defined(generation_inputs._HELPER)["as_generate_called_it"]
    seen: dict[str, Any] = {}

    class Toy:
        config = SimpleNamespace(is_encoder_decoder=False)

        @decorate
        def prepare_inputs_for_generation(self, input_ids, cache_position=None, **kwargs):
            seen.update(kwargs, cache_position=cache_position)
            return {"input_ids": input_ids}

    ids = torch.ones(2, 6, dtype=torch.long)
    cache = defined(legacy_caches._FROM)["cache_from_tuples"](pairs(1, 4))
    Toy().prepare_inputs_for_generation(
        ids, next_sequence_length=1, is_first_iteration=False, attention_mask=None, past_key_values=cache
    )
    assert torch.equal(seen["attention_mask"], torch.ones_like(ids))
    assert seen["cache_position"].tolist() == [4, 5]
    assert not {"next_sequence_length", "is_first_iteration"} & set(seen)


def test_defaults_are_those_of_a_config_of_transformers_4() -> None:
    keep = defined(config_defaults._HELPER)["keep_defaults"]
    config = SimpleNamespace(pad_token_id=7)
    keep(config, {"use_cache": False}, pad_token_id=None, use_cache=True, is_decoder=False)
    assert (config.pad_token_id, config.use_cache, config.is_decoder) == (7, False, False)


def test_a_config_class_of_another_file_is_known_by_its_name(tmp_path: Any) -> None:
    targets = target_releases("5.23")
    folder = batch.read("nomic_bert", tmp_path, targets)
    edited = apply_rules(folder, [config_identity.RULE], releases=span_of(targets))
    assert [(edit.rule, edit.file) for edit in edited.edits] == [("config class", "modeling_mini_nomic.py")]
    assert "if not is_config_of(config, MiniNomicConfig):" in edited.texts["modeling_mini_nomic.py"]
    known = defined(config_identity._HELPER)["is_config_of"]
    once, twice = type("ToyConfig", (), {}), type("ToyConfig", (), {})
    assert known(once(), twice) and not known(SimpleNamespace(), twice)


def test_a_tensor_that_a_constructor_reads_by_a_local_name_is_made_with_data() -> None:
    source = """import torch
from torch import nn
from transformers import PreTrainedModel


class ToyModel(PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        scale = torch.tensor(config.hidden_size).sqrt()
        self.scale = scale.item()
        self.post_init()
"""
    text = apply_to_source(tensors_in_init.RULE, source).texts["modeling_example.py"]
    assert "scale = on_cpu(lambda: torch.tensor(config.hidden_size).sqrt())" in text


def test_masks_that_a_model_passed_on_are_imported_from_their_home() -> None:
    folder = Folder(Path("example"))
    file = parse_text("modeling_example.py", MASK_OF_BLOOM)
    assert not isinstance(file, str)
    folder.code["modeling_example.py"], folder.files["modeling_example.py"] = file, Path("example/modeling_example.py")
    folder.values["config.json"] = {"auto_map": {"AutoModel": "modeling_example.Toy"}}
    folder.memo["headers"] = {}
    folder.releases = find_releases(None)
    edited = apply_rules(folder, [imports_gone.RULE])
    text = edited.texts["modeling_example.py"]
    assert "from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask" in text
    assert not edited.refused

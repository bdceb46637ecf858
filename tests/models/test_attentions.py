"""`output_attentions=True` whatever attention the model runs: eager's weights and outputs, for that call alone."""

import logging

import pytest
import torch
from tiny import SWITCHES, batch, largest_difference, mybert_config, mygpt2_config

from mymodels import MyBertModel, MyGPT2Model

MODELS = {name: (MyGPT2Model, mygpt2_config, SWITCHES[name]) for name in ("stock", "sliding-mixed", "everything")}
MODELS["bert"] = (MyBertModel, mybert_config, {})


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("name", MODELS)
def test_one_call_runs_eager(name: str, implementation: str) -> None:
    model_class, config, switches = MODELS[name]
    model = model_class(config(**switches)).eval()
    cases: list[dict] = [batch(padding, length=9) for padding in ("none", "left", "right")]
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    cases += [{"input_ids": cases[0]["input_ids"][:1], "position_ids": packed, "use_cache": False}]
    for inputs in cases:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found = model(**inputs, output_attentions=True, output_hidden_states=True)
            assert model.config._attn_implementation == implementation
            if implementation == "sdpa":  # uncompiled, flex attention is slow
                assert model(**inputs).attentions is None
            model.set_attn_implementation("eager")
            expected = model(**inputs, output_attentions=True, output_hidden_states=True)
        assert len(found.attentions) == 3
        for mine, theirs in zip(found.attentions + found.hidden_states, expected.attentions + expected.hidden_states):
            assert torch.equal(mine, theirs)


def test_with_a_cache_and_gradients() -> None:
    model = MyGPT2Model(mygpt2_config(**SWITCHES["everything"])).eval()
    ids = torch.randint(2, 97, (2, 9))
    with torch.no_grad():
        whole = model(ids, output_attentions=True)
        cache = model(ids[:, :6], use_cache=True).past_key_values
        step = model(ids[:, 6:], past_key_values=cache, output_attentions=True)
    assert largest_difference(step.last_hidden_state, whole.last_hidden_state[:, 6:]) <= 1e-5
    model(ids, output_attentions=True).attentions[0].square().sum().backward()
    assert model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_it_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    model = MyBertModel(mybert_config()).eval()
    library = logging.getLogger("transformers")
    library.propagate, before = True, library.propagate
    try:
        type(model)._outputs_wanted.__globals__["logger"].warning_once.cache_clear()
        for _ in range(2):
            model(torch.ones(1, 3, dtype=torch.long), output_attentions=True)
    finally:
        library.propagate = before
    warnings = [r for r in caplog.records if "output_attentions=True run eager attention" in r.getMessage()]
    assert len(warnings) == 1


def test_an_engine_of_its_own_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MyBertModel(mybert_config()).eval()
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "engine")
    with pytest.raises(ValueError, match="output_attentions=True needs attn_implementation='eager'"):
        model(torch.ones(1, 3, dtype=torch.long), output_attentions=True)

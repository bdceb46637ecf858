"""The models' plans, in one process: every rule names a module, and a model cut by its pipeline plan stays the same."""

import copy
import re
from pathlib import Path

import pytest
import torch
from tiny import SWITCHES, batch, largest_difference, mybert_config, mygpt2_config

import mymodels
from mymodels import MyBertModel, MyGPT2ForCausalLM, MyGPT2Model

HEADS = ["MyBertForSequenceClassification", "MyBertForMaskedLM", "MyBertForTokenClassification"]


@pytest.mark.parametrize("name", [*SWITCHES, *HEADS])
def test_every_rule_of_every_plan_names_a_module(name: str) -> None:
    if name in SWITCHES:
        model = MyGPT2ForCausalLM(mygpt2_config(**SWITCHES[name]))
    else:
        model = getattr(mymodels, name)(mybert_config(layer_mix=2))
    modules = {re.sub(r"\.\d+(?=\.|$)", ".*", path) for path, _ in model.named_modules()}
    for plan in (model.tp_plan, model.pp_plan, model.fsdp_plan):
        assert plan and not set(plan) - modules - {"bert.pooler"}  # not built under the heads that read every token
    projections = {path for path in modules if re.search(r"layers?\.\*\..*(_proj|query|key|value|dense)$", path)}
    assert projections <= set(model.tp_plan)


def test_plans_follow_the_switches_and_stay_out_of_config_json(tmp_path: Path) -> None:
    config = mygpt2_config()
    assert "layers.*.mlp.gate_proj" not in config.base_model_tp_plan and "embed_positions" in config.base_model_pp_plan
    config.mlp_type, config.position_embedding_type = "gated", "rope"
    assert config.base_model_tp_plan["layers.*.mlp.gate_proj"] == "colwise"
    assert "embed_positions" not in config.base_model_pp_plan
    for made in (config, mybert_config()):
        made.save_pretrained(tmp_path)
        assert "plan" not in (tmp_path / "config.json").read_text()
        assert type(made).from_pretrained(tmp_path).base_model_pp_plan == made.base_model_pp_plan
    of_my_own = mygpt2_config(base_model_tp_plan={"layers.*.mlp.up_proj": "colwise"})
    assert MyGPT2Model(of_my_own).tp_plan["layers.*.mlp.up_proj"] == "colwise"
    assert "layers.*.self_attn.q_proj" not in MyGPT2Model(of_my_own).tp_plan


class Elsewhere(torch.nn.Identity):
    """What transformers and vLLM put in the place of a module of another stage."""

    def __init__(self):
        super().__init__()

    def forward(self, *args, **kwargs):
        return args[0] if args else next(iter(kwargs.values()))


def stage(model: torch.nn.Module, index: int, first_of_second: int) -> torch.nn.Module:
    """One of two stages, cut by nothing but the model's plan: what it names before its list of layers goes to the first
    stage, what comes after to the second, as in vLLM."""
    own = copy.deepcopy(model)
    names = list(own.pp_plan)
    (layers,) = (name for name in names if isinstance(own.get_submodule(name), torch.nn.ModuleList))
    for name in names[: names.index(layers)] if index == 1 else names[names.index(layers) + 1 :]:
        own.set_submodule(name, Elsewhere())
    for number in range(len(own.get_submodule(layers))):
        if (number >= first_of_second) != (index == 1):
            own.get_submodule(layers)[number] = Elsewhere()
    return own


ENCODERS = {"pooler": {}, "mean": {"pooling": "mean"}, "mix": {"pooling": "attention", "layer_mix": 2}}


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("name", [*SWITCHES, *ENCODERS])
@torch.no_grad()
def test_stages_cut_by_the_plan_are_the_same_model(name: str, cut: int) -> None:
    torch.manual_seed(0)
    if name in ENCODERS:
        model = MyBertModel(mybert_config(**ENCODERS[name])).eval()
        inputs = batch("right") | {"token_type_ids": torch.randint(0, 2, (3, 11))}
    else:
        model = MyGPT2Model(mygpt2_config(**SWITCHES[name])).eval()
        inputs = batch("right") | {"token_type_ids": torch.randint(2, 97, (3, 11))}
    for padded in (True, False):
        mask = {"attention_mask": inputs["attention_mask"]} if padded else {}
        ids = {"input_ids": inputs["input_ids"], "token_type_ids": inputs["token_type_ids"]}
        expected = model(**ids, **mask)
        between = stage(model, 0, cut)(**ids, **mask).last_hidden_state
        found = stage(model, 1, cut)(inputs_embeds=between, token_type_ids=ids["token_type_ids"], **mask)
        kept = inputs["attention_mask"].bool() if padded else slice(None)
        assert largest_difference(found[0][kept], expected[0][kept]) <= 1e-5
        if name in ENCODERS:
            assert largest_difference(found.pooler_output, expected.pooler_output) <= 1e-5


def test_a_mix_of_layers_that_are_on_another_stage_is_refused() -> None:
    model = MyBertModel(mybert_config(layer_mix=3)).eval()
    with pytest.raises(ValueError, match="layer_mix=3 reads layers of an earlier pipeline stage"):
        stage(model, 1, 2)(inputs_embeds=torch.randn(1, 4, 32))

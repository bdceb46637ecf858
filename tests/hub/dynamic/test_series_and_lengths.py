"""Models whose `input_ids` are numbers, and models that scale positions by the length of a row: checks called here."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from mymodels.hub.isolated import causality, generating, golden_outputs, losses, outputs
from mymodels.hub.isolated.inputs import make_inputs
from mymodels.hub.isolated.stages import Outcome


class Forecast(nn.Module):
    """The mean of the numbers so far, by a mask that `fault` ignores; generates by itself, with no cache at all."""

    main_input_name = "input_ids"

    def __init__(self, fault: str = "", channels: int = 0):
        super().__init__()
        self.config = PretrainedConfig(max_position_embeddings=32, **({"input_size": channels} if channels else {}))
        self.fault, self.weight = fault, nn.Parameter(torch.tensor(0.5))

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        assert input_ids.is_floating_point() and input_ids.dim() == (3 if "input_size" in vars(self.config) else 2)
        x = input_ids if input_ids.dim() == 3 else input_ids.unsqueeze(-1)
        seen = torch.ones(x.shape[:2]) if attention_mask is None or self.fault == "padding" else attention_mask
        x = x * seen[..., None]
        logits = self.weight * (x.cumsum(1) / seen.cumsum(1)[..., None].clamp(min=1))
        if self.fault == "last position" and x.shape[1] == 32:
            logits = logits / 0
        return {"loss": None if labels is None else logits.square().mean(), "logits": logits}

    def can_generate(self):
        return True

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, max_new_tokens=8, use_cache=True, **kwargs):
        for _ in range(max_new_tokens):
            made = self(input_ids, attention_mask)["logits"][:, -1:]
            made = made + 1 if self.fault == "cached generation" and use_cache else made
            input_ids = torch.cat([input_ids, made.reshape(len(made), 1, *input_ids.shape[2:])], 1)
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask, attention_mask[:, :1] * 0 + 1], 1)
        return input_ids


class Events:
    """Keeps the outcomes of checks by name; what a check raises is raised."""

    def __init__(self):
        self.found: dict[str, Outcome] = {}

    def check(self, name: str, where: str = ""):
        self.found[name] = Outcome()
        return self

    def __enter__(self) -> Outcome:
        return list(self.found.values())[-1]

    def __exit__(self, *error: object) -> None:
        pass


def checked(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, Outcome]:
    events = Events()
    same = generating.check_generation(events, "", model, inputs)
    outputs.check_padding(events.check("padding").__enter__(), model, inputs, with_generation=same)
    outputs.check_last_position(events.check("last position").__enter__(), model, inputs)
    return events.found


@pytest.mark.parametrize("channels", [0, 1, 3])
def test_a_series_is_made_up_and_checked(channels: int) -> None:
    model = Forecast(channels=channels).eval()
    inputs = make_inputs(model)
    assert inputs["input_ids"].shape == ((2, 11, channels) if channels else (2, 11))
    assert inputs["attention_mask"].tolist() == [[1] * 11] * 2
    found = checked(model, inputs)
    assert {name: check.status for name, check in found.items()} == {
        **{"cached generation": "ok", "padding": "ok", "last position": "ok"},
        **dict.fromkeys(["generation config", "beams", "static cache"], "n/a"),
    }, {name: check.what for name, check in found.items()}
    labels, check = losses.make_labels("AutoModelForCausalLM", model, inputs), Outcome()
    assert torch.equal(labels["labels"], inputs["input_ids"])
    losses.check_loss(check, model, inputs, labels)
    assert check.status == "ok" and "it was not recomputed" in check.what


@pytest.mark.parametrize("fault", ["cached generation", "padding", "last position"])
def test_faults_of_a_model_of_series_are_found(fault: str) -> None:
    model = Forecast(fault).eval()
    found = checked(model, make_inputs(model))
    assert [name for name, check in found.items() if check.status == "failed"] == [fault]


def test_recorded_numbers_are_compared_with_a_tolerance() -> None:
    want = torch.tensor([[0.5, -1.0111432]])
    assert golden_outputs._other_tokens(want + 1e-7, want, 1e-5) == ""
    assert "differs by up to" in golden_outputs._other_tokens(want + 1e-3, want, 1e-5)
    assert "position 1: 4 instead of 3" in golden_outputs._other_tokens(
        torch.tensor([[2, 4]]), torch.tensor([[2, 3]]), 1e-5
    )


def llama(**settings: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, max_position_embeddings=64, initializer_range=0.5, **sizes, **settings)
    return LlamaForCausalLM(config).eval()


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
}  # fmt: skip


def test_a_cache_under_positions_scaled_by_the_length_is_compared_within_the_trained_length() -> None:
    model = llama(rope_parameters=LONGROPE)
    assert causality.scaled_by_length(model.config) == "rope_parameters.rope_type = longrope"
    assert causality.steady_length(model, {}, 19) == 16
    found = checked(model, make_inputs(model))
    for name, changes in (("cached generation", "the cache changes"), ("padding", "padding changes")):
        assert found[name].status == "warning", found[name].what
        assert f"up to 16 tokens {changes} nothing, beyond them" in found[name].what
    assert {found[name].status for name in ("beams", "generation config", "last position")} == {"ok"}


def test_without_the_setting_or_within_the_length_a_cache_that_changes_numbers_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama(rope_parameters=LONGROPE)
    with monkeypatch.context() as patched:
        patched.setattr(causality, "scaled_by_length", lambda config: "")
        assert checked(model, make_inputs(model))["cached generation"].status == "failed"
    plain = model.model.forward

    def wrong(*args, **kwargs):
        made = plain(*args, **kwargs)
        if kwargs.get("use_cache") and made.last_hidden_state.shape[1] == 1:
            made.last_hidden_state = made.last_hidden_state + 1
        return made

    model.model.forward = wrong  # within the trained length too
    assert checked(model, make_inputs(model))["cached generation"].status == "failed"


def test_settings_that_scale_by_the_length_are_found_at_any_depth() -> None:
    for given, found in [
        ({"use_dynamic_ntk": True}, "use_dynamic_ntk"),
        ({"use_dynamic_ntk": False}, ""),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type = dynamic"),
        ({"text": {"rotary": {"type": "ntk"}}}, "text.rotary.type = ntk"),
        ({"rope_scaling": {"type": "linear"}}, ""),
        ({"loss": "dynamic"}, ""),
    ]:
        assert causality.scaled_by_length(PretrainedConfigOf(given)) == found, given


class PretrainedConfigOf:
    """A config with these values and nothing else, whatever the release makes of their names."""

    def __init__(self, values: dict[str, object]):
        self.values = values

    def to_dict(self) -> dict[str, object]:
        return self.values


def test_golden_outputs_at_the_last_positions_leave_out_what_a_class_does_not_take() -> None:
    class Plain(Forecast):
        def forward(self, input_ids=None):
            return super().forward(input_ids)

    inputs = {"input_ids": torch.ones(1, 9), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    assert golden_outputs.outputs_at(Plain().eval(), inputs)["logits"].shape == (8,)


def test_padding_that_counts_within_the_trained_length_fails() -> None:
    model = llama(rope_parameters=LONGROPE)
    plain = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: plain(*args, **kwargs)
    assert checked(model, make_inputs(model))["padding"].status == "failed"


def test_without_a_vocabulary_the_last_position_of_tokens_is_skipped() -> None:
    check = Outcome()
    outputs.check_last_position(check, Forecast().eval(), {"input_ids": torch.arange(5)[None]})
    assert check.status == "skipped" and "no vocab_size" in check.what

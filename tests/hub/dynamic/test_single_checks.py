"""Single checks of the clean process, called here: models that require a mask, what the tokenizer gives, weights on the disk."""

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from own_models.make import make
from torch import nn
from transformers import PretrainedConfig

from mymodels.hub.isolated import calls, generating, outputs, processors, training
from mymodels.hub.isolated.inputs import make_inputs, with_required
from mymodels.hub.isolated.placement import attention_without_weights
from mymodels.hub.isolated.stages import Outcome
from mymodels.training.tokenizers import train_bert_tokenizer

# ---- arguments that forward requires


def padding_of(model: nn.Module) -> Outcome:
    check = Outcome()
    outputs.check_padding(check, model, make_inputs(model), with_generation=False)
    return check


def test_padding_is_checked_of_a_model_that_requires_a_mask() -> None:
    model = make("conv_bert")
    assert padding_of(model).status == "ok"
    seen = type(model)

    class CountsPadding(seen):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, torch.ones_like(attention_mask))

    check = padding_of(CountsPadding(model.config).eval())
    assert check.status == "failed" and "padding on the right changes the outputs" in check.what


def test_all_that_text_needs_is_made_up() -> None:
    class Strict(type(make("conv_bert"))):
        def forward(self, input_ids, attention_mask, token_type_ids, position_ids):
            given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
            assert all(tensor.shape == input_ids.shape for tensor in given.values())
            return self.bert(input_ids, **given).last_hidden_state

    model = Strict(make("conv_bert").config).eval()
    inputs = make_inputs(model)
    assert list(inputs) == ["input_ids", "attention_mask", "token_type_ids", "position_ids"]
    assert inputs["position_ids"].tolist() == [list(range(inputs["input_ids"].shape[1]))] * 2
    assert padding_of(model).status == "ok"
    for check_of in (outputs.check_last_position, calls.check_inputs_embeds):
        check = Outcome()
        check_of(check, model, inputs)
        assert check.status in ("ok", "n/a"), check.what
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert list(with_required(make("moe_gpt2"), {"input_ids": ids})) == ["input_ids"]  # nothing that is not required


# ---- embeddings that are passed, and a vocabulary that is extended


class Scaled(torch.nn.Module):
    """Logits of embeddings that forward multiplies when it looks them up; with `shift`, it does more to them."""

    main_input_name = "input_ids"

    def __init__(self, config, shift: float = 0.0):
        super().__init__()
        self.config, self.shift = config, shift
        self.embed, self.head = nn.Embedding(20, 4), nn.Linear(4, 20)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, inputs_embeds=None):
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids) * 12.0 + self.shift
        return {"logits": self.head(inputs_embeds).tanh()}


@pytest.mark.parametrize(
    ("shift", "status", "what"), [(0.0, "warning", "by 12,"), (0.5, "failed", "different outputs")]
)
def test_embeddings_that_are_scaled_in_the_lookup_are_named(shift: float, status: str, what: str) -> None:
    model = Scaled(PretrainedConfig(vocab_size=20), shift).eval()
    check = Outcome()
    calls.check_inputs_embeds(check, model, {"input_ids": torch.arange(6)[None]})
    assert check.status == status and what in check.what


def resized(model: nn.Module) -> Outcome:
    check = Outcome()
    training.check_resize(check, model, {"input_ids": torch.arange(5, 12)[None]})
    return check


def test_a_class_that_cannot_be_resized_is_named_and_one_that_breaks_fails() -> None:
    base = make("moe_gpt2")
    assert resized(base).status == "ok"

    class NoSetter(type(base)):
        def set_input_embeddings(self, value):
            raise NotImplementedError("`set_input_embeddings` not auto-handled for NoSetter; please override it.")

    class Breaks(type(base)):
        def set_input_embeddings(self, value):
            raise TypeError("not this one")

    class OwnHead(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight, self.bias = nn.Parameter(linear.weight.detach().clone()), None

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    check = resized(NoSetter(base.config).eval())
    assert check.status == "warning" and "no set_input_embeddings" in check.what
    with pytest.raises(TypeError, match="not this one"):
        resized(Breaks(base.config).eval())
    own = make("moe_gpt2")
    own.config.tie_word_embeddings = False
    own.set_output_embeddings(OwnHead(own.get_output_embeddings()))
    check = resized(own)
    assert check.status == "warning" and "head is of a class of its own" in check.what


OWN_FORWARD = """
class Own(Base):
    def forward(self, input_ids, **kwargs):
        if len(input_ids) == 4:
            raise ValueError("four rows are too many")
        return super().forward(input_ids, **kwargs)
"""


def test_a_forward_that_raises_under_beams_does_not_pass_for_one_without_beams(monkeypatch) -> None:
    base = make("moe_gpt2")
    own = {"Base": type(base)}
    exec(compile(OWN_FORWARD, "/transformers_modules/own/modeling_own.py", "exec"), own)
    prompt = {"input_ids": torch.arange(5, 12)[None], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    with pytest.raises(ValueError, match="four rows"):
        generating.check_beams(Outcome(), own["Own"](base.config).eval(), prompt)

    def refuses(*args, **kwargs):
        raise ValueError("no beams for this model")

    monkeypatch.setattr(generating, "generate", refuses)
    check = Outcome()
    generating.check_beams(check, base.eval(), prompt)
    assert (check.status, "no beams for this model" in check.what) == ("n/a", True)


def test_what_the_tokenizer_gives_and_forward_does_not_take_is_named(tmp_path: Path) -> None:
    model, tokenizer = make("conv_bert"), train_bert_tokenizer(["we saw the cat", "and the dog"], 97, 64)
    for names, status in ((None, "failed"), (["input_ids", "attention_mask"], "ok")):
        tokenizer.model_input_names = names or tokenizer.model_input_names
        tokenizer.save_pretrained(tmp_path / status)
        model.config.save_pretrained(tmp_path / status)
        check = Outcome()
        processors.check_tokenizer_output(check, {"folder": str(tmp_path / status)}, model)
        assert check.status == status, check.what
        if names is None:
            assert (
                "gives token_type_ids, which forward of ConvBert does not take: add token_type_ids=None" in check.what
            )
            assert '"model_input_names": ["input_ids", "attention_mask"] in tokenizer_config.json' in check.what


# ---- weights on the disk


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Encoding(nn.Module):
    """Rows of unequal length, which torch packs into a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -1] = True
        return self.layers(x, src_key_padding_mask=padding)


class ReadsPast(Attending):
    """Its own fault beside an attention: it reads the weight of a part without calling the part."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x):
        return nn.functional.linear(x, self.up.weight, self.up.bias)


class Raises(Attending):
    def forward(self, x):
        raise RuntimeError("a tensor of 3 does not fit one on device meta")


class RaisesInside(Attending):
    def forward(self, x):
        return self.attention(x[..., :3], x, x)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "known"), [(Attending, True), (Encoding, True), (ReadsPast, False), (Raises, False), (RaisesInside, False)]
)
def test_only_an_attention_without_its_weights_is_excused(kind: type, known: bool, tmp_path: Path) -> None:
    device_map = {"0": "cpu", "1": "disk"}
    model = nn.Sequential(nn.Identity(), kind()).eval()
    model = dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path))
    with torch.inference_mode(), pytest.raises((RuntimeError, AssertionError)) as caught:
        model(torch.randn(2, 3, 16))
    found = attention_without_weights(caught.value, model, device_map)
    assert bool(found) == known and (not found or isinstance(model.get_submodule(found), nn.MultiheadAttention))
    assert not attention_without_weights(caught.value, model, {"0": "disk", "1": "cpu"})

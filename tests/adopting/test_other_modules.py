"""What a wrapper has to find out of modules unlike those of `authors`: outputs, losses and padding are the module's."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from adopting.cases import job
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from mymodels.adopting.examine import examine
from mymodels.adopting.make_folder import _check_rebuilt, _job
from mymodels.checkpoints import CheckpointError

FILE = Path(__file__).parent / "others" / "modules.py"
DICTIONARY = {"cfg": {"vocab": 30, "model": {"dim": 8}, "classes": 3}, "act": "tanh"}
# class → the constructor's arguments, the Auto class it is for
CASES = {
    "Recurrent": ({"num_layers": 2}, "AutoModelForCausalLM"),
    "Smoothed": ({}, "AutoModelForCausalLM"),
    "Sentiment": ({}, "AutoModelForSequenceClassification"),
    "OneLogit": ({}, "AutoModelForSequenceClassification"),
    "SeveralLabels": ({}, "AutoModelForSequenceClassification"),
    "Quantity": ({}, "AutoModelForSequenceClassification"),
    "Keep": ({}, "AutoModelForSequenceClassification"),
    "PadById": ({}, "AutoModelForSequenceClassification"),
    "EncoderDecoder": ({}, "AutoModelForSeq2SeqLM"),
    "ZeroHead": ({}, "AutoModelForMaskedLM"),
    "Patches": ({"image_size": 40}, "AutoModelForImageClassification"),
    "Spans": ({}, "AutoModelForQuestionAnswering"),
    "Forecast": ({}, "AutoModel"),
    "FromClass": ({"vocab_size": 40, "block_size": 16, "drop": 0.2}, "AutoModelForCausalLM"),
    "FromDictionary": (DICTIONARY, "AutoModelForSequenceClassification"),
}
IDS = torch.tensor([[5, 9, 3, 8, 4, 7], [6, 4, 9, 5, 3, 8]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """By class: what was found out, the loaded model, the folder."""
    found = {}
    for name, (config, auto_class) in CASES.items():
        out = tmp_path_factory.mktemp(f"other_{name}")
        result = examine(job(FILE, name, config), out)
        folder = out / f"source_other_{name}"
        (out / "source").rename(folder)
        model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
        found[name] = result, model, folder
    return found


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_auto_class_and_text(made: dict, name: str) -> None:
    result, model, folder = made[name]
    assert result["auto_class"] == CASES[name][1]
    outputs = model(**load_file(folder.parent / "inputs.safetensors"))
    for key, want in load_file(folder.parent / "outputs.safetensors").items():
        assert torch.equal(outputs[key], want)
    for kind in ("modeling", "configuration"):
        text = next(folder.glob(f"{kind}_*.py")).read_text()
        assert max(map(len, text.splitlines())) <= 120


def test_values_reach_the_constructor(made: dict) -> None:
    assert made["Recurrent"][1].net.rnn.num_layers == 2
    assert made["FromClass"][1].net.h[0].drop.p == 0.2
    assert made["FromDictionary"][1].net.act == "tanh" and made["FromDictionary"][1].net.drop.p == 0.1


def test_a_label_that_the_module_leaves_out_is_left_out(made: dict) -> None:
    model, labels = made["Recurrent"][1], IDS.clone()
    labels[0, 3:] = 0
    kept = labels[:, 1:].reshape(-1) != 0
    logits = model(IDS).logits[:, :-1].reshape(-1, 40)
    want = cross_entropy(logits[kept], labels[:, 1:].reshape(-1)[kept])
    assert abs(model(IDS, labels=labels).loss - want) < 1e-6
    labels[0, 3:] = -100
    assert abs(model(IDS, labels=labels).loss - want) < 1e-6
    assert "the label 0 is left out" in " ".join(made["Recurrent"][0]["derived"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_own_loss_gets_the_next_tokens(made: dict, side: str) -> None:
    model = made["Smoothed"][1]
    want = model.net(IDS[:, :-1], IDS[:, 1:])[1]
    assert abs(model(IDS, labels=IDS).loss - want) < 1e-6
    few = model.net(IDS[:1, :3], IDS[:1, 1:4])[1]  # the same four tokens, padded
    pad, labels = torch.zeros(1, 3, dtype=torch.long), torch.full((1, 3), -100)
    rows = [(pad, IDS[:1, :4]), (labels, IDS[:1, :4]), (pad, torch.ones(1, 4, dtype=torch.long))]
    padded, wanted, mask = (torch.cat(pair if side == "left" else pair[::-1], 1) for pair in rows)
    assert abs(model(padded, attention_mask=mask, labels=wanted).loss - few) < 1e-6
    assert model.accepts_loss_kwargs is False  # so that the Trainer scales it when it accumulates gradients


def test_one_logit_and_several_labels(made: dict) -> None:
    for name, labels in (("OneLogit", torch.tensor([0.0, 1.0])), ("SeveralLabels", torch.eye(4)[:2])):
        output = made[name][1](IDS, labels=labels)
        plain = made[name][1](IDS).logits
        assert torch.equal(output.logits, plain)
        assert abs(output.loss - binary_cross_entropy_with_logits(plain, labels.view_as(plain))) < 1e-6
    assert "training" in " ".join(made["Quantity"][0]["missing"])
    with pytest.raises(TypeError, match="takes no labels"):
        made["Quantity"][1](IDS, labels=torch.tensor([0.0, 1.0]))


def test_spans_have_the_author_s_loss(made: dict) -> None:
    result, model, _ = made["Spans"]
    places = {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([3, 2])}
    output = model(IDS, **places)
    loss, start, end = model.net(IDS, **places)
    assert abs(output.loss - loss) < 1e-6 and torch.equal(output.start_logits, start)
    assert torch.equal(output.end_logits, end) and "equal to the module's own" in " ".join(result["derived"])


def test_sounds_with_labels_if_the_caller_says_so(tmp_path: Path) -> None:
    result = examine(job(FILE, "Waves", {}, auto_class="AutoModelForAudioClassification"), tmp_path)
    (tmp_path / "source").rename(tmp_path / "source_waves")
    auto = transformers.AutoModelForAudioClassification
    model = auto.from_pretrained(tmp_path / "source_waves", trust_remote_code=True).eval()
    sounds, labels = torch.rand(2, 1, 400), torch.tensor([1, 4])
    want = cross_entropy(model.net(sounds), labels)
    assert abs(model(sounds, labels=labels).loss - want) < 1e-6 and model.main_input_name == "input_values"
    assert model.config.num_labels == 5 and "feature extractor" in " ".join(result["missing"])


def greedy(model, source: torch.Tensor, steps: int) -> torch.Tensor:
    """By the author's module alone."""
    target = torch.full((len(source), 1), model.config.decoder_start_token_id)
    for _ in range(steps):
        target = torch.cat([target, model.net(source, target)[:, -1:].argmax(-1)], 1)
    return target


@torch.no_grad()
def test_an_encoder_decoder_generates_and_makes_its_own_inputs(made: dict) -> None:
    result, model, _ = made["EncoderDecoder"]
    got = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, greedy(model, IDS, 5)) and "runs the source again" in " ".join(result["missing"])
    labels = torch.tensor([[7, 8, 9], [4, 5, -100]])
    shifted = torch.tensor([[0, 7, 8], [0, 4, 5]])
    want = cross_entropy(model.net(IDS, shifted).flatten(0, 1), labels.flatten())
    assert abs(model(IDS, labels=labels).loss - want) < 1e-6
    assert torch.equal(model(IDS, labels=labels).logits, model(IDS, decoder_input_ids=shifted).logits)


@pytest.mark.parametrize("name", ["Sentiment", "Keep", "PadById"])
@torch.no_grad()
def test_padding_is_left_out(made: dict, name: str) -> None:
    model = made[name][1]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    got = model(IDS, attention_mask=mask).logits[0]
    assert torch.allclose(got, model(IDS[:1, :4]).logits[0], atol=1e-6)
    config = json.loads((made[name][2] / "config.json").read_text())
    assert config.get("pad_token_id") == (2 if name == "PadById" else None)


def test_padding_that_cannot_be_left_out_is_refused(made: dict) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    for name in ("ZeroHead", "EncoderDecoder", "FromDictionary"):
        more = {"decoder_input_ids": IDS} if name == "EncoderDecoder" else {}
        with pytest.raises(ValueError, match="cannot leave out padding"):
            made[name][1](IDS, attention_mask=mask, **more)
        assert any(line.startswith("padding") for line in made[name][0]["missing"])


def test_what_is_not_passed_on_is_listed(made: dict) -> None:
    assert "outputs that are not returned: forward(…)[0]" in made["Keep"][0]["missing"]


HEADING = "import torch\nfrom torch import nn\nclass Net(nn.Module):\n    def __init__(self, vocab=20, dim=8):\n        super().__init__()\n"
TABLE = "        self.e, self.o = nn.Embedding(vocab, dim), nn.Linear(dim, vocab)\n"
RNN = TABLE + "        self.r = nn.GRU(dim, dim)\n"
REFUSED = {
    "time first": (
        RNN + "    def forward(self, x):\n        return self.o(self.r(self.e(x))[0])\n",
        r"py:8: a row of the batch depends on the other rows",
    ),
    "probabilities": (
        TABLE + "    def forward(self, x):\n        return self.o(self.e(x)).softmax(-1)\n",
        r"py:8: forward returns probabilities",
    ),
    "random outputs": (
        TABLE + "    def forward(self, x):\n        return self.o(nn.functional.dropout(self.e(x)))\n",
        r"py:7: forward gives different outputs each time",
    ),
    "a plain list": (
        TABLE + "        self.blocks = [nn.Linear(dim, dim)]\n    def forward(self, x):\n"
        "        return self.o(self.blocks[0](self.e(x)))\n",
        "blocks is a list of parameters or modules",
    ),
    "weights from the Hub": (
        "        self.bert = AutoModel.from_pretrained('bert-base-uncased')\n    def forward(self, x):\n        return x\n",
        r"py:6: `AutoModel.from_pretrained\(.*loads weights whenever",
    ),
    "a mask of two meanings": (
        TABLE
        + "    def forward(self, x, mask):\n        return self.o(self.e(x).cumsum(1) * (1.0 + mask[..., None]))\n",
        "it is not clear which of them it expects",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_wrong_numbers_are_refused(what: str, tmp_path: Path) -> None:
    text, says = REFUSED[what]
    path = tmp_path / f"refused_{list(REFUSED).index(what)}.py"
    path.write_text(HEADING + text)
    with pytest.raises(CheckpointError, match=says) as caught:
        examine(job(path, "Net", {}), tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "source").exists()


def test_a_module_whose_attributes_do_not_hold_its_arguments(tmp_path: Path) -> None:
    """It is compared with the one that its attributes describe."""
    spec = importlib.util.spec_from_file_location("modules", FILE)
    others = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(others)
    module: nn.Module = others.Scaled()
    made = _job(module, tmp_path, None, {})
    found = examine(job(FILE, "Scaled", made["config"], weights=made["weights"]), tmp_path)
    with pytest.raises(
        CheckpointError, match="a module built from the arguments found in its attributes gives other outputs"
    ):
        _check_rebuilt(module, tmp_path, found)
    assert module.training

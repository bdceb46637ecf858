"""Targets of every kind, sources of every kind, the options, and what is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from warmstart.random_stock_models import randomised
from warmstart.stock_families import SIZES, family

from mymodels import MyBertConfig, MyBertForMaskedLM, cli, warm_start
from mymodels.checkpoints import CheckpointError
from mymodels.warmstart import NotAllowedError

OUR_SIZES = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")}  # fmt: skip


class CnnBertConfig(MyBertConfig):
    model_type = "cnn-bert"

    def __init__(self, num_filters: int = 7, **kwargs):
        super().__init__(**kwargs)
        self.num_filters = num_filters


class CnnBert(MyBertForMaskedLM):
    config_class = CnnBertConfig

    def __init__(self, config):
        super().__init__(config)
        self.convolution = nn.Conv1d(config.hidden_size, config.num_filters, 3)
        self.post_init()


class LonelyConfig(MyBertConfig):
    model_type = "lonely-bert"


class StockCnnConfig(transformers.BertConfig):
    model_type = "stock-cnn-bert"

    def __init__(self, num_filters: int = 7, **kwargs):
        super().__init__(**kwargs)
        self.num_filters = num_filters


class StockCnn(transformers.BertPreTrainedModel):
    config_class = StockCnnConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.convolution = nn.Conv1d(config.hidden_size, config.num_filters, 3)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return self.bert(input_ids, attention_mask=attention_mask)


def test_a_config_of_ones_own_is_never_replaced() -> None:
    source = family("bert")
    report = warm_start(CnnBertConfig(num_filters=3, **OUR_SIZES), source)
    assert type(report.model) is CnnBert and report.model.config.num_filters == 3
    assert report.model.convolution.weight.shape[0] == 3
    ours, theirs = report.model.bert.embeddings.word_embeddings, source.bert.embeddings.word_embeddings
    assert torch.equal(ours.weight, theirs.weight)
    report = warm_start(CnnBertConfig(**OUR_SIZES), source, overrides={"num_filters": 5})
    assert report.model.config.num_filters == 5
    report = warm_start(StockCnnConfig(num_filters=3, **SIZES), source)
    assert type(report.model) is StockCnn and report.model.config.num_filters == 3
    loaded = {name for row in report.rows if row.sources for name in row.targets}
    assert not any("pooler" in name or "convolution" in name for name in loaded)
    layer, origin = report.model.bert.encoder.layer[1].output.dense, source.bert.encoder.layer[1].output.dense
    assert torch.equal(layer.weight, origin.weight)
    for config, words in (
        (LonelyConfig(**OUR_SIZES), r"no model class has config_class = LonelyConfig.*model_class="),
        (SIZES, "a dict is neither a model nor a config"),
    ):
        with pytest.raises(CheckpointError, match=words):
            warm_start(config, source)
    report = warm_start(LonelyConfig(**OUR_SIZES), source, model_class=MyBertForMaskedLM)
    assert type(report.model.config) is LonelyConfig
    with pytest.raises(CheckpointError, match="CnnBertConfig has no field 'number_of_filters'"):
        warm_start(CnnBertConfig(**OUR_SIZES), source, overrides={"number_of_filters": 5})


def test_a_stock_config_becomes_its_stock_class() -> None:
    source = family("llama")
    report = warm_start(source.config, source)
    assert type(report.model) is transformers.LlamaForCausalLM and report.is_exact and not report.model.training
    report = warm_start(source.config, source, head="Model")
    assert type(report.model) is transformers.LlamaModel
    report = warm_start(source.config, source, dtype="bfloat16")
    assert report.model.dtype == torch.bfloat16
    report = warm_start(family("bert").config, family("bert"), model_class=transformers.BertForMaskedLM)
    assert type(report.model) is transformers.BertForMaskedLM and report.is_exact


def test_folders_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = family("llama")
    source.save_pretrained(tmp_path / "llama")
    config = family("phi3", num_key_value_heads=4, sliding_window=None, rms_norm_eps=1e-6).config
    config.architectures = ["Phi3ForCausalLM"]
    config.save_pretrained(tmp_path / "config only")
    report = warm_start(tmp_path / "config only", tmp_path / "llama")
    assert type(report.model).__name__ == "Phi3ForCausalLM" and report.is_exact and report.checked.agrees
    out = tmp_path / "out"
    command = ["warm-start", str(tmp_path / "llama"), "--to", str(tmp_path / "config only")]
    assert cli.main([*command, "--out", str(out), "--strict"]) == 0
    ids = torch.randint(2, 97, (2, 9))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, source(ids).logits, atol=1e-4)
    assert json.loads((out / "warm_start.json").read_text())["exact"] is True
    # a folder with weights keeps what the source lacks
    target = family("gpt2")
    target.save_pretrained(tmp_path / "gpt2")
    report = warm_start(tmp_path / "gpt2", tmp_path / "llama")
    assert torch.equal(report.model.transformer.wpe.weight, target.transformer.wpe.weight)
    capsys.readouterr()
    assert cli.main(["warm-start", str(tmp_path / "llama"), "--to", str(tmp_path / "nothing")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "there is no such folder" in error


def test_the_rename_of_the_report_decides_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from safetensors.torch import save_file

    source = family("llama")
    source.save_pretrained(tmp_path / "llama")
    state = {n.replace("q_proj", "one").replace("k_proj", "two"): t.clone() for n, t in source.state_dict().items()}
    save_file(state, tmp_path / "odd.safetensors")
    command = ["warm-start", str(tmp_path / "odd.safetensors"), "--to", str(tmp_path / "llama")]
    assert cli.main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "ambiguous, so not loaded" in shown and "--rename '^" in shown and "self_attn.one" in shown
    target = family("llama")
    report = warm_start(target, tmp_path / "odd.safetensors")
    note = next(note for note in report.notes if note.startswith("ambiguous"))
    rename = eval(note.partition("rename=")[2])
    report = warm_start(family("llama"), tmp_path / "odd.safetensors", rename=rename)
    ours = report.model.model.layers
    decided = next(iter(rename.values())).rpartition("self_attn.")[2].rstrip(".")
    origin = "one" if "one" in next(iter(rename)) else "two"
    for i, layer in enumerate(ours):
        assert torch.equal(
            layer.self_attn.get_submodule(decided).weight, state[f"model.layers.{i}.self_attn.{origin}.weight"]
        )
    report = warm_start(
        family("llama"), tmp_path / "odd.safetensors", rename={r"\.one\.": ".q_proj.", r"\.two\.": ".k_proj."}
    )
    assert report.totals["loaded"]["percent"] == 100 and not any("ambiguous" in note for note in report.notes)


class Net(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width))
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        return self.out(torch.relu(self.stem(x)))


def trained() -> Net:
    net = randomised(Net()).train()
    for _ in range(3):
        net(torch.randn(16, 6) * 3 + 1)
    return net.eval()


@pytest.mark.parametrize("wrap", ["", "module.", "_orig_mod.", "model.", "net.encoder."])
def test_prefixes_buffers_and_options(wrap: str, tmp_path: Path) -> None:
    source = trained()
    tensors = {wrap + name: tensor for name, tensor in source.state_dict().items()}
    target = Net().eval()
    report = warm_start(target, tensors, strict=True)
    x = torch.randn(4, 6)
    assert torch.equal(target(x), source(x)) and int(target.stem[1].num_batches_tracked) == 3
    saved = report.save_pretrained(tmp_path / "saved")
    again = Net().eval()
    warm_start(again, saved)
    assert torch.equal(again(x), source(x))
    before = copy.deepcopy(again.out.weight)
    assert report.checked.ran is False
    fresh = Net().eval()
    kept = copy.deepcopy(fresh.state_dict())
    report = warm_start(fresh, tensors, skip=r"stem\.0", freeze_loaded=True)
    assert torch.equal(fresh.stem[0].weight, kept["stem.0.weight"]) and torch.equal(fresh.out.weight, before)
    assert fresh.stem[0].weight.requires_grad and not fresh.out.weight.requires_grad
    fresh = Net().eval()
    kept = copy.deepcopy(fresh.state_dict())
    warm_start(fresh, tensors, only=r"out\.", allow=".")
    assert torch.equal(fresh.out.weight, before) and torch.equal(fresh.stem[0].weight, kept["stem.0.weight"])


def test_two_parts_that_fit_are_not_chosen_from() -> None:
    first, second = trained(), trained()
    tensors = {f"{front}.{name}": t for front, net in (("query", first), ("momentum", second)) for name, t in net.state_dict().items()}  # fmt: skip
    target = Net().eval()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(NotAllowedError):
        warm_start(target, tensors)
    report = warm_start(target, tensors, allow=".")
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    note = next(note for note in report.notes if "ambiguous" in note)
    assert "momentum." in note and "query." in note and "rename=" in note
    report = warm_start(target, tensors, rename={"^query\\.": ""})
    assert torch.equal(target.out.weight, first.out.weight)


@pytest.mark.parametrize(
    "source,options,words",
    [
        ({}, {}, "has no tensors"),
        ({"out.weight": torch.full((3, 8), float("nan"))}, {"allow": "."}, "has NaN or infinite values"),
        ({"out.weight": torch.ones(3, 8, dtype=torch.int8)}, {"allow": "."}, "not floating point"),
        ({"other": torch.ones(3)}, {}, "too little of it loads"),
        ({"out.weight": torch.randn(3, 8)}, {"strict": True}, "strict: "),
        ({"out.weight": torch.randn(3, 8)}, {"rename": {"(": ""}}, "is not a regular expression"),
        (
            {"a.weight": torch.randn(3, 8), "b.weight": torch.randn(3, 8)},
            {"rename": {"^[ab]": "out"}},
            r"are both 'out\.weight'",
        ),
        ({"out.weight": torch.randn(3, 8)}, {"overrides": {"width": 3}}, "overrides= changes the config"),
        ({"out.weight": torch.randn(3, 8)}, {"model_class": Net}, "model_class= is the class to build"),
        (3, {}, "a int cannot be a source"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(source, options: dict, words: str) -> None:
    target = Net().eval()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointError, match=words) as caught:
        warm_start(target, source, **options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_other_refusals(tmp_path: Path) -> None:
    wide = family("llama", hidden_size=64)
    with pytest.raises(CheckpointError, match="hidden_size=32, the target 64: a warm start cannot change the width"):
        warm_start(wide, family("gpt2"))
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(CheckpointError, match="has parameters without data"):
        warm_start(empty, trained())
    (tmp_path / "bare").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json: pass a model"):
        warm_start(tmp_path / "bare", trained())
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoModel": "m.M"}}))
    with pytest.raises(CheckpointError, match="has code of its own, which would be run"):
        warm_start(tmp_path / "bare", trained())
    with pytest.raises(CheckpointError, match="model_class=3 is not a model class"):
        warm_start(family("llama").config, family("llama"), model_class=3)
    with pytest.raises(CheckpointError, match="head='ForImages': LlamaConfig has"):
        warm_start(family("llama").config, family("llama"), head="ForImages")
    with pytest.raises(CheckpointError, match="layers='best' is none of every"):
        warm_start(family("llama", num_hidden_layers=1), family("llama"), layers="best")


def test_word_vectors_and_tokens(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(92))]
    for name, vocabulary in (("old", words), ("new", [*words[:5], *reversed(words[5:60])])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    source = family("electra")
    source.save_pretrained(tmp_path / "old")
    target = family("bert", vocab_size=60)
    report = warm_start(target, tmp_path / "old", tokenizer=tmp_path / "new")
    ours, theirs = target.bert.embeddings.word_embeddings.weight, source.electra.embeddings.word_embeddings.weight
    assert torch.equal(ours[5], theirs[59]) and torch.equal(ours[59], theirs[5]) and torch.equal(ours[3], theirs[3])
    assert report.coverage["tokens, same token"] == 60
    vector = " ".join(str(i / 10) for i in range(32))
    (tmp_path / "vectors.txt").write_text(f"w7 {vector}\n")
    report = warm_start(target, None, word_vectors=tmp_path / "vectors.txt", tokenizer=tmp_path / "new")
    row = [*words[:5], *reversed(words[5:60])].index("w7")
    assert torch.allclose(target.bert.embeddings.word_embeddings.weight[row], torch.arange(32) / 10)
    assert torch.equal(target.bert.embeddings.word_embeddings.weight[3], theirs[3])


def test_models_with_two_stacks_under_a_prefix() -> None:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(
        vocab_size=97, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, **sizes
    )
    source, target = (randomised(transformers.BartForConditionalGeneration(config)) for _ in range(2))
    report = warm_start(target, {f"module.net.{name}": tensor for name, tensor in source.state_dict().items()})
    theirs = dict(source.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in target.named_parameters())
    assert not any("ambiguous" in note for note in report.notes)
    again = transformers.BartForConditionalGeneration(config).eval()
    report = warm_start(again, source)
    assert report.is_exact and report.checked.agrees

"""Files as people have them: nanoGPT's, RoBERTas with other padding, heads stored apart, quantised ones, foreign ones.

The truth is the model that the file comes from, or transformers' own loading of it.
"""

import argparse
import dataclasses
import json
import types
from pathlib import Path

import pytest
import torch
import transformers
from tiny import largest_difference, mygpt2_config
from warmstart.nanogpt import NanoGPT
from warmstart.random_stock_models import difference, distilbert, randomised, roberta, stock_model

from mymodels import MyBertForMaskedLM, MyGPT2ForCausalLM, cli, warm_start
from mymodels.checkpoints import CheckpointError
from mymodels.warmstart import NotAllowedError

ARGS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": False, "vocab_size": 97, "dropout": 0.0}
WIDE = {**ARGS, "n_embd": 128}  # where width / 64 is another number of heads
TOKENS = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def from_nano(report, nano: NanoGPT) -> float:
    return largest_difference(report.model.eval()(TOKENS).logits, nano(TOKENS))


class TestNanoGPT:
    @pytest.mark.parametrize(
        ("bias", "wrapper"), [(False, ""), (True, ""), (False, "_orig_mod."), (False, "module._orig_mod.")]
    )
    def test_its_checkpoint_as_it_is(self, bias: bool, wrapper: str, tmp_path: Path) -> None:
        args = {**WIDE, "bias": bias}
        nano = NanoGPT(**args)
        weights = {wrapper + name: tensor for name, tensor in nano.state_dict().items()}
        optimizer = torch.optim.AdamW(nano.parameters())
        training = {"n_head": 12, "n_layer": 12, "n_embd": 768, "dataset": "shakespeare", "learning_rate": 1e-3}
        saved = {
            "model": weights,
            "optimizer": optimizer.state_dict(),
            "model_args": args,
            "iter_num": 5,
            "config": training,
        }
        torch.save(saved, tmp_path / "ckpt.pt")
        for source in (tmp_path / "ckpt.pt", torch.load(tmp_path / "ckpt.pt", weights_only=True)):
            report = warm_start("mygpt2", source)
            assert from_nano(report, nano) <= 1e-5
            assert (report.model.config.num_attention_heads, report.model.config.norm_type) == (4, "layernorm")
            # nanoGPT had another GELU before May 2023, and its files do not say which
            assert not report.is_exact and "activation_function='gelu' is assumed" in report.notes[0]
            settled = warm_start("mygpt2", source, overrides={"activation_function": "gelu"})
            assert settled.is_exact and settled.checked.agrees and from_nano(settled, nano) <= 1e-5

    def test_a_config_that_says_gpt2(self, tmp_path: Path) -> None:
        nano = NanoGPT(**ARGS)
        config = transformers.GPT2Config(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=24, activation_function="gelu"
        )
        report = warm_start("mygpt2", nano.state_dict(), config=config)
        assert report.is_exact and from_nano(report, nano) <= 1e-5
        torch.save(nano.state_dict(), tmp_path / "pytorch_model.bin")
        config.save_pretrained(tmp_path)
        report = warm_start("mygpt2", tmp_path)
        assert report.is_exact and from_nano(report, nano) <= 1e-5

    def test_nothing_says_anything(self) -> None:
        nano = NanoGPT(**ARGS)
        report = warm_start("mygpt2", nano.state_dict(), config={"n_head": 4})
        assert not report.is_exact and from_nano(report, nano) <= 1e-5
        assert "norm_type='layernorm'" in report.notes[0] and "activation_function='gelu'" in report.notes[0]
        with pytest.raises(CheckpointError, match="its num_attention_heads is not known"):
            warm_start("mygpt2", nano.state_dict())

    def test_a_target_that_was_made_before(self) -> None:
        nano = NanoGPT(**ARGS)
        config = mygpt2_config(n_layer=2, n_positions=24, activation_function="gelu")
        target = MyGPT2ForCausalLM(config).eval()
        report = warm_start(target, {"model": nano.state_dict(), "model_args": ARGS})
        assert from_nano(report, nano) <= 1e-5

    def test_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        nano = NanoGPT(**WIDE)
        torch.save(nano.state_dict(), tmp_path / "w.pt")
        assert cli.main(["warm-start", str(tmp_path / "w.pt"), "--to", "mygpt2"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert (
            "num_attention_heads=2" in shown and "set them with --config or --set" in shown and "overrides" not in shown
        )
        sets = [
            "n_head=4",
            "activation_function=gelu",
            "layer_norm_epsilon=1e-5",
            "scale_attn_weights=true",
            "norm_type=layernorm",
        ]
        options = [word for text in [*sets, "scale_attn_by_inverse_layer_idx=false"] for word in ("--set", text)]
        out = tmp_path / "out"
        assert cli.main(["warm-start", str(tmp_path / "w.pt"), "--to", "mygpt2", "--out", str(out), *options]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "assumed" not in shown and "Every step is exact: the target gives the outputs of the source." in shown
        mine = MyGPT2ForCausalLM.from_pretrained(out).eval()
        with torch.no_grad():
            assert largest_difference(mine(TOKENS).logits, nano(TOKENS)) <= 1e-5
        torch.save(NanoGPT(**ARGS).state_dict(), tmp_path / "narrow.pt")
        assert cli.main(["warm-start", str(tmp_path / "narrow.pt"), "--to", "mygpt2"]) != 0
        error = capsys.readouterr().err
        assert "pass --config, or set it with --set" in error and "config=" not in error


@dataclasses.dataclass
class Described:
    hidden_size: int = 32
    num_attention_heads: int = 2
    layer_norm_eps: float = 1e-3
    hidden_act: str = "relu"


FIELDS = dataclasses.asdict(Described())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hyper_parameters", {"lr": 1e-3, **FIELDS}),
        ("hyper_parameters", {"lr": 1e-3, "model": FIELDS, "batch_size": 8}),
        ("args", argparse.Namespace(lr=1e-3, **FIELDS)),
        ("hparams", types.SimpleNamespace(**FIELDS)),
        ("config", Described()),
        ("config", transformers.BertConfig(vocab_size=97, num_hidden_layers=3, intermediate_size=64, max_position_embeddings=64, **FIELDS)),
    ],
)  # fmt: skip
def test_what_is_stored_beside_weights(key: str, value, tmp_path: Path) -> None:
    stock = stock_model("BertForMaskedLM", num_attention_heads=2, layer_norm_eps=1e-3, hidden_act="relu")
    saved = {"state_dict": {f"model.{name}": t for name, t in stock.state_dict().items()}, key: value, "epoch": 1}
    sources = [saved]
    if not dataclasses.is_dataclass(value) and not isinstance(value, transformers.PretrainedConfig):
        torch.save(saved, tmp_path / "last.ckpt")
        sources.append(tmp_path / "last.ckpt")
    for source in sources:
        report = warm_start("mybert", source)
        assert report.is_exact and report.checked.agrees and difference(report.model, stock) <= 1e-5


@pytest.mark.parametrize(("kind", "padding"), [("Roberta", 3), ("Roberta", 0), ("XLMRoberta", 5), ("Camembert", 1)])
def test_roberta_positions_begin_after_its_padding(kind: str, padding: int, tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, pad_token_id=padding,
        max_position_embeddings=20 + padding + 1, type_vocab_size=2 if padding == 3 else 1, initializer_range=0.2,
    )  # fmt: skip
    stock = randomised(getattr(transformers, f"{kind}ForMaskedLM")(config))
    stock.save_pretrained(tmp_path)
    tokens = torch.randint(6, 97, (3, 20))
    mask = torch.ones_like(tokens)
    tokens[1, 12:], mask[1, 12:] = padding, 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    for source, how in ((stock, {}), (tmp_path, {}), (stock.state_dict(), {"config": config})):
        report = warm_start("mybert", source, **how)
        assert report.is_exact and report.checked.agrees and difference(report.model, stock, inputs=inputs) <= 1e-5
        assert report.model.config.max_position_embeddings == 20
    assert difference(MyBertForMaskedLM.from_pretrained(tmp_path), stock, inputs=inputs) <= 1e-5
    bare = {"config": {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": config.layer_norm_eps}}
    if padding != 1:
        assert any(
            "pad_token_id=1 is assumed" in note for note in warm_start("mybert", stock.state_dict(), **bare).notes
        )
    report = warm_start("mybert", stock.state_dict(), overrides={"pad_token_id": padding}, **bare)
    assert report.is_exact and difference(report.model, stock, inputs=inputs) <= 1e-5


HEADS = {
    "GPT2LMHeadModel": ("lm_head.weight", MyGPT2ForCausalLM),
    "BertForMaskedLM": ("cls.predictions.decoder.weight", MyBertForMaskedLM),
    "RobertaForMaskedLM": ("lm_head.decoder.weight", MyBertForMaskedLM),
    "DistilBertForMaskedLM": ("vocab_projector.weight", MyBertForMaskedLM),
}


class TestHeadBesideEmbeddings:
    """transformers 5: a head of other values than the embeddings is used, whatever the config says."""

    def files(self, name: str, folder: Path, tie: bool | None) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        make = roberta if "Roberta" in name else distilbert if "Distil" in name else stock_model
        stock = make(name)
        tensors = {key: tensor.clone() for key, tensor in stock.state_dict().items()}
        tensors[HEADS[name][0]] = torch.randn(97, 32) * 0.2
        raw = stock.config.to_dict()
        raw.pop("tie_word_embeddings", None)
        raw |= {"architectures": [name]} | ({} if tie is None else {"tie_word_embeddings": tie})
        (folder / "config.json").write_text(json.dumps(raw, default=str))
        torch.save(tensors, folder / "pytorch_model.bin")
        if tie is not False and transformers.__version__ < "5":
            pytest.skip("transformers 4 drops such a head")
        return getattr(transformers, name).from_pretrained(folder).eval(), tensors

    @pytest.mark.parametrize(
        ("name", "tie"), [*((name, True) for name in HEADS), ("GPT2LMHeadModel", None), ("BertForMaskedLM", False)]
    )
    def test_it_counts(self, name: str, tie: bool | None, tmp_path: Path) -> None:
        truth, tensors = self.files(name, tmp_path, tie)
        inputs = {"input_ids": torch.randint(2, 97, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
        kind = "mygpt2" if "GPT2" in name else "mybert"
        for source, how in ((tmp_path, {}), (tensors, {"config": json.loads((tmp_path / "config.json").read_text())})):
            report = warm_start(kind, source, **how)
            assert difference(report.model, truth, inputs=inputs) <= 1e-5
            assert report.checked.agrees and report.is_exact == (tie is False)
            assert tie is False or any("both are stored with different values" in note for note in report.notes)
        mine, loading = HEADS[name][1].from_pretrained(tmp_path, output_loading_info=True)
        assert not mine.config.tie_word_embeddings and not any(loading.values())
        assert difference(mine, truth, inputs=inputs) <= 1e-5

    def test_a_tied_target_is_not_called_exact(self, tmp_path: Path) -> None:
        self.files("GPT2LMHeadModel", tmp_path, True)
        for target in ("mygpt2", MyGPT2ForCausalLM(mygpt2_config())):
            how = {"overrides": {"tie_word_embeddings": True}} if target == "mygpt2" else {}
            report = warm_start(target, tmp_path, **how)
            assert not report.is_exact and report.checked.difference > 0.1 and not report.checked.agrees

    def test_a_bias_of_the_decoder(self, tmp_path: Path) -> None:
        stock = stock_model("BertForMaskedLM")
        tensors = {key: tensor.clone() for key, tensor in stock.state_dict().items()}
        tensors["cls.predictions.decoder.bias"] = torch.randn(97)
        stock.config.architectures = ["BertForMaskedLM"]
        stock.config.save_pretrained(tmp_path)
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        report = warm_start("mybert", tmp_path)
        assert not report.is_exact and "the decoder's is used" in report.notes[0]
        if transformers.__version__ >= "5":
            assert difference(report.model, transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()) <= 1e-5

    def test_a_tied_pair_under_the_heads_name(self) -> None:
        stock = stock_model("GPT2LMHeadModel")
        tensors = {name: tensor for name, tensor in stock.state_dict().items() if "wte" not in name}
        for how in ({"config": stock.config}, {"config": {"n_head": 4}}):
            report = warm_start("mygpt2", tensors, **how)
            assert difference(report.model, stock) <= 1e-5 and not report.totals["new"]["tensors"]


QUANTISED = {
    "fp8": {"attn.c_proj.weight": torch.randn(32, 32).to(torch.float8_e4m3fn), "attn.c_proj.weight_scale_inv": torch.ones(1, 1)},
    "nf4": {
        "attn.c_proj.weight": torch.zeros(512, 1, dtype=torch.uint8), "attn.c_proj.weight.absmax": torch.ones(16),
        "attn.c_proj.weight.quant_map": torch.ones(16), "attn.c_proj.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    },
    "gptq": {"attn.c_proj.qweight": torch.zeros(4, 32, dtype=torch.int32), "attn.c_proj.g_idx": torch.zeros(32, dtype=torch.int32)},
    "awq": {"attn.c_proj.qweight": torch.zeros(32, 4, dtype=torch.int32), "attn.c_proj.qzeros": torch.zeros(1, 4, dtype=torch.int32)},
    "int8": {"attn.c_proj.weight": torch.zeros(32, 32, dtype=torch.int8), "attn.c_proj.SCB": torch.ones(32)},
}  # fmt: skip


@pytest.mark.parametrize("how", [*QUANTISED, "config"])
def test_quantised_sources_are_refused_in_one_sentence(how: str, tmp_path: Path) -> None:
    stock = stock_model("GPT2LMHeadModel")
    tensors = dict(stock.state_dict())
    raw = {**stock.config.to_dict(), "architectures": ["GPT2LMHeadModel"]}
    if how == "config":
        raw["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    else:
        del tensors["transformer.h.0.attn.c_proj.weight"]
        tensors |= {f"transformer.h.0.{name}": tensor for name, tensor in QUANTISED[how].items()}
    (tmp_path / "config.json").write_text(json.dumps(raw, default=str))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    for load in (
        lambda: warm_start("mygpt2", tmp_path),
        lambda: warm_start(MyGPT2ForCausalLM(mygpt2_config()), tensors, config=raw),
        lambda: MyGPT2ForCausalLM.from_pretrained(tmp_path),
    ):
        with pytest.raises(CheckpointError, match=r"is quantised: .*use the model that it was made from") as caught:
            load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrapper", ["model.", "module.model.", "base_model.model.", "net.encoder."])
@pytest.mark.parametrize(
    ("make", "head"),
    [(roberta, "RobertaForMaskedLM"), (roberta, "RobertaForSequenceClassification"), (stock_model, "BertForMaskedLM"),
     (stock_model, "GPT2LMHeadModel"), (distilbert, "DistilBertForMaskedLM")],
)  # fmt: skip
def test_heads_behind_wrappers_without_a_config(make, head: str, wrapper: str) -> None:
    stock = make(head)
    kind = "mygpt2" if "GPT2" in head else "mybert"
    tensors = {wrapper + name: tensor for name, tensor in stock.state_dict().items()}
    report = warm_start(kind, tensors, config={"num_attention_heads": 4})
    inputs = {"input_ids": torch.randint(2, 97, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    assert type(report.model).__name__.endswith(head[head.index("For") :] if "For" in head else "ForCausalLM")
    assert difference(report.model, stock, inputs=inputs) <= 1e-4  # of BERT's kinds, layer_norm_eps is assumed
    assert all(row.kind == "exact" for row in report.rows)
    assert all(row.constant for row in report.rows if row.status == "unused")


def test_a_head_beside_its_wrapped_encoder() -> None:
    stock = roberta("RobertaForTokenClassification")
    parts = {f"net.encoder.{name}": tensor for name, tensor in stock.roberta.state_dict().items()}
    parts |= {f"net.classifier.{name}": tensor for name, tensor in stock.classifier.state_dict().items()}
    report = warm_start("mybert", parts, config=stock.config, head="ForTokenClassification")
    inputs = {"input_ids": torch.randint(2, 97, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    assert report.is_exact and difference(report.model, stock, inputs=inputs) <= 1e-5


def test_a_head_that_roberta_does_not_have() -> None:
    stock = roberta("RobertaModel")
    parts = {f"roberta.{name}": tensor for name, tensor in stock.state_dict().items()}
    parts |= {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    report = warm_start("mybert", parts, config=stock.config, head="ForSequenceClassification")
    assert not report.is_exact and any(
        "its input is assumed to be the pooler's output" in note for note in report.notes
    )


class TestNextToNothingFits:
    def test_gpt1(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        config = transformers.OpenAIGPTConfig(vocab_size=97, n_embd=64, n_layer=2, n_head=2, n_positions=32)
        model = transformers.OpenAIGPTLMHeadModel(config)
        for tensors in (model.state_dict(), model.transformer.state_dict()):
            with pytest.raises(CheckpointError, match="is a GPT-1 checkpoint"):
                warm_start("mygpt2", tensors)
        torch.save(model.state_dict(), tmp_path / "gpt1.pt")
        assert (
            cli.main(["warm-start", str(tmp_path / "gpt1.pt"), "--to", "mygpt2", "--out", str(tmp_path / "out")]) != 0
        )
        assert not (tmp_path / "out").exists() and "GPT-1" in capsys.readouterr().err

    def test_others_are_counted(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        odd = {"transformer.wte.weight": torch.randn(97, 32), "transformer.h.0.attn.c_attn.weight": torch.randn(32, 96)}
        odd |= {f"decoder.{i}.weight": torch.randn(200, 200) for i in range(3)}
        torch.save(odd, tmp_path / "odd.pt")
        how = {"config": {"n_head": 4}}
        with pytest.raises(
            NotAllowedError,
            match=r"6,176 of 126,176 elements \(4\.9%\): \d+ parameters are newly initialised and 3 tensors",
        ) as e:
            warm_start("mygpt2", tmp_path / "odd.pt", **how)
        assert e.value.report.model is None
        assert warm_start("mygpt2", tmp_path / "odd.pt", allow=".", **how).model is not None
        command = ["warm-start", str(tmp_path / "odd.pt"), "--to", "mygpt2", "--set", "n_head=4"]
        assert cli.main(command) != 0 and "--allow '.'" in capsys.readouterr().err
        assert cli.main([*command, "--allow", "."]) == 0

    def test_what_was_asked_for_does_not_count(self) -> None:
        stock = stock_model("GPT2LMHeadModel", n_layer=12, vocab_size=20)
        assert warm_start("mygpt2", stock, overrides={"num_hidden_layers": 1}).model is not None
        assert warm_start("mygpt2", stock, only=["wpe"]).totals["loaded"]["tensors"] == 1


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    stock = stock_model("GPT2LMHeadModel")
    adapted = peft.get_peft_model(stock, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    for module in adapted.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight)
    adapted.save_pretrained(tmp_path / "adapter")
    for source, sentence in ((tmp_path / "adapter", "is an adapter of PEFT"), (adapted, "that is not merged")):
        with pytest.raises(CheckpointError, match=rf"{sentence}.*merge_and_unload\(\)"):
            warm_start("mygpt2", source)
    merged = adapted.merge_and_unload().eval()  # as advised
    merged.save_pretrained(tmp_path / "merged")
    report = warm_start("mygpt2", tmp_path / "merged")
    assert report.is_exact and difference(report.model, merged) <= 1e-5


def test_gamma_beside_weight() -> None:
    stock = stock_model("BertModel")
    tensors = dict(stock.state_dict())
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): torch.zeros(32)
        for name in tensors
        if "LayerNorm.weight" in name
    }
    with pytest.raises(CheckpointError, match=r"both map to.*leave one of them out with skip="):
        warm_start("mybert", tensors | old, config=stock.config)
    for both in (tensors | old, old | tensors):
        report = warm_start("mybert", both, config=stock.config, skip=r"\.gamma$")
        assert difference(report.model, stock) <= 1e-5 and not report.totals["new"]["tensors"]
        assert {row.how for row in report.rows if row.status == "unused"} == {"left out on request"}
    wrapped = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    report = warm_start("mybert", tensors | wrapped, config=stock.config, skip=r"^module\.")
    assert difference(report.model, stock) <= 1e-5


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(92))]


def test_a_tokenizer_with_more_tokens_than_embeddings(tmp_path: Path) -> None:
    stock = stock_model("BertModel")
    for count, noted in ((3, True), (0, False)):
        folder = tmp_path / str(count)
        stock.save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join([*WORDS, *(f"x{i}" for i in range(count))]) + "\n")
        report = warm_start("mybert", folder)
        found = [note for note in report.notes if "the tokenizer has 100 tokens" in note and "97 embeddings" in note]
        assert bool(found) == noted and report.tokenizer is not None


@pytest.mark.parametrize("capital", [False, True])
def test_a_vocabulary_without_a_config(capital: bool, tmp_path: Path) -> None:
    from mymodels.warmstart.vocabulary import load_tokenizer

    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "hello", *(["Hello"] if capital else [])]) + "\n")
    assert load_tokenizer(tmp_path).tokenize("Hello w3") == ["Hello" if capital else "hello", "w3"]
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "encoder.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (tmp_path / "gpt2" / "vocab.bpe").write_text("#version: 0.2\na b\n")
    assert load_tokenizer(tmp_path / "gpt2")("abab").input_ids == [2, 2]

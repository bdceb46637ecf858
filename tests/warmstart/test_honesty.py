"""What is called exact is exact, what is lost is said, what fails leaves things as they were: each a case that once did not."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny import mybert_config, mygpt2_config, stock_gpt2_config
from warmstart.random_stock_models import difference, randomised, roberta, stock_model

from mymodels import (
    MyBertForSequenceClassification,
    MyGPT2Config,
    MyGPT2ForCausalLM,
    MyGPT2ForSequenceClassification,
    cli,
    open_checkpoint,
    warm_start,
)
from mymodels.checkpoints import Checkpoint, CheckpointError
from mymodels.warmstart import NotAllowedError
from mymodels.warmstart.warm_start_model import empty_model


def how_of(report, name: str) -> str:
    return next(row.how for row in report.rows if name in row.names)


class TestExact:
    def test_a_lost_head_bias(self) -> None:
        source = randomised(MyGPT2ForCausalLM(mygpt2_config(lm_head_bias=True)))
        report = warm_start("mygpt2", source, overrides={"lm_head_bias": False})
        assert not report.is_exact and how_of(report, "lm_head.bias").endswith("has no lm_head.bias")

    def test_layers_that_see_another_window(self) -> None:
        types = ["full_attention", "sliding_attention"]
        source = MyGPT2ForCausalLM(mygpt2_config(n_layer=2, sliding_window=3, layer_types=types))
        report = warm_start("mygpt2", source, overrides={"layer_types": types[::-1]})
        assert not report.is_exact and "layer 1 saw 3 tokens and sees all tokens" in report.notes

    def test_what_a_partial_config_leaves_open(self) -> None:
        stock = stock_model("GPT2LMHeadModel", activation_function="relu", layer_norm_epsilon=1e-2)
        report = warm_start("mygpt2", stock.state_dict(), config={"n_head": 4})
        assert not report.is_exact
        assert any("activation_function='gelu_new', layer_norm_epsilon=1e-05" in note for note in report.notes)
        told = {"n_head": 4, "activation_function": "relu", "layer_norm_epsilon": 1e-2}
        report = warm_start("mygpt2", stock.state_dict(), config={**told, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False})  # fmt: skip
        assert report.is_exact and difference(report.model, stock) <= 1e-5

    def test_a_target_tells_what_a_bare_state_dict_does_not(self) -> None:
        stock = stock_model("GPT2LMHeadModel", activation_function="relu")
        target = MyGPT2ForCausalLM(mygpt2_config(activation_function="relu")).eval()
        report = warm_start(target, stock.state_dict())
        assert difference(target, stock) <= 1e-5 and any("activation_function='relu'" in note for note in report.notes)

    @pytest.mark.parametrize(
        "lost", ["transformer.h.1.mlp.c_fc.bias", "transformer.ln_f.bias", "transformer.h.2.ln_2.bias"]
    )
    def test_a_bias_that_is_missing(self, lost: str, tmp_path: Path) -> None:
        stock = stock_model("GPT2LMHeadModel")
        tensors = dict(stock.state_dict())
        del tensors[lost]
        report = warm_start("mygpt2", tensors, config=stock.config)
        assert not report.is_exact and report.totals["new"]["tensors"] == 1
        stock.config.save_pretrained(tmp_path)
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        _, loading = MyGPT2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert len(loading["missing_keys"]) == 1

    def test_layers_that_are_missing(self) -> None:
        stock = stock_model("GPT2LMHeadModel")
        for lost, sentence in ((2, "config says num_hidden_layers=3, its tensors 2"), (1, "has no tensors of layer 1")):
            tensors = {name: tensor for name, tensor in stock.state_dict().items() if f".h.{lost}." not in name}
            with pytest.raises(CheckpointError, match=sentence):
                warm_start("mygpt2", tensors, config=stock.config)
        tensors = {**stock.state_dict(), "transformer.h.300000.ln_1.weight": torch.ones(32)}
        with pytest.raises(CheckpointError, match=r"has no tensors of layer 3|has a tensor of layer 300000"):
            warm_start("mygpt2", tensors, config=stock.config)

    def test_rounding(self) -> None:
        stock = stock_model("GPT2LMHeadModel")
        report = warm_start("mygpt2", stock, dtype="bfloat16")
        assert not report.is_exact and report.totals["loaded"]["tensors"] == 0
        assert "rounded to bfloat16" in how_of(report, "transformer.wte.weight")
        assert not warm_start(MyGPT2ForCausalLM(mygpt2_config()).half(), stock).is_exact

    def test_narrower_and_gated_keeps_the_largest_units(self) -> None:
        stock = stock_model("GPT2LMHeadModel")
        with torch.no_grad():
            for block in stock.transformer.h:
                block.mlp.c_proj.weight[torch.randperm(128)[:88]] *= 1e-8
        report = warm_start("mygpt2", stock, overrides={"mlp_type": "gated", "intermediate_size": 40})
        assert difference(report.model, stock) <= 1e-4

    def test_where_a_text_ends(self) -> None:
        stock = stock_model("GPT2ForSequenceClassification", num_labels=2)
        report = warm_start("mygpt2", stock, overrides={"pad_token_id": 5})
        assert not report.is_exact and any(note.startswith("pad_token_id was 0 and is 5") for note in report.notes)

    def test_a_reinterpreting_switch_in_from_pretrained_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mymodels.warmstart import pretrained as module

        said: list[str] = []
        monkeypatch.setattr(module.logger, "warning", said.append)
        stock_model("GPT2LMHeadModel").save_pretrained(tmp_path)
        MyGPT2ForCausalLM.from_pretrained(tmp_path, num_attention_heads=2, activation_function="relu")
        assert "num_attention_heads was 4 and is 2" in said[0] and "activation_function was 'gelu_new'" in said[0]

    def test_rmsnorm_with_a_tied_head_keeps_the_last_norms_bias(self) -> None:
        report = warm_start(
            "mygpt2", stock_model("GPT2LMHeadModel"), overrides={"norm_type": "rmsnorm", "lm_head_bias": True}
        )
        assert "the norm's bias folded in" in how_of(report, "transformer.ln_f.bias")


class TestStrict:
    @pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForMaskedLM", "BertModel"])
    def test_a_stock_model_passes_in_every_form(self, name: str, tmp_path: Path) -> None:
        stock, kind = stock_model(name), "mygpt2" if "GPT2" in name else "mybert"
        stock.save_pretrained(tmp_path / "folder")
        stock.config.save_pretrained(tmp_path)
        torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
        for source in (stock, tmp_path / "folder", tmp_path / "pytorch_model.bin"):
            report = warm_start(kind, source, strict=True)
            assert report.is_exact and report.totals["unused"]["tensors"] == sum(row.constant for row in report.rows)

    def test_one_pattern_is_one_pattern(self) -> None:
        stock = stock_model("BertModel")
        with pytest.raises(NotAllowedError):
            warm_start("mybert", stock, head="ForMaskedLM", strict=True, allow="wpe")
        report = warm_start("mygpt2", stock_model("GPT2LMHeadModel"), skip="wpe")
        assert report.totals["new"]["tensors"] == 1
        for option in ("skip", "only", "allow"):
            with pytest.raises(CheckpointError, match=rf"{option}='\[' has an invalid regular expression"):
                warm_start("mybert", stock, **{option: "["})


class TestTargets:
    def test_an_error_on_the_way_changes_nothing(self) -> None:
        target = MyGPT2ForCausalLM(mygpt2_config())
        target.model.layers.half()
        before = copy.deepcopy(target.state_dict())
        tensors = dict(stock_model("GPT2LMHeadModel").state_dict())
        tensors["transformer.h.2.ln_2.weight"] = tensors["transformer.h.2.ln_2.weight"].clone()
        tensors["transformer.h.2.ln_2.weight"][0] = 1e6
        with pytest.raises(CheckpointError, match=r"NaN or infinite values in torch\.float16"):
            warm_start(target, tensors)
        assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())

    def test_a_model_from_itself(self) -> None:
        target = MyGPT2ForCausalLM(mygpt2_config(n_layer=2))
        first, second = (layer.mlp.up_proj.weight.clone() for layer in target.model.layers)
        warm_start(target, target, layers=[1, 0])
        assert torch.equal(target.model.layers[0].mlp.up_proj.weight, second)
        assert torch.equal(target.model.layers[1].mlp.up_proj.weight, first)

    def test_a_model_without_data(self) -> None:
        with pytest.raises(
            CheckpointError, match=r"has parameters without data \(meta device, or offloaded\): load it first"
        ):
            warm_start(empty_model(MyGPT2ForCausalLM, mygpt2_config()), stock_model("GPT2LMHeadModel"))

    def test_a_config_that_was_read_from_the_stock_folder(self, tmp_path: Path) -> None:
        stock = stock_model("GPT2LMHeadModel")
        stock.save_pretrained(tmp_path)
        config = MyGPT2Config.from_pretrained(tmp_path)
        for given in (config, tmp_path, stock.config):
            mine = MyGPT2ForCausalLM.from_pretrained(tmp_path, config=given)
            assert difference(mine, stock) <= 1e-5 and mine.config is not given
        assert difference(warm_start(config, tmp_path).model, stock) <= 1e-5
        mine.save_pretrained(tmp_path / "mine")
        assert json.loads((tmp_path / "mine" / "config.json").read_text())["model_type"] == "mygpt2"

    def test_a_subclass_with_its_own_type_argument_and_buffer(self, tmp_path: Path) -> None:
        class OwnConfig(MyGPT2Config):
            model_type = "own-gpt2"

        class Own(MyGPT2ForCausalLM):
            config_class = OwnConfig

            def __init__(self, config, extra: int = 3):
                super().__init__(config)
                self.extra = extra
                self.register_buffer("seen", torch.arange(4.0))

        stock = stock_model("GPT2LMHeadModel")
        stock.save_pretrained(tmp_path)
        mine = Own.from_pretrained(tmp_path, extra=5)
        assert mine.extra == 5 and mine.seen.tolist() == [0, 1, 2, 3] and difference(mine, stock) <= 1e-5
        assert difference(warm_start(Own(OwnConfig(**mygpt2_config().to_dict())).eval(), stock).model, stock) <= 1e-5


def test_every_tensor_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_model("GPT2LMHeadModel").save_pretrained(tmp_path)
    reads: list[str] = []
    original = Checkpoint.__getitem__
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: reads.append(name) or original(self, name))
    MyGPT2ForCausalLM.from_pretrained(tmp_path)
    for name in open_checkpoint(tmp_path):
        assert reads.count(name) <= (3 if "c_attn" in name else 1), name  # q, k and v each read the fused one


class TestFromPretrained:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        stock = stock_model("GPT2LMHeadModel")
        stock.config.output_hidden_states = True
        stock.save_pretrained(tmp_path / "stock")
        return tmp_path / "stock"

    def test_arguments_mean_what_they_mean_in_the_library(self, folder: Path) -> None:
        theirs, loading = transformers.GPT2LMHeadModel.from_pretrained(
            folder, output_loading_info=True, dtype="bfloat16"
        )
        mine, ours = MyGPT2ForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="bfloat16")
        assert {name: type(value) for name, value in ours.items()} == {name: type(loading[name]) for name in ours}
        assert mine.config.dtype == theirs.config.dtype == torch.bfloat16
        assert mine.config.output_hidden_states
        generation = transformers.GenerationConfig(max_new_tokens=3)
        how = {
            "use_kernels": False,
            "state_dict": None,
            "low_cpu_mem_usage": True,
            "trust_remote_code": True,
            "token": False,
        }
        mine = MyGPT2ForCausalLM.from_pretrained(folder, generation_config=generation, output_attentions=True, attn_implementation="eager", **how)  # fmt: skip
        assert mine.generation_config.max_new_tokens == 3 and mine.config.output_attentions

    def test_automatic_places_count_in_the_wanted_dtype(self, folder: Path) -> None:
        size = sum(info.nbytes for info in open_checkpoint(folder).info.values()) // 2
        mine = MyGPT2ForCausalLM.from_pretrained(
            folder, device_map="auto", dtype="bfloat16", max_memory={"cpu": int(1.5 * size)}
        )
        assert all(not parameter.is_meta for parameter in mine.parameters())

    def test_no_config_is_no_random_model(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"has no config\.json: pass config=, or use mymodels\.warm_start"):
            MyGPT2ForCausalLM.from_pretrained(folder)

    def test_another_head_is_unexpected_as_in_the_library(self, tmp_path: Path) -> None:
        stock_model("BertForPreTraining").save_pretrained(tmp_path)
        theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)[1]["unexpected_keys"]
        from mymodels import MyBertForMaskedLM

        assert set(MyBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)[1]["unexpected_keys"]) == set(
            theirs
        )


class TestSources:
    def test_nanogpt_has_linear_layers(self) -> None:
        stock = stock_model("GPT2LMHeadModel")
        linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        tensors = {name: tensor.t() if name.endswith(linear) else tensor for name, tensor in stock.state_dict().items()}
        report = warm_start(
            "mygpt2", {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, config=stock.config
        )
        assert difference(report.model, stock) <= 1e-5
        assert "transposed" not in how_of(report, "_orig_mod.transformer.h.0.mlp.c_fc.weight")

    def test_wrapped_models_and_loaded_training_checkpoints(self) -> None:
        stock = stock_model("GPT2LMHeadModel")
        report = warm_start("mygpt2", torch.nn.DataParallel(stock))
        assert report.is_exact and difference(report.model, stock) <= 1e-5
        loaded = {
            "model": stock.state_dict(),
            "epoch": 1,
            "optimizer": torch.optim.AdamW(stock.parameters()).state_dict(),
        }
        assert difference(warm_start("mygpt2", loaded, config=stock.config).model, stock) <= 1e-5

    def test_a_config_says_more_rows_than_there_are(self) -> None:
        stock = stock_model("GPT2LMHeadModel")
        stock.config.vocab_size = 100
        report = warm_start("mygpt2", stock)
        assert report.model.config.vocab_size == 97
        assert any("says vocab_size=100, its tensors 97, which is used" in note for note in report.notes)

    def test_roberta_without_a_config_has_robertas_epsilon(self) -> None:
        stock = roberta("RobertaModel")
        report = warm_start("mybert", stock.state_dict(), config={"num_attention_heads": 4})
        assert report.model.config.layer_norm_eps == 1e-5 and report.model.config.pad_token_id == 1

    def test_the_generation_config_comes_along(self, tmp_path: Path) -> None:
        stock = stock_model("GPT2LMHeadModel")
        stock.generation_config.update(repetition_penalty=1.5)
        stock.save_pretrained(tmp_path)
        assert warm_start("mygpt2", tmp_path).model.generation_config.repetition_penalty == 1.5

    @pytest.mark.parametrize(
        ("source", "how", "sentence"),
        [
            (5, {}, "a int cannot be a source: pass a path, a Hub repo's id, a model or a state dict"),
            ({1: torch.zeros(2)}, {}, "holds a Tensor at 1, which is not a named tensor"),
            ({"a": torch.eye(3).to_sparse()}, {}, r"tensor 'a' is torch\.sparse_coo: make it dense"),
            (None, {"config": "gpt2"}, r"config= is a str: pass the source's config"),
            (None, {"layers": 5, "overrides": {"n_layer": 2}}, "layers=5 is none of every, first, last or a list"),
            (None, {"rename": {"(": ""}}, "is not a valid regular expression"),
            (None, {"overrides": {"num_key_value_heads": True}}, "num_key_value_heads=True should be like 12"),
            (None, {"overrides": {"n_layer": "abc"}}, "num_hidden_layers"),
            (None, {"config": {"n_head": "4"}}, "no model can be built from its config and tensors"),
            (None, {"config": {"n_head": 0}}, "no model can be built from its config and tensors|num_attention_heads"),
        ],
    )  # fmt: skip
    def test_one_sentence(self, source, how: dict, sentence: str) -> None:
        source = stock_model("GPT2LMHeadModel").state_dict() if source is None else source
        with pytest.raises(ValueError, match=sentence) as caught:
            warm_start("mygpt2", source, **{"config": {"n_head": 4}, **how})
        assert "\n" not in str(caught.value)


def test_the_command_takes_a_config_and_writes_nothing_in_vain(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stock = stock_model("GPT2LMHeadModel")
    torch.save({"model": stock.state_dict(), "epoch": 3}, tmp_path / "run.pt")
    (tmp_path / "c.json").write_text(json.dumps({"n_head": 4}))
    command = ["warm-start", str(tmp_path / "run.pt"), "--to", "mygpt2", "--json", str(tmp_path / "report.json")]
    assert cli.main(command) == 1 and "num_attention_heads is not known: pass --config" in capsys.readouterr().err
    command += ["--config", str(tmp_path / "c.json")]
    (tmp_path / "file").write_text("dear")
    for wrong in (
        ["--out", str(tmp_path / "file")],
        ["--max-shard-size", "bogus"],
        ["--skip", "["],
        ["--set", "n_layer=2.5"],
    ):
        assert cli.main([*command, *wrong]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "report.json").exists()
    assert cli.main(command) == 0 and (tmp_path / "report.json").is_file()


def test_a_head_of_ones_own_is_another_head() -> None:
    report = warm_start(MyBertForSequenceClassification(mybert_config()).eval(), stock_model("BertForMaskedLM"))
    assert how_of(report, "cls.predictions.bias") == "MyBertForSequenceClassification has another head"
    report = warm_start(
        MyGPT2ForSequenceClassification(mygpt2_config(num_labels=2)).eval(), stock_model("GPT2LMHeadModel")
    )
    assert how_of(report, "score.weight").startswith("kept as the model had it")
    assert stock_gpt2_config().n_layer == 3

"""Modules as people write them become models of transformers with the same outputs, their files untouched."""

import importlib.util
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from adopting.cases import AUTHORS, CASES, job
from safetensors.torch import load_file

from mymodels.adopting.examine import examine
from mymodels.adopting.make_folder import _job
from mymodels.hub.static import static_checks


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """By file: what was found out, and the folder it was written to."""
    found = {}
    for file, (name, config, _) in CASES.items():
        out = tmp_path_factory.mktemp(f"adopted_{file}")
        found[file] = examine(job(AUTHORS / f"{file}.py", name, config), out), out
        (out / "source").rename(out / f"source_{file}")
    return found


def load(out: Path, file: str, auto_class: str):
    folder = out / f"source_{file}"
    model, loading = getattr(transformers, auto_class).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values()), loading
    return model.eval()


@pytest.mark.parametrize("file", CASES)
class TestEach:
    def test_the_author_s_file_is_untouched_and_the_auto_class_is_right(self, examined: dict, file: str) -> None:
        found, out = examined[file]
        assert (out / f"source_{file}" / f"{file}.py").read_bytes() == (AUTHORS / f"{file}.py").read_bytes()
        assert found["auto_class"] == CASES[file][2]

    @torch.no_grad()
    def test_outputs_are_those_of_the_author_s_module(self, examined: dict, file: str) -> None:
        """`outputs.safetensors` was made by the author's class itself, before there was a wrapper."""
        _, out = examined[file]
        model = load(out, file, CASES[file][2])
        outputs = model(**load_file(out / "inputs.safetensors"))
        for name, want in load_file(out / "outputs.safetensors").items():
            assert torch.equal(outputs[name], want), name
        plain = model(**load_file(out / "inputs.safetensors"), return_dict=False)
        assert isinstance(plain, tuple) and torch.equal(plain[0], next(iter(outputs.values())))

    def test_an_unknown_argument_is_refused_and_not_ignored(self, examined: dict, file: str) -> None:
        _, out = examined[file]
        model = load(out, file, CASES[file][2])
        with pytest.raises(TypeError, match="takes no output_attentions"):
            model(**load_file(out / "inputs.safetensors"), output_attentions=True)

    def test_a_new_model_keeps_the_author_s_initialisation(self, examined: dict, file: str) -> None:
        _, out = examined[file]
        model = load(out, file, CASES[file][2])
        torch.manual_seed(0)
        auto = getattr(transformers, CASES[file][2])
        fresh = auto.from_config(model.config, trust_remote_code=True).state_dict()
        if file in ("bert_cls", "my_gpt2"):  # a PreTrainedModel starts by transformers' own rule
            return
        for name, tensor in model.state_dict().items():
            assert torch.equal(fresh[name], tensor), name

    def test_save_and_load(self, examined: dict, file: str, tmp_path: Path) -> None:
        _, out = examined[file]
        model = load(out, file, CASES[file][2])
        model.save_pretrained(tmp_path / f"again_{file}")
        again = type(model).from_pretrained(tmp_path / f"again_{file}")
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        for name, tensor in model.named_buffers():
            assert torch.equal(dict(again.named_buffers())[name], tensor), name


def author_module(file: str):
    spec = importlib.util.spec_from_file_location(f"of_author_{file}", AUTHORS / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_causal_loss_is_the_author_s_with_shifted_targets(examined: dict) -> None:
    _, out = examined["gpt"]
    model = load(out, "gpt", "AutoModelForCausalLM")
    ids = load_file(out / "inputs.safetensors")["input_ids"]
    want = model.net(ids[:, :-1], ids[:, 1:].contiguous())[1]
    assert abs(model(ids, labels=ids).loss - want) < 1e-6
    labels = ids.clone()
    labels[:, 2] = -100
    kept = [i for i in range(ids.shape[1] - 1) if i + 1 != 2]
    logits = model(ids).logits
    want = torch.nn.functional.cross_entropy(logits[:, kept].flatten(0, 1), ids[:, [i + 1 for i in kept]].flatten())
    assert abs(model(ids, labels=labels).loss - want) < 1e-6


@pytest.mark.parametrize("file", ["gpt", "decoder"])
@torch.no_grad()
def test_padding_on_either_side_changes_no_token(examined: dict, file: str) -> None:
    _, out = examined[file]
    model = load(out, file, "AutoModelForCausalLM")
    ids = load_file(out / "inputs.safetensors")["input_ids"]
    alone = model(ids[:1, :4]).logits[0]
    for side in ("left", "right"):
        kept = slice(3, None) if side == "left" else slice(0, 4)
        row, mask = ids.clone(), torch.ones_like(ids)
        mask[0] = 0
        mask[0, kept], row[0, kept] = 1, ids[0, :4]
        assert (model(row, attention_mask=mask).logits[0, kept] - alone).abs().max() < 1e-5
        made = model.generate(row, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        if side == "left":
            want = model.generate(ids[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert torch.equal(made[0, -4:], want[0, -4:])


@torch.no_grad()
def test_an_encoder_is_found_and_runs_once_for_all_steps(examined: dict) -> None:
    found, out = examined["seq2seq"]
    model = load(out, "seq2seq", "AutoModelForSeq2SeqLM")
    source, mask = torch.tensor([[3, 9, 4, 0], [7, 2, 8, 5]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    runs: list[int] = []
    encoder = model.net.transformer.encoder
    inner = encoder.layers[0].linear1.register_forward_hook(lambda part, args, output: runs.append(len(output)))
    got = model.generate(source, attention_mask=mask, max_new_tokens=6, do_sample=False)
    inner.remove()
    assert runs == [2] and "encoder: transformer.encoder" in " ".join(found["derived"])
    beams = model.generate(source, attention_mask=mask, max_new_tokens=6, num_beams=3)
    for row, length in enumerate((3, 4)):
        alone = source[row : row + 1, :length]
        target = torch.full((1, 1), model.config.decoder_start_token_id)
        for _ in range(6):
            target = torch.cat([target, model.net(alone, target)[:, -1:].argmax(-1)], 1)
        assert torch.equal(got[row], target[0])
        assert torch.equal(beams[row], model.generate(alone, max_new_tokens=6, num_beams=3)[0])
    assert "forward" not in vars(encoder)


def test_special_tokens_of_the_tokenizer_end_generation(tmp_path: Path) -> None:
    tokens = {"eos_token_id": 5, "bos_token_id": 4, "pad_token_id": 3}
    examine(job(AUTHORS / "gpt.py", "GPT", CASES["gpt"][1], tokens=tokens), tmp_path)
    (tmp_path / "source").rename(tmp_path / "source_ends")
    model = load(tmp_path, "ends", "AutoModelForCausalLM")
    assert {name: getattr(model.generation_config, name) for name in tokens} == tokens
    assert {name: getattr(model.config, name) for name in tokens} == tokens


def test_a_training_checkpoint_brings_weights_and_arguments(tmp_path: Path) -> None:
    author = author_module("gpt")
    torch.manual_seed(7)
    trained = author.GPT(author.GPTConfig(context=16, vocab_size=40, n_layer=1, n_head=2, n_embd=16)).eval()
    optimizer = trained.optimizer(0.1, 1e-3, (0.9, 0.95), "cpu")
    ids = torch.randint(40, (2, 9))
    trained(ids[:, :-1], ids[:, 1:].contiguous())[1].backward()
    optimizer.step()
    state = {f"_orig_mod.{name}": tensor for name, tensor in trained.state_dict().items()}
    beside = {"optimizer": optimizer.state_dict(), "model_args": asdict(trained.config), "iter_num": 3}
    torch.save({"model": state, **beside}, tmp_path / "ckpt.pt")
    found = examine(job(AUTHORS / "gpt.py", "GPT", {}, weights=str(tmp_path / "ckpt.pt"), section="model"), tmp_path)
    (tmp_path / "source").rename(tmp_path / "source_trained")
    model = load(tmp_path, "trained", found["auto_class"])
    assert model.config.n_embd == model.config.hidden_size == 16 and model.config.max_position_embeddings == 16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(model(ids).logits, trained(ids, ids)[0])


def test_what_could_not_be_derived_is_listed(examined: dict) -> None:
    missing = {file: " ".join(found["missing"]) for file, (found, _) in examined.items()}
    assert "cache" in missing["gpt"] and "cache" in missing["seq2seq"] and "training" in missing["my_gpt2"]
    assert "padding" not in missing["encoder"] and "gradient checkpointing" not in missing["bert_cls"]
    changed = " ".join(examined["my_gpt2"][0]["changed"])
    assert "'gpt2' is a family of transformers' own" in changed and "eos_token_id is None" in changed
    config = json.loads((examined["my_gpt2"][1] / "source_my_gpt2" / "config.json").read_text())
    assert config["model_type"] not in ("gpt2", "mygpt2")


def test_buffers_that_the_wrapper_makes_persistent_are_in_the_file(examined: dict, tmp_path: Path) -> None:
    """`gpt.py` registers its causal mask with persistent=False; without the wrapper's line, verify has to refuse it."""
    folder = tmp_path / "without"
    shutil.copytree(examined["gpt"][1] / "source_gpt", folder)
    found = {check.name: check.status for check in static_checks(folder)}
    assert found["buffers"] == "ok"
    modeling = folder / "modeling_gpt_hub.py"
    lines = modeling.read_text().split("\n")
    kept = [line.replace("module._non_persistent_buffers_set.clear()", "pass") for line in lines]
    assert kept != lines
    modeling.write_text("\n".join(kept))
    assert {check.name: check.status for check in static_checks(folder)}["buffers"] == "failed"


@pytest.mark.parametrize("file", ["gpt", "my_gpt2", "encoder"])
def test_a_module_in_memory_brings_its_weights_and_what_its_attributes_hold(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(AUTHORS)
    author, (name, config, auto_class) = importlib.import_module(file), CASES[file]
    torch.manual_seed(11)
    if file == "gpt":
        module, given = author.GPT(author.GPTConfig(**config)), {}
    elif file == "my_gpt2":
        module, given = author.MyGPT2Model(transformers.GPT2Config(**config)), {}
    else:  # its constructor keeps one of its arguments only
        module, given = author.Tagger(**config), {"vocab": config["vocab"]}
    made = _job(module, tmp_path, None, given)
    found = examine(job(made["file"], name, made["config"], weights=made["weights"]), tmp_path)
    (tmp_path / "source").rename(tmp_path / f"source_memory_{file}")
    model = load(tmp_path, f"memory_{file}", found["auto_class"])
    assert found["auto_class"] == auto_class
    for key, tensor in module.state_dict().items():
        assert torch.equal(model.net.state_dict()[key], tensor), key

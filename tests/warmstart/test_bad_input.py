"""What is wrong with a source is said in one sentence, before anything is allocated, changed or written."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
import warm_python
from safetensors.torch import load_file, save_file
from tiny import mygpt2_config
from warmstart.random_stock_models import stock_model

from mymodels import MyGPT2ForCausalLM, cli, warm_start
from mymodels.checkpoints import CheckpointError
from mymodels.warmstart import NotAllowedError, warm_start_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stock_model("GPT2LMHeadModel").save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def refused(source, sentence: str, **how) -> None:
    """Refused in one sentence, with a model as with a config; the model stays what it was."""
    model = MyGPT2ForCausalLM(mygpt2_config())
    before = copy.deepcopy(model.state_dict())
    for target in (model, model.config, "mygpt2"):
        with pytest.raises((CheckpointError, FileNotFoundError), match=sentence) as caught:
            warm_start(target, source, **how)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def damage(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(value: float, folder: Path) -> None:
    def spoil(tensors: dict) -> None:
        tensors["transformer.h.2.mlp.c_fc.weight"][3, 4] = value

    refused(
        damage(folder, spoil), r"gpt2: 'transformer\.h\.2\.mlp\.c_fc\.weight' has NaN or infinite values .*diverged"
    )
    assert warm_start("mygpt2", folder, skip=[r"h\.2\.mlp\.c_fc"]).model is not None


def test_a_value_too_large_for_the_wanted_dtype(folder: Path) -> None:
    def enlarge(tensors: dict) -> None:
        tensors["transformer.wpe.weight"][0, 0] = 1e6

    damage(folder, enlarge)
    with pytest.raises(CheckpointError, match=r"'transformer.wpe.weight' has NaN or infinite values in torch.float16"):
        warm_start("mygpt2", folder, dtype="float16")
    half = MyGPT2ForCausalLM(mygpt2_config()).half()
    before = copy.deepcopy(half.state_dict())
    with pytest.raises(CheckpointError, match=r"has NaN or infinite values in torch.float16"):
        warm_start(half, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in half.state_dict().items())


def test_truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(folder, r"model\.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_quantised(dtype: torch.dtype, folder: Path) -> None:
    def quantise(tensors: dict) -> None:
        tensors["transformer.h.0.attn.c_attn.weight"] = torch.ones(32, 96, dtype=dtype)

    refused(
        damage(folder, quantise),
        r"tensor 'transformer\.h\.0\.attn\.c_attn\.weight' is [UI]\d+, not floating point: .*quantised",
    )


def test_the_wrong_family(folder: Path, tmp_path: Path) -> None:
    stock_model("BertModel").save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", r"bert is a bert checkpoint, and MyGPT2 has another architecture: use it for MyBert")
    refused(stock_model("BertModel").state_dict(), "is a bert checkpoint, and MyGPT2 has another architecture")
    with pytest.raises(
        CheckpointError, match="is a gpt2 checkpoint, and MyBert has another architecture: use it for MyGPT2"
    ):
        warm_start("mybert", folder)
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    refused(
        tmp_path / "t5", "is a t5 checkpoint, and MyGPT2 has another architecture: MyGPT2 starts from GPT-2 weights"
    )
    refused({"a.weight": torch.zeros(2)}, r"has tensor names of no known family \(.*such as 'a.weight'")


def test_doubled_names() -> None:
    tensors = dict(stock_model("GPT2LMHeadModel").state_dict())
    tensors["transformer.h.0.ln_1.weight"] = tensors["transformer.h.0.ln_1.weight"].clone()
    refused(
        tensors | {"module.transformer.h.0.ln_1.weight": torch.ones(32)},
        r"are both 'transformer\.h\.0\.ln_1\.weight' without wrappers",
    )
    refused(
        tensors | {"h.0.ln_1.weight": torch.ones(32)},
        r"'transformer\.h\.0\.ln_1\.weight' and 'h\.0\.ln_1\.weight' both map to",
    )


def test_what_is_no_source(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "there is no file or folder .*nothing")
    refused({"epoch": 3}, r"holds a int at 'epoch', which is not a named tensor: pass the state dict")
    refused({"h.0.attn.c_attn.weight": torch.zeros(2, 2, device="meta")}, "is on the meta device and has no data")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty holds no checkpoint")


def test_impossible_wishes(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="layers='best' is none of every, first, last"):
        warm_start("mygpt2", folder, overrides={"num_hidden_layers": 2}, layers="best")
    with pytest.raises(CheckpointError, match="widen='stretch' is none of pad, split"):
        warm_start("mygpt2", folder, overrides={"intermediate_size": 200}, widen="stretch")
    with pytest.raises(CheckpointError, match=r"MyGPT2Config has no field 'num_layer': did you mean n_layer"):
        warm_start("mygpt2", folder, overrides={"num_layer": 2})
    with pytest.raises(ValueError, match=r"num_key_value_heads=3, but it must be a divisor"):
        warm_start("mygpt2", folder, overrides={"num_key_value_heads": 3})
    with pytest.raises(CheckpointError, match="hidden_size=32, the target 64: the width of a model cannot be changed"):
        warm_start("mygpt2", folder, overrides={"hidden_size": 64})
    with pytest.raises(CheckpointError, match="head='ForTokenClassification': MyGPT2 has Model, ForCausalLM"):
        warm_start("mygpt2", folder, head="ForTokenClassification")
    with pytest.raises(CheckpointError, match="'llama' is not a model of mymodels: warm_start fills mygpt2 and mybert"):
        warm_start("llama", folder)
    with pytest.raises(CheckpointError, match="a dict is neither a model nor a config"):
        warm_start({}, folder)
    with pytest.raises(NotAllowedError, match="too little of it loads into Linear"):
        warm_start(torch.nn.Linear(1, 1), folder)
    with pytest.raises(CheckpointError, match="overrides= changes the config before a model is built"):
        warm_start(MyGPT2ForCausalLM(mygpt2_config()), folder, overrides={"n_layer": 2})
    with pytest.raises(CheckpointError, match="its num_attention_heads is not known: pass config="):
        warm_start("mygpt2", stock_model("GPT2LMHeadModel").state_dict())


def test_more_than_memory_is_refused_before_allocation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start_model, "get_max_memory", lambda: {"cpu": 100_000})
    monkeypatch.setattr(warm_start_model, "load_checkpoint_and_dispatch", lambda *_: pytest.fail("loaded all the same"))
    with pytest.raises(CheckpointError, match=r"0\.0 GB of memory are needed, 0\.0 GB are free: choose fewer layers"):
        warm_start("mygpt2", folder)


def sparse_gpt2(folder: Path, vocab_size: int) -> Path:
    """A checkpoint whose data is a hole in the file."""
    shapes = {"wte.weight": [vocab_size, 10_000], "h.0.attn.c_attn.weight": [10_000, 30_000]}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = {"model_type": "gpt2", "n_head": 100, "n_embd": 10_000, "n_layer": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_large_source_is_counted_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start_model, "get_max_memory", lambda: {"cpu": 4e9})
    with pytest.raises(CheckpointError, match=r"1\d\.\d GB of memory are needed, 4\.0 GB are free"):
        warm_start("mygpt2", sparse_gpt2(tmp_path, 50_000))


def test_a_source_too_large_to_map(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"memory"):
        warm_start("mygpt2", sparse_gpt2(tmp_path, 10_000_000))  # 400 GB


def test_the_command_writes_nothing_when_it_fails(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def spoil(tensors: dict) -> None:
        tensors["transformer.wpe.weight"][0, 0] = float("nan")

    out = tmp_path / "out"
    command = ["warm-start", str(folder), "--to", "mygpt2", "--out", str(out)]
    assert cli.main([*command, "--set", "position_embedding_type=rope", "--strict"]) == 1
    captured = capsys.readouterr()
    assert "has no table" in " ".join(captured.out.split())
    assert captured.err.startswith(
        "mymodels warm-start: strict: 0 parameters are newly initialised and 1 tensors are not used"
    )
    damage(folder, spoil)
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "NaN or infinite" in error
    assert cli.main([*command, "--set", "norm_type"]) == 1
    assert "'norm_type' has no '='" in capsys.readouterr().err
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["gpt2"]


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    sets = [
        "num_key_value_heads=2",
        "norm_type=rmsnorm",
        "tie_word_embeddings=false",
        "sliding_window=None",
        "rope_theta=5e4",
    ]
    command = ["warm-start", str(folder), "--to", "mygpt2", "--out", str(out), "--json", str(report), "--layers", "2,0"]
    options = [word for text in sets for word in ("--set", text)]
    assert (
        cli.main([*command, *options, "--set", "num_hidden_layers=2", "--skip", "wpe", "--max-shard-size", "20KB"]) == 0
    )
    shown = capsys.readouterr().out
    assert (
        "4 key/value heads mean-pooled to 2" in " ".join(shown.split())
        and f"{out}: MyGPT2ForCausalLM with code" in shown
    )
    assert json.loads(report.read_text()) == json.loads((out / "warm_start.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert (config["num_key_value_heads"], config["norm_type"], config["rope_theta"]) == (2, "rmsnorm", 5e4)
    assert config["tie_word_embeddings"] is False and config["sliding_window"] is None
    code = "import sys; sys.modules['mymodels'] = None; from transformers import AutoModelForCausalLM as A; "
    code += f"print(type(A.from_pretrained({str(out)!r}, trust_remote_code=True)).__module__)"
    run = warm_python.run([sys.executable, "-I", "-c", code], check=True)
    assert re.match(r"transformers_modules\.", run.stdout)

"""What a folder's `auto_map` names is what runs if trusted; our classes stand for unchanged code only, by every way in."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import released_code
import torch
from tiny import mygpt2_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import mymodels
from mymodels import MyGPT2Config, MyGPT2ForCausalLM, build_repo, export_model, finetune, predict, train, warm_start
from mymodels.checkpoints import CheckpointError
from mymodels.export.exporting import _load as load_for_export
from mymodels.hub import write_lock
from mymodels.hub.clean_process import CleanRun
from mymodels.released import released
from mymodels.training.load_base import load_base
from mymodels.training.tokenizers import train_gpt2_tokenizer

HUB_REPO = Path(__file__).parents[2] / "hub_repo"
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unchanged") / "ours"
    tokenizer = train_gpt2_tokenizer(["the cat sat on the mat"] * 3, vocab_size=300, model_max_length=64)
    model = MyGPT2ForCausalLM(mygpt2_config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0))
    return build_repo(model, tokenizer, folder, card="# Ours", golden=False)


@pytest.fixture(scope="module")
def negated(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights under code that gives the logits the other sign."""
    folder = tmp_path_factory.mktemp("changed") / "negated"
    shutil.copytree(ours, folder)
    (folder / "manifest.json").unlink()
    code = folder / "modeling_mygpt2.py"
    text = code.read_text()
    begin = text.index("class MyGPT2ForCausalLM")
    assert "return soft_cap(" in text[begin:]
    code.write_text(text[:begin] + text[begin:].replace("return soft_cap(", "return -soft_cap(", 1))
    return folder


def test_auto_classes(ours: Path, negated: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(ours).eval()
    assert type(plain) is MyGPT2ForCausalLM
    with torch.no_grad():
        expected = -plain(IDS).logits
        model = AutoModelForCausalLM.from_pretrained(negated, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules.") and model(IDS).logits.equal(expected)
        config = AutoConfig.from_pretrained(negated, trust_remote_code=True)
        again = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        again.load_state_dict(model.state_dict())
        assert again.eval()(IDS).logits.equal(expected)
        piped = pipeline("text-generation", str(negated), trust_remote_code=True)
        assert piped.model(IDS).logits.equal(expected)
    for way in (AutoConfig, AutoModel, AutoModelForCausalLM, MyGPT2ForCausalLM):
        with pytest.raises(ValueError, match=r"negated has code of its own .*with trust_remote_code=True$"):
            way.from_pretrained(negated)
    with pytest.raises(ValueError, match=r"has code of its own"):  # a config of ours does not help it
        AutoModelForCausalLM.from_pretrained(
            negated, config=MyGPT2Config.from_pretrained(negated), trust_remote_code=True
        )
    shutil.copytree(negated, tmp_path / "negated")  # of the same name, and with the same code of the config
    code = tmp_path / "negated" / "modeling_mygpt2.py"
    code.write_text(code.read_text().replace("return -soft_cap(", "return 2 * soft_cap("))
    with torch.no_grad():
        doubled = AutoModelForCausalLM.from_pretrained(code.parent, trust_remote_code=True).eval()
        assert doubled(IDS).logits.equal(-2 * expected)
    assert AutoTokenizer.from_pretrained(negated)("the cat").input_ids
    assert AutoTokenizer.from_pretrained(negated, trust_remote_code=True)("the cat").input_ids


def test_predict_export_load_and_build(ours: Path, negated: Path, tmp_path: Path) -> None:
    def continued(folder: Path, **how) -> str:
        predict(folder, tmp_path / "lines.txt", tmp_path / "answers.jsonl", text=True, max_new_tokens=5, **how)
        return (tmp_path / "answers.jsonl").read_text()

    (tmp_path / "lines.txt").write_text("the cat\n")

    with pytest.raises(ValueError, match=r"has code of its own.*trust_remote_code=True"):
        continued(negated)
    assert continued(negated, trust_remote_code=True) != continued(ours)

    with pytest.raises(ValueError, match=r"has code of its own.*trust_remote_code=True"):
        export_model(negated, "pt2", tmp_path / "exported")
    traced, _ = load_for_export(negated, None, None, True, False)  # what `export_model` traces
    model = AutoModelForCausalLM.from_pretrained(ours).eval()
    with torch.no_grad():
        assert traced.eval()(IDS).logits.equal(-model(IDS).logits)

        write_lock(negated, tmp_path / "lock")
        locked = mymodels.load(negated, auto_class="AutoModelForCausalLM", lock=tmp_path / "lock")
        assert locked.eval()(IDS).logits.equal(-model(IDS).logits)

    built = build_repo(negated, None, tmp_path / "built", golden=False)
    assert (built / "modeling_mygpt2.py").read_bytes() == (negated / "modeling_mygpt2.py").read_bytes()
    twice = build_repo(built, None, tmp_path / "twice" / "built", golden=False)
    for file in built.iterdir():
        assert file.read_bytes() == (twice / file.name).read_bytes(), file.name


def test_warm_start_and_training(ours: Path, negated: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"negated has code of its own .*, so its weights may mean .*--trust-remote"
    ):
        warm_start("mygpt2", negated)
    assert warm_start("mygpt2", ours).is_exact
    for report in (
        warm_start("mygpt2", negated, trust_remote_code=True),
        warm_start("mygpt2", AutoModelForCausalLM.from_pretrained(negated, trust_remote_code=True)),
        warm_start(type("Own", (MyGPT2ForCausalLM,), {})(AutoConfig.from_pretrained(ours)), ours),
    ):
        assert not report.is_exact and ("own code" in report.notes[0] or "custom code" in report.notes[0])
    with pytest.raises(CheckpointError, match=r"from a folder with its own copy of the code"):
        warm_start(AutoConfig.from_pretrained(negated, trust_remote_code=True), ours)

    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n\n" * 40)
    how = {"task": "lm", "max_steps": 1, "max_length": 8, "golden": False, "report_to": []}
    for more in ({}, {"overrides": {"resid_pdrop": 0.0}}, {"to": "mygpt2"}):
        with pytest.raises(ValueError, match=r"code of its own"):
            finetune(negated, text, tmp_path / "no", **how, **more)
    assert not (tmp_path / "no").exists() and not (tmp_path / "no-checkpoints").exists()
    tuned = finetune(
        negated,
        text,
        tmp_path / "tuned",
        **how,
        overrides={"resid_pdrop": 0.0},
        trust_remote_code=True,
        keep_checkpoints=True,
    )
    assert type(tuned.model).__module__.startswith("transformers_modules.") and tuned.model.config.resid_pdrop == 0.0
    for folder in (tmp_path / "tuned", next((tmp_path / "tuned-checkpoints").glob("checkpoint-*"))):
        assert (folder / "modeling_mygpt2.py").read_bytes() == (negated / "modeling_mygpt2.py").read_bytes()
        assert "_auto_class" not in json.loads((folder / "config.json").read_text())

    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    one = {"max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 2}
    trusted = AutoModelForCausalLM.from_pretrained(negated, trust_remote_code=True)
    train(trusted, rows, output_dir=str(tmp_path / "run"), **one)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    with pytest.raises(ValueError, match=r"checkpoint-1 has code of its own .*: resume with a model of that code"):
        train(
            AutoModelForCausalLM.from_pretrained(ours),
            rows,
            output_dir=str(tmp_path / "run"),
            resume_from_checkpoint=True,
            **one,
        )
    changed = checkpoint / "modeling_mygpt2.py"
    changed.write_text(changed.read_text() + "\n# another\n")
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"modeling_mygpt2\.py is not the code of this MyGPT2ForCausalLM"):
        train(trusted, rows, output_dir=str(tmp_path / "run"), resume_from_checkpoint=str(checkpoint), **one)


def test_what_counts_as_ours(ours: Path, tmp_path: Path) -> None:
    """An edit of any file that `auto_map` reaches counts, and nothing else."""

    def changed(name: str, change) -> Path:
        folder = tmp_path / name
        shutil.copytree(ours, folder)
        change(folder)
        return folder

    def set_config(**fields):
        def change(folder: Path) -> None:
            path = folder / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

        return change

    auto_map = MyGPT2Config.AUTO_MAP
    unchanged = {
        "as it is": lambda folder: None,
        "another file": lambda folder: (folder / "train.py").write_text("raise SystemExit\n"),
        "no code": lambda folder: [file.unlink() for file in folder.glob("*.py")],
        "no auto_map": set_config(auto_map={}),
        "a tokenizer": set_config(auto_map={**auto_map, "AutoTokenizer": ["tokenization_x.X", None]}),
    }
    for name, change in unchanged.items():
        assert type(AutoModelForCausalLM.from_pretrained(changed(name, change))) is MyGPT2ForCausalLM, name
    own = {
        **{
            file: lambda folder, file=file: (folder / file).write_text((folder / file).read_text() + "\n# mine\n")
            for file in ("base.py", "attention.py", "configuration_mygpt2.py")
        },
        "a file is missing": lambda folder: (folder / "base.py").unlink(),
        "an entry more": set_config(auto_map={**auto_map, "AutoModelForTokenClassification": "mine.Mine"}),
        "exchanged": set_config(auto_map={**auto_map, "AutoModel": auto_map["AutoModelForCausalLM"]}),
        "another module": set_config(auto_map={**auto_map, "AutoModelForCausalLM": "mine.Mine"}),
        "a path": set_config(auto_map={**auto_map, "AutoModelForCausalLM": "../mine.Mine"}),
        "no text": set_config(auto_map={**auto_map, "AutoModelForCausalLM": ["modeling_mygpt2.MyGPT2ForCausalLM"]}),
    }
    for name, change in own.items():
        for way in (AutoModelForCausalLM, MyGPT2ForCausalLM):
            with pytest.raises(ValueError, match=r"has code of its own"):
                way.from_pretrained(changed(f"{name} {way.__name__}", change))
    model_only = changed("model only", set_config(auto_map={"AutoModelForCausalLM": "mine.Mine"}))
    with pytest.raises(ValueError, match=r"auto_map names custom code, but no AutoConfig.*: add AutoConfig"):
        AutoModelForCausalLM.from_pretrained(model_only, trust_remote_code=True)


def test_earlier_releases_count(tmp_path: Path) -> None:
    commits = released_code.commits()
    if len(commits) < 2:
        pytest.skip("the history of hub_repo/ is not here")
    for commit in (commits[1], commits[-1]):
        assert released_code.digests_at(commit) <= released(), f"{commit}: run python tests/hub/released_code.py"
    old = tmp_path / "old"
    shutil.copytree(HUB_REPO / "mygpt2", old)
    for file in old.glob("*.py"):
        content = released_code.at(commits[1], f"hub_repo/mygpt2/{file.name}")
        if content is None:  # a newer one
            file.unlink()
        else:
            file.write_bytes(content)
    assert type(AutoModelForCausalLM.from_pretrained(old)) is MyGPT2ForCausalLM
    assert type(AutoModelForCausalLM.from_pretrained(HUB_REPO / "mygpt2")) is MyGPT2ForCausalLM


@pytest.mark.parametrize(
    ("last", "sentence"),
    [
        (
            "mymodels_clean.inputs.NoSuitableInputs: the config has no vocab_size, so no token ids can be generated",
            "the config has no vocab_size, so no token ids can be generated: leave them out (golden=False, --no-golden)",
        ),
        (
            "transformers_modules.x.modeling_x.OddError: /tmp/mymodels-clean-ab12cd34/hf/modules/modeling_x.py is odd",
            "it ended with exit code 1: OddError: modeling_x.py is odd (modeling_x.py:3)",
        ),
    ],
)
def test_an_error_of_build_shows_nothing_of_its_own(
    last: str, sentence: str, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = {"ended": "record", "how": "ended with exit code 1", "last": last, "where": "modeling_x.py:3"}

    @contextlib.contextmanager
    def ended(*args, **kwargs):  # what the clean process reports of such a model
        yield CleanRun([event], "", tmp_path, 0.0)

    monkeypatch.setattr("mymodels.hub.golden.clean_process", ended)
    with pytest.raises(CheckpointError) as refused:
        build_repo(ours, None, tmp_path / "out")
    assert str(refused.value).startswith(f"{tmp_path / 'out'}: golden outputs cannot be recorded, {sentence}")
    assert not (tmp_path / "out").exists()


def test_training_begins_with_a_save(tmp_path: Path) -> None:
    class Unsaved(MyGPT2ForCausalLM):
        def save_pretrained(self, *args, **kwargs):
            raise RuntimeError("no\nway")

    model = Unsaved(mygpt2_config())
    model.forward = None  # nothing is computed before
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    with pytest.raises(ValueError, match=r"^Unsaved cannot be saved, so nothing was trained: no$"):
        train(model, rows, output_dir=str(tmp_path / "run"), max_steps=1)
    assert not (tmp_path / "run").exists()
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n\n" * 40)
    tokenizer = train_gpt2_tokenizer(["the cat sat on the mat"], vocab_size=290, model_max_length=64)
    inside = type("InsideForCausalLM", (MyGPT2ForCausalLM,), {})(mygpt2_config(vocab_size=len(tokenizer)))
    with pytest.raises(
        ValueError, match=r"InsideForCausalLM cannot be saved, so nothing was trained: .*not at the top level"
    ):
        finetune(inside, text, tmp_path / "tuned", task="lm", tokenizer=tokenizer, max_length=8)
    assert not list(tmp_path.glob("tuned*"))


def test_a_model_in_memory_may_be_called_anything(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """What is trained is the head that its class derives from; a module that is not a model of transformers is refused."""
    tokenizer = train_gpt2_tokenizer(["the cat sat on the mat"], vocab_size=290, model_max_length=64)
    model = type("Own", (MyGPT2ForCausalLM,), {})(mygpt2_config(vocab_size=len(tokenizer)))
    assert load_base(model, "lm", tokenizer=tokenizer).kind == "causal"
    with pytest.raises(ValueError, match=r"^Own is not a model for --task classification"):
        load_base(model, "classification", tokenizer=tokenizer)

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

    for task in ("lm", "classification"):
        with pytest.raises(ValueError, match=r"^finetune takes a transformers model or the name of one, and Plain is"):
            finetune(Plain(), "sample_text", tmp_path / "tuned", task=task, tokenizer=tokenizer)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    with pytest.raises(ValueError, match=r"^the data have no entry that Plain\.forward takes"):
        train(Plain(), rows, max_steps=1)

    recwarn.clear()
    train(model, rows, output_dir=str(tmp_path / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=2)
    told = {str(one.message) for one in recwarn if "without its code" in str(one.message)}
    assert len(told) == 1 and "trial" not in told.pop()  # the same at each save, so that Python shows it once

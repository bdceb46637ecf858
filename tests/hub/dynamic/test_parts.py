"""The parts of `verify`: golden files, releases, checks of what a process reported, tables, the card, the pytest helper."""

import io
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from faults import code
from repos_to_verify import tiny_repo
from rich.console import Console
from safetensors.torch import save_file
from tiny import MODERN, mybert_config, mygpt2_config, stock_gpt2_config
from torch import nn
from transformers import GPT2Model, LlamaConfig, LlamaModel

from mymodels import MyBertModel, MyGPT2ForCausalLM, cli
from mymodels.checkpoints import check_checkpoint, write_manifest
from mymodels.checkpoints.checkpoint import CheckpointError
from mymodels.hub import Verification, record_golden, verify
from mymodels.hub.checks import Check
from mymodels.hub.clean_process import CleanRun, clean_process
from mymodels.hub.engine_readiness import serving_checks
from mymodels.hub.golden import read_golden
from mymodels.hub.isolated import facts, side_effects
from mymodels.hub.releases import RELEASES, install, resolve
from mymodels.hub.reporting import show_verification, verdict, write_matrix
from mymodels.hub.results_to_checks import DYNAMIC, checks_of_run
from mymodels.hub.testing import check_repo


def names(checks: list[Check]) -> list[tuple[str, str]]:
    return [(check.name, check.status) for check in checks]


# ---- golden files


def test_recording_twice_gives_the_same_bytes_and_keeps_the_manifest_true(tmp_path: Path) -> None:
    folder = tiny_repo(tmp_path / "repo")
    write_manifest(folder)
    first = record_golden(folder).read_bytes()
    assert not check_checkpoint(folder, full=True)
    with pytest.raises(CheckpointError, match=r"has golden\.safetensors already: remove it first"):
        record_golden(folder)
    (folder / "golden.safetensors").unlink()
    assert record_golden(folder).read_bytes() == first and not check_checkpoint(folder, full=True)
    golden = read_golden(folder / "golden.safetensors")
    assert golden.inputs["input_ids"].shape == golden.inputs["attention_mask"].shape == (2, 11)
    assert golden.inputs["attention_mask"].tolist() == [[1] * 11, [0] * 4 + [1] * 7]
    assert set(golden.outputs) == {"AutoModelForCausalLM", "AutoModel"}
    assert golden.outputs["AutoModelForCausalLM"]["logits"].shape == (18 * 97,)  # what is padding is left out
    assert golden.greedy["AutoModelForCausalLM"].shape == (2, 11 + 8)
    assert golden.configured["AutoModelForCausalLM"].shape[1] <= 11 + 8
    assert golden.last_inputs["input_ids"].shape == (1, 64)  # up to the last position
    assert golden.last_outputs["AutoModel"]["last_hidden_state"].shape == (8 * 32,)
    assert golden.made["tolerance"] == 1e-5 and golden.made["dtype"] == "float32" and golden.made["transformers"]


@pytest.mark.slow
def test_golden_inputs_of_the_authors_own(tmp_path: Path) -> None:
    folder = tiny_repo(tmp_path / "repo")
    record_golden(folder, inputs={"input_ids": torch.arange(5)[None]})
    golden = read_golden(folder / "golden.safetensors")
    assert list(golden.inputs) == ["input_ids"] and golden.outputs["AutoModel"]["last_hidden_state"].shape == (5 * 32,)


@pytest.mark.slow
def test_nothing_is_recorded_for_an_incomplete_folder(tmp_path: Path) -> None:
    folder = tiny_repo(tmp_path / "repo")
    code(before="raise RuntimeError('not today')\n")(folder)
    with pytest.raises(CheckpointError, match=r"cannot be recorded.*RuntimeError: not today"):
        record_golden(folder)
    assert not (folder / "golden.safetensors").exists()


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"a": torch.ones(1)}, {"golden": "{}"}),
        ({"input.x": torch.ones(1)}, None),
        ({"input.x": torch.ones(1)}, {"golden": '{"tolerance": 1e-5}'}),
        ({"output.x": torch.ones(1)}, {"golden": '{"tolerance": 1e-5}'}),
        ({"output.x.y": torch.ones(1)}, {"golden": '{"tolerance": "much"}'}),
    ],
)
def test_something_else_is_no_golden_file(tensors: dict, metadata: dict | None, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "golden.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"golden\.safetensors: .*record it again"):
        read_golden(tmp_path / "golden.safetensors")


# ---- releases


def test_releases_by_minor_patch_and_word() -> None:
    assert [release.transformers for release in resolve("5.0, 4.57")] == ["4.57.6", "5.0.0"]
    assert resolve("4.57.3")[0] == ("4.57.3", "0.36.2", "0.22.2")
    assert [release.transformers for release in resolve(["latest"])] == [list(RELEASES.values())[-1][0]]
    assert [release.transformers for release in resolve("all,5.3")] == [row[0] for row in RELEASES.values()]
    for wrong in ("4.55", "6.0", "five", "5.0.0.1", ""):
        with pytest.raises(ValueError, match=r"not a supported transformers release: name one from 4\.56 to 5\.\d+"):
            resolve(wrong)
    assert all(row[0].startswith(f"{minor}.") for minor, row in RELEASES.items())


def test_a_release_that_pip_cannot_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match=r"pip cannot install transformers 5\.0\.0: ERROR"):
        install(resolve("5.0")[0], tmp_path)
    assert not list(tmp_path.iterdir())


# ---- checks of a run


def run_of(*events: dict, failure: str = "") -> CleanRun:
    return CleanRun([{"versions": {}}, *events], failure, Path(), 0.0)


def crash(stage: str, where: str, how: str = "crashed with SIGSEGV") -> dict:
    return {"ended": stage, "how": how, "last": "Fatal Python error", "where": where}


def test_one_crash_is_reported_once(tmp_path: Path) -> None:
    events = [
        {"begin": "forward", "where": "AutoModel"},
        crash("outputs", "m.py:7"),
        {"begin": "side effects", "where": "forward"},
        crash("side effects", "m.py:7"),
        {"begin": "backward", "where": "AutoModel"},
        crash("training", "m.py:9"),
    ]
    checks = checks_of_run(run_of(*events), tmp_path, "")
    told = [check for check in checks if "not run, because the process of its stage" not in check.what]
    assert names(told) == [("side effects", "skipped"), ("forward", "failed"), ("backward", "skipped")]
    assert "ended for the same reason as that of 'forward'" in checks[0].what
    events[0] = {"begin": "reload", "where": "AutoModel"}  # nothing that the others depend on
    told = [check for check in checks_of_run(run_of(*events), tmp_path, "") if "not run" not in check.what]
    assert names(told) == [("side effects", "skipped"), ("reload", "failed"), ("backward", "failed")]


@pytest.mark.parametrize(
    ("stage", "begun", "left_out"),
    [
        (
            "outputs",
            ("padding", "AutoModelForCausalLM"),
            [("inputs_embeds", ""), ("last position", ""), ("eager = sdpa", "")],
        ),
        ("placement", ("meta", ""), [("device map", ""), ("no split", "")]),
        ("training", ("backward", ""), [("gradient checkpointing", ""), ("optimizer step", ""), ("resize", "")]),
        ("workers", ("pickle", ""), [("forked worker", ""), ("spawned worker", "")]),
        (
            "side effects",
            ("side effects", "import and load"),
            [("side effects", "forward"), ("side effects", "training and generation")],
        ),
        ("other classes", ("load", "AutoModel"), []),
        ("reload", ("reload", ""), []),
    ],
)
def test_what_comes_after_a_crash_in_its_stage_is_named(
    stage: str, begun: tuple, left_out: list, tmp_path: Path
) -> None:
    folder = tiny_repo(tmp_path / "repo")
    events = [{"begin": begun[0], "where": begun[1]}, crash(stage, "m.py:7")]
    checks = checks_of_run(run_of(*events), folder, "AutoModelForCausalLM")
    assert [check.name for check in checks if check.status == "failed"] == [begun[0]]
    skipped = [check for check in checks if check.status == "skipped"]
    assert [(check.name, check.where) for check in skipped] == left_out
    assert all(f"ended at {begun[0]!r}" in check.what for check in skipped)


def test_of_a_crash_in_forward_only_what_the_folder_has_is_left_out(tmp_path: Path) -> None:
    folder = tiny_repo(tmp_path / "repo")
    events = [{"begin": "forward", "where": "AutoModelForCausalLM"}, crash("outputs", "m.py:7")]
    found = {check.name for check in checks_of_run(run_of(*events), folder, "") if check.status == "skipped"}
    assert {"save", "beams", "padding", "eager = sdpa"} <= found
    assert not found & {"golden", "generation", "tokenizer output", "pipeline", "processor"}
    (folder / "tokenizer.json").write_text("{}")
    (folder / "golden.safetensors").touch()
    found = {check.name for check in checks_of_run(run_of(*events), folder, "") if check.status == "skipped"}
    assert {"golden", "generation", "tokenizer output", "pipeline"} <= found


def test_a_model_that_hangs_is_waited_for_once(tmp_path: Path) -> None:
    events = [{"begin": "forward", "where": ""}, crash("outputs", "m.py:7", "did not end within 5 s")]
    events += [{"not_run": stage} for stage in ("side effects", "other classes", "training")]
    checks = checks_of_run(run_of(*events), tmp_path, "")
    told = [check for check in checks if "not run, because the process of its stage" not in check.what]
    assert {check.name: check.status for check in told if check.name != "load"} == {
        "forward": "failed",
        "side effects": "skipped",
        "training loss": "skipped",
    }
    assert all(check.what == "not run because 'forward' failed" for check in told if check.status == "skipped")


def test_a_stage_that_ends_early_fails_the_check_it_was_at(tmp_path: Path) -> None:
    ended = {"ended": "workers", "how": "was killed", "last": "", "where": ""}
    checks = checks_of_run(run_of({"begin": "pickle", "where": "AutoModel"}, ended), tmp_path, "AutoModel")
    assert checks == [Check("pickle", "failed", "the process was killed", "AutoModel", DYNAMIC["pickle"])]
    assert names(checks_of_run(run_of(ended), tmp_path, "AutoModel")) == [("pickle", "failed")]
    assert names(checks_of_run(run_of(ended | {"ended": "export"}, {"export": "x"}), tmp_path, "")) == [
        ("clean process", "failed")
    ]


OTHER = {"check": "no such", "status": "ok", "what": "", "where": ""}
GREAT = {"check": "load", "status": "great", "what": "", "where": ""}
WRITES = {"attempt": "world peace", "what": "", "where": ""}


def test_what_a_report_says_cannot_reach_the_terminal_as_a_command(tmp_path: Path) -> None:
    event = {"check": "load", "status": "failed", "what": "\x1b[2Jall\nis well", "where": "a\rb"}
    (check,) = checks_of_run(run_of(event), tmp_path, "")
    assert (check.what, check.where) == (r"\x1b[2Jall is well", "a b")


def test_a_report_that_the_code_meddled_with_is_a_failure_and_raises_nothing(tmp_path: Path) -> None:
    for forged in (
        {"check": "no such"},
        {"check": []},
        {"begin": "load"},
        {"loaded": 3},
        {"check": "load", "status": "ok"},
        OTHER,
        GREAT,
        WRITES,
    ):
        (check,) = checks_of_run(run_of(forged), tiny_repo(tmp_path / str(len(list(tmp_path.iterdir())))), "AutoModel")
        assert (check.name, check.status) == ("clean process", "failed") and "is invalid" in check.what


def test_what_follows_from_wrong_weights_is_no_news(tmp_path: Path) -> None:
    def outcome(name: str) -> dict:
        return {"check": name, "status": "failed", "what": "wrong", "where": ""}

    run = run_of(outcome("forward"), outcome("golden"), outcome("network"), outcome("tied"))
    assert names(checks_of_run(run, tmp_path, "")) == [
        ("tied", "failed"),
        ("forward", "skipped"),
        ("golden", "skipped"),
        ("network", "failed"),
    ]


def test_a_folder_without_a_config_fails_and_raises_nothing(tmp_path: Path) -> None:
    (checks,) = verify(tmp_path).runs.values()
    assert names(checks) == [("load", "failed")] and "has no config.json" in checks[0].what
    (tmp_path / "config.json").write_text("[")
    (checks,) = verify(tmp_path).runs.values()
    assert names(checks) == [("load", "failed")] and "not valid JSON" in checks[0].what


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tiny_repo(tmp_path / "repo")
    (tmp_path / "secret").write_text("x")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    with clean_process(folder, ["outputs"]) as run:
        assert "leads out of the folder" in run.failure and not run.events


# ---- serving

FACTS = {
    "forward": ["input_ids", "inputs_embeds", "position_ids"],
    "forward_kwargs": True,
    "attention_backend": True,
    "attention": [
        {
            "path": "a",
            **dict.fromkeys(("layer_idx", "scaling", "is_causal", "kwargs", "interface"), True),
            "children": [],
        }
    ],
    "fused": ["QKV"],
    "linears": ["x"],
    "conv1d": [],
    "heads": ["model", "lm_head"],
    "input_embeddings": True,
    "tp_plan": True,
    "config": ["num_attention_heads", "hidden_size"],
}


@pytest.mark.parametrize(
    ("change", "engine", "reason"),
    [
        ({"attention_backend": False}, "vLLM", "_supports_attention_backend"),
        ({"forward_kwargs": False}, "SGLang", r"no \*\*kwargs"),
        ({"heads": ["model", "out"]}, "vLLM", "the head is none of classifier, lm_head, score"),
        ({"config": []}, "SGLang", "the config has no num_attention_heads, hidden_size"),
        ({"forward": ["input_ids"]}, "vLLM", "does not name inputs_embeds, position_ids"),
        ({"linears": []}, "PEFT", r"no nn\.Linear"),
        ({"tp_plan": False}, "tensor parallel", "base_model_tp_plan"),
        ({"attention": []}, "vLLM", "no class with Attention"),
        ({"attention": [FACTS["attention"][0] | {"interface": False}]}, "vLLM", "ALL_ATTENTION_FUNCTIONS and call it"),
        ({"conv1d": ["c_attn"]}, "vLLM", "c_attn are Conv1D"),
    ],
)
def test_readiness_is_yes_or_no_with_the_reason(change: dict, engine: str, reason: str) -> None:
    how = {"classes": ["AutoModelForCausalLM", "AutoModel"], "custom_code": True, "export": ""}
    assert {check.status for check in serving_checks(FACTS, **how)} == {"ok"}
    found = {check.name: check for check in serving_checks(FACTS | change, **how)}
    assert found[engine].status == "warning" and re.search(reason, found[engine].what), found[engine]
    for forged in (None, {}, FACTS | {"attention": 3}, FACTS | {"heads": [[]]}):
        assert {check.status for check in serving_checks(forged, **how)} == {"skipped"}


# ---- what people see

FOUND = Verification(
    "me/model",
    [Check("auto_map", "ok")],
    {
        "4.57.6": [Check("load", "ok"), Check("golden", "failed", "logits [differ]", "AutoModel", "look")],
        "5.23.0": [Check("load", "ok"), Check("load", "warning"), Check("golden", "ok"), Check("padding", "skipped")],
    },
    [Check("PEFT", "ok", "any of q_proj")],
)


def shown(verification: Verification, width: int = 140, *, terminal: bool = False, every_check: bool = False) -> str:
    file = io.StringIO()
    console = Console(width=width, file=file, force_terminal=terminal, color_system=None)
    show_verification(verification, console, every_check=every_check)
    return file.getvalue()


def test_what_failed_is_shown_first_and_last_with_the_count_of_what_passed() -> None:
    lines = shown(FOUND).splitlines()
    assert lines[:3] == [
        "failed     golden  AutoModel  under transformers 4.57.6",
        "           logits [differ]",
        "           → look",
    ]
    assert lines[3:5] == [
        "warning    load  under transformers 5.23.0",
        "left out   padding  under transformers 5.23.0",
    ]
    assert lines[-4:] == [
        "failed     golden (AutoModel)",
        "warning    load",
        "passed     5 checks; --all lists them",
        "me/model: 1 check failed; left out: padding",
    ]
    table = "\n".join(lines[5:-4])  # of the releases, with what is not ok everywhere
    assert re.search(r"golden +│ ✗ +│ ✓", table) and "padding" in table and "auto_map" not in table
    every = shown(FOUND, every_check=True)
    assert "read, nothing executed\npassed     auto_map\n" in every and "passed     5 checks\n" in every
    assert "passed     PEFT\n           any of q_proj" in every


def test_at_80_columns_no_word_is_broken_and_scripts_get_one_last_line() -> None:
    words = [f"word{'x' * number}" for number in range(24)]
    where = "a/very/long/path/" + "y" * 90 + ".py:17"
    check = Check("golden", "failed", " ".join(words), where, "look-at " + " ".join(words))
    skipped = [
        Check(name, "skipped", "not run because 'load' failed") for name in ("meta", "save", "reload", *words[:9])
    ]
    releases = [f"5.{minor}.0" for minor in range(24)]
    ran = {release: [check, Check("load", "ok"), *skipped] for release in releases}
    found = Verification("me/model", [], ran, [Check("vLLM", "warning", "not ready: auto_map has no AutoModel")])
    for terminal in (True, False):
        text = shown(found, 80, terminal=terminal)
        assert all(word in text.split() for word in [*words, where, *releases])
        lines = text.splitlines()
        assert all(len(line) <= 80 for line in lines[: None if terminal else -1] if where not in line)
        assert text.count("not run because 'load' failed") == 1
        assert "not ready  vLLM\n           auto_map has no AutoModel\n" in text
        assert "\x1b" not in text
    assert lines[-1].startswith("me/model: 24 checks failed; left out: meta, save, reload")


def test_a_verification_is_plain_data() -> None:
    assert json.loads(json.dumps(FOUND.to_dict()))["runs"]["4.57.6"][1]["what"] == "logits [differ]"
    assert not FOUND.passed and not FOUND.complete and [release for release, _ in FOUND.failed] == ["4.57.6"]


def test_the_last_line_and_the_exit_code_say_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    ran = [
        Check("forward", "skipped", "no inputs could be made up", "AutoModel"),
        Check("beams", "n/a"),
        Check("load", "ok"),
    ]
    found = Verification("me/model", [Check("manifest", "n/a")], {"5.23.0": ran}, [Check("ONNX export", "skipped")])
    assert found.passed and not found.complete and [check.name for _, check in found.skipped] == ["forward"]
    assert found.to_dict()["skipped"][0]["what"] == "no inputs could be made up" and not found.to_dict()["complete"]
    assert verdict(found) == "what was looked at held; left out: forward (AutoModel)"
    whole = found._replace(runs={"5.23.0": ran[1:]})
    assert whole.complete and verdict(whole) == "every check held"
    assert "its code was not run" in verdict(found._replace(runs={}))
    failing = found._replace(runs={"5.23.0": [*ran, Check("golden", "failed")]})
    for outcome, status, options in ((found, 3, []), (found, 0, ["--allow-skipped"]), (whole, 0, []), (failing, 1, [])):
        monkeypatch.setattr("mymodels.hub.verify", lambda *args, outcome=outcome, **how: outcome)
        assert cli.main(["verify", str(tmp_path), *options]) == status
    assert "left out: forward (AutoModel)" in capsys.readouterr().out
    monkeypatch.setattr("mymodels.hub.testing.verify", lambda path, **how: found)
    with pytest.raises(AssertionError, match="forward was skipped: no inputs could be made up"):
        check_repo("me/model")
    assert check_repo("me/model", allow_skipped=True) is found


def test_an_adapter_is_read_only_and_the_verdict_says_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    found = verify(tmp_path)
    assert not found.complete and [check.name for _, check in found.skipped] == ["load"]
    assert "without a model to run" in found.skipped[0][1].what


def test_a_golden_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    golden = read_golden(Path(__file__).parents[3] / "hub_repo" / "mygpt2" / "golden.safetensors")
    assert set(golden.outputs) and set(golden.greedy) == {"AutoModelForCausalLM"}
    held = {"input.x": torch.ones(1), "output.AutoModel.last_hidden_state": torch.ones(1)}
    save_file(held, tmp_path / "golden.safetensors", metadata={"golden": '{"tolerance": 1e-5}'})
    golden = read_golden(tmp_path / "golden.safetensors")
    assert not golden.last_outputs and not golden.configured and list(golden.inputs) == ["x"]


def test_the_matrix_goes_into_the_card_once(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    with pytest.raises(FileNotFoundError, match=r"README\.md is missing"):
        write_matrix(FOUND, tmp_path)
    card.write_text("# A model\n\nText.\n")
    write_matrix(FOUND, tmp_path)
    first = card.read_text()
    assert first.startswith("# A model\n\nText.\n\n<!-- mymodels verify: begin -->")
    for line in ("| check | 4.57.6 | 5.23.0 |", "| load | ✓ | ! |", "| golden | ✗ | ✓ |", "| padding | – | ○ |"):
        assert line in first.splitlines()
    card.write_text(first + "\nMore.\n")
    write_matrix(FOUND._replace(runs={"5.23.0": FOUND.runs["5.23.0"]}), tmp_path)
    text = card.read_text()
    assert "4.57.6" not in text and text.endswith("<!-- mymodels verify: end -->\n\nMore.\n")


def test_check_repo_raises_the_failing_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mymodels.hub.testing.verify", lambda path, **how: FOUND)
    with pytest.raises(AssertionError) as raised:
        check_repo("me/model")
    assert str(raised.value).splitlines() == [
        "me/model fails verification:",
        "golden [transformers 4.57.6]: logits [differ] (AutoModel); look",
    ]
    held = FOUND._replace(runs={})
    monkeypatch.setattr("mymodels.hub.testing.verify", lambda path, **how: held)
    assert check_repo("me/model", quick=True) is held


def test_without_execution_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_repo(tmp_path / "repo")
    monkeypatch.setattr("mymodels.hub.verifying.clean_process", lambda *args, **how: pytest.fail("a process started"))
    monkeypatch.setattr("mymodels.hub.verifying.static_checks", lambda folder, releases: [Check("auto_map", "ok")])
    assert verify(folder, execute=False) == (str(folder), [Check("auto_map", "ok")], {}, [], "")


def test_what_an_engine_reads_in_the_source_is_read_likewise() -> None:
    def read(model: nn.Module) -> tuple[set[str], set[bool]]:
        holders = [m for m in model.modules() if sum(isinstance(c, nn.Linear) for c in m.children()) > 2]
        found = {facts._calls_interface(facts._source(m)) for m in holders if "Attention" in type(m).__name__}
        return {name for name, fuses in facts.FUSIONS.items() if any(map(fuses, model.modules()))}, found

    everything = {"QKV", "gate and up", "RMSNorm"}
    llama = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    assert read(LlamaModel(llama)) == (everything, {True})
    assert read(GPT2Model(stock_gpt2_config())) == (set(), set())  # `Conv1D`
    assert read(MyGPT2ForCausalLM(mygpt2_config(**MODERN))) == (everything, {True})
    assert read(MyGPT2ForCausalLM(mygpt2_config())) == ({"QKV"}, {True})
    assert read(MyBertModel(mybert_config())) == ({"QKV"}, {True})

    class Attention(nn.Module):
        """Hands the call on to a helper, and the projections too."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(2, 2) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attend(self, *(call(layer, x) for layer in (self.q, self.k, self.v)))  # noqa: F821

    assert read(Attention()) == (set(), {False})


# ---- side effects


def test_draws_are_no_change_of_the_process_a_seed_is_one() -> None:
    with torch.random.fork_rng():
        python, array = random.getstate(), np.random.get_state()
        try:
            states = side_effects.set_probe_seeds()
            torch.rand(3), [random.random() for _ in range(2000)], np.random.rand(1000)
            assert side_effects.reseeded_generators(states) == []
            torch.manual_seed(7), random.seed(7), np.random.seed(7)
            assert side_effects.reseeded_generators(states) == [
                "torch's random seed (set to 7)",
                "the random seed of Python's random",
                "NumPy's random seed",
            ]
        finally:
            random.setstate(python)
            np.random.set_state(array)


def test_settings_and_what_is_exchanged_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before, foreign = side_effects.snapshot(), side_effects.library_objects()
    assert (
        side_effects.changed_settings(before, side_effects.snapshot()) == side_effects.replaced_objects(foreign) == []
    )
    monkeypatch.setenv("TINY_SECRET", "do not show me")
    monkeypatch.setattr(nn.functional, "gelu", torch.relu)
    monkeypatch.setitem(transformers.activations.ACT2CLS, "relu", nn.Tanh)
    torch.set_default_dtype(torch.float64)
    try:
        assert side_effects.changed_settings(before, side_effects.snapshot()) == [
            "the environment variable TINY_SECRET",
            "torch's default dtype (torch.float32 became torch.float64)",
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert side_effects.replaced_objects(foreign) == [
        "torch.nn.functional.gelu was replaced",
        "transformers.activations.ACT2CLS['relu'] was replaced",
    ]


@pytest.mark.parametrize(
    ("lookup", "found"),
    [
        ("ALL_ATTENTION_FUNCTIONS[name]", True),
        ("eager if name == 'eager' else ALL_ATTENTION_FUNCTIONS[name]", True),
        ("ALL_ATTENTION_FUNCTIONS.get_interface(name, eager) if new else other", True),
        ("eager if name == 'eager' else other", False),
        ("choose(ALL_ATTENTION_FUNCTIONS)", False),
    ],
)
def test_an_attention_function_chosen_by_a_conditional_expression_is_looked_up(lookup: str, found: bool) -> None:
    import ast

    source = f"def forward(self, x):\n    attend = {lookup}\n    return attend(self, x)\n"
    assert facts._calls_interface(ast.parse(source)) is found

"""Every fault that only running shows is found and named, nothing else is; healthy folders of all shapes pass."""

import re
from pathlib import Path

import pytest
from faults import FAULTS, code
from hub.healthy_folders import make_with_tokenizer
from repos_to_verify import stock, tiny_repo

from mymodels.hub import record_golden, verify
from mymodels.hub.testing import check_repo, failures

ROOT = Path(__file__).parents[3]
RELEASES = ROOT / ".cache" / "transformers"
FAST = {"attention mask ignored", "missing tensor"}
HEALTHY = {
    "hub_repo/mygpt2": lambda folder: ROOT / "hub_repo" / "mygpt2",
    "hub_repo/mybert": lambda folder: ROOT / "hub_repo" / "mybert",
    **{
        name: lambda folder, n=name: stock(folder, n)
        for name in ("gpt2", "bert", "llama-untied", "llama-tied-bf16", "t5", "vit")
    },
    "one file, tied": lambda folder: tiny_repo(folder),
    "one file, untied": lambda folder: tiny_repo(folder, tied=False),
    "three files, tied": lambda folder: tiny_repo(folder, files=3),
    "tokenizer of its own": make_with_tokenizer,
}


@pytest.fixture
def no_static_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have tests of their own; here a fault is one that only running shows."""
    monkeypatch.setattr("mymodels.hub.verifying.static_checks", lambda folder, releases: [])


def slow_unless(names: set[str], table: dict) -> list:
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in table]


@pytest.mark.parametrize("name", slow_unless({"hub_repo/mybert"}, HEALTHY))
def test_a_healthy_folder_passes(name: str, tmp_path: Path) -> None:
    verification = verify(HEALTHY[name](tmp_path / "repo"))
    assert not failures(verification)
    (checks,) = verification.runs.values()
    held = {check.name for check in checks if check.status == "ok" or check.name == "parallel load"}  # may warn
    assert {"load", "weights", "forward", "save", "reload", "meta", "device map", "pickle", "parallel load"} <= held
    assert {"forked worker", "spawned worker", "eager = sdpa"} <= held
    assert [check.name for check in verification.serving] == [
        "vLLM",
        "SGLang",
        "PEFT",
        "tensor parallel",
        "ONNX export",
    ]
    if name.startswith("hub_repo/"):
        assert {check.name: check.status for check in verification.serving}["tensor parallel"] == "ok"


@pytest.mark.usefixtures("no_static_checks")
@pytest.mark.parametrize("name", slow_unless(FAST, FAULTS))
def test_a_fault_is_found_and_named_and_nothing_else(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    folder = tiny_repo(tmp_path / "repo")
    fault.break_it(folder)
    verification = verify(folder, **{"quick": True, "cache_dir": RELEASES, **fault.how})
    assert {check.name for _, check in verification.failed} == {fault.check}, failures(verification)
    assert any(re.search(fault.says, check.what) for _, check in verification.failed), failures(verification)
    assert any(re.search(fault.where, check.where) for _, check in verification.failed), failures(verification)
    assert all(check.remedy for _, check in verification.failed)
    assert all("Traceback" not in line and "\n" not in line for line in failures(verification))


@pytest.mark.usefixtures("no_static_checks")
@pytest.mark.slow
def test_releases_that_do_not_agree_are_found_without_a_golden_file(tmp_path: Path) -> None:
    folder = tiny_repo(tmp_path / "repo")
    old = "logits = self.lm_head(outputs.last_hidden_state)\n"
    new = "        if transformers.__version__ < '5.1':\n            logits = logits * 1.01\n"
    code((old, old + new), before="import transformers\n")(folder)
    verification = verify(folder, releases="5.0,latest", quick=True, cache_dir=RELEASES)
    assert [(release, check.name) for release, check in verification.failed] == [("5.0.0", "golden")]
    assert any(check.name == "golden" and check.status == "ok" for check in verification.runs["5.23.0"])
    assert not (folder / "golden.safetensors").exists()


@pytest.mark.usefixtures("no_static_checks", "real_start")
@pytest.mark.slow
def test_the_folder_is_left_as_it_was(tmp_path: Path) -> None:
    folder = tiny_repo(tmp_path / "repo", files=3)
    vandal = "import os\nfor name in os.listdir(os.path.dirname(__file__)):\n    pass\nopen({!r}, 'w').close()\n"
    code(before=vandal.format(str(folder / "config.json")))(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    verification = verify(folder, quick=True)
    assert {"load", "file writes"} == {check.name for _, check in verification.failed}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.usefixtures("real_start")
@pytest.mark.slow
def test_what_was_recorded_holds(tmp_path: Path) -> None:
    folder = tiny_repo(tmp_path / "repo")
    record_golden(folder)
    verification = check_repo(folder, quick=True)
    (checks,) = verification.runs.values()
    seen = {(check.name, check.where): check.status for check in checks}
    assert seen["golden", "AutoModelForCausalLM"] == seen["golden", "AutoModel"] == "ok"
    assert seen["generation", "AutoModelForCausalLM"] == "ok"


@pytest.mark.slow
def test_sound_is_made_up_and_what_stock_code_cannot_help_is_no_fault(tmp_path: Path) -> None:
    verification = verify(stock(tmp_path / "repo", "whisper"), quick=True)
    assert verification.complete, verification.skipped
    (checks,) = verification.runs.values()
    outcomes = {check.name: check.status for check in checks}
    for name in ("forward", "cached generation", "reload", "eager = sdpa", "training loss", "optimizer step"):
        assert outcomes[name] == "ok", outcomes[name]

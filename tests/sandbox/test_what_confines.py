"""What confines code is said in one line, can be required, and what comes back is not trusted."""

import json
import sys
from pathlib import Path

import pytest
import torch

import mymodels
from mymodels import sandbox
from mymodels.cli.command import main
from mymodels.hub.clean_process import clean_process, load_in_clean_process
from mymodels.sandbox.isolation import NONE, Isolation

HUB_REPO = Path(__file__).parents[2] / "hub_repo"


class NeedsItsClass:
    """What only its class could read."""

    def __reduce__(self):
        return print, (torch.ones(2),)


def test_the_line() -> None:
    lines = {
        Isolation(7, True, True, ""): "isolation: Landlock 7, seccomp, namespaces, no network",
        Isolation(0, True, True, "no Landlock"): "isolation: seccomp, namespaces, no network (no Landlock)",
        Isolation(7, True, False, "no namespaces: x"): "isolation: Landlock 7, seccomp, no network (no namespaces: x)",
        Isolation(7, False, False, "no seccomp: x"): "isolation: none (no seccomp: x)",
        Isolation(0, True, False, "too old"): "isolation: none (too old)",
    }
    for isolation, line in lines.items():
        assert str(isolation) == line
        if "none" in line:
            with pytest.raises(sandbox.NotIsolated, match="this machine has none"):
                isolation.require()
        else:
            isolation.require()


def test_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run the code as before, and say so."""
    monkeypatch.setattr(sys, "platform", "darwin")
    sandbox.available.cache_clear()
    try:
        found = sandbox.available()
    finally:
        sandbox.available.cache_clear()
    assert not found.confined and str(found) == "isolation: none (darwin has no Landlock and no seccomp)"


def test_without_a_box_the_script_runs_as_it_is(tmp_path: Path) -> None:
    done = sandbox.run(["-c", "print(open('/proc/self/status').read())"], scratch=tmp_path, isolation=NONE)
    assert done.returncode == 0 and b"Seccomp:\t0" in done.stdout


def test_it_can_be_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("mymodels.sandbox.available", lambda: NONE._replace(why="it is too old"))
    monkeypatch.setattr("mymodels.hub.verifying.available", lambda: NONE._replace(why="it is too old"))
    monkeypatch.setattr("mymodels.hub.verifying.clean_process", lambda *args, **how: pytest.fail("it was run"))
    torch.save({"w": torch.ones(2), "x": NeedsItsClass()}, tmp_path / "x.pt")
    folder = str(HUB_REPO / "mybert")
    for command in (
        ["verify", folder],
        ["build", folder, "--out", str(tmp_path / "out")],
        ["upgrade", folder, "--out", str(tmp_path / "out")],
        ["export", folder, "--to", "pt2", "--out", str(tmp_path / "out")],
        ["inspect", str(tmp_path / "x.pt"), "--allow-pickle"],
    ):
        assert main([*command, "--require-isolation"]) == 1
        error = capsys.readouterr().err
        assert "isolation is required, and this machine has none: it is too old" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(sandbox.NotIsolated):
        mymodels.hub.verify(folder, require_isolation=True)


def test_the_line_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"w": torch.ones(2), "x": NeedsItsClass()}, tmp_path / "x.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "plain.pt")
    assert main(["inspect", str(tmp_path / "x.pt"), "--allow-pickle"]) == 0
    assert capsys.readouterr().err == f"{sandbox.available()}\n"
    for command in (["inspect", str(tmp_path / "plain.pt")], ["inspect", str(tmp_path / "plain.pt"), "--allow-pickle"]):
        assert main(command) == 0  # no code was run
        assert capsys.readouterr().err == ""


POISON = """
import json, os, sys
job = json.load(open(sys.argv[1]))
SECRET = json.load(open(os.path.join(job["folder"], "config.json")))["secret"]
for name in {names!r}:
    path = os.path.join(job["scratch"], name)
    if os.path.lexists(path):
        os.remove(path)
    os.symlink(SECRET, path)
with open(os.path.join(job["scratch"], "huge"), "wb") as file:
    file.truncate(10**9)
os.mkdir(os.path.join(job["scratch"], "closed"), 0o000)
os._exit(0)
"""


@pytest.mark.parametrize("names", [["events.jsonl"], ["report.json", "outputs.safetensors", "golden.safetensors"]])
def test_links_in_the_scratch_folder_are_not_followed(names: list[str], tmp_path: Path) -> None:
    folder, secret = tmp_path / "poisoned-model", tmp_path / "secret.json"
    folder.mkdir()
    secret.write_text('{"check": "load", "status": "ok", "what": "", "where": ""}\n')
    (folder / "modeling_poison.py").write_text(POISON.format(names=names))
    auto_map = {"AutoConfig": "modeling_poison.C", "AutoModel": "modeling_poison.M"}
    (folder / "config.json").write_text(
        json.dumps({"auto_map": auto_map, "secret": str(secret), "model_type": "poison"})
    )
    if "report.json" in names:
        with pytest.raises(RuntimeError, match=r"tampered with its results: report.json cannot be read"):
            load_in_clean_process(folder, ["AutoModel"], texts=["a"])
    with clean_process(folder, ["outputs"]) as run:
        assert not any("check" in event and event.get("status") == "ok" for event in run.events)
        scratch = run.scratch
    assert not scratch.exists() and secret.exists()

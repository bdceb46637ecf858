"""The verbs `verify`, `push` and `lock` on the command line: what they print, write and return."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hub_repos import Blob
from hub_server import Hub
from tiny import mygpt2_config

from mymodels import MyGPT2ForCausalLM, cli
from mymodels.checkpoints import check_checkpoint
from mymodels.cli.command import make_parser
from mymodels.hub import build_repo
from mymodels.hub.checks import Check
from mymodels.hub.verifying import Verification

TOKEN = "hf_writer_of_me_0123456789"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_repo(
        MyGPT2ForCausalLM(mygpt2_config()), None, tmp_path_factory.mktemp("x") / "repo", card="# Mine", golden=False
    )


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "repo"))


def test_read_only(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mymodels.hub.verifying.clean_process", lambda *args, **how: pytest.fail("it was run"))
    monkeypatch.setattr("mymodels.hub.record_golden", lambda *args, **how: pytest.fail("it was run"))
    assert cli.main(["verify", str(folder), "--no-exec"]) == 0
    assert "every check held" in capsys.readouterr().out
    (folder / "base.py").unlink()
    assert cli.main(["verify", str(folder), "--no-exec", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"] and "relative imports" in {c["name"] for c in found["static"] if c["status"] == "failed"}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for option in ("--record", "--write-card"):
        assert cli.main(["verify", str(folder), "--no-exec", option]) == 1
        assert f"{option} needs a local folder and runs its code: leave out --no-exec" in capsys.readouterr().err
        assert cli.main(["verify", "me/nothing", option]) == 1 and "needs a local folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_record_then_card(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["verify", str(folder), "--record", "--quick", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["passed"] and "golden.safetensors" in captured.err
    assert check_checkpoint(folder, full=True) == []
    assert (
        cli.main(["verify", str(folder), "--record"]) == 1
        and "has golden.safetensors already" in capsys.readouterr().err
    )
    verified = Verification(str(folder), [], {"5.0.0": [Check("load", "ok")], "5.1.0": [Check("load", "ok")]}, [])
    monkeypatch.setattr("mymodels.hub.verify", lambda *args, **how: verified)
    assert cli.main(["verify", str(folder), "--write-card"]) == 0
    assert "| load | ✓ | ✓ |" in (folder / "README.md").read_text()
    assert check_checkpoint(folder, full=True) == []


def test_a_changed_file_is_not_signed_by_what_writes_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mymodels.hub.verify", lambda *args, **how: Verification(str(folder), [], {}, []))
    (folder / "base.py").write_text((folder / "base.py").read_text() + "\n# changed\n")
    cli.main(["verify", str(folder), "--record", "--quick", "--json"])
    assert [problem.file for problem in check_checkpoint(folder, full=True)] == ["base.py"]


def test_names_cannot_steer_the_terminal(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "\x1b]0;owned\x07.log").write_text("x")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["Auto\x1b[31mEvil"] = "x\x1b[2J.Y"
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(["verify", str(folder), "--no-exec"]) == 1
    assert cli.main(["build", str(folder), "--out", str(folder.parent / "out")]) == 1
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and "owned" in captured.out


SEVERAL = """
import sys
from mymodels import cli
for command in COMMANDS:
    code = cli.main(command)
    sys.stderr.flush()
    print("\\0", code, end="\\0", flush=True)
"""


def run(client, *commands: list[str]) -> list[tuple[int, str]]:
    """Exit codes and output of commands that one process who knows the Hub runs one after another."""
    process = client(SEVERAL.replace("COMMANDS", repr(commands)), token=TOKEN)
    output, _ = process.communicate(timeout=300)
    said = output.split("\0")
    assert process.returncode == 0 and len(said) == 2 * len(commands) + 1, output
    return [(int(code), text) for text, code in zip(said[::2], said[1::2])]


def test_push_and_lock(hub: Hub, client, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    example = re.search(r"^  mymodels (push .* --dry-run.*)$", make_parser()[1]["push"].format_help(), re.MULTILINE)[1]
    (tmp_path / "hub_repo").symlink_to(Path(__file__).parents[2] / "hub_repo")
    tried, sent, refused = run(
        client,
        example.split(),
        ["push", str(folder), "me/mine", "--no-verify", "--tag", "v1"],
        ["push", str(folder / "nothing"), "me/mine", "--no-verify"],
    )
    assert tried[0] == 0 and "config.json" in tried[1] and list(hub.repos) == ["me/mine"]
    code, said = sent
    assert code == 0 and hub.repos["me/mine"].private and "code_revision" in said and TOKEN not in said
    code, said = refused
    assert code == 1 and "is not a folder" in said and "Traceback" not in said
    lock = tmp_path / "mine.lock"
    assert cli.main(["lock", str(folder), "--out", str(lock)]) == 0
    assert "code files locked" in capsys.readouterr().out and json.loads(lock.read_text())


@pytest.mark.slow
def test_a_repo_by_its_id(hub: Hub, client, folder: Path, tmp_path: Path) -> None:
    """Verified with all that is in it, pickles too, and built from the links that the Hub's cache is made of."""

    again = str(tmp_path / "again")
    pushed, (code, said), built = run(
        client,
        ["push", str(folder), "me/mine", "--no-verify"],
        ["verify", "me/mine", "--no-exec"],
        ["build", "me/mine", "--out", again, "--no-golden"],
    )
    assert pushed[0] == 0 and built[0] == 0
    assert code == 0 and hub.repos["me/mine"].refs["refs/heads/main"] in said.replace("\n", "")
    assert check_checkpoint(tmp_path / "again", full=True) == []
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in folder.iterdir()}
    repo = hub.repos["me/mine"]
    evil = Blob.regular(b"\x80\x04cos\nsystem\n\x8c\x04true\x85R.")
    repo.commit("refs/heads/main", {**repo.commits[repo.resolve("main")], "evil.pt": evil}, "Evil")
    ((code, said),) = run(client, ["verify", "me/mine", "--no-exec", "--json"])
    found = [check["what"] for check in json.loads(said)["static"] if check["name"] == "pickles"]
    assert code == 1 and len(found) == 1 and found[0].startswith("evil.pt is a pickle that calls"), found

"""The commands of the page "Code from before transformers 5", as a reader runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import folders
import pytest
from docs.pages import ROOT, blocks_of, shell_commands

pytestmark = pytest.mark.versions


def test_the_commands_run(tmp_path: Path) -> None:
    folders.make("minicpm", tmp_path / "old-model")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "MYMODELS_CACHE": str(ROOT / ".cache")}
    page = ROOT / "docs" / "guides" / "upgrade-old-code.md"
    commands = [c for block in blocks_of(page) if block.language == "bash" for c in shell_commands(block.code)]
    assert [command.split()[1] for command in commands] == ["upgrade", "upgrade", "verify"]
    for number, command in enumerate(commands):
        command += " --to 4.57,5.10" if number == 1 else " --quick --json" if number == 2 else ""
        done = subprocess.run(command.split(), cwd=tmp_path, env=environment, capture_output=True, text=True)
        told = f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
        if number == 0:
            assert done.returncode == 3, told  # a dry run proves nothing
        elif number == 1:
            assert done.returncode == 0, told
            assert "proven: the numbers of transformers 4.36.2 under transformers 4.57.6, 5.10.4" in done.stdout
        else:
            checks = [check for checks in json.loads(done.stdout)["runs"].values() for check in checks]
            assert [check for check in checks if check["status"] == "failed"] == [], told
            assert {check["status"] for check in checks if check["name"] in ("load", "golden")} == {"ok"}, told
    report = json.loads((tmp_path / "new-model" / "upgrade.json").read_text())
    assert report["golden"] == "recorded from the original under transformers 4.36.2"
    assert report["verify"] == report["left"] == []
    made = {file.name for file in (tmp_path / "new-model").iterdir()}
    assert {"upgrade.json", "upgrade.diff", "golden.safetensors", "manifest.json", "README.md"} <= made

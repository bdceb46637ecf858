"""What a verb is at: on a terminal only, not before it has taken a while, and gone when it is done."""

import io
import sys
import time
from pathlib import Path

import pytest

from mymodels.cli import progress
from mymodels.hub.clean_process import clean_process


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "patience", "seen"), [(Terminal, 0.0, True), (Terminal, 60.0, False), (io.StringIO, 0.0, False)]
)
def test_progress_is_for_a_terminal_and_for_what_takes_long(
    stream: type[io.StringIO], patience: float, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setenv("TERM", "xterm")
    with progress.working("verifying me/[model]") as at:
        deadline = time.monotonic() + 20
        at("padding")
        while seen and "padding" not in sys.stderr.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    text = sys.stderr.getvalue()
    assert ("verifying me/[model]: padding" in text) is seen and (bool(text) is seen)
    assert not seen or text.endswith("\x1b[2K")  # the line is erased


@pytest.mark.usefixtures("real_start")
def test_a_clean_process_says_which_check_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "job = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        "with open(job['events'], 'a') as file:\n"
        '    file.write(\'{"begin": "padding", "where": ""}\\n\')\n'
        "time.sleep(0.7)\n"
    )
    monkeypatch.setattr("mymodels.hub.clean_process.SCRIPT", script)
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "config.json").write_text("{}")
    told: list[str] = []
    with clean_process(tmp_path / "repo", ["outputs"], progress=told.append) as run:
        assert not run.failure and run.one("begin") == "padding"
    assert set(told) == {"padding"}

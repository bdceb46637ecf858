"""What a verb is at: on a terminal only, not before it has taken a while, and gone when it is done."""

import io
import re
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from tqdm import tqdm

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


def test_bars_are_part_of_the_display_and_lines_stand_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.working("verifying repo") as at:
        at("padding")
        for number in tqdm(range(8), desc="hashing", disable=None, ncols=60):
            time.sleep(0.15)
            if number == 4:
                tqdm.write("isolation: none", file=sys.stderr)
        time.sleep(0.3)
    assert sys.stderr is terminal
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert "isolation: none" in lines
    shown = [line for line in lines if line != "isolation: none"]
    assert all("verifying repo" in line for line in shown), lines  # no bar by itself
    assert any(re.search(r"verifying repo: hashing: .*[1-8]/8", line) for line in shown), lines
    assert shown[-1].rstrip().endswith("verifying repo: padding")


def test_bars_after_the_display_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    terminal, out = Terminal(), Console(file=io.StringIO())
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.working("reading", until=out):
        out.print("the first line of the results")
        before = len(terminal.getvalue())
        for _ in tqdm(range(2), desc="training", disable=None, ncols=60):
            pass
    assert "\rtraining: 100%|" in terminal.getvalue()[before:]


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

"""The tutorials run top to bottom in a fresh kernel, say nothing of failure, and are committed as they ran."""

import re
import time
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
pytest.importorskip("nbclient")

from nbformat import NotebookNode  # noqa: E402
from notebook_runs import NAMES, NOTEBOOKS, ON_THE_HUB, outputs, read, run, run_with_hub  # noqa: E402

pytestmark = pytest.mark.notebooks

# what a cell prints when something went wrong and it went on
FAILURE = re.compile(r"\bFAILED\b|\bfailed\b|Traceback|\bError\b|\bnan\b")
# what belongs to the machine or the moment: other folders, addresses, progress bars, colours, addresses of objects
OF_THIS_MACHINE = re.compile(
    r"(?<![\w.])/(?:home|root|tmp|work|usr|Users|private)/|127\.0\.0\.1|\r|\x1b|\bat 0x[0-9a-f]{6}|it/s"
)
seconds: dict[str, float] = {}


def texts(notebook: NotebookNode) -> list[str]:
    found = [output.text for output in outputs(notebook) if output.output_type == "stream"]
    return found + [output.data.get("text/plain", "") for output in outputs(notebook) if "data" in output]


def figures(name: str) -> int:
    """How many pictures the notebook promises."""
    return sum("plt.show()" in cell.source or "display(Image(" in cell.source for cell in read(name).cells)


def assert_no_errors_in_output(notebook: NotebookNode) -> None:
    loud = [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert not loud  # warnings, too
    for text in texts(notebook):
        assert not FAILURE.search(text), text
        assert not OF_THIS_MACHINE.search(text), text


@pytest.mark.parametrize("name", NAMES)
def test_runs(name: str, tmp_path: Path) -> None:
    started = time.monotonic()
    notebook = run_with_hub(name, tmp_path)
    seconds[name] = time.monotonic() - started
    assert_no_errors_in_output(notebook)
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == figures(name)
    there = {path.name for path in tmp_path.iterdir()}
    assert there <= {"hub_repo", "notebooks", "hf"}, "it writes only below notebooks/output"
    assert {path.name for path in (tmp_path / "notebooks").iterdir()} == {"output"}


def test_in_ten_minutes() -> None:
    if set(seconds) != set(NAMES):
        pytest.skip("not all of them were run")
    assert sum(seconds.values()) < 600, seconds


def test_without_a_token_nothing_is_sent(tmp_path: Path) -> None:
    notebook = run(ON_THE_HUB, tmp_path)
    assert_no_errors_in_output(notebook)
    said = "\n".join(texts(notebook))
    assert "nobody is logged in: nothing will be sent" in said and re.search(r"would get \d+ files", said)
    assert "commit" not in said


@pytest.mark.parametrize("name", NAMES)
def test_committed_as_it_ran(name: str) -> None:
    notebook = jupytext.read(NOTEBOOKS / f"{name}.ipynb")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"
    assert_no_errors_in_output(notebook)
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == figures(name)


@pytest.mark.parametrize("name", NAMES)
def test_text_form_in_step(name: str) -> None:
    """The text form is what people edit and review; `make notebooks` makes the other of it."""
    notebook = jupytext.read(NOTEBOOKS / f"{name}.ipynb")
    written = [(cell.cell_type, cell.id, cell.source) for cell in read(name).cells]
    assert [(cell.cell_type, cell.id, cell.source) for cell in notebook.cells] == written, "run `make notebooks`"


def test_every_notebook_has_both_forms() -> None:
    assert NAMES and sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES

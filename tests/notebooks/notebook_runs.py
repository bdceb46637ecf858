"""Run a notebook as a reader would: from its text form, top to bottom, in a fresh kernel, in a copy of what it reads.

`python tests/notebooks/notebook_runs.py [NAME …]` (make notebooks) writes the results into `notebooks/*.ipynb`.
"""

import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
WIDGET = "application/vnd.jupyter.widget-view+json"
TOKEN = "hf_writer_of_me_0123456789"
ON_THE_HUB = "05_private_hub"  # the one notebook that asks a Hub
sys.path.append(str(ROOT / "tests" / "hub"))  # the Hub on 127.0.0.1


def read(name: str) -> NotebookNode:
    """The notebook as its text form has it: no outputs, and cell ids that stay while a cell's text does."""
    notebook = jupytext.read(NOTEBOOKS / f"{name}.py")
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return notebook


def run(name: str, scratch: Path, hub_url: str | None = None) -> NotebookNode:
    """The notebook with its outputs.

    Args:
        scratch: an empty folder, which becomes a small copy of this one; the kernel has no cache but what is made there.
        hub_url: a Hub that knows `TOKEN`; without one the kernel is offline and nobody is logged in.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    shutil.copytree(ROOT / "hub_repo", scratch / "hub_repo")
    (scratch / "notebooks").mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "PYTHON", "MPL"))}
    environment = {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # the `mymodels` of this environment
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(scratch / "hf"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",  # the last digits of a result depend on it
        "COLUMNS": "110",
        **(
            {"HF_ENDPOINT": hub_url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
            if hub_url
            else {"HF_HUB_OFFLINE": "1"}
        ),
    }
    notebook = read(name)
    client = NotebookClient(
        notebook,
        timeout=900,  # seconds for a cell, on a machine that has other things to do
        kernel_name="python3",
        resources={"metadata": {"path": str(scratch / "notebooks")}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    )
    client.execute(env=environment)
    notebook.metadata.pop("language_info", None)  # the version of Python
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_bar(output)]
    for output in outputs(notebook):
        if "text" in output:
            plain = re.sub(r"\x1b\[[\d;]*m", "", output.text)  # colours are for screens
            output.text = re.sub(r"[ \t]+$", "", plain, flags=re.MULTILINE)
    return notebook


def is_bar(output: NotebookNode) -> bool:
    """Progress is for people who wait: tqdm's, and the table with times that the Trainer shows in a notebook."""
    data = output.get("data", {})
    return WIDGET in data or "<progress" in data.get("text/html", "") or not data.get("text/html", "x").strip()


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def run_with_hub(name: str, scratch: Path) -> NotebookNode:
    """`run`, with a Hub to push to for the notebook that pushes."""
    if name != ON_THE_HUB:
        return run(name, scratch)
    from hub_server import Hub

    with Hub() as hub:
        return run(name, scratch, hub.url)


def main(names: list[str]) -> None:
    for name in names or NAMES:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            notebook = run_with_hub(name, Path(scratch))
        nbformat.write(notebook, NOTEBOOKS / f"{name}.ipynb")
        print(f"{name}.ipynb: run in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

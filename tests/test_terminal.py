"""What people read on terminals of any width, and what a pipe gets."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mymodels import MyGPT2Config, warm_start
from mymodels.checkpoints import open_checkpoint
from mymodels.checkpoints.comparing import compare_checkpoints
from mymodels.checkpoints.inspecting import inspect_checkpoint
from mymodels.checkpoints.inspection_tables import show_difference, show_inspection
from mymodels.cli.options import console
from mymodels.hub.pushing import CHANGED, NEW, FileState, show_files
from mymodels.tables import print_table, print_text
from mymodels.training.plots import class_table, metric_table

ROOT = Path(__file__).parents[1]
GPT2, BERT = ROOT / "hub_repo" / "mygpt2", ROOT / "hub_repo" / "mybert"
FILES = [FileState("a_folder_with_a_long_name/modeling_of_a_model_with_a_long_name.py", 12345678, CHANGED)]


def printed(show, width: int) -> str:
    out = io.StringIO()
    show(Console(file=out, width=width))
    return out.getvalue()


@pytest.fixture(scope="module")
def shows() -> dict:
    """Name → a function that prints it on a console."""
    found, other = inspect_checkpoint(GPT2), inspect_checkpoint(BERT)
    report = warm_start(MyGPT2Config.from_pretrained(GPT2, num_key_value_heads=1, norm_type="layernorm"), GPT2)
    rows = compare_checkpoints(open_checkpoint(GPT2), open_checkpoint(BERT))
    matrix, names = np.array([[5, 2], [1, 9]]), ["a_label_with_a_name_of_some_length", "another"]
    metrics = {
        "validation": {"accuracy": 0.5, "f1_macro": 0.25, "loss": 1.5, "perplexity": 4.4817, "tokens_per_second": 9}
    }
    return {
        "inspect": lambda out: show_inspection(found, out),
        "inspect --all": lambda out: show_inspection(other, out, every_tensor=True),
        "inspect --diff": lambda out: show_difference(rows, "hub_repo/mygpt2", "hub_repo/mybert", out),
        "warm-start": lambda out: report.show(out),
        "warm-start --all": lambda out: report.show(out, every_tensor=True),
        "push": lambda out: show_files([*FILES, FileState("a", 1, NEW)], "me/a-model-with-a-long-name-and-more", out),
        "classes": lambda out: print_table(class_table(matrix, names, "on the validation data"), out),
        "metrics": lambda out: print_table(metric_table(metrics), out),
    }


def words(text: str) -> set[str]:
    return set(re.sub(r"[─-╿]", " ", text).split())


NAMES = ("inspect", "inspect --all", "inspect --diff", "warm-start", "warm-start --all", "push", "classes", "metrics")


@pytest.mark.parametrize("name", NAMES)
def test_no_table_breaks_a_word(name: str, shows: dict) -> None:
    """By the words that the same table has with room for everything."""
    wide = words(printed(shows[name], 1000))
    for width in (100, 80, 60, 40):
        assert wide - words(printed(shows[name], width)) <= HEADERS, (name, width)


# of first columns and of empty cells, which need none in a row
HEADERS = {"name", "tensor", "module", "file", "class", "measured", "on", "max", "|Δ|"}


def test_lines_fit_unless_a_word_is_longer_than_a_line(shows: dict) -> None:
    for name in NAMES:
        for line in printed(shows[name], 60).splitlines():
            assert len(line) <= 60 or len(max(line.split(), key=len)) > 30, (name, line)


def test_columns_where_they_fit_and_rows_where_they_do_not() -> None:
    def show(out: Console) -> None:
        table = Table("", "source", "how", box=None, pad_edge=False, title=Text("[a] → b"), title_justify="left")
        table.add_row("resized", Text("model.layers.0.self_attn.q_proj.weight"), "two heads [red]averaged[/] to one")
        table.add_row("new", Text("[x]"), "")
        print_table(table, out)

    lines = [line.rstrip() for line in printed(show, 80).splitlines()]
    assert lines[0] == "[a] → b" and re.fullmatch(r" +source +how", lines[1])
    assert lines[2:] == [
        "resized  model.layers.0.self_attn.q_proj.weight  two heads averaged to one",
        "new      [x]",
    ]
    assert printed(show, 42).splitlines() == [
        "[a] → b",
        "resized",
        "    source",
        "      model.layers.0.self_attn.q_proj.weight",
        "    how two heads averaged to one",
        "new  source [x]",
    ]


def test_a_path_in_a_text_stays_in_one_piece() -> None:
    path = "/a/very/long/path/that/is/longer/than/forty/columns.safetensors"
    assert f"{path}:" in printed(lambda out: print_text(f"found in {path}: nothing", out), 40).splitlines()


def test_a_pipe_gets_no_colours_and_the_width_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a terminal none with NO_COLOR."""
    for name in ("COLUMNS", "FORCE_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert (console().width, console().is_terminal, console().color_system) == (160, False, None)
    monkeypatch.setenv("COLUMNS", "70")
    assert console().width == 70
    monkeypatch.setenv("NO_COLOR", "1")
    assert console().no_color

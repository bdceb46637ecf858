"""What the docs show of the code itself: the command line, from its parsers; the figures of benchmarks/."""

import os
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]


def cli_reference() -> str:
    """Every verb's help, in Markdown, as the command prints it at 80 columns."""
    os.environ["COLUMNS"] = "80"
    sys.path.insert(0, str(ROOT))
    sys.modules.setdefault("mymodels_command", __import__("mymodels_command")).started = True  # torch is not needed
    from mymodels.cli.command import make_parser

    parser, verbs = make_parser()
    pages = [
        "# Command line",
        "",
        "Each verb's `--help`, as it is printed.",
        "",
        "```text",
        parser.format_help().rstrip(),
        "```",
    ]
    for name, verb in verbs.items():
        pages += ["", f"## mymodels {name}", "", "```text", verb.format_help().rstrip(), "```"]
    return "\n".join(pages) + "\n"


def _breakable(code: re.Match) -> str:
    """A browser may break long names in a table after these signs, and before a capital letter."""
    return re.sub(r"(?<=\w)([/_.])(?=\w{3})|(?<=[a-z])(?=[A-Z][a-z]{2})", r"\1<wbr>", code[0])


def on_page_content(html, **_):
    cells = r"<td.*?</td>"
    return re.sub(cells, lambda cell: re.sub(r"<code>[^<]*</code>", _breakable, cell[0]), html, flags=re.S)


def on_files(files, config):
    files.append(File.generated(config, "reference/cli.md", content=cli_reference()))
    for figure in sorted((ROOT / "benchmarks" / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files

"""What the docs show of the code itself: the command line, from its parsers; the figures of benchmarks/."""

import os
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


def on_files(files, config):
    files.append(File.generated(config, "reference/cli.md", content=cli_reference()))
    for figure in sorted((ROOT / "benchmarks" / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files

"""The unified diff of what the rules changed."""

import difflib
import json
from typing import Any

from ..static.repo_snapshot import Folder
from .edit_engine import Edited


def config_text(values: dict[str, Any]) -> str:
    """`config.json` as transformers writes it."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def diff_of(folder: Folder, edited: Edited) -> str:
    """The diff of the code files, and of `config.json` if its values changed."""
    pairs = [(name, folder.code[name].text, text) for name, text in sorted(edited.texts.items())]
    if edited.config is not None:
        pairs.insert(0, ("config.json", config_text(folder.config), config_text(edited.config)))
    return "".join(_diff(*pair) for pair in pairs)


def _diff(name: str, before: str, after: str) -> str:
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"a/{name}", f"b/{name}"
    )
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)

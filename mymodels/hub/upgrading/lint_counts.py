"""How many findings transformers-mlinter has on the code before and after, for information."""

from importlib.util import find_spec

from ..static.repo_snapshot import Folder
from .edit_engine import Edited


def lint_counts(folder: Folder, edited: Edited) -> dict[str, int]:
    """Findings `before` and `after`; empty if transformers-mlinter is not installed, or cannot read the code.

    It only reads. Its rules are those for models inside transformers, so custom code need not reach zero.
    """
    if find_spec("mlinter") is None:
        return {}
    from mlinter import analyze_file

    try:
        before = {name: len(analyze_file(folder.path / name, file.text)) for name, file in folder.code.items()}
        changed = {name: len(analyze_file(folder.path / name, text)) for name, text in edited.texts.items()}
    except Exception:  # a linter's own trouble with odd code is no reason to stop
        return {}
    return {"before": sum(before.values()), "after": sum((before | changed).values())}

"""Write the upgraded folder: everything of the original, the edited files in their place, the proof beside them."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...checkpoints import CheckpointError, replace_folder, write_manifest
from ...checkpoints.integrity import MANIFEST
from ..given_inputs import Inputs
from ..golden import GOLDEN, temporary_golden
from ..static.repo_snapshot import Folder
from .edit_engine import Edited
from .left_faults import verify_faults
from .report import card_faults, card_table, report_of
from .unified_diff import config_text

if TYPE_CHECKING:
    from .upgrade import Upgrade

REPORT, DIFF = "upgrade.json", "upgrade.diff"
_BEGIN, _END = "<!-- mymodels upgrade: begin -->", "<!-- mymodels upgrade: end -->"


def write_copy(folder: Folder, edited: Edited, target: Path, *, link: bool = True) -> Path:
    """The folder's regular files with the edited ones in their place, in a new folder.

    Args:
        link: large files as links, for a folder that is soon deleted.
    """
    for name, file in folder.files.items():
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if name in edited.texts:
            copy.write_text(edited.texts[name], encoding="utf-8", newline="")
        elif name == "config.json" and edited.config is not None:
            copy.write_text(config_text(edited.config), encoding="utf-8")
        elif link and file.stat().st_size > 10_000_000:
            copy.symlink_to(file.resolve())
        else:
            shutil.copyfile(file, copy)
    return target


class GoldenSource(NamedTuple):
    """A folder that golden outputs may be recorded from.

    Attributes:
        folder: its code is run.
        release: where its transformers release is installed; None for the installed one.
        named: what it is, for the report.
    """

    folder: Path
    release: Path | None
    named: str


def write_upgraded(
    folder: Folder,
    edited: Edited,
    result: "Upgrade",
    out: Path,
    original: GoldenSource | None = None,
    *,
    inputs: Inputs | None = None,
    limits: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Write the result with its report, diff, golden outputs, card's table and manifest: all of it, or nothing.

    What `verify` fails on in it is put into `result.verify`, and into the report and the card.

    Args:
        original: where the golden outputs are recorded; None if no old release runs the original.
        inputs: the caller's arguments of `forward` for them.
        limits: `time_limit` and `memory_limit` of the recording.
        cache_dir: where releases are installed.
        tell: called with what is being done.

    Raises:
        FileExistsError: `out` is not empty.
    """
    with replace_folder(out, overwrite=False, finish=write_manifest) as new:
        write_copy(folder, edited, new, link=False)
        (new / MANIFEST).unlink(missing_ok=True)
        tell("writing the folder, and recording golden outputs")
        upgraded = GoldenSource(new, None, f"the upgraded code under transformers {version('transformers')}")
        sources = [original, upgraded] if original is not None else [upgraded]
        result.golden = _write_golden(new, sources, inputs=inputs, **(limits or {}))
        tell("verifying the folder")
        how = {"inputs": inputs, "cache_dir": cache_dir, **(limits or {})}
        assert result.proof is not None
        result.verify = list(verify_faults(new, result.proof.targets[-1], how))
        (new / REPORT).write_text(json.dumps(report_of(result), indent=2) + "\n", encoding="utf-8")
        (new / DIFF).write_text(result.diff, encoding="utf-8")
        faults = card_faults(result)
        _write_card(new / "README.md", card_table(result) + (f"\n\nNot repaired:\n{faults}" if faults else ""))


def _write_golden(new: Path, sources: Sequence[GoldenSource], **how: Any) -> str:
    """Golden outputs from the first source that gives them; a phrase on where they come from."""
    if (new / GOLDEN).is_file():
        return "the folder's own file, unchanged"
    failed: list[str] = []
    for source in sources:
        try:
            with temporary_golden(source.folder, release=source.release, **how) as made:
                shutil.copyfile(made, new / GOLDEN)
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{source.folder}: ").removeprefix("golden outputs cannot be recorded, ")
            failed.append(f"{source.named} gives none: {reason}")
            continue
        return "; ".join([f"recorded from {source.named}", *failed])
    return "; ".join(["none", *failed])


def _write_card(card: Path, table: str) -> None:
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        before, after = (text.rstrip() + "\n\n" if text.strip() else ""), "\n"
    card.write_text(f"{before}{_BEGIN}\n\n{table}\n\n{_END}{after}", encoding="utf-8")

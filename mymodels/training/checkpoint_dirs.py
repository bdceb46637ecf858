"""The checkpoint folders of a run: check them, choose one to resume from, remove old ones."""

import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..checkpoints import CheckpointError
from ..checkpoints.atomic_write import repair
from ..checkpoints.integrity import MANIFEST, check_checkpoint, check_manifest
from ..checkpoints.safetensors_files import read_json
from ..checkpoints.torch_files import load_plain

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # transformers' name; every training checkpoint has one
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-N` of `output_dir`, by their step."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def check_training_checkpoint(folder: Path) -> str | None:
    """A sentence on what is wrong with a training checkpoint; None if it is complete and every file's hash is right.

    A folder without a manifest, as transformers' Trainer writes, is complete if its weights and its state can be read.
    """
    if not (folder / STATE).is_file():
        return f"{folder} has no {STATE}: it is incomplete, or is not a training checkpoint"
    if not any(folder.glob("optimizer*")) and not any(folder.glob("global_step*")):  # DeepSpeed's
        return f"{folder} has no optimizer state (optimizer.pt), so it cannot be resumed: save checkpoints without save_only_model=True"
    if (folder / MANIFEST).is_file():
        problems = check_manifest(folder, full=True)
        return problems[0].message if problems else None
    try:
        read_json(folder / STATE)
        problems = check_checkpoint(folder)
        for file in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
            load_plain(file)
    except (ValueError, OSError) as error:
        return str(error)
    return problems[0].message if problems else None


def find_checkpoint(
    output_dir: str | os.PathLike | None, resume_from_checkpoint: bool | str | os.PathLike | None
) -> Path | None:
    """The checkpoint to resume from: the given one, or for `True` the newest complete one of `output_dir`; else None.

    Damaged checkpoints are skipped with a warning. The main process chooses and sends its choice to all processes, which
    must see the same files. Writing to `output_dir` is tried here, so that it does not fail at the first checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint.
        FileExistsError: the run is not resumed, but `output_dir` has checkpoints of an earlier run.
        CheckpointError: the given checkpoint, or every checkpoint, is damaged.
        OSError: `output_dir` cannot be written.
    """
    answer: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            answer = [_find(output_dir, resume_from_checkpoint)]
        except (OSError, ValueError) as error:
            answer = [error]  # so that the other processes stop too
    found = broadcast_object_list(answer)[0]
    if isinstance(found, Exception):
        raise found
    return found


def _find(output_dir: str | os.PathLike | None, resume: bool | str | os.PathLike | None) -> Path | None:
    if output_dir is not None and resume is not True:
        try_to_write(Path(output_dir))
    if not resume:
        earlier = list_checkpoints(output_dir) if output_dir is not None else []
        if earlier:
            raise FileExistsError(
                f"{output_dir} holds {earlier[-1].name} of an earlier run: pass resume_from_checkpoint=True to resume "
                "it, or choose another folder"
            )
        return None
    if resume is not True:
        folder = Path(resume)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no checkpoint folder {folder} to resume from")
        if problem := check_training_checkpoint(folder):
            raise CheckpointError(f"{problem}. resume_from_checkpoint=True uses the newest complete checkpoint")
        return folder
    if output_dir is None:
        raise ValueError("resume_from_checkpoint=True needs output_dir, the folder with the checkpoints")
    return newest_checkpoint(Path(output_dir))


def newest_checkpoint(output_dir: Path) -> Path:
    """The newest complete checkpoint of `output_dir`; warns of each damaged one that is skipped.

    Raises:
        FileNotFoundError: there are no checkpoints.
        CheckpointError: every checkpoint is damaged.
    """
    if not output_dir.is_dir():
        raise FileNotFoundError(f"there is no folder {output_dir} to resume from: start without resume_from_checkpoint")
    try_to_write(output_dir)
    _repair(output_dir)
    problem = ""
    for folder in reversed(list_checkpoints(output_dir)):
        problem = check_training_checkpoint(folder) or ""
        if not problem:
            return folder
        logger.warning("%s is damaged and was skipped: %s", folder, problem)
    if problem:
        raise CheckpointError(f"{output_dir} has no complete checkpoint: {problem}")
    raise FileNotFoundError(f"{output_dir} has no checkpoint to resume from: start without resume_from_checkpoint")


def _repair(output_dir: Path) -> None:
    """Finish or remove what killed processes left half written or half removed."""
    for path in output_dir.glob(".checkpoint-*"):
        if found := re.fullmatch(r"\.(checkpoint-\d+)\.saving-\w{8}", path.name):
            repair(output_dir / found[1])
        elif path.name.endswith(".removing"):
            shutil.rmtree(path, ignore_errors=True)


def try_to_write(output_dir: Path) -> None:
    """Create the folder if it does not exist; raise an `OSError` with one sentence if it cannot be written to."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise OSError(error.errno, f"{output_dir} cannot be written to: {reason}") from None


def remove_old_checkpoints(output_dir: Path, newest: Path, best: Path | None, save_total_limit: int | None) -> None:
    """Keep `newest`, `best` and the latest others, `save_total_limit` in all but at least these two; remove the rest."""
    _repair(output_dir)
    if not save_total_limit or save_total_limit < 1:
        return
    kept = {path.name for path in (newest, best) if path}
    others = [path for path in list_checkpoints(output_dir) if path.name not in kept]
    others.sort(key=lambda path: path.stat().st_mtime)
    for path in others[: max(len(others) + len(kept) - save_total_limit, 0)]:
        doomed = path.with_name(f".{path.name}.removing")  # so that no half removed checkpoint has its name
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

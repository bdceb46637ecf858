"""The folder beside the result: checkpoints while it trains, and a record by which a later run knows whether they are its own."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.replacing import replace_file
from .data import Data
from .folders import STATE, list_checkpoints, newest_checkpoint

RECORD, METRICS = "finetune.json", "metrics.json"
MAY_CHANGE = {"report_to", "disable_tqdm", "logging_steps", "save_total_limit", "dataloader_num_workers"}  # to resume


def fingerprint(data: Data) -> str:
    """Of the texts and labels that are trained on, in their order."""
    digest = hashlib.sha256()
    for rows in (data.train, data.validation):
        for column in rows.column_names:
            for value in rows[column]:
                digest.update(f"{value}\0".encode())
    return digest.hexdigest()


def checkpoint_to_resume(
    where: Path, output_dir: Path, record: Mapping[str, Any], resume: bool | str | os.PathLike
) -> str | None:
    """The checkpoint to go on from.

    Raises:
        FileExistsError: there are some, and resuming was not asked for.
        ValueError: they are of another training, all are damaged, or the training is finished.
    """
    there = list_checkpoints(where)
    if resume is False or resume is None:
        if there:
            raise FileExistsError(
                f"{where} holds checkpoints of an earlier training, the newest is {there[-1].name}: go on with --resume, or "
                "remove the folder, or choose another --checkpoint-dir"
            )
        return None
    if resume is not True:
        if not Path(resume, STATE).is_file():
            raise ValueError(f"{resume} is no checkpoint of a training: name a folder checkpoint-N")
        return str(resume)
    if (where / RECORD).is_file():
        before = json.loads((where / RECORD).read_text(encoding="utf-8"))
        now = json.loads(json.dumps(record, default=str))
        if differ := [name for name in now if before.get(name) != now[name]]:
            raise ValueError(
                f"{where} is of another training, {', '.join(differ)} differ{'s' * (len(differ) == 1)}: use the same "
                "options to resume, or leave out --resume and choose another --checkpoint-dir"
            )
    if (where / METRICS).is_file():
        raise ValueError(
            f"the training in {where} is finished, {output_dir} is its result: leave out --resume to train anew"
        )
    return str(newest_checkpoint(where)) if there else None


def begin(where: Path, record: Mapping[str, Any]) -> None:
    """Note which training this folder is of."""
    where.mkdir(parents=True, exist_ok=True)
    (where / METRICS).unlink(missing_ok=True)
    with replace_file(where / RECORD) as file:
        file.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")

"""The record of a training's data and options, by which a resumed run checks that the checkpoints are its own."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..checkpoints.atomic_write import replace_file
from .checkpoint_dirs import STATE, list_checkpoints, newest_checkpoint
from .data import Data

RECORD, METRICS, ADAPTER = "finetune.json", "metrics.json", "adapter"
# options that a resumed run may change
MAY_CHANGE = {"report_to", "disable_tqdm", "logging_steps", "save_total_limit", "dataloader_num_workers"}


def hash_data(data: Data) -> str:
    """SHA-256 of the texts and labels of all splits, in order."""
    splits = [rows for rows in (data.train, data.validation, data.test) if rows is not None]
    return _hash(value for rows in splits for column in rows.column_names for value in rows[column])


def hash_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the tokens and their ids."""
    return _hash(sorted(tokenizer.get_vocab().items()))


def _hash(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()


def checkpoint_to_resume(
    where: Path, output_dir: Path, record: Mapping[str, Any], resume: bool | str | os.PathLike
) -> str | None:
    """The checkpoint to resume from, None to start.

    Raises:
        FileExistsError: there are checkpoints and `resume` is false, or they were not written by `finetune`.
        ValueError: the checkpoints are of another training, all are damaged, or the training is finished.
    """
    there = list_checkpoints(where)
    if not (where / RECORD).is_file():
        own = [path.name for path in (*there, where / METRICS, where / ADAPTER) if path.exists()]
        if own:
            raise FileExistsError(f"{where} holds {own[0]}, but no {RECORD}: choose another --checkpoint-dir")
    named = None if isinstance(resume, bool) or resume is None else Path(resume)
    folder = named.parent if named else where if resume else None
    if named and not (named / STATE).is_file():
        raise ValueError(f"{named} is not a checkpoint of a training: name a folder checkpoint-N")
    if there and (folder is None or folder.resolve() != where.resolve()):
        raise FileExistsError(
            f"{where} holds checkpoints of an earlier training, the newest is {there[-1].name}: pass --resume, or "
            "remove the folder, or choose another --checkpoint-dir"
        )
    if folder is None:
        return None
    if (folder / RECORD).is_file():
        before = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        now = json.loads(json.dumps(record, default=str))
        changes = [(name, f"{name} was {before.get(name)}, now {now.get(name)}") for name in {**now, **before}]
        differ = [
            sentence if len(sentence) <= 80 else f"{name} differs"
            for name, sentence in changes
            if before.get(name) != now.get(name)
        ]
        if differ:
            raise ValueError(
                f"{folder} is of another training ({', '.join(differ)}): use the same options to resume, or leave out "
                "--resume and choose another --checkpoint-dir"
            )
    elif named:
        raise ValueError(f"{named} has no {RECORD} beside it, the record of its training: name the original folder")
    if named:
        return str(named)
    if (where / METRICS).is_file():
        raise ValueError(
            f"the training in {where} is finished, {output_dir} is its result: leave out --resume to train again"
        )
    return str(newest_checkpoint(where)) if there else None


def write_run_record(where: Path, record: Mapping[str, Any]) -> None:
    """Write the record of the training into its folder."""
    where.mkdir(parents=True, exist_ok=True)
    (where / METRICS).unlink(missing_ok=True)
    with replace_file(where / RECORD) as file:
        file.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")

"""Lines in, answers out, in the same order, a window of batches at a time."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..messages import first_line
from .jsonl import Line, read_lines
from .load_task import load_task
from .tasks import Span, Task


@dataclass
class Counts:
    """What became of the lines: `answered`, `skipped` as bad, and of the answered ones, how many were `cut`."""

    answered: int = 0
    skipped: int = 0
    cut: int = 0


def predict(
    model: PreTrainedModel | str | os.PathLike,
    input: str | os.PathLike | BinaryIO,
    output: str | os.PathLike | BinaryIO,
    *,
    task: str | None = None,
    column: str = "text",
    pair_column: str | None = None,
    text: bool = False,
    batch_size: int = 32,
    window: int = 16,
    top_k: int | None = None,
    max_length: int | None = None,
    max_new_tokens: int = 50,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    report: Callable[[str], None] | None = None,
) -> Counts:
    """Answer each line of a JSONL file, or of plain text, with a line of JSON, in memory that does not grow with them.

    An answer begins with the line's `id`, or with its number as `line`; then comes what the task gives, see its class
    in `mymodels.predicting.tasks`. A line that cannot be used is reported and skipped. Answers are the same as for one
    text at a time, up to rounding.

    Args:
        model: a folder or Hub repo that transformers' Auto classes load, or a model in memory (then with `tokenizer`).
        input, output: files, or open binary ones. A file is written under a name that ends in `.partial`, which it
            loses when all is done; a pipe or device is written to as it is.
        task: `text-classification`, `token-classification`, `question-answering`, `feature-extraction`,
            `text-generation`, `text2text-generation` (encoder-decoders) or `loss`. Default: what the class is for.
        column, pair_column: the fields with the text, and with the second one of a pair (default: `text_pair`, if there).
        text: lines are texts, not JSON.
        batch_size: texts that are computed together.
        window: batches that are read ahead and sorted by length, so that little is padded; 1 answers after each batch.
        top_k: also give the scores of so many labels, 0 for all.
        max_length: tokens that texts are cut to. Default: what the model takes.
        max_new_tokens: of `text-generation` and `text2text-generation`.
        device: default: `cuda` where there is one.
        dtype: of the weights. Default: as they are saved.
        tokenizer: default: the model's.
        report: takes a sentence on each line that is skipped. Default: it goes to stderr.

    Raises:
        ValueError: the model cannot be used for this, an option makes no sense, or an answer is not a number.
        OSError: a file or the model cannot be read or written.
    """
    for name, value in (("batch_size", batch_size), ("window", window)):
        if value < 1:
            raise ValueError(f"{name}={value}: it must be 1 or more")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k={top_k}: it must be 1 or more, or 0 for all labels")
    with ExitStack() as stack:
        source: Any = input
        size = None
        if isinstance(input, (str, os.PathLike)):
            source = stack.enter_context(Path(input).open("rb"))
            size = os.fstat(source.fileno()).st_size or None
            if isinstance(output, (str, os.PathLike)):
                for place in (output, _partial(output)):
                    if os.path.isfile(place) and os.path.samefile(input, place):
                        raise ValueError(f"{os.fspath(place)} is the input, too: name another file for the output")
        if isinstance(output, (str, os.PathLike)):
            _check_output(output)  # before the model is loaded, and before it has answered
        ready_task, notes = load_task(
            model,
            task,
            tokenizer=tokenizer,
            revision=revision,
            trust_remote_code=trust_remote_code,
            device=device,
            dtype=dtype,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            top_k=top_k,
        )
        target = stack.enter_context(_open_output(output))
        unit: dict[str, Any] = {"unit": "line"} if size is None else {"unit": "B", "unit_scale": True, "total": size}
        bar = stack.enter_context(tqdm(desc="predicting", disable=None, **unit))
        notify = report or (lambda sentence: bar.write(sentence, file=sys.stderr))
        for note in notes:
            notify(f"{type(model).__name__ if isinstance(model, PreTrainedModel) else os.fspath(model)}: {note}")
        counts = Counts()

        def usable() -> Iterator[Line]:
            for line in read_lines(source, column=column, pair_column=pair_column, plain=text):
                bar.update(1 if size is None else line.size)
                if line.problem is None and line.pair is not None and not ready_task.takes_pairs:
                    line.problem = f"it has a second text, and {type(ready_task).__name__} takes one"
                if line.problem is None and line.pair is None and isinstance(ready_task, Span):
                    line.problem = "it has no context: give it as text_pair, or name its field by --pair-column"
                if line.problem is None:
                    yield line
                else:
                    skip(line, line.problem)

        def skip(line: Line, problem: str) -> None:
            counts.skipped += 1
            notify(f"line {line.number} skipped: {problem}")

        for answered in answer(ready_task, usable(), batch_size=batch_size, window=window, skip=skip):
            target.write(b"".join(answered))
            target.flush()
            counts.answered += len(answered)
    counts.cut = ready_task.cut
    return counts


def _partial(output: str | os.PathLike) -> Path:
    return Path(f"{os.path.realpath(output)}.partial")  # beside the file itself, so that a link stays one


def _check_output(output: str | os.PathLike) -> None:
    if os.path.isdir(output):
        raise IsADirectoryError(f"{os.fspath(output)} is a folder: name a file for the output")
    if not os.path.exists(output) and not _partial(output).parent.is_dir():
        raise FileNotFoundError(f"{os.fspath(output)} is in a folder that does not exist: make it first")


@contextmanager
def _open_output(output: str | os.PathLike | BinaryIO) -> Iterator[Any]:
    if not isinstance(output, (str, os.PathLike)):
        yield output
    elif os.path.exists(output) and not os.path.isfile(output):  # a pipe or a device, whose place no file may take
        with Path(output).open("wb") as file:
            yield file
    else:
        partial = _partial(output)
        try:
            with partial.open("wb") as file:
                yield file
        except BaseException:
            if partial.is_file() and not partial.stat().st_size:  # no answer to keep
                partial.unlink()
            raise
        os.replace(partial, os.path.realpath(output))


@torch.inference_mode()
def answer(
    task: Task, lines: Iterable[Line], *, batch_size: int, window: int, skip: Callable[[Line, str], None]
) -> Iterator[list[bytes]]:
    """Answers as lines of JSON, for a window of `window * batch_size` lines at a time, in their order."""
    lines = iter(lines)
    while window_lines := list(islice(lines, window * batch_size)):
        encoded = task.encode([(line.text, line.pair) for line in window_lines])
        lengths = [len(ids) for ids in encoded["input_ids"]]
        for line, length in zip(window_lines, lengths):
            if not length:
                skip(line, "the tokenizer finds no token in it")
        found: dict[int, bytes] = {}
        order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
        for chosen in _batches(order, lengths, batch_size, mixed=task.pads):
            rows = {name: [column[i] for i in chosen] for name, column in encoded.items()}
            texts = [(window_lines[i].text, window_lines[i].pair) for i in chosen]
            for i, given in zip(chosen, _answers_or_error(task, rows, texts, [window_lines[i].number for i in chosen])):
                found[i] = _to_json_line(window_lines[i], given)
        yield [found[i] for i in sorted(found)]


def _batches(order: list[int], lengths: list[int], batch_size: int, *, mixed: bool) -> Iterator[list[int]]:
    """`order` cut into batches; unless `mixed`, each of texts of one length, so that none is padded."""
    groups = [order] if mixed else [list(group) for _, group in groupby(order, key=lambda i: lengths[i])]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _answers_or_error(task: Task, rows: dict[str, Any], texts: Any, numbers: list[int]) -> list[dict[str, Any]]:
    """The task's answers; what a model's own code raises is one sentence."""
    try:
        return task(rows, texts)
    except (ValueError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{type(task.model).__name__} fails on line{'s' * (len(numbers) > 1)} {', '.join(map(str, sorted(numbers)[:5]))}"
            f"{', …' * (len(numbers) > 5)}: {type(error).__name__}: {first_line(error)}"
        ) from error


def _to_json_line(line: Line, given: dict[str, Any]) -> bytes:
    try:
        return json.dumps({**line.key, **given}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except ValueError:
        raise ValueError(
            f"line {line.number}: the model's answer is not a number but NaN or infinite: see whether its weights are whole "
            "(mymodels check --full), or take another --dtype"
        ) from None

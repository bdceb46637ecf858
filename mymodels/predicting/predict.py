"""`predict`: answer lines in order, reading a window of batches at a time."""

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
    """Numbers of lines: `answered`, `skipped` as invalid, and `cut`, answered after truncation."""

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
    """Answer each line of a JSONL or plain text file with a line of JSON, in constant memory.

    An answer has the line's `id`, or its number as `line`, and the fields of the task, see its class in
    `mymodels.predicting.tasks`. Invalid lines are reported and skipped. Answers do not depend on the batches, up to
    rounding.

    Args:
        model: a folder or Hub repo that transformers' Auto classes load, or a model in memory (then with `tokenizer`).
        input, output: files, or open binary files. An output file has the suffix `.partial` until it is complete; a pipe
            or device is written to directly.
        task: `text-classification`, `token-classification`, `question-answering`, `feature-extraction`,
            `text-generation`, `text2text-generation` (encoder-decoders) or `loss`. Default: the task of the model's class.
        column, pair_column: the fields with the text, and with the second text of a pair (default: `text_pair` if present).
        text: lines are texts, not JSON.
        batch_size: texts per batch.
        window: number of batches that are read ahead and sorted by length to reduce padding; 1 answers batch by batch.
        top_k: also return the scores of this many labels, 0 for all.
        max_length: texts are truncated to this many tokens. Default: the model's maximum.
        max_new_tokens: for `text-generation` and `text2text-generation`.
        device: default: `cuda` where there is one.
        dtype: of the weights. Default: as they are saved.
        tokenizer: default: the model's.
        report: takes a sentence on each line that is skipped. Default: it goes to stderr.

    Raises:
        ValueError: the model does not fit the task, an option is invalid, or an answer is NaN or infinite.
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
                        raise ValueError(f"{os.fspath(place)} is also the input: name another file for the output")
        if isinstance(output, (str, os.PathLike)):
            _check_output(output)  # before the model is loaded
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
                    line.problem = f"it has a second text, but {type(ready_task).__name__} takes one"
                if line.problem is None and line.pair is None and isinstance(ready_task, Span):
                    line.problem = "it has no context: add it as text_pair, or name its field by --pair-column"
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
    return Path(f"{os.path.realpath(output)}.partial")  # beside the target of a link, so that the link is kept


def _check_output(output: str | os.PathLike) -> None:
    if os.path.isdir(output):
        raise IsADirectoryError(f"{os.fspath(output)} is a folder: name a file for the output")
    if not os.path.exists(output) and not _partial(output).parent.is_dir():
        raise FileNotFoundError(f"{os.fspath(output)} is in a folder that does not exist: create it first")


@contextmanager
def _open_output(output: str | os.PathLike | BinaryIO) -> Iterator[Any]:
    if not isinstance(output, (str, os.PathLike)):
        yield output
    elif os.path.exists(output) and not os.path.isfile(
        output
    ):  # a pipe or device, which must not be replaced by a file
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
    """Answers as lines of JSON, in order, for `window * batch_size` lines at a time."""
    lines = iter(lines)
    while window_lines := list(islice(lines, window * batch_size)):
        encoded = task.encode([(line.text, line.pair) for line in window_lines])
        lengths = [len(ids) for ids in encoded["input_ids"]]
        for line, length in zip(window_lines, lengths):
            if not length:
                skip(line, "the tokenizer returns no tokens for it")
        found: dict[int, bytes] = {}
        order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
        for chosen in _batches(order, lengths, batch_size, mixed=task.pads):
            rows = {name: [column[i] for i in chosen] for name, column in encoded.items()}
            texts = [(window_lines[i].text, window_lines[i].pair) for i in chosen]
            for i, given in zip(chosen, _answers_or_error(task, rows, texts, [window_lines[i].number for i in chosen])):
                found[i] = _to_json_line(window_lines[i], given)
        yield [found[i] for i in sorted(found)]


def _batches(order: list[int], lengths: list[int], batch_size: int, *, mixed: bool) -> Iterator[list[int]]:
    """`order` in batches; unless `mixed`, each batch has texts of one length, without padding."""
    groups = [order] if mixed else [list(group) for _, group in groupby(order, key=lambda i: lengths[i])]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _answers_or_error(task: Task, rows: dict[str, Any], texts: Any, numbers: list[int]) -> list[dict[str, Any]]:
    """The task's answers; errors of custom code become one sentence."""
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
            f"line {line.number}: the model's answer is NaN or infinite: check its weights (mymodels check --full), or use "
            "another --dtype"
        ) from None

"""The process in the box that a model lives in, and the way to it; see `isolated_model.py`."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.opening import weight_files
from ..checkpoints.safetensors_files import inside
from ..messages import one_line
from ..sandbox import available, command, end, results, why_ended
from .clean_process import environment
from .isolated import exchange

_SERVE = Path(__file__).parent / "isolated" / "serve.py"
_MEMORY, _OF_WEIGHTS = 8 * 10**9, 4  # bytes of memory: these, and so many times the weights
_SCRATCH, _COPIES = 4 * 10**9, 4
_PATIENCE = 5.0  # seconds to wait for code that was interrupted


class IsolatedError(RuntimeError):
    """What a model in the box raised, or why its process has ended."""


class IsolatedProcess:
    """The confined process of a model, and the way to it."""

    def __init__(self, folder: Path, auto_class: str, options: dict[str, Any], limits: dict[str, Any], name: str):
        self.isolation = available()
        self.isolation.require()
        self.name, self.time_limit, self._why = name, limits["time_limit"], ""
        with contextlib.ExitStack() as undo:  # whatever keeps the process from starting
            self._start(folder, auto_class, limits, undo)
            undo.pop_all()
        try:
            self.channel.send(options)
        except TypeError as error:
            self.close()
            raise TypeError(f"an option of from_pretrained cannot be used with isolated=True: {error}") from None
        except exchange.Closed:
            pass  # `receive` says why

    def _start(self, folder: Path, auto_class: str, limits: dict[str, Any], undo: contextlib.ExitStack) -> None:
        """Start the process; `undo` removes what was made for it until it runs."""
        control = Path(tempfile.mkdtemp(prefix="mymodels-isolated-")).resolve()
        undo.callback(results.delete, control)
        self.control, self.scratch = control, control / "scratch"
        self.scratch.mkdir()
        asked, ask = os.pipe()
        answered, answer = os.pipe()
        memories = exchange.shared_memory("requests"), exchange.shared_memory("answers")
        theirs, mine = [asked, answer, *memories], [answered, ask, *memories]
        for descriptor in (asked, answer, *mine):
            undo.callback(os.close, descriptor)
        size = sum(file.stat().st_size for file in weight_files(folder))
        self.scratch_size = _SCRATCH + _COPIES * size
        memory = limits["memory_limit"] or _MEMORY + _OF_WEIGHTS * size
        job = {
            "folder": str(folder),
            "auto_class": auto_class,
            "saved": str(self.scratch / "saved"),
            "threads": torch.get_num_threads(),
            "descriptors": theirs,
        }
        (control / "job.json").write_text(json.dumps(job), encoding="utf-8")
        started = command(
            [_SERVE, control / "job.json"],
            control=control,
            scratch=self.scratch,
            readable=[_SERVE.parent, control / "job.json", folder, *_links(folder)],
            memory=memory,
            scratch_size=self.scratch_size,
            devices=limits["devices"],
            keep=theirs,
            isolation=self.isolation,
        )
        own = environment(self.scratch)
        for variable in (
            "OMP_NUM_THREADS",
            "MKL_NUM_THREADS",
            *(["CUDA_VISIBLE_DEVICES"] if limits["devices"] else []),
        ):
            own.pop(variable, None)
            own |= {variable: os.environ[variable]} if variable in os.environ else {}
        with (control / "stderr").open("wb") as errors:
            self.process = subprocess.Popen(
                started,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=own,
                cwd=self.scratch,
                start_new_session=True,
                pass_fds=theirs,
            )
        for descriptor in (asked, answer):
            os.close(descriptor)
        self.channel = exchange.Channel(answered, ask, memories[1], memories[0], largest=memory)
        self._finalizer = weakref.finalize(self, _end, self.process, mine, control, os.getpid())

    def receive(self) -> Any:
        """The next message; whatever is wrong with it ends the process."""
        try:
            return self.channel.receive(self.time_limit)
        except exchange.Closed:
            why = self._reason()
        except exchange.InvalidMessage as error:
            why = f"its code sent {one_line(error, 200)}"
        except TimeoutError:
            why = f"it did not answer within {self.time_limit:g} s"
        self.close(why)
        raise IsolatedError(f"{self.name}: the process in the box has ended: {why}")

    def answer(self, request: dict[str, Any], number: int) -> dict[str, Any]:
        """The answer to a request, those to requests that were interrupted left out."""
        if not self._finalizer.alive:
            raise IsolatedError(f"{self.name}: the process in the box has ended{': ' * bool(self._why)}{self._why}")
        try:
            with contextlib.suppress(exchange.Closed):  # `receive` says why
                self.channel.send(request)
            while True:
                answer = self.receive()
                if not isinstance(answer, dict) or answer.get("number") == number or "number" not in answer:
                    break
        except KeyboardInterrupt:
            self._interrupt()
            raise
        if isinstance(answer, dict) and "error" in answer:
            raise IsolatedError(failure_sentence(answer))
        if not isinstance(answer, dict) or "value" not in answer:
            self.close("its code sent no answer")
            raise IsolatedError(f"{self.name}: the process in the box has ended: {self._why}")
        return answer

    def _interrupt(self) -> None:
        """Let the code in the box raise KeyboardInterrupt; end it if it does not."""
        with contextlib.suppress(OSError):
            os.kill(self.process.pid, signal.SIGINT)
        try:
            self.channel.receive(_PATIENCE)
        except (exchange.Closed, exchange.InvalidMessage, TimeoutError, KeyboardInterrupt):
            self.close("it was interrupted")

    def _reason(self) -> str:
        """Why the process has ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        if why := why_ended(self.control):
            return why
        with (self.control / "stderr").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 10_000))
            printed = file.read().decode("utf-8", errors="replace").strip().splitlines()
        how = f"it ended with exit code {self.process.returncode}"
        return one_line(f"{how}: {printed[-1]}" if printed else how, 300)

    def close(self, why: str = "it was closed") -> None:
        if self._finalizer.alive:
            self._why = why
            self._finalizer()


def failure_sentence(answer: Any) -> str:
    """The sentence of an answer that reports an exception."""
    if not isinstance(answer, dict):
        return "it sent no answer"
    where = one_line(answer.get("where") or "", 100)
    return one_line(answer.get("error", "it sent no answer"), 600) + (f" ({where})" if where else "")


def _end(process: subprocess.Popen, descriptors: Iterable[int], control: Path, owner: int) -> None:
    if os.getpid() != owner:  # a fork, which must not end the process of its parent
        return
    end(process)
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    results.delete(control)


def _links(folder: Path) -> list[Path]:
    """The files in a folder that are links, followed; as in the Hub's cache.

    Raises:
        CheckpointError: a link leads out of the folder.
    """
    names = [Path(base, name).relative_to(folder).as_posix() for base, _, files in os.walk(folder) for name in files]
    return [inside(folder, name, folder).resolve() for name in names if (folder / name).is_symlink()]

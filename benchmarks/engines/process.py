"""An engine in a process of its own, so that none shares threads, allocator or OpenMP with another; and its clock."""

import os
import subprocess
import sys
import time
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from . import load

HOME = Path(__file__).resolve().parent.parent


class Start(NamedTuple):
    """Which engine ("ours" or a key of `ENGINES`) with which model: `kind` is "Classifier" or "Generator"."""

    engine: str
    kind: str
    folder: Path
    precision: str
    threads: int


class Worker:
    """An engine with a model; a call of `run` is a call of a method there. Idle, it waits without using the processor.

    Raises:
        SystemExit: the engine fails; its own last lines are printed.
    """

    spent = 0.0  # processor seconds of the calls of all workers

    def __init__(self, *start: Any):
        self.start = Start(*start)
        self.pipe, theirs = Pipe()
        threads = str(self.start.threads)
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment = (
            os.environ | quiet | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        )
        path = [str(HOME), str(HOME.parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
        command = [sys.executable, "-m", "engines.process", str(theirs.fileno())]
        self.process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL)
        theirs.close()
        self.run(None, self.start)

    def run(self, method: str | None, *arguments: Any) -> Any:
        try:
            self.pipe.send((method, arguments))
            failed, result, spent = self.pipe.recv()
        except (EOFError, OSError):
            failed, result, spent = True, "its process ended", 0.0
        if failed:
            self.close()
            raise SystemExit(f"{self.start.engine}, {self.start.precision}: {result}")
        Worker.spent += spent
        return result

    def close(self) -> None:
        self.pipe.close()
        self.process.wait()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def processor_seconds() -> float:
    """A clock for `pairs`: what the calls of all workers took of the processor."""
    return Worker.spent


def _make(start: Start) -> Any:
    module = load(start.engine)
    given = {"ours": True} if start.engine == "ours" else {}
    return getattr(module, start.kind)(start.folder, start.precision, start.threads, **given)


def _serve(pipe: Connection) -> None:
    model = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        begin = time.process_time()
        try:
            if method is None:
                model, result = _make(*arguments), None
            else:
                result = getattr(model, method)(*arguments)
        except Exception as error:
            traceback.print_exc()
            pipe.send((True, f"{type(error).__name__}: {error}", 0.0))
            return
        pipe.send((False, result, time.process_time() - begin))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))

"""Making attempts from outside: in an ordinary process, for the control, and in the box."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attempts import Attempt
from outside import Outside

from mymodels import sandbox

SCRIPT = Path(__file__).parent / "attempts" / "run.py"
GRACE = 1.0  # seconds beyond the limit of an attempt that only wants to go on
LARGEST_OUTPUT = 2_000_000  # bytes that the box may make its caller hold
Outcomes = dict[str, dict[str, Any]]


def _arguments(world: Outside, attempts: list[Attempt], scratch: Path) -> list[str]:
    """What `attempts/run.py` is given: an attempt that wants a process of its own, or any number of the others."""
    alone = ["--alone"] if attempts[0].alone else []
    assert len(attempts) == 1 or not any(attempt.alone for attempt in attempts)
    fields = json.dumps(world.target._replace(scratch=str(scratch))._asdict())
    return [str(SCRIPT), fields, *alone, *(attempt.name for attempt in attempts)]


def _reports(printed: bytes) -> Outcomes:
    """What each attempt said last."""
    found: Outcomes = {}
    for line in printed.splitlines():
        with contextlib.suppress(ValueError):
            report = json.loads(line)
            if isinstance(report, dict) and "name" in report:
                found[report["name"]] = found.get(report["name"], {}) | report
    return found


def _look(found: Outcomes, world: Outside, output: int) -> Outcomes:
    """Judges by what is there, for attempts that say what they left; removes it.

    Args:
        output: bytes that came from standard output or error, whichever is more.
    """
    for report in found.values():
        there = None
        if path := report.get("left"):
            there = os.path.lexists(path)
            with contextlib.suppress(OSError):
                (os.rmdir if os.path.isdir(path) else os.unlink)(path)
        if process := report.get("remains"):
            there = process in world.processes().values()
        if size := report.get("printed"):
            there = output >= min(size, LARGEST_OUTPUT)
        if there is not None:
            report["outcome"] = "succeeded" if there else "stopped"
    return found


def plainly(world: Outside, attempts: list[Attempt], scratch: Path) -> Outcomes:
    """What came of attempts in a process with the user's own rights."""
    limit = attempts[0].limits.get("seconds", 30) + GRACE
    files = [scratch.with_suffix(f".{name}") for name in ("out", "err")]
    with files[0].open("wb") as out, files[1].open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-ISB", *_arguments(world, attempts, scratch)],
            stdout=out,
            stderr=err,
            cwd=scratch,
            pass_fds=list(world.descriptors.values()),
            start_new_session=True,
        )
        try:
            process.wait(limit)
            ran_on = False
        except subprocess.TimeoutExpired:
            ran_on = True
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = _reports(files[0].read_bytes())
    for report in found.values():
        if report["outcome"] == "began" and ran_on:
            report["outcome"] = "succeeded"
    return _look(found, world, max(file.stat().st_size for file in files))


def boxed(world: Outside, attempts: list[Attempt], scratch: Path, isolation: sandbox.Isolation) -> Outcomes:
    """What came of attempts in the box."""
    limits = {"seconds": 60} | attempts[0].limits
    began = time.monotonic()
    ended = sandbox.run(
        _arguments(world, attempts, scratch),
        readable=[SCRIPT.parents[1], world.folder],
        scratch=scratch,
        isolation=isolation,
        **limits,
    )
    found = _reports(ended.stdout)
    late = time.monotonic() - began > limits["seconds"] + 5
    for report in found.values():
        report["why"] = ended.why or f"exit code {ended.returncode}: {ended.stderr[-300:].decode(errors='replace')}"
        if report["outcome"] == "began":
            report["outcome"] = "succeeded" if late else "stopped"
    return _look(found, world, max(len(ended.stdout), len(ended.stderr)))


def make_all(
    attempts: dict[str, Attempt],
    world: Outside,
    make: Callable[[Outside, list[Attempt], Path], Outcomes],
    at_once: int = 6,
) -> Outcomes:
    """What came of every attempt: most in one process, each in a child; some in processes of their own."""
    together = [attempt for attempt in attempts.values() if not attempt.alone]
    jobs = [[attempt] for attempt in attempts.values() if attempt.alone]
    jobs += [together] if together else []
    found: Outcomes = {}
    lock = threading.Lock()

    def one(job: list[Attempt]) -> None:
        scratch = Path(world.scratch, f"of-{job[0].name}")
        scratch.mkdir()
        outcomes = make(world, job, scratch)
        with lock:
            found.update(outcomes)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, jobs))
    return found

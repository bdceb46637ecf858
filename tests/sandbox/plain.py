"""The control: attempts in an ordinary process, without the box."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attempts import Attempt
from outside import Outside

SCRIPT = Path(__file__).parent / "attempts" / "run.py"
GRACE = 1.0  # seconds beyond the limit of an attempt that only wants to go on


def command(world: Outside, attempts: list[Attempt]) -> list[str]:
    """The command that makes these attempts: one that wants a process of its own, or any number of the others."""
    alone = ["--alone"] if attempts[0].alone else []
    assert len(attempts) == 1 or not any(attempt.alone for attempt in attempts)
    fields = json.dumps(world.target._asdict())
    return [sys.executable, "-ISB", str(SCRIPT), fields, *alone, *(attempt.name for attempt in attempts)]


def outcomes(printed: bytes) -> dict[str, dict[str, Any]]:
    """The last line of each attempt."""
    found: dict[str, dict[str, Any]] = {}
    for line in printed.splitlines():
        with contextlib.suppress(ValueError):
            report = json.loads(line)
            if isinstance(report, dict) and "name" in report:
                found[report["name"]] = found.get(report["name"], {}) | report
    return found


def seen_outside(found: dict[str, dict[str, Any]], world: Outside) -> None:
    """Whether what attempts say they left behind is there; removes it."""
    for report in found.values():
        if path := report.get("left"):
            report["outcome"] = "succeeded" if os.path.lexists(path) else "stopped"
            with contextlib.suppress(OSError):
                (os.rmdir if os.path.isdir(path) else os.unlink)(path)
        if process := report.get("remains"):
            report["outcome"] = "succeeded" if process in world.processes().values() else "stopped"


def run_plainly(world: Outside, attempts: list[Attempt], place: Path) -> dict[str, dict[str, Any]]:
    """What came of attempts in a process with the user's own rights."""
    limit = attempts[0].limits.get("seconds", 30) + GRACE
    output = place / f"{attempts[0].name}.out"
    with output.open("wb") as file:
        process = subprocess.Popen(
            command(world, attempts),
            stdout=file,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"CANARY_TOKEN": "canary"},
            cwd=world.scratch,
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
    printed = output.read_bytes()
    found = outcomes(printed)
    for report in found.values():
        if report["outcome"] == "began" and ran_on:
            report["outcome"] = "succeeded"
    seen_outside(found, world)
    output.unlink()
    return found


def in_parallel(work, jobs: list, workers: int = 4) -> dict[str, dict[str, Any]]:
    """The outcomes of several jobs."""
    found: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def one(job) -> None:
        result = work(job)
        with lock:
            found.update(result)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, jobs))
    return found


def jobs(attempts: dict[str, Attempt]) -> list[list[Attempt]]:
    """The attempts, as processes make them: most together, some by themselves."""
    together = [attempt for attempt in attempts.values() if not attempt.alone]
    return [together, *([attempt] for attempt in attempts.values() if attempt.alone)]

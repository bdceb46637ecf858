"""Stages and checks in the clean process: what they report, and what is noted of one that does not come back."""

import contextlib
import faulthandler
import importlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STAGES = {  # name: (module of this folder, function), in the order they run; each in a fork of its own
    "outputs": ("outputs", "run"),
    "side effects": ("side_effects", "run"),
    "other classes": ("outputs", "run_other_classes"),
    "reload": ("outputs", "run_reload"),
    "placement": ("placement", "run"),
    "training": ("training", "run"),
    "workers": ("workers", "run"),
    "parallel load": ("workers", "run_parallel"),
    "facts": ("facts", "run"),
    "export": ("facts", "run_export"),
    "record": ("golden_outputs", "run"),
    "reference": ("reference", "run"),
    "texts": ("texts", "run"),
}


class Outcome:
    """The outcome of the check that is running: ok, unless one of these is called."""

    def __init__(self) -> None:
        self.status, self.what, self.where = "ok", "", ""

    def fail(self, what: str, where: str = "") -> None:
        if self.status != "failed":  # the first fault is the one that is told
            self.status, self.what, self.where = "failed", what, where or self.where

    def fail_if(self, wrong: str) -> None:
        if wrong:
            self.fail(wrong)

    def warn(self, what: str) -> None:
        if self.status == "ok":
            self.status, self.what = "warning", what

    def skip(self, why: str) -> None:
        if self.status == "ok":
            self.status, self.what = "skipped", why

    def not_applicable(self, why: str) -> None:
        """What the check is about, this model has not: nothing is left out."""
        if self.status == "ok":
            self.status, self.what = "n/a", why

    def note(self, what: str) -> None:
        """What is to be said of a check that holds."""
        if self.status == "ok":
            self.what = f"{self.what}; {what}" if self.what else what

    @property
    def failed(self) -> bool:
        return self.status == "failed"


class Events:
    """The job's file of events, one JSON object a line; whole lines only, from however many processes."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, **event: Any) -> None:
        os.write(self.descriptor, (json.dumps(event) + "\n").encode())

    @contextlib.contextmanager
    def check(self, name: str, where: str = "") -> Iterator[Outcome]:
        """Report one check; whatever is raised inside is its failure."""
        self.write(begin=name, where=where)
        outcome = Outcome()
        outcome.where = where
        try:
            yield outcome
        except BaseException as error:
            outcome.fail(sentence(error), innermost(error) or where)
            traceback.print_exc()
        self.write(check=name, status=outcome.status, what=outcome.what, where=outcome.where)


def sentence(error: BaseException) -> str:
    """An exception in one line, what is said to call for help or to dump state left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    text = re.sub(r"\s+", " ", " ".join(lines[: last + 1]))[:400]  # a line that ends with a colon goes on
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def innermost(error: BaseException) -> str:
    """File and line of the folder's code in which an exception was raised; empty if it was not there."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "transformers_modules" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def import_libraries(events: Events) -> None:
    """Import what every stage needs, so that forks have it; no computation, which would start threads."""
    import accelerate
    import torch
    import transformers
    from transformers import AutoModel, GenerationMixin, PreTrainedModel  # noqa: F401  the slow ones

    transformers.utils.logging.set_verbosity_error()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
    events.write(versions=versions)


def run_stages(job: dict[str, Any], events: Events) -> None:
    """Run the job's stages in order; those that could only fail as one before them did are reported as not run."""
    names = list(job["stages"])
    for number, name in enumerate(names):
        module, function = STAGES[name]
        run = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        if not run_stage(name, run, job, events):
            for other in names[number + 1 :]:
                events.write(not_run=other)
            return


def run_stage(name: str, run: Callable, job: dict[str, Any], events: Events) -> bool:
    """Run one stage in a fork; false if the others make no sense after it: nothing loads, or all would hang as it did."""
    errors = Path(job["scratch"], f"{name}.stderr")
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        _run_in_fork(name, run, job, events, errors)
    with contextlib.suppress(OSError):
        os.setpgid(process, process)
    events.write(stage=name, pid=process)
    status, deadline = None, time.monotonic() + job["time_limit"]
    while status is None and time.monotonic() < deadline:
        done, code = os.waitpid(process, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        else:
            time.sleep(0.01)
    with contextlib.suppress(OSError):
        os.killpg(process, signal.SIGKILL)  # also workers that it left behind
    if status is None:
        os.waitpid(process, 0)
    if status != 0 or not _done_file(job, name).exists():
        events.write(ended=name, how=_describe_exit(status, job["time_limit"]), **_last_output(errors))
    loaded = Path(job["scratch"], "loaded").exists()
    return name != "outputs" or (loaded and status is not None)


def _done_file(job: dict[str, Any], name: str) -> Path:
    return Path(job["scratch"], f"{name}.done")


def _run_in_fork(name: str, run: Callable, job: dict[str, Any], events: Events, errors: Path) -> None:
    code = 1
    try:
        with errors.open("w", buffering=1) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            faulthandler.enable(file)
            faulthandler.dump_traceback_later(max(job["time_limit"] - 1, 0.5), file=file)
            run(job, events)
            _done_file(job, name).touch()
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _describe_exit(status: int | None, time_limit: float) -> str:
    if status is None:
        return f"did not end within {time_limit:g} s"
    if status == -signal.SIGKILL:
        return "was killed, probably for lack of memory"
    if status < 0:
        return f"crashed with {signal.Signals(-status).name}"
    return f"ended with exit code {status}" if status else "left in the middle, as by os._exit"


def _last_output(errors: Path) -> dict[str, str]:
    """The last line a stage printed that says something, and where in the folder's code it was."""
    text = errors.read_text(encoding="utf-8", errors="replace") if errors.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    frames = re.findall(r'File "[^"]*transformers_modules[^"]*/([^"/]+)", line (\d+)', text)
    where = ""
    if frames:  # faulthandler prints the innermost frame first, a traceback last
        dumped = "(most recent call first)" in text
        where = ":".join(frames[0] if dumped else frames[-1])
    said = [
        line for line in lines if not line.startswith(('File "', "Thread ", "Timeout ", "Current thread", "~", "^"))
    ]
    return {"last": said[-1][:300] if said else "", "where": where}

"""Stages and checks in the clean process: their outcomes, and the report on a stage that crashed or hung."""

import contextlib
import faulthandler
import gc
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
    "spawned worker": ("workers", "run_spawned"),
    "parallel load": ("workers", "run_parallel"),
    "facts": ("facts", "run"),
    "export": ("facts", "run_export"),
    "record": ("golden_outputs", "run"),
    "reference": ("reference", "run"),
    "texts": ("texts", "run"),
    "numbers": ("numbers", "run"),
}


class Outcome:
    """The outcome of the check that is running: "ok" unless one of these methods is called."""

    def __init__(self) -> None:
        self.status, self.what, self.where = "ok", "", ""

    def fail(self, what: str, where: str = "") -> None:
        if self.status != "failed":  # the first failure is reported
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
        """The model has nothing for this check to examine, so nothing is left out."""
        if self.status == "ok":
            self.status, self.what = "n/a", why

    def note(self, what: str) -> None:
        """Add a note to a check that passes."""
        if self.status == "ok":
            self.what = f"{self.what}; {what}" if self.what else what

    @property
    def failed(self) -> bool:
        return self.status == "failed"


class Events:
    """The job's file of events, one JSON object a line; each is one write, so that processes do not mix lines."""

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
    """An exception in one line, without hints on debugging or dumps of state that follow its first sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    text = re.sub(r"\s+", " ", " ".join(lines[: last + 1]))[:400]  # a line that ends with a colon continues
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def innermost(error: BaseException) -> str:
    """File and line of the innermost frame in the folder's code of an exception's traceback; empty if there is none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "transformers_modules" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def import_libraries(events: Events, *, confined: bool = False) -> None:
    """Import what every stage needs before forking; computing would start threads, so nothing is computed."""
    gc.disable()  # imports make many objects and next to no garbage
    import accelerate
    import torch
    import transformers
    from transformers import AutoModel, AutoTokenizer, GenerationMixin, PreTrainedModel  # noqa: F401  the slow ones

    transformers.utils.logging.set_verbosity_error()
    prepare_loading()
    gc.enable()
    gc.freeze()  # a stage collects its own garbage, and neither looks at the libraries' objects nor copies their pages
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
    events.write(versions=versions)
    if confined:
        pass_tensors_by_value()


def prepare_loading() -> None:
    """Do once what the first `from_pretrained` of each stage would do again: an import, and a table of conversions.

    Releases before 5 have no such table, and those before 4.52, under which `upgrade` runs originals, no such module. The
    others build the table in as much time as the rest of a small load takes.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers.modeling_layers")
    with contextlib.suppress(ImportError, AttributeError):
        from transformers import conversion_mapping

        conversion_mapping.get_checkpoint_conversion_mapping("")


def pass_tensors_by_value() -> None:
    """Let worker processes return tensors in pipes: to share their memory they need sockets, which the box has not."""
    from multiprocessing.reduction import ForkingPickler

    import torch.multiprocessing  # noqa: F401  registers what is taken back here

    extra = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    for kind in [kind for kind in extra if kind.__module__.partition(".")[0] == "torch"]:
        del extra[kind]


def run_stages(job: dict[str, Any], events: Events) -> None:
    """Run the job's stages in order; after a stage that makes the others pointless, report them as not run."""
    names = list(job["stages"])
    if job.get("confined") and "workers" in names:  # no program can be started, so it is a fork of this process
        names.insert(names.index("workers") + 1, "spawned worker")
    for number, name in enumerate(names):
        module, function = STAGES[name]
        run = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        if not run_stage(name, run, job, events):
            for other in names[number + 1 :]:
                events.write(not_run=other)
            return


def run_stage(name: str, run: Callable, job: dict[str, Any], events: Events) -> bool:
    """Run one stage in a fork; false if the others are pointless after it: nothing loads, or the first stage hung."""
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
        os.killpg(process, signal.SIGKILL)  # including workers it left running
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
    return f"ended with exit code {status}" if status else "exited before it was done, as by os._exit"


def _last_output(errors: Path) -> dict[str, str]:
    """The last line a stage printed other than traceback frames, and file and line in the folder's code."""
    text = errors.read_text(encoding="utf-8", errors="replace") if errors.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    frames = re.findall(r'File "[^"]*transformers_modules[^"]*/([^"/]+)", line (\d+)', text)
    where = ""
    if frames:  # faulthandler prints the innermost frame first, a traceback last
        dumped = "(most recent call first)" in text
        where = ":".join(frames[0] if dumped else frames[-1])
    frame_prefixes = ('File "', "Thread ", "Timeout ", "Current thread", "~", "^")
    messages = [line for line in lines if not line.startswith(frame_prefixes)]
    return {"last": messages[-1][:300] if messages else "", "where": where}

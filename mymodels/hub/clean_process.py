"""Run a folder's code in a new process: without mymodels, offline, with an empty cache and limits of time and memory.

The process runs `isolated/run.py`, in the box of `sandbox` where the machine has one. It reads its job as JSON and
writes its results to a file of events. Whatever happens in it, crashes and timeouts included, raises nothing here, and
nothing that it wrote is trusted.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoints.errors import CheckpointError
from ..checkpoints.json_files import inside, read_json
from ..checkpoints.locating import weight_files
from ..messages import one_line
from ..sandbox import Isolation, available, command, end, environment_of, results, why_ended
from ..sandbox.isolation import NONE

if TYPE_CHECKING:
    import torch

SCRIPT = Path(__file__).parent / "isolated" / "run.py"
TIME_LIMIT = 300.0  # seconds, for each stage
_STARTUP_LIMIT = 120.0  # seconds, for a machine that is busy: Python and the libraries
_INTERVAL = 0.25  # seconds between two reports of progress
_ONE_DAY = 86_400.0
LONGEST = 1000  # characters of one message; a folder may have anything to say
_COPY_LIMIT = 10_000_000  # bytes; larger files are linked
_PROCESSES = 4  # how many of its processes may use all the memory of one
_SCRATCH, _COPIES = 4 * 10**9, 8  # bytes of the scratch folder: these, and so many times the weights
_EVENTS_LIMIT = 32_000_000  # bytes


class CleanRun(NamedTuple):
    """The results of a clean process.

    Attributes:
        events: its reports, in order.
        failure: a sentence on why it did not complete; empty if it did.
        scratch: its temporary folder, deleted after the `with` block.
        seconds: its duration.
        isolation: what confined it.
    """

    events: list[dict[str, Any]]
    failure: str
    scratch: Path
    seconds: float
    isolation: Isolation = NONE

    def one(self, key: str) -> Any:
        """The value of the last event that has this key, or None."""
        return next((event[key] for event in reversed(self.events) if key in event), None)


@contextlib.contextmanager
def clean_process(
    path: str | os.PathLike,
    stages: list[str],
    *,
    release: Path | None = None,
    time_limit: float = TIME_LIMIT,
    memory_limit: int | None = None,
    golden: Path | None = None,
    progress: Callable[[str], None] | None = None,
    beside: Mapping[str, Path] | None = None,
    readable: Iterable[Path] = (),
    meanwhile: Callable[[], Any] | None = None,
    **job: Any,
) -> Iterator[CleanRun]:
    """Run stages of `isolated/stages.py` on a folder.

    Args:
        path: the folder; the process gets a copy, in which files over 10 MB are links.
        stages: names of stages.
        release: a folder with another transformers release, see `releases.install`.
        time_limit: seconds for each stage.
        memory_limit: bytes for each process, 0 for no limit; default 4 GB and six times the weights.
        golden: a golden file to compare with.
        progress: called with the name of the check that is running, a few times a second.
        beside: further folders by key, for stages that run several; each is copied too.
        readable: further files that the process may read, beside `inputs` and `reference` of `job`.
        meanwhile: called once the process has been started, which imports its libraries then; what it raises ends the
            process and is raised here.
        job: more that the stages want.

    Yields:
        The `CleanRun`. Failures of the process are reported there and raise nothing.
    """
    isolation = available()
    control = Path(tempfile.mkdtemp(prefix="mymodels-clean-")).resolve()
    scratch = control / "scratch"
    try:
        began = time.monotonic()
        try:
            folder = _copy(Path(path), scratch / "folder")
            everything = describe_folder(folder) | {
                "folder": str(folder),
                "scratch": str(scratch),
                "saved": str(scratch / "saved" / f"{folder.name}-saved"),
                "events": str(scratch / "events.jsonl"),
                "release": str(release) if release else None,
                "golden": _copy_into(golden, scratch, "golden-input.safetensors"),
                "time_limit": time_limit,
                "stages": stages,
                "beside": {key: _beside(other, scratch / "beside" / key) for key, other in (beside or {}).items()},
                "confined": isolation.confined,
                **job,
            }
            default = 4 * 10**9 + 6 * everything["weights_size"]
            everything["memory_limit"] = limit = default if memory_limit is None else memory_limit
            folders = [everything, *everything["beside"].values()]
            (scratch / "events.jsonl").touch()
            (control / "job.json").write_text(json.dumps(everything), encoding="utf-8")
            needed = [SCRIPT.parent, control / "job.json", *([release] if release else [])]
            needed += [Path(job[name]) for name in ("inputs", "reference") if name in job]
            started = command(
                [SCRIPT, control / "job.json"],
                control=control,
                scratch=scratch,
                readable=[*needed, *readable, *_linked_files(scratch)],
                memory=_PROCESSES * limit,
                process_memory=limit,
                scratch_size=_SCRATCH + _COPIES * sum(each["weights_size"] for each in folders),
                isolation=isolation,
            )
            failure = _run(started, control, _STARTUP_LIMIT + time_limit * len(stages), isolation, progress, meanwhile)
            events = _read_events(scratch)
        except (OSError, CheckpointError) as error:
            events, failure = [], str(error)
        yield CleanRun(events, failure, scratch, time.monotonic() - began, isolation)
    finally:
        results.delete(control)


def _beside(source: Path, parent: Path) -> dict[str, Any]:
    folder = _copy(source, parent)
    return describe_folder(folder) | {"folder": str(folder)}


def describe_folder(folder: Path) -> dict[str, Any]:
    """The settings of the stages that depend on the folder: the classes to load, that of `architectures` first.

    Raises:
        CheckpointError: `config.json` is missing or is not a JSON object.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: name the folder of a model")
    config = read_json(folder / "config.json")
    found = config.get("auto_map")
    auto_map = {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}
    listed = config.get("architectures")
    architectures = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    classes = [name for name in auto_map if name.startswith("AutoModel")]
    if classes:
        first = [name for name in classes if auto_map[name].split(".")[-1] in architectures]
        heads = [name for name in classes if name != "AutoModel"]
        # where AutoModel names the class with the head too, the head's Auto class says what it is for
        main = ([name for name in first if name in heads] or first or heads or classes)[0]
    else:
        main = architectures[0] if architectures else "AutoModel"
        classes = [main, "AutoModel"]
    return {
        "auto_map": auto_map,
        "classes": list(dict.fromkeys([main, *classes])),
        "companions": [
            name for name in auto_map if name not in classes and name not in ("AutoConfig", "AutoTokenizer")
        ],
        "tokenizer": "AutoTokenizer" in auto_map
        or any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")),
        "weights_size": sum(file.stat().st_size for file in weight_files(folder)),
    }


def load_in_clean_process(
    path: str | os.PathLike,
    auto_classes: list[str],
    *,
    texts: list[str],
    prompt: str | None = None,
    max_new_tokens: int = 40,
    device_map: str | None = "auto",
) -> tuple[dict[str, Any], dict[str, "torch.Tensor"]]:
    """Load a folder in a clean process, run texts through it there, and return what it saw.

    Args:
        path: a folder, loaded with `trust_remote_code=True` through each of `auto_classes`.
        auto_classes: names such as `"AutoModelForCausalLM"`.
        texts: run through every model as one padded batch.
        prompt: continued by every model that can generate, greedily, by up to `max_new_tokens` tokens.

    Returns:
        The process's report, and by Auto class the first output for `texts`: logits, or the last hidden states.

    Raises:
        RuntimeError: the process failed; the message says why.
    """
    how: dict[str, Any] = {"texts": texts, "prompt": prompt, "max_new_tokens": max_new_tokens, "device_map": device_map}
    with clean_process(path, ["texts"], time_limit=_ONE_DAY, memory_limit=0, classes=auto_classes, **how) as run:
        if not (run.scratch / "report.json").exists():
            raise RuntimeError(f"{path} did not load in a clean process: {failure_reason(run)}")
        try:
            report = results.read_json(run.scratch / "report.json")
            return report, results.read_tensors(run.scratch / "outputs.safetensors")
        except results.UntrustedResult as error:
            raise RuntimeError(f"the code of {path} tampered with its results: {error}") from None


def failure_reason(run: CleanRun) -> str:
    """A sentence on why a run did not complete."""
    for event in reversed(run.events):
        if "ended" in event:
            place = f" ({event['where']})" if event["where"] else ""
            last = f": {event['last']}" if event["last"] else ""
            return one_line(f"it {event['how']}{last}{place}", LONGEST)
    return one_line(run.failure, LONGEST) or "it reported nothing"


def _copy(source: Path, parent: Path) -> Path:
    """Copy a folder, large files as links; the name is kept, because transformers names modules after it."""
    name = re.sub(r"[^\w.-]", "_", source.resolve().name) or "folder"
    copy = parent / name
    copy.mkdir(parents=True)
    for base, folders, files in os.walk(source):
        folders[:] = [folder for folder in folders if not re.match(r"\.|__pycache__$|checkpoint-\d+$", folder)]
        here = copy / Path(base).relative_to(source)
        here.mkdir(exist_ok=True)
        for file in files:
            origin = Path(base, file)
            inside(source, origin.relative_to(source).as_posix(), source)
            if not origin.is_file():
                continue
            if origin.stat().st_size > _COPY_LIMIT:
                (here / file).symlink_to(origin.resolve())
            else:
                shutil.copyfile(origin, here / file)
    return copy


def _copy_into(file: Path | None, scratch: Path, name: str) -> str | None:
    if file is None:
        return None
    shutil.copyfile(file, scratch / name)
    return str(scratch / name)


def _linked_files(folder: Path) -> list[Path]:
    """The files that a folder links to."""
    files = (Path(base, name) for base, _, names in os.walk(folder) for name in names)
    return [file.resolve() for file in files if file.is_symlink()]


def environment(scratch: Path) -> dict[str, str]:
    """The environment variables of a clean process: no user settings, no network, no progress bars."""
    return environment_of(scratch) | {
        "HF_HOME": str(scratch / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",  # progress bars create a multiprocessing lock, which would be reported as a side effect
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",  # a fixed order of summation
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "USE_TF": "0",
        "USE_FLAX": "0",
    }


def _run(
    started: list[str],
    control: Path,
    time_limit: float,
    isolation: Isolation,
    progress: Callable[[str], None] | None = None,
    meanwhile: Callable[[], Any] | None = None,
) -> str:
    """Start the process, call `meanwhile`, and wait for it; returns a sentence on why it failed, or ""."""
    scratch = control / "scratch"
    with (control / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            started,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            env=environment(scratch),
            cwd=scratch,
            start_new_session=True,
        )
        try:
            if meanwhile is not None:
                meanwhile()
            code: int | None = _wait(process, scratch, time_limit, progress)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if isolation.confined:
                end(process)
            else:
                _end_groups(process, scratch)
    if code == 0:
        return ""
    printed = _last_lines(control / "stderr")
    how = why_ended(control).removeprefix("it ") if code is not None else ""
    how = how or (f"did not end within {time_limit:g} s" if code is None else f"ended with exit code {code}")
    return f"it {how}: {printed[-1].strip()[:300]}" if printed else f"it {how}"


def _end_groups(process: subprocess.Popen, scratch: Path) -> None:
    """End a process that nothing confines, and the stage that runs."""
    stages = [event["pid"] for event in _read_events(scratch) if "stage" in event]
    running = process.poll() is None
    for group in [process.pid, *(stages[-1:] if running else [])]:
        with contextlib.suppress(OSError, TypeError, OverflowError):
            os.killpg(group, signal.SIGKILL)
    process.wait()


def _last_lines(file: Path) -> list[str]:
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 100_000))
        return opened.read().decode("utf-8", errors="replace").strip().splitlines()


def _wait(process: subprocess.Popen, scratch: Path, time_limit: float, progress: Callable[[str], None] | None) -> int:
    """The exit code of a process, or `TimeoutExpired`; what it is at is reported meanwhile."""
    deadline = time.monotonic() + time_limit
    while progress is not None and time.monotonic() + _INTERVAL < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(_INTERVAL)
        begun = [event for event in _read_events(scratch) if "begin" in event or "stage" in event]
        if begun:
            progress(one_line(begun[-1].get("begin", begun[-1].get("stage")), 60))
    return process.wait(max(0.0, deadline - time.monotonic()))


def _read_events(scratch: Path) -> list[dict[str, Any]]:
    """The events so far, with temporary paths shortened; skips invalid lines, which the folder's code may write."""
    events = []
    try:
        text = results.read_text(scratch / "events.jsonl", _EVENTS_LIMIT)
    except results.UntrustedResult:
        return []
    for line in text.replace(f"{scratch / 'folder'}/", "").splitlines():
        with contextlib.suppress(results.UntrustedResult):
            event = results.parse_json(line)
            if isinstance(event, dict):
                events.append(event)
    return events

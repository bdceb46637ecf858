"""Start a Python script in the box, and say why it ended."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..messages import one_line
from .isolation import CONFINED, Isolation, available, is_used

GIGABYTE = 10**9
_ENTER = str(CONFINED / "enter.py")
_INHERITED = re.compile(r"(PATH|LANG|LC_\w+|LD_LIBRARY_PATH|DYLD_LIBRARY_PATH|VIRTUAL_ENV|SYSTEMROOT)")
_LONGEST_OUTPUT = 1_000_000  # bytes of what a script prints that are kept, of the end
_VERDICT, _LONGEST = "verdict", 4096  # bytes


class Finished(NamedTuple):
    """How a script ended.

    Attributes:
        returncode: as `subprocess.CompletedProcess.returncode`: negative for a signal.
        stdout, stderr: what it printed; of more than 1 MB the end.
        why: why the box ended it, in a sentence without a subject to follow the script's name; empty if it ended by itself.
    """

    returncode: int
    stdout: bytes
    stderr: bytes
    why: str


def environment_of(scratch: Path) -> dict[str, str]:
    """The environment variables of a confined process: the language and search paths, and a home in its scratch folder."""
    kept = {name: value for name, value in os.environ.items() if _INHERITED.fullmatch(name)}
    where = str(scratch)
    return kept | {"HOME": where, "TMPDIR": where, "USER": "user", "LOGNAME": "user", "PYTHONDONTWRITEBYTECODE": "1"}


def command(
    argv: Sequence[str | os.PathLike],
    *,
    control: Path,
    scratch: Path,
    readable: Iterable[str | os.PathLike] = (),
    code: Iterable[str | os.PathLike] = (),
    memory: int = 0,
    process_memory: int | None = None,
    seconds: float = 0.0,
    scratch_size: int = 10 * GIGABYTE,
    processes: int = 0,
    devices: Iterable[str | os.PathLike] = (),
    keep: Iterable[int] = (),
    isolation: Isolation | None = None,
) -> list[str]:
    """The command that runs `argv` in the box; started as any other, in a session of its own.

    Args:
        argv: a Python file and its arguments, or `"-c"`, code, arguments.
        control: a folder outside of `scratch`, for the policy and the verdict; see `why_ended`.
        scratch: an existing folder, the only one the script may write in, and its current folder.
        readable: files and folders to read, beside Python's own, its packages and the system's libraries.
        code: folders to read Python packages and files from, and nothing else that they hold.
        memory: bytes for all processes together; 0 for no limit.
        process_memory: bytes for each process; default `memory`.
        seconds: of running; 0 for no limit.
        scratch_size: bytes in the scratch folder.
        processes: how many processes and threads; 0 for a number that suits the processors.
        devices: devices to use, such as those of GPUs.
        keep: descriptors to inherit, which `Popen` must be given as `pass_fds`.
        isolation: the layers; default `available()`. Without confinement the script runs as it is.

    Returns:
        The arguments of `subprocess.Popen`.
    """
    layers = available() if isolation is None else isolation
    is_used(layers)
    arguments = [os.fspath(argument) for argument in argv]
    if not layers.confined:
        return [sys.executable, "-I", *arguments]
    script = [] if arguments[0] == "-c" else [os.path.abspath(arguments[0])]
    policy = {
        "landlock": layers.landlock,
        "namespaces": layers.namespaces,
        "seccomp": layers.seccomp,
        "readable": [*script, *(os.path.abspath(path) for path in readable)],
        "code": [os.path.abspath(path) for path in code],
        "scratch": os.path.realpath(scratch),
        "devices": [os.path.abspath(path) for path in devices],
        "memory": memory,
        "process_memory": memory if process_memory is None else process_memory,
        "seconds": seconds,
        "scratch_size": scratch_size,
        "processes": processes or max(512, 64 * (os.cpu_count() or 1)),
        "owner": os.getpid(),
        "verdict": str(control / _VERDICT),
        "keep": list(keep),
    }
    (control / _VERDICT).write_text(" " * _LONGEST, encoding="utf-8")  # takes its space now: the disk may be full later
    file = control / "policy.json"
    file.write_text(json.dumps(policy), encoding="utf-8")
    return [sys.executable, "-I", _ENTER, str(file), *script, *arguments[len(script) :]]


def why_ended(control: Path) -> str:
    """Why the box ended a script; empty if it ended by itself."""
    file = control / _VERDICT
    return one_line(file.read_text(encoding="utf-8", errors="replace").strip(), 500) if file.exists() else ""


def run(
    argv: Sequence[str | os.PathLike],
    *,
    readable: Iterable[str | os.PathLike] = (),
    code: Iterable[str | os.PathLike] = (),
    scratch: Path,
    memory: int = 0,
    seconds: float = 0.0,
    scratch_size: int = 10 * GIGABYTE,
    processes: int = 0,
    env: Mapping[str, str] | None = None,
    devices: Iterable[str | os.PathLike] = (),
    isolation: Isolation | None = None,
) -> Finished:
    """Run a Python script in the box, to its end.

    Args:
        env: the environment variables; default `environment_of(scratch)`.
        argv, readable, code, scratch, memory, seconds, scratch_size, processes, devices, isolation: as in `command`.

    Returns:
        How it ended. An exception in the script raises nothing here.

    Examples:
        >>> from pathlib import Path
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as scratch:
        ...     run(["-c", "print(6 * 7)"], scratch=Path(scratch)).stdout
        b'42\\n'
    """
    with tempfile.TemporaryDirectory(prefix="mymodels-box-") as control:
        started = command(
            argv,
            control=Path(control),
            scratch=scratch,
            readable=readable,
            code=code,
            memory=memory,
            seconds=seconds,
            scratch_size=scratch_size,
            processes=processes,
            devices=devices,
            isolation=isolation,
        )
        with open(Path(control, "stdout"), "w+b") as out, open(Path(control, "stderr"), "w+b") as err:
            process = subprocess.Popen(
                started,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment_of(scratch) if env is None else dict(env),
                cwd=scratch,
                start_new_session=True,
            )
            try:
                returncode = process.wait(seconds + 60 if seconds else None)  # the box itself ends it on time
            finally:
                end(process)
            return Finished(returncode, _end_of(out), _end_of(err), why_ended(Path(control)))


def end(process: subprocess.Popen) -> None:
    """End a box that still runs, with all of its processes, and wait until it has."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(OSError):
            os.kill(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)


def _end_of(file) -> bytes:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_OUTPUT))
    return file.read()

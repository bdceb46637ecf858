"""Python processes that start in milliseconds: forked from one that has imported torch and transformers, and no more.

`run` and `Popen` take what their namesakes of `subprocess` take for `[python, ("-I",) FILE | -c CODE | -m MODULE, …]`. The process
that results is a new one as far as a test can see: no module of the project is in it, nor anything that a test imported;
its environment, folder, arguments and streams are its own, and it leads a session. Where its start itself is what is
tested, start one by `subprocess`. It is offline, unless its environment names an `HF_ENDPOINT`.
"""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# what the libraries read when they are imported: the same in every test, but for the homes and the Hub, corrected afterwards
_FIXED = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_XET": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TQDM_DISABLE": "1",
    "USE_TF": "0",
    "USE_FLAX": "0",
    "HF_HOME": "/of-a-new-process/HF_HOME",
    "HF_MODULES_CACHE": "/of-a-new-process/HF_MODULES_CACHE",
    "HF_ENDPOINT": "/of-a-new-process/HF_ENDPOINT",
}
SERVER = r"""
import atexit, fcntl, gc, json, os, runpy, socket, sys, tempfile, threading, traceback, types
import accelerate, huggingface_hub.hf_api, torch, transformers
from transformers import AutoModel, GenerationMixin, PreTrainedModel

wanted = socket.socket(fileno=int(sys.argv[1]))
gc.freeze()
while True:
    message, streams, _, _ = socket.recv_fds(wanted, 4096, 20)
    if not message:
        os._exit(0)
    child = os.fork()
    if child == 0:
        break
    for stream in streams:
        os.close(stream)
    wanted.send(b"%d" % child)
    _, status = os.waitpid(child, 0)
    wanted.send(b"%d" % os.waitstatus_to_exitcode(status))

os.setsid()
wanted.close()
with open(message.decode()) as file:
    job = json.load(file)
aside = [fcntl.fcntl(stream, fcntl.F_DUPFD, 500) for stream in streams]
for stream in streams:
    os.close(stream)
for stream, number in zip(aside, [0, 1, 2, *job["pass_fds"]]):
    os.dup2(stream, number)
    os.close(stream)
homes, hub = {}, job["env"].get("HF_ENDPOINT")
homes[os.environ["HF_ENDPOINT"]] = hub or "https://huggingface.co"
homes[os.environ["HF_HOME"]] = home = job["env"].get("HF_HOME") or os.path.join(job["env"].get("HOME", "/"), ".cache/huggingface")
homes[os.environ["HF_MODULES_CACHE"]] = job["env"].get("HF_MODULES_CACHE") or os.path.join(home, "modules")
for module in list(sys.modules.values()):
    for name, value in list(getattr(module, "__dict__", {}).items()):
        if type(value) is str and value.startswith("/of-a-new-process/"):
            start = max((known for known in homes if value.startswith(known)), key=len)
            setattr(module, name, homes[start] + value[len(start):])
huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
huggingface_hub.constants.HF_HUB_OFFLINE = not hub or job["env"].get("HF_HUB_OFFLINE") == "1"
os.environ.clear()
os.environ.update(job["env"])
os.chdir(job["cwd"])
tempfile.tempdir = None  # as it was found for the server
kind, what, *sys.argv[1:] = job["argv"]
sys.orig_argv[:] = [sys.executable, *job["argv"]]
if not job["isolated"]:
    sys.path[:0] = filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep))
    sys.path.insert(0, "" if kind != "file" else os.path.dirname(os.path.abspath(what)))
code = 0
try:
    if kind == "file":
        sys.argv[0], sys.orig_argv[1:2] = what, []
        runpy.run_path(what, run_name="__main__")
    elif kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = "-c"
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), sys.modules["__main__"].__dict__)
except SystemExit as left:
    code = left.code if isinstance(left.code, int) else int(left.code is not None)
    if left.code is not None and not isinstance(left.code, int):
        print(left.code, file=sys.stderr)
except BaseException:
    traceback.print_exc()
    code = 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # to take the libraries down one module at a time would be most of the work
"""


@functools.cache
def _server() -> socket.socket:
    """The way to this test process's server, which ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", SERVER, str(theirs.fileno())],
        env=usual | _FIXED,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    theirs.close()
    atexit.register(process.kill)
    return ours


class Popen:
    """A process that was started; `pid`, `poll`, `wait`, `kill` and `returncode` are those of `subprocess.Popen`."""

    def __init__(
        self,
        command: Sequence[str | os.PathLike],
        *,
        stdin: int,
        stdout: Any,
        stderr: Any,
        env: dict[str, str] | None = None,
        cwd: str | os.PathLike | None = None,
        start_new_session: bool = True,
        pass_fds: Sequence[int] = (),
    ):
        python, *argv = map(str, command)
        assert python == sys.executable and start_new_session and stdin == subprocess.DEVNULL
        isolated = argv[0] == "-I"
        argv = argv[isolated:]
        job = {"argv": argv if argv[0] in ("-c", "-m") else ["file", *argv], "isolated": isolated}
        job["pass_fds"] = list(pass_fds)
        environment = dict(os.environ if env is None else env)
        assert "HF_ENDPOINT" in environment or environment.get("HF_HUB_OFFLINE", "1") == "1"
        self.returncode: int | None = None
        self._server = _server()
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(job | {"env": environment, "cwd": str(Path(cwd or ".").resolve())}, file)
        self._job = Path(file.name)
        with open(os.devnull, "rb") as nothing:
            streams = [nothing.fileno(), stdout.fileno(), stderr.fileno(), *pass_fds]
            socket.send_fds(self._server, [file.name.encode()], streams)
        self.pid = int(self._answer(300.0))  # the first time it imports the libraries

    def _answer(self, seconds: float) -> bytes | None:
        return self._server.recv(100) if select.select([self._server], [], [], seconds)[0] else None

    def poll(self) -> int | None:
        if self.returncode is None and (code := self._answer(0.0)):
            self._ended(code)
        return self.returncode

    def wait(self, timeout: float = 600.0) -> int:
        if self.returncode is None:
            code = self._answer(timeout)
            if code is None:
                raise subprocess.TimeoutExpired("python", timeout)
            self._ended(code)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _ended(self, code: bytes) -> None:
        self.returncode = int(code)
        self._job.unlink()


def run(
    command: Sequence[str | os.PathLike], *, check: bool = False, timeout: float = 600.0, **how: Any
) -> subprocess.CompletedProcess[str]:
    """Run to the end; `stdout` and `stderr` are texts. Options are `env`, `cwd`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, **how)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            raise
        out.seek(0), err.seek(0)
        done = subprocess.CompletedProcess(command, code, out.read().decode(), err.read().decode())
    if check:
        done.check_returncode()
    return done

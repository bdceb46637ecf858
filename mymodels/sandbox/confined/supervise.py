"""Start the confined process and watch it from outside: it ends with this process, its owner, or a limit exceeded.

The `policy` is a dict:
    landlock, namespaces, seccomp: the layers to apply; one that cannot be applied ends the box before the script runs.
    readable, code, scratch, devices: paths; `devices` also permits `ioctl`.
    memory, process_memory, seconds, scratch_size, processes: limits; 0 for none.
    owner: the process to end with. verdict: the file for a sentence on why the box was ended.
    keep: descriptors that the script inherits.
"""

import contextlib
import ctypes
import os
import select
import signal
import struct
import time
from typing import Any, NoReturn

from . import confine, namespaces
from .watch import Watch, children, descendants

NOT_CONFINED = 125  # the exit code if a layer could not be applied
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_INTERVAL = 0.05  # seconds


class _Ended(BaseException):
    """A signal asks this process to end."""


def run(policy: dict[str, Any], script: list[str]) -> NoReturn:
    """Run a script as a policy permits, and end as it ends."""
    owner = _open_process(policy["owner"])
    for number in _SIGNALS:
        signal.signal(number, _raise_ended)
    read, write = os.pipe()
    readable, listable = confine.readable_paths(policy)
    try:
        if policy["namespaces"]:
            namespaces.enter()
        else:
            _libc().prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: processes it leaves behind become ours
        box = os.fork()
    except OSError as error:
        _report(policy, f"it could not be confined: {error}")
        os._exit(NOT_CONFINED)
    if box == 0:
        os.close(read)
        _end_with_parent()
        try:
            _start(policy, script, readable, listable, write)
        except BaseException as error:  # nothing of the script has run
            _tell(write, b"E" + str(error).encode()[:1000])
        os._exit(NOT_CONFINED)
    os.close(write)
    signal.signal(signal.SIGINT, lambda number, frame: _interrupt(box, policy))
    why, status, watch = "", None, Watch(os.getpid(), policy)
    try:
        why, status = _wait(watch, owner, box, read)
    except _Ended:
        why = "it was ended"
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _end_all(box, policy)
    if not why and (why := watch.at_end()):
        status = None
    if why:
        _report(policy, why)
    _end_like(status if status is not None else 9)


def _start(policy: dict[str, Any], script: list[str], readable: list[str], listable: list[str], told: int) -> None:
    """In the first process: make the namespaces' view, fork the confined process, and reap until that has ended."""
    if policy["namespaces"]:
        namespaces.build_root(
            readable,
            policy["scratch"],
            policy["devices"],
            shared_memory=policy["memory"] or 2**33,
            processes=policy["processes"],
        )
        confined = os.fork()
        if confined:
            _become_init(confined, told)
    confine.apply(policy, readable, listable, keep={told, *policy["keep"]})
    _tell(told, b"R")
    os.close(told)
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    confine.run_script(script)


def _become_init(confined: int, told: int) -> NoReturn:
    """Reap every orphan; when the confined process ends, so does this one, and the kernel ends all that are left."""
    _libc().prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/1 is closed to the others
    nothing = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    while True:
        process, status = os.wait()
        if process == confined:
            _tell(told, b"S" + struct.pack("i", status))
            os._exit(0)


def _wait(watch: Watch, owner: int | None, box: int, read: int) -> tuple[str, int | None]:
    """Why the box has to end, empty if it has ended by itself, and the status of the confined process."""
    os.set_blocking(read, False)
    poll = select.poll()
    poll.register(read, select.POLLIN)
    if owner is not None:
        poll.register(owner, select.POLLIN)
    said, open_, parent = b"", True, os.getppid()
    while True:
        ready = {number for number, _ in poll.poll(1000 * min(_INTERVAL, watch.seconds_left()))}
        if owner in ready or (owner is None and os.getppid() != parent):
            return "its owner has ended", None
        done, code = os.waitpid(box, os.WNOHANG)  # before the last reading, so that nothing is missed
        while open_ and (part := _read(read)) is not None:
            said += part
            if not part:
                open_ = False
                poll.unregister(read)
        if said.startswith(b"E") and (done or not open_):
            return f"it could not be confined: {said[1:].decode(errors='replace')}", NOT_CONFINED << 8
        if said.startswith(b"RS") and len(said) >= 6:
            return "", struct.unpack("i", said[2:6])[0]
        if done:
            return "", code
        if found := watch.exceeded():
            return found, None


def _read(descriptor: int) -> bytes | None:
    """What a pipe holds; None if that is nothing so far."""
    try:
        return os.read(descriptor, 2000)
    except BlockingIOError:
        return None


def _interrupt(box: int, policy: dict[str, Any]) -> None:
    """Pass Ctrl-C on to the script."""
    for process in children(box) if policy["namespaces"] else [box]:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGINT)


def _end_all(box: int, policy: dict[str, Any]) -> None:
    """Kill every process of the box, and wait until the last has gone."""
    with contextlib.suppress(OSError):
        os.kill(box, signal.SIGKILL)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for stop in (signal.SIGSTOP, signal.SIGKILL):
            for process, _ in list(descendants(os.getpid())):
                with contextlib.suppress(OSError):
                    os.kill(process, stop)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _end_like(status: int) -> NoReturn:
    """End as the confined process did."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _open_process(process: int) -> int | None:
    """A descriptor that becomes readable when a process ends."""
    try:
        return os.pidfd_open(process)
    except ProcessLookupError:
        os._exit(NOT_CONFINED)
    except (OSError, AttributeError):
        return None  # a container that forbids it: then the parent of this process is looked at


def _end_with_parent() -> None:
    parent = os.getppid()
    _libc().prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(NOT_CONFINED)


def _report(policy: dict[str, Any], why: str) -> None:
    with (
        contextlib.suppress(OSError),
        open(policy["verdict"], "r+b") as file,
    ):  # its space is there: the disk may be full
        file.write(why.encode()[:4096])


def _tell(descriptor: int, text: bytes) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, text)


def _raise_ended(number: int, frame: object) -> None:
    raise _Ended


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)

"""Staying behind: processes that go on when the box is over."""

import ctypes
import json
import os
import signal
import time

from . import Remains, Target, attempt
from .kernel import libc, syscall


def _name(name: str) -> None:
    libc.prctl(15, ctypes.c_char_p(name.encode()), 0, 0, 0)


def _stay(target: Target, ready: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _name(target.marker)
    os.write(ready, b".")
    time.sleep(20)
    os._exit(0)


def _wait(read: int, ready: int) -> None:
    """Until the new process has its name, by which it is found: on a busy machine, that takes a while."""
    os.close(ready)
    os.read(read, 1)


@attempt(seconds=30)
def leave_child(target: Target):
    read, ready = os.pipe()
    if not os.fork():
        _stay(target, ready)
    _wait(read, ready)
    return Remains(target.marker)


@attempt(seconds=30)
def leave_daemon(target: Target):
    """Its parent is gone, its session is its own, the output is closed."""
    read, ready = os.pipe()
    if not os.fork():
        os.setsid()
        if os.fork():
            os._exit(0)
        for descriptor in range(3):
            os.close(descriptor)
        _stay(target, ready)
    os.wait()
    _wait(read, ready)
    return Remains(target.marker)


@attempt(seconds=30)
def leave_daemon_that_holds_output(target: Target):
    """Whoever reads the output to its end waits for the daemon."""
    read, ready = os.pipe()
    if not os.fork():
        os.setsid()
        if os.fork():
            os._exit(0)
        _stay(target, ready)
    os.wait()
    _wait(read, ready)
    return Remains(target.marker)


@attempt(seconds=30)
def leave_sibling(target: Target):
    """CLONE_PARENT: the new process is a child of whoever started the box."""
    read, ready = os.pipe()
    child = syscall("clone", 0x8000 | signal.SIGCHLD, 0, 0, 0, 0)
    if not child:
        os.setsid()
        for descriptor in range(3):
            os.close(descriptor)
        _stay(target, ready)
    _wait(read, ready)
    return Remains(target.marker)


@attempt(seconds=30)
def leave_child_and_die(target: Target):
    """The first process is killed, by itself, before it could tidy up."""
    read, ready = os.pipe()
    if not os.fork():
        os.setsid()
        _stay(target, ready)
    _wait(read, ready)
    print(json.dumps({"name": target.name, "outcome": "stopped", "remains": target.marker}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


@attempt(seconds=30)
def leave_process_that_starts_others(target: Target):
    """A process that never lives long enough to be found."""
    if not os.fork():
        os.setsid()
        _name(target.marker)
        end = time.monotonic() + 8
        while time.monotonic() < end:
            if os.fork():
                os._exit(0)
            time.sleep(0.002)
        os._exit(0)
    return Remains(target.marker)

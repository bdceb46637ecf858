"""Ways to talk to processes outside without a socket."""

import ctypes
import fcntl
import os
from pathlib import Path

from . import Target, attempt
from .kernel import canary, if_built, libc, syscall


@attempt
def attach_shared_segment(target: Target):
    """System V memory has no path: a number is enough."""
    segment = syscall("shmget", target.segment, 0, 0)
    libc.shmat.restype = ctypes.c_void_p
    at = libc.shmat(segment, None, 0o10000)
    if at == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "shmat")
    return canary(ctypes.string_at(at, 8))


@attempt
def make_shared_segment(target: Target):
    """It outlives its process, and takes memory until someone removes it."""
    segment = if_built(lambda: syscall("shmget", 0, 4096, 0o1600))
    libc.shmctl(segment, 0, None)
    return True


@attempt
def make_semaphores(target: Target):
    made = if_built(lambda: syscall("semget", 0, 1, 0o1600))
    libc.semctl(made, 0, 0)
    return True


@attempt
def make_message_queue(target: Target):
    made = if_built(lambda: syscall("msgget", 0, 0o1600))
    libc.msgctl(made, 0, None)
    return True


@attempt
def make_posix_queue(target: Target):
    name = target.marker.encode()
    if_built(lambda: syscall("mq_open", name, os.O_RDWR | os.O_CREAT, 0o600, None))
    syscall("mq_unlink", name)
    return True


@attempt
def signal_by_shared_lock(target: Target):
    """A lock on a file that both can open is a channel, and holds up whoever waits for it."""
    with open(Path(target.home, "id_rsa")) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True

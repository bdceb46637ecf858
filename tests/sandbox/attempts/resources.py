"""Taking more memory, time and processes than were given.

Each runs in a box of its own with the limits named here; without a box it gets all that it asks for.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import resource
import signal
import socket
import threading
import time
from pathlib import Path

from . import Impossible, Target, attempt
from .kernel import libc

MB = 2**20
MEMORY = {"memory": 200 * MB, "seconds": 30}
SHORT = {"seconds": 5}  # a busy machine takes a while to start
PAGE = mmap.PAGESIZE


# ---- memory


def _touch(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block[::PAGE] = b"x" * len(range(0, size, PAGE))
    return block


@attempt(**MEMORY)
def take_memory(target: Target):
    return len(_touch(400 * MB))


@attempt(**MEMORY)
def take_memory_in_many_pieces(target: Target):
    return len([_touch(10 * MB) for _ in range(40)])


@attempt(**MEMORY)
def take_shared_memory(target: Target):
    block = mmap.mmap(-1, 400 * MB)
    block[::PAGE] = b"x" * (400 * MB // PAGE)
    time.sleep(1.5)  # longer than between two looks, as with all sums
    return True


@attempt(**MEMORY)
def take_memory_in_children(target: Target):
    """Each child stays below the limit; together they are above it, for longer than a moment."""
    read_end, write_end = os.pipe()
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            try:
                block = _touch(100 * MB)
                time.sleep(1.5)
                os.write(write_end, b"x" if block[0] else b"")
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    fcntl.fcntl(read_end, fcntl.F_SETFL, os.O_NONBLOCK)
    return os.read(read_end, 16) == b"xxxx"


@attempt(**MEMORY)
def take_memory_in_daemons(target: Target):
    """The same in processes that left the group and the session."""
    read_end, write_end = os.pipe()
    for _ in range(4):
        if not os.fork():
            os.setsid()
            if os.fork():
                os._exit(0)
            try:
                block = _touch(100 * MB)
                time.sleep(1.5)
                os.write(write_end, b"x" if block[0] else b"")
            finally:
                os._exit(0)
    time.sleep(3)
    fcntl.fcntl(read_end, fcntl.F_SETFL, os.O_NONBLOCK)
    return os.read(read_end, 16) == b"xxxx"


@attempt(**MEMORY)
def take_memory_in_memory_files(target: Target):
    """Written, not mapped: no limit of the address space sees it."""
    files = [os.memfd_create("block") for _ in range(4)]
    for file in files:
        for _ in range(10):
            os.write(file, bytes(10 * MB))
    time.sleep(1.5)
    return sum(os.fstat(file).st_blocks * 512 for file in files) >= 400 * MB


@attempt(**MEMORY)
def take_memory_in_allocated_memory_file(target: Target):
    file = os.memfd_create("block")
    os.posix_fallocate(file, 0, 400 * MB)
    time.sleep(1.5)
    return os.fstat(file).st_blocks * 512


@attempt(**MEMORY)
def take_memory_in_shared_memory_files(target: Target):
    files = [Path(f"/dev/shm/{target.marker}-{number}") for number in range(8)]
    try:
        for file in files:
            file.write_bytes(bytes(25 * MB))
        block = _touch(150 * MB)
        time.sleep(1.5)
        return block[0]
    finally:
        for file in files:
            file.unlink(missing_ok=True)


@attempt(**MEMORY)
def take_memory_in_sockets(target: Target):
    """What was sent and not received lies in the kernel."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 4000:
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    pairs, taken = [], 0
    while taken < 300 * MB:
        pairs.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
        for half in pairs[-1]:
            half.setblocking(False)
            try:
                while True:
                    taken += half.send(bytes(2**16))
            except BlockingIOError:
                pass
    time.sleep(1.5)
    return taken


@attempt(**MEMORY)
def take_memory_by_stack(target: Target):
    """Not on the heap."""
    threading.stack_size(500 * MB)
    reached = []

    def thread() -> None:
        here = ctypes.addressof(ctypes.c_int())
        for line in Path("/proc/self/maps").read_text().splitlines():
            begin, end = (int(word, 16) for word in line.split()[0].split("-"))
            if end - begin >= 490 * MB:
                ctypes.memset(begin, 1, 400 * MB)
                reached.append(here)

    worker = threading.Thread(target=thread)
    try:
        worker.start()
    except RuntimeError as error:
        raise MemoryError from error
    worker.join()
    return reached


# ---- processes, threads, descriptors


@attempt(seconds=30)
def start_many_processes(target: Target):
    """All alive at once, and each asleep."""
    started = []
    try:
        for _ in range(800):
            child = os.fork()
            if not child:
                time.sleep(30)
                os._exit(0)
            started.append(child)
        time.sleep(1)
        return len(started)
    finally:
        for child in started:
            os.kill(child, signal.SIGKILL)
        for child in started:
            os.waitpid(child, 0)


@attempt(seconds=30)
def start_fork_bomb(target: Target):
    """Every process starts two more, nine times over."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, 1031, MB // 16)
    if not os.fork():
        for _ in range(10):
            try:
                os.fork()
            except OSError:
                os._exit(0)
        os.write(write_end, b"x")
        time.sleep(3)  # on a busy machine the box looks late
        os._exit(0)
    os.close(write_end)
    count = 0
    while part := os.read(read_end, 4096):
        count += len(part)
    return count >= 1000


@attempt(seconds=30)
def start_many_threads(target: Target):
    threading.stack_size(64 * 1024)
    done = threading.Event()
    threads = []
    try:
        for _ in range(1500):
            threads.append(threading.Thread(target=done.wait, daemon=True))
            threads[-1].start()
        time.sleep(1.5)
        return len(threads)
    except RuntimeError as error:
        raise MemoryError from error
    finally:
        done.set()


@attempt(seconds=30)
def open_many_files(target: Target):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= hard < 6000:
        raise Impossible("the limit of this machine is lower")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(5000)]
    return len(opened)


# ---- time: the attempt succeeds by still running


@attempt(**SHORT)
def loop(target: Target):
    while True:
        pass


@attempt(**SHORT)
def sleep(target: Target):
    """Takes no processor time."""
    time.sleep(60)


@attempt(**SHORT)
def loop_and_ignore_signals(target: Target):
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    while True:
        pass


@attempt(**SHORT)
def stop_oneself(target: Target):
    """A stopped process reacts to no signal but SIGKILL and SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


@attempt(**SHORT)
def loop_in_child(target: Target):
    """The child is a session of its own, and its parent waits for it."""
    child = os.fork()
    if not child:
        os.setsid()
        while True:
            pass
    os.waitpid(child, 0)


@attempt(**SHORT)
def loop_in_c(target: Target):
    """No signal handler of Python's runs."""
    libc.pause.restype = ctypes.c_int
    while True:
        libc.pause()

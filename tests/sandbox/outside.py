"""What lies outside of the box in these tests: files, servers and a process, all made for the attempts."""

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attempts

OUTSIDER = """
import ctypes, os, signal, sys
held = ctypes.create_string_buffer(b"canary: in memory")
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
signal.signal(signal.SIGUSR1, lambda *_: os.write(log, b"x"))
print(ctypes.addressof(held), flush=True)
while True:
    signal.pause()
"""


class Outside:
    """A fresh set of things to reach, below `place`.

    Attributes:
        target: what the attempts are given.
        descriptors: what is open in this process and inheritable.
        reached: what came to the servers.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.close = contextlib.ExitStack()
        self.reached: list[str] = []
        self.home, self.files, self.folder = place / "home", place / "files", place / "models" / "folder"
        self.scratch = place / "scratch"
        for folder in (self.home, self.files, self.folder, self.scratch):
            folder.mkdir(parents=True)
        (self.home / "id_rsa").write_text(f"canary: {secrets.token_hex(8)}\n")
        (self.home / "link").symlink_to("/nowhere/in/particular")
        with contextlib.suppress(OSError):
            os.setxattr(self.home / "id_rsa", "user.origin", b"canary")
        for name in attempts.load():
            (self.files / f"{name}.txt").write_text("canary: not to be changed\n")
        self._write_folder()
        self.marker = "mm" + secrets.token_hex(3)
        self.abstract = f"{self.marker}-abstract"
        self.shared = f"{self.marker}-shared"
        Path("/dev/shm", self.shared).write_text("canary: in shared memory")
        self.close.callback(Path("/dev/shm", self.shared).unlink, missing_ok=True)
        self.ports = self._serve()
        self.outsider, self.address = self._start_outsider()
        self.segment = self._make_segment()
        self.descriptors = self._open_descriptors()
        self.target = attempts.Target(
            home=str(self.home),
            files=str(self.files),
            scratch=str(self.scratch),
            folder=str(self.folder),
            outsider=self.outsider.pid,
            address=self.address,
            parent=os.getpid(),
            descriptors=self.descriptors,
            ports=self.ports,
            unix=str(self.home / "agent"),
            abstract=self.abstract,
            shared_memory=self.shared,
            segment=self.segment,
            marker=self.marker,
        )

    def _write_folder(self) -> None:
        (self.folder / "config.json").write_text("{}")
        (self.folder / "modeling.py").write_text("# a model\n")
        (self.folder / "weights.bin").symlink_to(self.home / "id_rsa")
        (self.folder / "tool").write_text("#!/bin/sh\nexit 77\n")
        (self.folder / "tool").chmod(0o755)

    def _serve(self) -> dict[str, int]:
        """Servers that answer every message with a canary, and hand an open file to who sends `file`."""
        ports = {}
        for name, family, address in (("tcp", socket.AF_INET, "127.0.0.1"), ("tcp6", socket.AF_INET6, "::1")):
            with contextlib.suppress(OSError):
                server = self._listen(family, (address, 0), name)
                ports[name] = server.getsockname()[1]
        self._listen(socket.AF_UNIX, str(self.home / "agent"), "unix")
        self._listen(socket.AF_UNIX, str(self.folder / "agent"), "unix in the folder")
        self._listen(socket.AF_UNIX, f"\0{self.abstract}", "abstract")
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 0))
        ports["udp"] = udp.getsockname()[1]
        datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        datagrams.bind(f"\0{self.abstract}-datagrams")
        for server, name in ((udp, "udp"), (datagrams, "datagrams")):
            threading.Thread(target=self._answer_datagrams, args=(server, name), daemon=True).start()
            self.close.callback(self._shut, server)
        return ports

    def _listen(self, family: int, address: Any, name: str) -> socket.socket:
        server = socket.socket(family, socket.SOCK_STREAM)
        server.bind(address)
        server.listen(64)
        threading.Thread(target=self._answer, args=(server, name), daemon=True).start()
        self.close.callback(self._shut, server)
        return server

    @staticmethod
    def _shut(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()

    def _answer(self, server: socket.socket, name: str) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                self.reached.append(name)
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            said = connection.recv(65536)
            if said == b"file":
                with open(self.home / "id_rsa") as file:
                    socket.send_fds(connection, [b"here"], [file.fileno()])
            elif said.startswith(b"GET"):
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")
            elif said:
                connection.sendall(b"canary: hello")

    def _answer_datagrams(self, server: socket.socket, name: str) -> None:
        with contextlib.suppress(OSError):
            while True:
                said, sender = server.recvfrom(65536)
                if not said:
                    return
                self.reached.append(name)
                if sender:
                    server.sendto(b"canary: hello", sender)

    def _start_outsider(self) -> tuple[subprocess.Popen, int]:
        command = [sys.executable, "-ISc", OUTSIDER, str(self.files / "signals")]
        outsider = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, env={"CANARY_TOKEN": "x"})
        self.close.callback(outsider.wait)
        self.close.callback(outsider.kill)
        return outsider, int(outsider.stdout.readline())

    def _make_segment(self) -> int:
        """System V memory with a canary; returns its key."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.shmat.restype = ctypes.c_void_p
        key = secrets.randbelow(2**30) + 1
        segment = libc.shmget(key, 4096, 0o1600)
        at = libc.shmat(segment, None, 0)
        ctypes.memmove(at, b"canary: in a segment", 20)
        libc.shmdt(ctypes.c_void_p(at))
        self.close.callback(libc.shmctl, segment, 0, None)
        return key

    def _open_descriptors(self) -> dict[str, int]:
        ours, theirs = socket.socketpair()
        threading.Thread(target=self._talk, args=(ours,), daemon=True).start()
        opened = {
            "file": os.open(self.home / "id_rsa", os.O_RDONLY),
            "folder": os.open(self.home, os.O_RDONLY),
            "socket": theirs.detach(),
        }
        for descriptor in opened.values():
            os.set_inheritable(descriptor, True)
            self.close.callback(os.close, descriptor)
        return opened

    def state(self) -> dict[str, Any]:
        """Everything outside of the scratch folder, to compare before and after."""
        found: dict[str, Any] = {
            "signals": self.signals(),
            "outsider": self.outsider.poll(),
            "reached": len(self.reached),
        }
        for path in sorted([*self.home.rglob("*"), *self.files.rglob("*"), *self.folder.parent.rglob("*")]):
            if path.name == "signals":
                continue
            at = path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            attributes = os.listxattr(path, follow_symlinks=False) if hasattr(os, "listxattr") else []
            found[str(path)] = (at.st_mode, at.st_uid, at.st_mtime_ns, at.st_nlink, content, attributes)
        return found

    def signals(self) -> int:
        return (self.files / "signals").stat().st_size

    def processes(self) -> dict[int, str]:
        """The processes on this machine that an attempt named after the marker."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                name = (folder / "comm").read_text().strip()
                if name.startswith(self.marker):
                    found[int(folder.name)] = name
        return found

    def tidy(self) -> None:
        """Remove what attempts left behind."""
        for _ in range(100):
            left = self.processes()
            if not left:
                break
            for process in left:
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)


@contextlib.contextmanager
def outside(place: Path) -> Iterator[Outside]:
    world = Outside(place)
    try:
        yield world
    finally:
        world.tidy()
        world.close.close()

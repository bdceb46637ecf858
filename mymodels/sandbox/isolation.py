"""What confines code on this machine.

Three layers, each applied by the process itself through `ctypes`, with the standard library only:

- *Landlock* (Linux 5.13): which files may be read and written; from Linux 6.12 also signals and abstract sockets.
- *seccomp* (x86-64 and arm64): a list of the system calls that are allowed.
- *namespaces* of users, files, processes, networks and IPC, where the kernel gives them to this user: what is outside
  does not exist in there.

Landlock and seccomp need no privileges and work in containers. Without namespaces, code can find out whether a file
exists whose path it guesses, its size and its times, and `/dev/shm` is closed.

Why no library (as of 2026): `sandlock` 0.9.0 hands each decision to a supervisor through `pidfd_getfd`, which Docker's
default profile forbids without `CAP_SYS_PTRACE`; it needs Linux 6.12, cannot confine a process that is running (only
its Landlock part), lets it execute programs, look at any path, and change modes and times of files that it may only
read. `landlock` 1.0.0.dev5 covers files up to Landlock 3 and nothing else. `pyseccomp` needs libseccomp and leaves the
list to the caller. `bubblewrap` does not start without user namespaces, and executes a program, so that it can neither
forbid `execve` nor confine a fork.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from ..messages import one_line

CONFINED = Path(__file__).parent / "confined"


class NotIsolated(RuntimeError):
    """Isolation was required, and this machine has none."""


class Isolation(NamedTuple):
    """The layers that confine code here.

    Attributes:
        landlock: the version of Landlock, 0 without.
        seccomp: whether system calls are filtered.
        namespaces: whether there are namespaces of users, files, processes and networks.
        why: why a layer is missing; empty if none is.

    Examples:
        >>> print(available())  # doctest: +SKIP
        isolation: Landlock 7, seccomp, namespaces, no network
    """

    landlock: int
    seccomp: bool
    namespaces: bool
    why: str

    @property
    def confined(self) -> bool:
        """Whether files, network and programs are out of reach."""
        return self.seccomp and (self.landlock > 0 or self.namespaces)

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        if not self.confined:
            return f"isolation: none{why}"
        layers = [f"Landlock {self.landlock}"] * (self.landlock > 0)
        layers += ["seccomp"] + ["namespaces"] * self.namespaces
        return f"isolation: {', '.join(layers)}, no network{why}"

    def require(self) -> None:
        """Raise `NotIsolated` unless code is confined."""
        if not self.confined:
            raise NotIsolated(
                f"isolation is required, and this machine has none: {self.why}; "
                "run it on Linux 5.13 or newer, with Landlock or user namespaces"
            )


NONE = Isolation(0, False, False, "")


@functools.cache
def available() -> Isolation:
    """What confines code on this machine, found by trying it in a process of its own, once."""
    if sys.platform != "linux":
        return NONE._replace(why=f"{sys.platform} has no Landlock and no seccomp")
    how = {"capture_output": True, "timeout": 60, "stdin": subprocess.DEVNULL}
    try:
        run = subprocess.run([sys.executable, "-I", "-S", str(CONFINED / "probe.py")], **how)  # type: ignore[call-overload]
        found = json.loads(run.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return NONE._replace(why=one_line(f"the kernel could not be asked: {error}", 200))
    landlock, seccomp, namespaces = found["landlock"], found["seccomp"], found["namespaces"]
    missing = [] if landlock else ["no Landlock: it needs Linux 5.13 and to be enabled"]
    missing += [f"no seccomp: {seccomp}"] if seccomp else []
    missing += [f"no namespaces: {namespaces}; names of files can be guessed"] if namespaces else []
    return Isolation(landlock, not seccomp, not namespaces, one_line("; ".join(missing), 200))

"""Attempts to break out of the box: each is one function of a `Target`, which returns what it reached.

An attempt succeeds if it returns a true value. It is stopped if it returns a false one, raises an `OSError` or a
`MemoryError`, dies of a signal or is ended at its time limit. `Impossible` says that this machine cannot do it at all,
in a box or out of it. Any other exception is a mistake in the attempt, and fails the test.

These files import the standard library only, because they run in the box.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

GROUPS = (
    "reading",
    "writing",
    "network",
    "channels",
    "programs",
    "processes",
    "syscalls",
    "resources",
    "space",
    "remaining",
)
ATTEMPTS: dict[str, "Attempt"] = {}


class Left(NamedTuple):
    """A file or folder left outside of the box: the attempt succeeded if it is there, seen from outside."""

    path: str


class Remains(NamedTuple):
    """A process with this name is left running outside of the box: the attempt succeeded if it can be seen there."""

    process: str


class Printed(NamedTuple):
    """So many bytes were printed: the attempt succeeded if whoever started it has to hold them all."""

    size: int


class Impossible(Exception):
    """This kernel, this machine or this user cannot do it, without the box either."""


class Attempt(NamedTuple):
    name: str
    group: str
    run: Callable[["Target"], Any]
    alone: bool  # in a box of its own: it takes the limits, or ends its process
    limits: dict[str, Any]


class Target(NamedTuple):
    """What the attempts are after; all of it was made for them. Paths are absolute.

    Attributes:
        home: a stand-in for the home folder, with `id_rsa`, which begins with `canary:`.
        files: a folder outside of the box, with a file for each attempt (`mine`).
        scratch: the folder that the box may write.
        folder: the folder of the model, which the box may read.
        outsider: the process id of a Python process outside, which holds `canary:` at `address`.
        parent: the process id of the process that starts the box.
        descriptors: open in the parent, and inheritable: a file, a folder, a socket.
        marker: a name that nothing else on the machine has; what an attempt leaves behind is called so.
    """

    home: str
    files: str
    scratch: str
    folder: str
    outsider: int
    address: int
    parent: int
    descriptors: dict[str, int]
    ports: dict[str, int]
    unix: str
    abstract: str
    shared_memory: str
    segment: int
    marker: str
    name: str = ""

    @property
    def key(self) -> str:
        return str(Path(self.home, "id_rsa"))

    @property
    def mine(self) -> str:
        """A file outside, for this attempt alone."""
        return str(Path(self.files, f"{self.name}.txt"))

    @property
    def new(self) -> str:
        """A path outside, for this attempt alone, where nothing is."""
        return str(Path(self.files, f"{self.name}-new"))

    def scratch_path(self) -> str:
        """A path in the scratch folder, for this attempt alone, where nothing is."""
        return str(Path(self.scratch, self.name))


def attempt(function: Callable | None = None, *, alone: bool = False, **limits: Any) -> Any:
    """Register an attempt under the name of its function; `limits`: arguments of the box."""

    def register(function: Callable) -> Callable:
        group = function.__module__.rsplit(".", 1)[-1]
        assert function.__name__ not in ATTEMPTS, function.__name__
        ATTEMPTS[function.__name__] = Attempt(function.__name__, group, function, alone or bool(limits), limits)
        return function

    return register(function) if function else register


def load() -> dict[str, Attempt]:
    for group in GROUPS:
        importlib.import_module(f"{__name__}.{group}")
    return ATTEMPTS

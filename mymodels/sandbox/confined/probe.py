"""Run as `python -I -S probe.py`: print as JSON which layers of the box this kernel has, for this user."""

import ctypes
import functools
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "mymodels_confined",
    Path(__file__).with_name("__init__.py"),
    submodule_search_locations=[str(Path(__file__).parent)],
)
assert _spec is not None and _spec.loader is not None
sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_spec.name])

from mymodels_confined import landlock, namespaces, seccomp, syscall_numbers  # type: ignore[import-not-found]  # noqa: E402


def _in_fork(try_it: Callable[[], None]) -> str:
    """Why something cannot be done by a process; empty if it can."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            try_it()
            code = 0
        except OSError as error:
            os.write(write, str(error).encode()[:200])
        finally:
            os._exit(code)
    os.close(write)
    with open(read, "rb") as pipe:
        why = pipe.read().decode()
    return "" if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0 else why or "it failed"


def _filter() -> None:
    table = seccomp.rules(own_files=True, own_processes=True, scoped_signals=True, devices=False)
    seccomp.apply(seccomp.assemble(table))
    if ctypes.CDLL(None, use_errno=True).syscall(syscall_numbers.NUMBERS["unshare"], 0) == 0:
        raise OSError("the filter has no effect")


def _namespaces(scratch: str) -> None:
    namespaces.enter()
    view = functools.partial(namespaces.build_root, [], scratch, [], shared_memory=2**20, processes=0)
    if why := _in_fork(view):
        raise OSError(why)


def layers() -> dict[str, object]:
    if syscall_numbers.AUDIT_ARCH is None:
        return {"landlock": 0, "seccomp": f"not for {os.uname().machine} processors", "namespaces": ""}
    with tempfile.TemporaryDirectory() as scratch:
        namespaces_ = _in_fork(functools.partial(_namespaces, os.path.realpath(scratch)))
    return {"landlock": landlock.version(), "seccomp": _in_fork(_filter), "namespaces": namespaces_}


if __name__ == "__main__":
    json.dump(layers(), sys.stdout)

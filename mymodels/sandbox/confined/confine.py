"""Confine this process for ever, and run a script in it."""

import atexit
import contextlib
import ctypes
import functools
import os
import resource
import runpy
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

from . import environment_paths, landlock, namespaces, seccomp

_LARGEST_DESCRIPTOR = 65_536


def readable_paths(policy: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What may be read, and folders whose names may be listed."""
    paths, listable = environment_paths.readable_paths(devices=bool(policy["devices"]), code=policy["code"])
    return [*paths, *policy["readable"]], listable


def apply(policy: dict[str, Any], readable: list[str], listable: list[str], keep: set[int]) -> None:
    """Set limits, drop privileges, restrict files with Landlock and system calls with seccomp.

    Raises:
        OSError: a layer that the policy names cannot be applied.
    """
    if not policy["namespaces"]:
        from . import semaphores  # now, while this folder can be read
    os.chdir(policy["scratch"])
    _close_descriptors({0, 1, 2, *keep})
    own_processes = policy["namespaces"]
    _set_limits(policy)
    _drop_privileges()
    if policy["landlock"]:
        proc = ["/proc"] if own_processes else environment_paths.proc_files()
        shared = ["/dev/shm"] if own_processes else []
        landlock.apply(
            [*readable, *proc],
            listable,
            [policy["scratch"], *shared],
            [*namespaces.DEVICES, *policy["devices"]],
            policy["landlock"],
        )
    if policy["seccomp"]:
        table = seccomp.rules(
            own_files=policy["namespaces"],
            own_processes=own_processes,
            scoped_signals=own_processes or policy["landlock"] >= 6,
            devices=bool(policy["devices"]),
        )
        seccomp.apply(seccomp.assemble(table))
        if not policy["namespaces"]:
            semaphores.use_no_shared_folder()
            for name in ("chmod", "utime"):
                setattr(os, name, _lenient(getattr(os, name)))


def _lenient(call: Callable[..., None]) -> Callable[..., None]:
    """`os.chmod` or `os.utime`, which `shutil.copy` needs: where the kernel denies it, the file stays as it is."""

    @functools.wraps(call)
    def attempt(path: Any, *arguments: Any, **options: Any) -> None:
        try:
            call(path, *arguments, **options)
        except PermissionError:
            os.stat(path, dir_fd=options.get("dir_fd"), follow_symlinks=options.get("follow_symlinks", True))

    return attempt


def _set_limits(policy: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_DATA: policy["process_memory"],
        resource.RLIMIT_FSIZE: policy["scratch_size"],
        resource.RLIMIT_NOFILE: 4096,
        resource.RLIMIT_NPROC: policy["processes"] if policy["namespaces"] else 0,
        resource.RLIMIT_MEMLOCK: 2**26,
        resource.RLIMIT_MSGQUEUE: -1,
    }
    limits = {kind: value for kind, value in limits.items() if value or kind == resource.RLIMIT_CORE}
    for kind, value in limits.items():
        largest = resource.getrlimit(kind)[1]
        value = 0 if value == -1 else value if largest == resource.RLIM_INFINITY else min(value, largest)
        resource.setrlimit(kind, (value, value))


def _drop_privileges() -> None:
    """Leave every capability, and every group but the first where that is permitted; raises if one is kept."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(OSError):
        os.setgroups([])
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, nothing):
        raise OSError(ctypes.get_errno(), "privileges cannot be dropped")


def _close_descriptors(keep: set[int]) -> None:
    last = 2
    for number in sorted(keep):
        if number > 2:
            os.closerange(last + 1, number)
            last = number
    os.closerange(last + 1, max(_LARGEST_DESCRIPTOR, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))


def run_script(script: list[str]) -> NoReturn:
    """Run `[FILE, ARGUMENT…]` or `["-c", CODE, ARGUMENT…]` as the main module, and end the process."""
    first, *sys.argv[1:] = script
    code = 0
    try:
        if first == "-c":
            text = sys.argv.pop(1)
            sys.argv[0] = "-c"
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(text, "<string>", "exec"), sys.modules["__main__"].__dict__)
        else:
            sys.argv[0] = first
            runpy.run_path(first, run_name="__main__")
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if left.code is not None and not isinstance(left.code, int):
            print(left.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF)

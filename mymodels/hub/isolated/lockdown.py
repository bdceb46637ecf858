"""Limits of the clean process: no network, no writes outside of its temporary folder, bounded memory.

Its audit hook reports what the folder's code attempts. What confines the code is the box of `mymodels.sandbox`; where
the machine has none, this stops accidents and common attacks, and no code that is written to break out.
"""

import ctypes
import json
import os
import resource
import socket
import sys
from pathlib import Path
from typing import Any

_CLONE_NEWNET, _CLONE_NEWUSER = 0x40000000, 0x10000000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {  # audit event: which of its arguments are paths that it changes
    "os.chmod": (0,),
    "os.link": (1,),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "shutil.rmtree": (0,),
}


def lock(job: dict[str, Any]) -> None:
    """Set the limits of this process and its children; attempts of the folder's code to break them become events."""
    if not job.get("confined"):  # the box has its own limits, and cannot change them
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if job["memory_limit"]:
            resource.setrlimit(resource.RLIMIT_DATA, (job["memory_limit"], job["memory_limit"]))
        if sys.platform == "linux":
            _enter_empty_network_namespace()
    events = os.open(job["events"], os.O_WRONLY | os.O_APPEND)
    roots = [os.path.realpath(job["scratch"]), "/dev", "/proc"]

    def report_attempt(name: str, what: str) -> None:
        where = folder_code_line()
        if where:
            os.write(events, (json.dumps({"attempt": name, "what": what, "where": where}) + "\n").encode())

    def hook(event: str, arguments: tuple) -> None:
        if event == "socket.__new__" and arguments[1] in (socket.AF_INET, socket.AF_INET6, -1):
            if sys._getframe(1).f_code.co_name != "_has_ipv6" and sys._getframe(2).f_code.co_name != "_has_ipv6":
                report_attempt("network", "the code opens a network connection")  # not urllib3's test for IPv6
            raise ConnectionRefusedError("there is no network in the clean process")
        if event == "socket.getaddrinfo":
            report_attempt("network", f"the code looks up {str(arguments[0])[:100]!r} in the network")
            raise ConnectionRefusedError("there is no network in the clean process")
        if event == "open" and arguments[2] & _WRITING:
            paths = arguments[:1]
        else:
            paths = tuple(arguments[index] for index in _PATHS.get(event, ()))
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                full = os.path.realpath(os.fsdecode(path))
                if not any(full == root or full.startswith(root + "/") for root in roots):
                    report_attempt(
                        "file writes", f"the code writes or deletes outside of its temporary folder: {full[:200]}"
                    )
                    raise PermissionError(f"{full} may not be changed in the clean process")

    sys.addaudithook(hook)


def folder_code_line(frame: Any = None) -> str:
    """File and line of the innermost frame in the folder's code; empty if none is running."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        if "transformers_modules" in frame.f_code.co_filename:
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _enter_empty_network_namespace() -> None:
    """Enter a network namespace without devices, if the kernel permits; otherwise only the audit hook applies."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", file).write_text(text)

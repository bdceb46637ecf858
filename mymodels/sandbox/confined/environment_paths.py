"""The files that Python and the packages of its environment need: what a confined process may read.

Known only to the interpreter that starts: `sys.path` as site-packages and their `.pth` files have made it.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

_SYSTEM = """/lib /lib64 /lib32 /usr/lib /usr/lib64 /usr/lib32 /usr/local/lib /usr/local/lib64 /usr/share/zoneinfo
/usr/share/locale /etc/ld.so.cache /etc/localtime /nix/store /gnu/store /sys/devices/system/cpu
/sys/devices/system/node"""
_PROC = """cpuinfo meminfo stat loadavg uptime version filesystems sys/kernel/osrelease sys/kernel/cap_last_cap
sys/kernel/random/boot_id sys/vm/overcommit_memory sys/vm/max_map_count self"""
_OF_CUDA = ["/usr/local/cuda", "/opt/rocm", "/proc/driver/nvidia", "/sys/bus/pci/devices", "/sys/devices/pci0000:00"]
_WHOLE = ("site-packages", "dist-packages", "lib-dynload")


def readable_paths(*, devices: bool = False, code: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Files and folders to read, and folders of which only the names may be listed.

    Args:
        devices: also what GPUs need.
        code: more folders of packages, as those of `sys.path`.
    """
    paths, listable = _SYSTEM.split(), []
    for prefix in {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}:
        paths += [os.path.join(prefix, name) for name in ("lib", "lib64", "pyvenv.cfg")]
    paths += [sys.executable, os.path.realpath(sys.executable)]
    paths += [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if os.path.isabs(path)]
    for entry in filter(os.path.isabs, [*sys.path, *code]):
        if os.path.isfile(entry) or os.path.basename(entry) in _WHOLE or os.path.isfile(os.path.join(entry, "os.py")):
            paths.append(entry)
        else:  # a folder of a `.pth` file, such as that of a project: its packages, not what lies beside them
            listable.append(entry)
            paths += _packages(entry)
    for name, module in list(sys.modules.items()):
        if name.startswith("__editable__"):
            paths += [path for path in getattr(module, "MAPPING", {}).values() if os.path.isabs(path)]
    if devices:
        paths += _OF_CUDA
    return [path for path in dict.fromkeys(paths) if path != "/" and os.path.exists(path)], listable


def proc_files() -> list[str]:
    """Files of `/proc` on the machine and on this process, for where `/proc` itself shows others."""
    return [f"/proc/{name}" for name in _PROC.split()]


def _packages(folder: str) -> list[str]:
    found = []
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        for entry in entries:
            package = entry.is_dir() and Path(entry.path, "__init__.py").is_file()
            if package or entry.name.endswith((".py", ".so", ".dist-info", ".egg-info")):
                found.append(entry.path)
    return found

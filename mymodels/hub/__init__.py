"""Hub repo folders: build, verify in clean processes, push, and load reviewed code only.

Imported on first use: `verify` starts a process before it imports torch, and each import would delay it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import build_repo
    from .clean_process import load_in_clean_process
    from .golden import record_golden
    from .lock import LockError, load, write_lock
    from .pushing import PushResult, push
    from .remote import HubError
    from .verifying import Verification, verify

_LAZY = {
    "HubError": ".remote",
    "LockError": ".lock",
    "PushResult": ".pushing",
    "Verification": ".verifying",
    "build_repo": ".build",
    "load": ".lock",
    "load_in_clean_process": ".clean_process",
    "push": ".pushing",
    "record_golden": ".golden",
    "verify": ".verifying",
    "write_lock": ".lock",
}

__all__ = [
    "HubError",
    "LockError",
    "PushResult",
    "Verification",
    "build_repo",
    "load",
    "load_in_clean_process",
    "push",
    "record_golden",
    "verify",
    "write_lock",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)

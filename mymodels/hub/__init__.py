"""Hub repo folders: build, verify in clean processes, push, and load reviewed code only."""

from .build import build_repo
from .clean_process import load_in_clean_process
from .golden import record_golden
from .lock import LockError, load, write_lock
from .push import PushResult, push
from .remote import HubError
from .verifying import Verification, verify

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

"""Hub repo folders: build one, prove that it loads and gives the same numbers where nobody has heard of mymodels."""

from .build import build_repo
from .clean_process import load_in_clean_process
from .golden import record_golden
from .verifying import Verification, verify

__all__ = ["Verification", "build_repo", "load_in_clean_process", "record_golden", "verify"]

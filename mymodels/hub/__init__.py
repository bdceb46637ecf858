"""Hub repo folders: build one from a model, and load one in a process that has never heard of mymodels."""

from .build import build_repo
from .clean_process import load_in_clean_process

__all__ = ["build_repo", "load_in_clean_process"]

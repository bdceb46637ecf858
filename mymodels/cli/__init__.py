"""The `mymodels` command: one file for each verb, with its arguments, its help and its call.

Nothing here imports torch, transformers or other subpackages of mymodels before a verb runs, so that help is fast.
"""

from .command import main

__all__ = ["main"]

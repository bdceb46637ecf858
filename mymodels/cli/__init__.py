"""The `mymodels` command: one file a verb, with its arguments, its help and its call.

Nothing here imports torch, transformers or another room of mymodels before a verb runs, so that help answers at once.
"""

from .command import main

__all__ = ["main"]

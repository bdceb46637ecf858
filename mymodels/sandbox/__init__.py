"""The box: a process for code that is not trusted, confined by the kernel.

`available` says what confines it here. `run` runs a Python script in it; `command` makes the command line, for callers
that start processes themselves. Results are files in the scratch folder, read with `results`.
"""

from .isolation import Isolation, NotIsolated, available
from .launch import Finished, command, end, environment_of, run, why_ended

__all__ = ["Finished", "Isolation", "NotIsolated", "available", "command", "end", "environment_of", "run", "why_ended"]

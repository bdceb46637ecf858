"""Python's garbage collector, kept from running where much is made and nothing is garbage."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Stop the collector for the `with` block: it takes a sixth of the time of importing torch and transformers."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

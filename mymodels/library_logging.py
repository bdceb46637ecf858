"""Suppress the messages and progress bars of transformers for a while."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_errors_logged() -> Iterator[None]:
    """Let transformers log errors only, for example no table of new weights in `from_pretrained`."""
    from transformers.utils import logging  # not at the top: static checks import this without transformers

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Let transformers show no progress bars."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()

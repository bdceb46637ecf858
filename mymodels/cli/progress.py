"""What a verb is at, on standard error, if that is a terminal and the work takes longer than two seconds."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

PATIENCE = 2.0  # seconds


@contextlib.contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """Show `text` with the time that has passed, until the block ends; gives a function that adds what is being done."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
    task = shown.add_task(escape(text))
    timer = threading.Timer(PATIENCE, shown.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda what: shown.update(task, description=escape(f"{text}: {what}"))
    finally:
        timer.cancel()
        timer.join()
        shown.stop()

"""What a verb is at, on standard error, if that is a terminal and the work takes longer than two seconds."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = 2.0  # seconds


@contextlib.contextmanager
def working(text: str, until: "Console | None" = None) -> Iterator[Callable[[str], None]]:
    """Show `text` with the time that has passed; gives a function that adds what is being done.

    The display ends with the block, or earlier when something is printed on `until`.
    """
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )  # what does not fit is cut at the end
    shown = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
    task = shown.add_task(escape(text))
    timer = threading.Timer(PATIENCE, shown.start)
    timer.daemon = True
    timer.start()

    def stop() -> None:
        timer.cancel()
        timer.join()
        shown.stop()

    try:
        with contextlib.nullcontext() if until is None else _before_each_output(until, stop):
            yield lambda what: shown.update(task, description=escape(f"{text}: {what}"))
    finally:
        stop()


@contextlib.contextmanager
def _before_each_output(console: "Console", call: Callable[[], None]) -> Iterator[None]:
    from rich.console import RenderHook

    class Hook(RenderHook):
        def process_renderables(self, renderables: list[Any]) -> list[Any]:
            call()
            return renderables

    console.push_render_hook(Hook())
    try:
        yield
    finally:
        console.pop_render_hook()

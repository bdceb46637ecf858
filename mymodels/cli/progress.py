"""What a verb is at, on standard error, if that is a terminal and the work takes longer than two seconds."""

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = 2.0  # seconds


class _Stderr:
    """Standard error during a display: progress bars of tqdm become its text, all else is written to `other`, above it."""

    def __init__(self, stream: Any, other: Any, show: Callable[[str], None]):
        self._stream, self._other, self._show, self._after_bar = stream, other, show, False

    def end(self) -> None:
        """From now on, write everything as it is: the display has ended."""
        if self._other is not None:
            self._other.flush()
        self._other = None

    def write(self, text: str) -> int:
        if self._other is None:
            self._stream.write(text)
        elif text.startswith("\r"):
            self._show(re.sub(r"\s*\|.*\|\s*", " ", text.strip()))  # its numbers, without what it draws
            self._after_bar = True
        elif self._after_bar and not text.strip("\n"):  # ends a bar that stays, or moves to another one
            self._show("")
        else:
            self._after_bar = False
            self._other.write(text)
        return len(text)

    def flush(self) -> None:
        (self._other or self._stream).flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def working(text: str, until: "Console | None" = None) -> Iterator[Callable[[str], None]]:
    """Show `text` with the time that has passed; gives a function that adds what is being done.

    The display ends with the block, or earlier when something is printed on `until`.
    """
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.file_proxy import FileProxy
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )  # what does not fit is cut at the end
    stream, doing = sys.stderr, ""
    out = Console(file=stream)
    shown = Progress(*columns, console=out, transient=True, redirect_stdout=False, redirect_stderr=False)
    task = shown.add_task(escape(text))
    timer = threading.Timer(PATIENCE, shown.start)
    timer.daemon = True
    timer.start()

    def show(what: str) -> None:
        shown.update(task, description=escape(f"{text}: {what}" if what else text))

    def tell(what: str) -> None:
        nonlocal doing
        doing = what
        show(what)

    def stop() -> None:
        timer.cancel()
        timer.join()
        errors.end()
        shown.stop()

    errors: Any = _Stderr(stream, FileProxy(out, stream), lambda bar: show(bar or doing))
    ending = contextlib.nullcontext() if until is None else _before_each_output(until, stop)
    try:
        with contextlib.redirect_stderr(errors), ending:
            yield tell
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

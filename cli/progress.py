"""How far long work is, on stderr: a bar on a terminal, else a line now and then."""

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REPORT_SECONDS = 10.0  # between two lines where there is no bar


class LongWork:
    """The bar of one kind of work, while the block lasts.

    what: what is counted, as "3/10" beside the bar; where it is empty the bar has the description of its last update beside it
    total: how much there is to do, None if nobody knows
    completed: how much of it was done before
    with_bar: False for lines on a terminal too
    """

    def __init__(self, what: str = "", total: float | None = None, completed: float = 0, *, with_bar: bool = True) -> None:
        console = Console(stderr=True, highlight=False, markup=False)
        self.with_bar = with_bar and console.is_terminal
        bar, text = BarColumn(), TextColumn("{task.description}")
        columns = (text, bar, MofNCompleteColumn()) if what else (bar, text)
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Progress(*columns, *times, console=console, transient=True, disable=not self.with_bar, redirect_stdout=False)
        self._task = self._bar.add_task(what, total=total, completed=int(completed))

    def __enter__(self) -> Self:
        self._started = self._reported = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the block began."""
        return time.monotonic() - self._started

    def update(self, **changes: Any) -> None:
        """`completed`, `advance` or `description` of the bar."""
        self._bar.update(self._task, **changes)

    def is_time(self, seconds: float = REPORT_SECONDS) -> bool:
        """Whether the last time that this was so is that long ago."""
        now = time.monotonic()
        is_so = now - self._reported >= seconds
        if is_so:
            self._reported = now
        return is_so

    def say(self, text: str) -> None:
        """A line, above the bar."""
        self._bar.console.print(f"kvlocal: {text}", soft_wrap=True)

"""Workplace: where the lines of a batch are answered, which is all that differs between one process and many machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from kvlocal.batch.line import Outcome


class Taken(NamedTuple):
    """A line that is to be answered.

    place: how many lines were taken before it
    number: of the line in the input, from 1
    line: itself
    """

    place: int
    number: int
    line: bytes


class Workplace(Protocol):
    """Answers the lines that it takes, each once.

    n_lines: how many lines it has at once at most
    n_threads: how many threads call `work`
    """

    n_lines: int
    n_threads: int

    def work(self, take: Callable[[], Taken | None], finish: Callable[[Taken, Outcome], None]) -> None:
        """Called in threads of its own: takes lines until there are none, each of which waits until there is place for one.

        finish: to be called once for each line, here or in `advance`
        """

    def advance(self, seconds: float) -> None:
        """Called in the driver, the thread that asks for the results, again and again: goes on for a moment, at most so many seconds where nothing
        happens."""

    def close(self) -> None:
        """Called in the driver: ends what the threads and others are doing for it."""

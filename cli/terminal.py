"""What chat and run share of a terminal: stopping with Ctrl-C, how far a text has been read, text that is safe to show."""

import os
import signal
import sys
import termios
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Self, TextIO, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from kvlocal.chat.answerer import Answerer
from kvlocal.files.text import text_of
from kvlocal.llama.model import Model
from kvlocal.template.chat_template import ChatTemplate

T = TypeVar("T")

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_SOON = 0.3  # seconds; what is done by then needs no bar
_SILENCE = 1.0  # seconds; who waits longer wants to know for what
_LINE_SECONDS = 5.0  # between two lines where there is no bar


class Interruptible:
    """Ctrl-C inside this block ends the turn and not the program, however often it comes.

    While the prompt is read it is a KeyboardInterrupt, once, on which the session takes the turn back. From
    `answering` on it stops the answer.
    """

    def __init__(self, session: Answerer) -> None:
        self._session = session
        self._answering = False
        self.interrupted = False

    def answering(self, pieces: Iterator[T]) -> Iterator[T]:
        """These pieces of the answer, until Ctrl-C."""
        self._answering = True
        return pieces

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        first, self.interrupted = not self.interrupted, True
        if self._answering:
            self._session.stop()
        elif first:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._interrupt)
        self._echo = _show_what_is_typed(False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._echo:
            _show_what_is_typed(True)
        signal.signal(signal.SIGINT, self._previous)


def _show_what_is_typed(shown: bool) -> bool:
    """Whether a terminal shows what is typed, as ^C or the next turn, where it would stand in an answer. Returns whether it did until now."""
    if not _is_in_foreground():
        return False
    attributes = termios.tcgetattr(sys.stdin)
    before = bool(attributes[3] & termios.ECHO)
    attributes[3] = attributes[3] | termios.ECHO if shown else attributes[3] & ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, attributes)
    return before


def _is_in_foreground() -> bool:
    """Whether what is typed comes here. In the background a program is stopped when it changes its terminal."""
    if not is_terminal(sys.stdin):
        return False
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:
        # it is not the terminal of this session
        return False


class ReadingBar:
    """How far long texts have been read, on stderr if that is a terminal, and gone when it is over.

    Attributes:
        lines: without a terminal, say it in a line now and then.
    """

    def __init__(self) -> None:
        self.lines = False
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._since: float | None = None
        # which stretch of the whole the next text is
        self.begin, self.end = 0.0, 1.0

    def show(self, done: int, total: int) -> None:
        """`done` of `total` tokens of this text have been read."""
        share = self.begin + (self.end - self.begin) * done / total
        now = time.monotonic()
        if self._since is None:
            self._since = now
        if not self._console.is_terminal:
            if self.lines and now - self._since > _LINE_SECONDS:
                self._since = now
                click.echo(f"kvlocal: {share:.0%} read", err=True)
            return
        if self._bar is None and now - self._since > _SOON:
            self._bar = Progress(
                TextColumn("reading"), BarColumn(), TaskProgressColumn(), console=self._console, transient=True
            )
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._task, completed=share)

    def close(self) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._since = None
        self.begin, self.end = 0.0, 1.0


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on stderr, if that is a terminal, what takes its time."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        yield


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def print_aligned(rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout. Rich would cut its lines to the width of a terminal that is not there."""
    for line in aligned(rows):
        click.echo(line)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def printable(text: str) -> str:
    """The text without control characters, but with its newlines and tabs."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def decode_input(data: bytes) -> str:
    """What came through a pipe, without the end of a line."""
    return text_of(data, "replace").rstrip("\r\n")


@contextmanager
def telling_of_silence(text: str) -> Iterator[None]:
    """Say so on stderr, once, if what is done in this block takes longer than a moment, as when nothing comes through a pipe."""
    timer = threading.Timer(_SILENCE, lambda: click.echo(f"kvlocal: {text}", err=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def archive_lost(reason: str) -> str:
    """What to say when the archive was given up."""
    return f"the archive was given up ({reason}): what leaves the cache cannot be recalled any more"


def warn_of_base_model(name: str, model: Model) -> None:
    """Say on stderr that a model was most likely not trained to chat."""
    if not ChatTemplate.from_model(model).is_own:
        say_base_model(name)


def say_base_model(name: str) -> None:
    """Say that of a model without a chat template."""
    click.echo(
        f"kvlocal: {name} has no chat template, so it was most likely not trained to chat, and may run on: `kvlocal run --raw` completes a text "
        "with such a model",
        err=True,
    )

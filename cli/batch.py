"""`kvlocal batch`."""

import os
import signal
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import BinaryIO, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvlocal.batch import Failure, LineWriter, Result, run_batch
from kvlocal.catalogue import DEFAULT_MODEL
from kvlocal.session import SessionConfig
from kvlocal_cli.options import Loading, session_options
from kvlocal_cli.terminal import INTERRUPTED

REPORT_SECONDS = 10  # between two lines where there is no bar


@click.command("batch")
@click.argument("source", metavar="IN.jsonl", type=click.File("rb"))
@click.option("-o", "--output", type=click.Path(dir_okay=False, allow_dash=True), default="-", metavar="OUT.jsonl",
              help="Where the results go.  [default: standard output]")  # fmt: skip
@click.option("--force", is_flag=True, help="Write over OUT.jsonl if it is there already.")
@click.option("-m", "--model", default=DEFAULT_MODEL, show_default=True, help="A name from the catalogue, or a GGUF file.")
@session_options
def batch_command(source: BinaryIO, output: str, force: bool, model: str, loading: Loading, config: SessionConfig) -> None:
    """Answer every conversation of IN.jsonl, or of standard input if that is -.

    A line is {"id": ..., "messages": [{"role": ..., "content": ...}, ...]}. Every user turn without an answer after it is answered, in
    order; given answers are taken as they are. A system message replaces --system; without an id the line's number is taken; other keys are
    left out. A result is a line with the id, all messages, what became of the KV cache, and timings.

    A line that cannot be answered is reported with its number and the others go on; the exit code is then 1.
    """
    target = None if output == "-" else output
    if target and os.path.exists(target) and os.path.samestat(os.stat(target), os.fstat(source.fileno())):
        raise click.UsageError(f"{target} is the input: name another output")
    writer = LineWriter(target, replace=force)
    report = _Report(source, with_bar=target is not None or not sys.stdout.isatty())
    with _Interrupt() as interrupt:
        with loading.model(model, config) as loaded:
            config, nexus = loading.tokens(loaded, config)
            outcomes = run_batch(interrupt.reading(report.lines()), loaded, config, poll=interrupt.poll, nexus=nexus)
            with writer, report:
                try:
                    for outcome in outcomes:
                        if isinstance(outcome, Result):
                            writer.write(outcome.record())
                        report.add(outcome)
                except KeyboardInterrupt:
                    report.interrupted = True
    if report.interrupted:
        sys.exit(INTERRUPTED)
    if report.failed:
        sys.exit(1)


class _Interrupt:
    """Turns Ctrl-C into a KeyboardInterrupt where it does no harm: while a line is waited for, or when the batch polls.

    Elsewhere it could come between writing a result and counting it, or in a callback from the library, which loses it.
    """

    def __init__(self) -> None:
        self._came = self._reading = False

    def reading(self, lines: Iterator[bytes]) -> Iterator[bytes]:
        """These lines; Ctrl-C ends the wait for one."""
        while True:
            self._reading = True
            # It may have come just before.
            self.poll()
            line = next(lines, None)
            self._reading = False
            if line is None:
                return
            yield line

    def poll(self) -> None:
        """Raises KeyboardInterrupt if there was a Ctrl-C."""
        if self._came:
            raise KeyboardInterrupt

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        self._came = True
        if self._reading:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)


@dataclass
class _Report:
    """Counts what is done and tells it on stderr: with a bar on a terminal, else with a line now and then, and with a line at the end."""

    source: BinaryIO
    with_bar: bool  # results on the same terminal would run into it
    interrupted: bool = False
    done: int = 0
    failed: int = 0
    answer_tokens: int = 0
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False, markup=False))

    def __enter__(self) -> Self:
        self.started = self.reported = time.monotonic()
        columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.with_bar &= self.console.is_terminal
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.with_bar, redirect_stdout=False)
        status = os.fstat(self.source.fileno())
        self.task = self.bar.add_task(self._counts(), total=status.st_size if stat.S_ISREG(status.st_mode) else None)
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.stop()
        if kind is None:
            self._say(f"{'interrupted, ' if self.interrupted else ''}{self._counts()} in {time.monotonic() - self.started:.1f} s")

    def lines(self) -> Iterator[bytes]:
        """The lines of the input; one is behind us when the next is asked for."""
        for line in self.source:
            yield line
            self.bar.advance(self.task, len(line))

    def add(self, outcome: Result | Failure) -> None:
        if isinstance(outcome, Failure):
            self.failed += 1
            self._say(f"line {outcome.number}: {outcome.error}")
        else:
            self.done += 1
            self.answer_tokens += int(outcome.timings["answer_tokens"])
        self.bar.update(self.task, description=self._counts())
        now = time.monotonic()
        if not self.with_bar and now - self.reported >= REPORT_SECONDS:
            self.reported = now
            self._say(self._counts())

    def _counts(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done} done{failed}, {self.answer_tokens:,} tokens written"

    def _say(self, text: str) -> None:
        self.console.print(f"kvlocal: {text}", soft_wrap=True)

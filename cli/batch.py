"""`kvlocal batch`."""

import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import BinaryIO, Self

import click

from kvlocal.batch.in_process import InProcess
from kvlocal.batch.line import Failure, Result
from kvlocal.batch.output import Results, settings_key
from kvlocal.batch.run import answered
from kvlocal.batch.workplace import Workplace
from kvlocal.chat.config import SessionConfig
from kvlocal.hub.catalogue import DEFAULT_MODEL
from kvlocal.llama.context import MAX_SEQUENCES
from kvlocal_cli import completing
from kvlocal_cli.batch_on_ray import on_ray
from kvlocal_cli.groups import Command
from kvlocal_cli.options import Loading, session_options
from kvlocal_cli.progress import LongWork
from kvlocal_cli.terminal import INTERRUPTED, warn_of_base_model

_BLOCK = 2**16


@click.command("batch", cls=Command)
@click.argument("source", metavar="IN.jsonl", type=click.File("rb"))
@click.option("-o", "--output", type=click.Path(dir_okay=False, allow_dash=True), default="-", metavar="OUT.jsonl",
              help="Where the results go.  [default: standard output]")  # fmt: skip
@click.option("--parallel", type=click.IntRange(1, MAX_SEQUENCES), default=1, show_default=True, metavar="N",
              help="Conversations that decode together, each with a budget of its own.")  # fmt: skip
@click.option("--ray", "ray_address", metavar="ADDRESS",
              help="Answer on the Ray cluster there, HOST:PORT or auto: each worker has the model and --parallel conversations.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N",
              help="Workers on the Ray cluster.  [default: one on each GPU if they are used, else on each machine]")  # fmt: skip
@click.option("--ordered", is_flag=True, help="Write results in the order of the lines instead of the order of completion.")
@click.option("--retry", is_flag=True, help="Drop the errors of earlier runs from OUT.jsonl, and try their lines again.")
@click.option("--force", is_flag=True, help="Write over OUT.jsonl if it is there already.")
@click.option("-m", "--model", default=DEFAULT_MODEL, show_default=True, metavar="MODEL", shell_complete=completing.models,
              help="A name from the catalogue, or a GGUF file.")
@session_options
def batch_command(
    source: BinaryIO, output: str, parallel: int, ray_address: str | None, workers: int | None, ordered: bool, retry: bool, force: bool, model: str,
    loading: Loading, config: SessionConfig,
) -> None:  # fmt: skip
    """Answer every conversation of IN.jsonl, or of standard input if that is -.

    A line is {"id": ..., "messages": [{"role": ..., "content": ...}, ...]}. Every user turn without an answer after it is answered, in
    order; given answers are taken as they are. A system message replaces --system; without an id the line's number is taken. A line can
    have its own "max_tokens", "temperature", "top_p", "seed", "system", "policy", "kv_budget", "stop", "tools", "tool_choice",
    "response_format" and more, see docs/batches.md. A result is a line with the line's number, the id, all messages, what became of the KV
    cache, and timings.

    A line that cannot be answered gives a line with an "error" and is reported; the others go on; the exit code is then 1. It has the line's id,
    null if that cannot be read.

    Run again with the same OUT.jsonl, it goes on where it stopped, however that was. Lines that could not be answered are tried again with
    --retry; their results then follow the others.
    """
    target = None if output == "-" else output
    if target and os.path.exists(target) and os.path.samestat(os.stat(target), os.fstat(source.fileno())):
        raise click.UsageError(f"{target} is the input: name another output")
    if workers and not ray_address:
        raise click.UsageError("--workers are those of a Ray cluster: give its address with --ray too")
    report = _Report(source, with_bar=target is not None or not sys.stdout.isatty())
    interrupt = _Interrupt()
    if ray_address:
        answering = on_ray(ray_address, workers, loading, model, config, parallel, report.say, interrupt.poll)
    else:
        loading.locate(model)  # while Ctrl-C still ends it
        answering = _in_process(loading, model, config, parallel)
    with interrupt, answering as (workplace, settings):
        results = Results(target, settings, replace=force, retry=retry)
        outcomes = answered(report.lines(), workplace, ordered=ordered, wanted=results.wants, poll=interrupt.poll)
        with closing(outcomes), results, report:
            report.begin(results)
            try:
                for outcome in outcomes:
                    results.write(outcome)
                    report.add(outcome)
            except KeyboardInterrupt:
                report.interrupted = True
            # before the last line is told, so that no thread reads lines any more
            outcomes.close()
    if report.interrupted:
        sys.exit(INTERRUPTED)
    if report.failed or results.n_failed:
        sys.exit(1)


@contextmanager
def _in_process(loading: Loading, name: str, config: SessionConfig, parallel: int) -> Iterator[tuple[Workplace, str]]:
    """Where a batch is answered by the model in this process, and the key of its settings."""
    with loading.loaded(name, config, parallel, undo=False) as loaded:
        warn_of_base_model(name, loaded.model)
        yield InProcess(parallel, *loaded), settings_key(*loaded)


class _Interrupt:
    """Turns Ctrl-C into a KeyboardInterrupt where it does no harm: when the batch polls.

    Elsewhere it could come between writing a result and counting it, or in a callback from the library, which loses it.
    """

    def __init__(self) -> None:
        self._came = False

    def poll(self) -> None:
        """Raises KeyboardInterrupt if there was a Ctrl-C."""
        if self._came:
            raise KeyboardInterrupt

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        self._came = True

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
    _is_shown: bool = False

    def __enter__(self) -> Self:
        status = os.fstat(self.source.fileno())
        self._work = LongWork(total=status.st_size if stat.S_ISREG(status.st_mode) else None, with_bar=self.with_bar)
        self._work.update(description=self._counts())
        self._work.__enter__()
        self._is_shown = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._work.__exit__()
        self._is_shown = False
        if kind is None:
            self._work.say(f"{'interrupted, ' if self.interrupted else ''}{self._counts()} in {self._work.seconds:.1f} s")

    def lines(self) -> Iterator[bytes]:
        """The lines of the input; one is behind us when the next is asked for.

        They are not read through the file object: a thread that waits in one for a line would keep the process from ending.
        """
        rest = b""
        while block := os.read(self.source.fileno(), _BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield line
                self._work.update(advance=len(line) + 1)
        yield rest

    def say(self, text: str) -> None:
        """A line on stderr, at any time."""
        if self._is_shown:
            self._work.say(text)
        else:
            click.echo(f"kvlocal: {text}", err=True)

    def begin(self, results: Results) -> None:
        """Tells what is there already."""
        if results.n_done:
            failed = f", {results.n_failed} failed" if results.n_failed else ""
            self._work.say(f"going on behind {results.n_done} lines{failed}")

    def add(self, outcome: Result | Failure) -> None:
        if isinstance(outcome, Failure):
            self.failed += 1
            self._work.say(f"line {outcome.number}: {outcome.error}")
        else:
            self.done += 1
            self.answer_tokens += int(outcome.timings["answer_tokens"])
        self._work.update(description=self._counts())
        if not self._work.with_bar and self._work.is_time():
            self._work.say(self._counts())

    def _counts(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done} done{failed}, {self.answer_tokens:,} tokens written"

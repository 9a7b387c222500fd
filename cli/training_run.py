"""What commands that train have in common: what they are asked for, where the result goes, how far they are, and how they end."""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import click

from kvlocal.files.replaceable import check_replaceable
from kvlocal_cli.option_lists import add_options
from kvlocal_cli.progress import LongWork
from kvlocal_cli.terminal import INTERRUPTED
from kvlocal_cli.torch_options import say, stops
from kvlocal_cli.trained_file import values_text

if TYPE_CHECKING:
    from kvlocal.training.training_run import Report, TrainingRun

R = TypeVar("R", bound="Report")

REPORT_SECONDS = 30  # between two lines about updates
FILE = click.Path(dir_okay=False, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(frozen=True)
class Times:
    """When a run does what is not an update.

    evaluate_every: updates between evaluations, 0 for none
    checkpoint_seconds: between checkpoints
    limit_seconds: after which it stops
    """

    evaluate_every: int
    checkpoint_seconds: float
    limit_seconds: float


def time_options(evaluate_every: int, checkpoint_minutes: float, *, least: int = 1) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds --evaluate-every, --checkpoint-minutes and --minutes; the command gets them as `times: Times`.

    evaluate_every, checkpoint_minutes: by default
    least: that evaluate_every can be; 0 if there may be no evaluation at all
    """
    options = (
        click.option("--evaluate-every", type=click.IntRange(min=least), default=evaluate_every, show_default=True, metavar="N",
                     help="Updates between evaluations" + ("." if least else "; 0 for none at all.")),
        click.option("--checkpoint-minutes", type=click.FloatRange(min=0), default=checkpoint_minutes, show_default=True, metavar="X",
                     help="Minutes between checkpoints."),
        click.option("--minutes", type=click.FloatRange(min=0, min_open=True), metavar="X",
                     help="Stop after so long; the same command goes on from there.  [default: no limit]"),
    )  # fmt: skip

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_times(*, evaluate_every: int, checkpoint_minutes: float, minutes: float | None, **others: Any) -> Any:
            times = Times(evaluate_every, 60 * checkpoint_minutes, 60 * minutes if minutes else math.inf)
            return command(times=times, **others)

        return add_options(with_times, options)

    return add


def check_output(output: Path, is_ours: Callable[[Path], bool], force: bool) -> None:
    """Refuses a file that is there already, unless this very run has left it unfinished or it may be written over.

    Raises:
        KvlocalError: it is refused.
    """
    is_begun = output.with_name(output.name + ".partial").exists()
    check_replaceable(output, lambda path: is_begun and is_ours(path), "what this run has left unfinished", force=force)


def check_plot(plot: Path | None, force: bool) -> None:
    """Refuses a figure that could not be drawn there.

    Raises:
        KvlocalError: another file is there, or matplotlib is missing.
    """
    from kvlocal.evaluation.figure import check, is_figure

    if plot:
        check(plot)
        check_replaceable(plot, is_figure, "a figure", force=force)


def train(
    run: TrainingRun[R, Any],
    steps: int,
    times: Times,
    describe: Callable[[Sequence[R]], str],
    output: Path,
    *,
    place: str,
    plot: Path | None = None,
    curve: tuple[str, Callable[[Any], float]] = ("", float),
) -> None:
    """Lets a run go on to its last update, or as long as it may, and says where the result is.

    Ctrl-C ends it after the update that it is at, and the program with INTERRUPTED.

    describe: some updates in a few words
    place: where and how is computed
    plot: where the run is drawn in the end
    curve: what is drawn of each update: its name, and the number in what the run keeps
    """
    from kvlocal.evaluation import training_plot

    say(place + (f", going on after {run.step} updates" if run.step else ""))
    with _Progress(run.step, steps, describe) as progress, stops(run) as interrupted:
        run.run(
            progress.add, evaluate_every=times.evaluate_every, checkpoint_seconds=times.checkpoint_seconds, limit_seconds=times.limit_seconds
        )
    if plot:
        name, value = curve
        training_plot.draw(name, [value(one) for one in run.updates], run.evaluations, plot)
    if run.step < steps:
        say(f"stopped after {run.step} of {steps} updates; the same command goes on from here")
    click.echo(output)
    if interrupted:
        sys.exit(INTERRUPTED)


class _Progress(Generic[R]):
    """How far training is, on stderr: a bar on a terminal, and lines about updates now and then."""

    def __init__(self, done: int, steps: int, describe: Callable[[Sequence[R]], str]) -> None:
        self._work = LongWork("updates", steps, done)
        self._steps, self._describe = steps, describe
        self._recent: list[R] = []

    def __enter__(self) -> Self:
        self._work.__enter__()
        return self

    def add(self, found: R) -> None:
        if found.held_out is not None:
            self._flush(found.step)
            if found.held_out:
                self._work.say(f"update {found.step}: held out {values_text(found.held_out)}")
            return
        self._work.update(completed=found.step)
        self._recent.append(found)
        if self._work.is_time(REPORT_SECONDS):
            self._flush(found.step)

    def _flush(self, step: int) -> None:
        if self._recent:
            seconds = statistics.fmean(one.seconds for one in self._recent)
            left = (self._steps - step) * seconds / 60
            self._work.say(f"update {step} of {self._steps}: {self._describe(self._recent)}, {seconds:.2f} s an update, {left:.0f} min left")
        self._recent = []

    def __exit__(self, *_: object) -> None:
        if self._recent:
            self._flush(self._recent[-1].step)
        self._work.__exit__()


def mean(reports: Iterable[R], name: str) -> float:
    """Of what the reports have of this name, without what is not a number; not a number if there is nothing."""
    known = [value for one in reports if not math.isnan(value := getattr(one, name))]
    return statistics.fmean(known) if known else math.nan

"""`kvlocal bench`."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvlocal import policies
from kvlocal.benchmark.comparison import Comparison
from kvlocal.benchmark.measures import Bench
from kvlocal.benchmark.plot import draw
from kvlocal.benchmark.process import BenchmarkError
from kvlocal.benchmark.report import COLUMNS, cells, record
from kvlocal.benchmark.runner import names, run, select
from kvlocal.benchmark.settings import QUICK, BenchSettings
from kvlocal.cache.fitting import check_file
from kvlocal.chat.config import SessionConfig
from kvlocal.errors import KvlocalError
from kvlocal.evaluation.figure import check, is_figure
from kvlocal.files.atomic import atomic_write
from kvlocal.files.replaceable import check_replaceable, holds_results
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.context import KV_TYPES
from kvlocal_cli import completing
from kvlocal_cli.device_options import device_options, take_devices
from kvlocal_cli.options import split_policy_arg

STOCK = Path("build/stock/dist/lib")

_EVICTING = [name for name in policies.POLICIES if policies.make(name).evicts]


@click.command("bench")
@click.option("-m", "--model", default=DEFAULT_MODEL, show_default=True, metavar="MODEL", shell_complete=completing.models,
              help="A name from the catalogue, or a GGUF file.")
@click.option("--stock", type=click.Path(path_type=Path), default=STOCK, show_default=True, metavar="DIR",
              help="Where `make stock` has put llama.cpp without our patches.")  # fmt: skip
@click.option("--policy", type=click.Choice(_EVICTING), default=BenchSettings.policy, show_default=True, help="What the session keeps.")
@click.option("--policy-arg", "policy_args", multiple=True, metavar="NAME=VALUE", help="A hyper-parameter of the policy; can be repeated.")
@click.option("--nexus", metavar="FILE", help="Nexus tokens for the policies that use them.  [default: as kvlocal chat finds them]")
@click.option("--ratio", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=BenchSettings.ratio, show_default=True, metavar="X",
              help="Share of the history that is removed.")  # fmt: skip
@click.option("--only", metavar="NAME[,NAME]", default="",
              help=f"What to measure, of: {', '.join(names(BenchSettings(Path(), Path())))}; `decode` means all that begin so.")  # fmt: skip
@click.option("--turns", type=click.IntRange(min=1), metavar="N", help=f"Turns of the chat.  [default: {BenchSettings.turns}]")
@click.option("--pairs", type=click.IntRange(min=1), metavar="N", help=f"Slices compared for a ratio.  [default: {BenchSettings.pairs}]")
@click.option("--quick", is_flag=True, help="Small sizes, to see that everything works.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads, of both.  [default: one per core]")
@click.option("--ctk", "type_k", type=click.Choice(tuple(KV_TYPES)), default=BenchSettings.type_k, show_default=True,
              help="Type of the keys, in both caches.")  # fmt: skip
@click.option("--ctv", "type_v", type=click.Choice(tuple(KV_TYPES)), default=BenchSettings.type_v, show_default=True,
              help="Type of the values, in both caches.")  # fmt: skip
@device_options
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Also write the results to this file, as they come.")  # fmt: skip
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Also draw them. Needs kvlocal[plot].")
@click.option("--force", is_flag=True, help="Write over the files of --json and --plot whatever they hold; else only over earlier results.")
def bench_command(
    model: str,
    stock: Path,
    policy_args: tuple[str, ...],
    only: str,
    turns: int | None,
    pairs: int | None,
    quick: bool,
    threads: int | None,
    json_path: Path | None,
    plot: Path | None,
    force: bool,
    **same: Any,
) -> None:
    """Measure a compressed session against stock llama.cpp, in alternation in one run.

    A ratio is ours over theirs, with its 95 % interval; over one is faster, or more memory. decode@N and prefill@N are at N tokens of
    conversation, of which the session holds its share and llama.cpp everything. decode@equal-cells is with as many cells in both,
    decode@control llama.cpp against itself. chat40 is a whole chat of 40 turns, chat40@context-shift the same against one that drops
    old text where its context is full. share.X is a part of the session's time. decode@N-snapkv is against a session that only evicts,
    read@N is one long text from its beginning. decode@busy is while another program has one core, which the benchmark starts for it,
    decode@busy-quiet what that leaves of the session's speed.

    Everything takes about 20 minutes on two cores; the machine should do nothing else.
    """
    arguments, where = dict(map(split_policy_arg, policy_args)), take_devices(same)
    settings = BenchSettings(resolve(model), stock.absolute(), policy_args=arguments, n_threads=threads, **same, **_sizes(quick, turns, pairs))
    try:
        policies.make(settings.policy, settings.policy_args)
        wanted = select(settings, [name.strip() for name in only.split(",") if name.strip()])
    except KvlocalError as error:
        raise click.UsageError(str(error)) from error
    if not settings.stock.is_dir():
        raise BenchmarkError(f"there is no stock llama.cpp in {stock}: run `make stock` in the source tree, or give its path as --stock")
    config = SessionConfig(type_k=settings.type_k, type_v=settings.type_v)
    read_stride = check_file(settings.model, config, where.placement).read_stride or settings.read_stride
    # stock llama.cpp holds everything, and both have the same layers there
    placement = where.of(settings.model, replace(config, policy="full"), undo=False)
    settings = replace(settings, placement=placement, read_stride=read_stride)
    if plot:
        check(plot)
        check_replaceable(plot, is_figure, "a figure", force=force)
    if json_path:
        check_replaceable(json_path, lambda path: holds_results(path, "versions"), "results of a benchmark", force=force)
    rows: list[Comparison] = []
    with _Progress() as progress:
        bench = Bench(settings, progress.show)
        try:
            with closing(run(bench, wanted)) as found:
                for row in found:
                    rows.append(row)
                    if json_path:
                        atomic_write(json_path, json.dumps(record(bench, rows), indent=1) + "\n")
        finally:
            progress.stop()
            if rows:
                _print(rows)
    if plot:
        draw(rows, plot)


def _sizes(quick: bool, turns: int | None, pairs: int | None) -> dict[str, Any]:
    given = {"turns": turns, "pairs": pairs}
    return (QUICK if quick else {}) | {name: value for name, value in given.items() if value is not None}


def _print(rows: list[Comparison]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        # Rich would cut the lines to the width of a terminal that is not there.
        console.width = 1000
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("name", "unit") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)


class _Progress:
    """What is being measured, on stderr: a bar on a terminal, else a line for each thing."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("starting", total=None)
        self._last = ""

    def show(self, what: str, done: int, total: int) -> None:
        if what != self._last and not self._console.is_terminal:
            click.echo(f"kvlocal: {what}", err=True)
        self._last = what
        self._bar.update(self._task, description=what, completed=done, total=total)

    def stop(self) -> None:
        self._bar.stop()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.stop()

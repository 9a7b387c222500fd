"""What the commands of `kvlocal eval` take, and what they do with a task: measure, show and write."""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

import kvlocal
from kvlocal.cache.config import DEFAULT_BUDGET, check_budget
from kvlocal.cache.fitting import CannotRecall, check_file
from kvlocal.chat.config import SessionConfig
from kvlocal.errors import KvlocalError
from kvlocal.evaluation import plot, report
from kvlocal.evaluation.figure import check, is_figure
from kvlocal.evaluation.reference import make_directory, references_dir
from kvlocal.evaluation.runner import ChatFailure, Task, WorkFile, outcomes, pending
from kvlocal.evaluation.variants import ALL, Variant, parse_all
from kvlocal.files.atomic import atomic_write
from kvlocal.files.fingerprint import fingerprint, run_key
from kvlocal.files.replaceable import check_replaceable, holds_results
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.adapter import Lora
from kvlocal.llama.context import KV_TYPES
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal.nexus.discovery import nexus_for
from kvlocal.nexus.tokens import NexusTokens
from kvlocal_cli import completing
from kvlocal_cli.device_options import DEVICE_OPTIONS, Where, take_devices
from kvlocal_cli.option_lists import add_options
from kvlocal_cli.options import lora_option, parse_ratios
from kvlocal_cli.progress import LongWork
from kvlocal_cli.terminal import INTERRUPTED, is_terminal, waiting

_SESSION = SessionConfig()
_GREEDY = SamplingParams(temperature=0, seed=0)


_PATH = click.Path(dir_okay=False, path_type=Path)
_OPTIONS = (
    click.option("-m", "--model", default=DEFAULT_MODEL, show_default=True, metavar="MODEL", shell_complete=completing.models,
                 help="A name from the catalogue, or a GGUF file."),
    click.option(
        "--policy", "specs", default=ALL, show_default=True, metavar="LIST",
        help="Policies to compare, comma separated, each as name[:arg=value[:arg=value]]; an argument is a hyper-parameter of the policy, or "
        "positions, window, stride, n_sink, archive or archive_type. all is every policy there is what it needs for. The full context is always "
        "measured, as the ceiling.",
    ),
    click.option("--ratio", "ratios", default="0.5,0.8", show_default=True, callback=parse_ratios, metavar="LIST",
                 help="Shares of the history to remove, comma separated."),
    click.option("--kv-budget", type=click.IntRange(min=1), metavar="N",
                 help="Cells that each layer and head keeps, however long the history is, in place of --ratio. eval memory keeps "
                      f"{DEFAULT_BUDGET} if neither is given."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Seed of everything that is random."),
    click.option("--window", type=click.IntRange(min=1), default=_SESSION.window, show_default=True, metavar="N",
                 help="The most recent cells, which always stay and whose queries score the others."),
    click.option("--stride", type=click.IntRange(min=1), default=_SESSION.stride, show_default=True, metavar="N",
                 help="Cells over the budget at which the cache is compressed."),
    click.option("--ctk", "type_k", type=click.Choice(tuple(KV_TYPES)), default=_SESSION.type_k, show_default=True,
                 help="Type of the keys in the cache."),
    click.option("--ctv", "type_v", type=click.Choice(tuple(KV_TYPES)), default=_SESSION.type_v, show_default=True,
                 help="Type of the values in the cache."),
    *DEVICE_OPTIONS,
    click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads.  [default: one per core]"),
    click.option("--nexus", metavar="FILE", help="Nexus tokens for the policies that use them, or off.  [default: as kvlocal chat finds them]"),
    lora_option,
    click.option("--json", "json_path", type=_PATH, metavar="FILE",
                 help="Also write the results as one JSON object; unfinished ones are kept in FILE.partial."),
    click.option("--plot", "plot_path", type=_PATH, metavar="FILE", help="Draw quality against cells kept, as .png, .svg or .pdf."),
    click.option("--force", is_flag=True, help="Write over the files of --json and --plot whatever they hold; else only over earlier results."),
    click.option("--cache", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
                 help="Where predictions of the full context are kept.  [default: kvlocal/eval in the user's cache directory]"),
)  # fmt: skip


def run_options(command: Callable[..., Any], budget: int | None = None) -> Callable[..., Any]:
    """Adds what all commands take; they get it as `run: Run`, made before anything is read.

    budget: cells of every policy but the full context, where neither --ratio nor --kv-budget is given; None for the default ratios
    """

    @functools.wraps(command)
    def with_run(
        *,
        specs: str,
        ratios: tuple[float, ...],
        kv_budget: int | None,
        window: int,
        stride: int,
        type_k: str,
        type_v: str,
        threads: int | None,
        plot_path: Path | None,
        cache: Path | None,
        force: bool,
        **others: Any,
    ) -> Any:
        where = take_devices(others)
        own = {name: others.pop(name) for name in ("model", "seed", "nexus", "lora", "json_path")}
        if click.get_current_context().get_parameter_source("ratios") is ParameterSource.DEFAULT:
            kv_budget = kv_budget or budget
        elif kv_budget:
            raise click.UsageError("--ratio and --kv-budget both say how many cells stay: give one of them")
        try:
            variants = parse_all(specs, [0.0] if kv_budget else ratios)
            base = SessionConfig(window=window, stride=stride, type_k=type_k, type_v=type_v, n_threads=threads, sampling=_GREEDY, budget=kv_budget)
            for variant in variants:
                variant.config(base)
            if plot_path:
                check(plot_path)
        except KvlocalError as error:
            raise click.UsageError(str(error)) from error
        if plot_path:
            check_replaceable(plot_path, is_figure, "a figure", force=force)
        if json_path := own["json_path"]:
            check_replaceable(json_path, lambda path: holds_results(path, "task"), "results of an evaluation", force=force)
        return command(run=Run(**own, where=where, variants=variants, base=base, plot_path=plot_path, cache=cache or references_dir()), **others)

    return add_options(with_run, _OPTIONS)


class Run:
    """One call of a command: measures, shows and writes."""

    def __init__(
        self,
        *,
        model: str,
        seed: int,
        where: Where,
        nexus: str | None,
        lora: Sequence[Lora],
        json_path: Path | None,
        variants: list[Variant],
        base: SessionConfig,
        plot_path: Path | None,
        cache: Path,
    ) -> None:
        self.seed, self.base, self.cache = seed, base, cache
        self._name, self._path, self._where = model, resolve(model), where
        self._json_path, self._plot_path = json_path, plot_path
        self._variants = variants
        self._lora = lora
        self._used: list[dict[str, Any]] = []  # of these, what has an effect
        self.fingerprint = fingerprint(self._path)
        self._nexus_choice = nexus
        self.nexus: NexusTokens | None = None

    def loaded(self) -> Model:
        """The model; its Nexus tokens, if there is a use for them, are then in `nexus`. Variants that lack them, or that it cannot recall with,
        are left out.
        """
        cannot: dict[str, str] = {}  # by specs
        with waiting(f"loading {self._name}"):
            # ratios make no difference
            for variant in {variant.spec: variant for variant in self._variants}.values():
                try:
                    check_file(self._path, variant.config(self.base), self._where.placement)
                except CannotRecall as error:
                    cannot[variant.spec] = str(error)
            # the full context, which all are compared with, takes most
            placement = self._where.of(self._path, replace(self.base, policy="full"), undo=False, lora=self._lora)
            model = Model(self._path, placement=placement, lora=self._lora)
        self._used = [
            {"file": each.path.name, "sha256_of_blocks": each.fingerprint, "scale": each.scale} for each in model.adapters if each.scale
        ]
        for spec, why in cannot.items():
            _say(f"{spec} cannot be measured: {why}")
        self._variants = [variant for variant in self._variants if variant.spec not in cannot]
        if self.base.budget is not None:
            check_budget(model, self.base)
        if any(variant.wants_nexus for variant in self._variants):
            self.nexus = nexus_for(model, self._nexus_choice, _say)
            if not self.nexus:
                left_out = dict.fromkeys(variant.spec for variant in self._variants if variant.wants_nexus)
                _say(f"there are no Nexus tokens for {self._name}, so {' and '.join(left_out)} cannot be measured: give --nexus FILE")
                self._variants = [variant for variant in self._variants if not variant.wants_nexus]
        return model

    def without_lora(self, model: Model) -> Model:
        """The same model without adapters."""
        with waiting(f"loading {self._name} without adapters"):
            return Model(self._path, placement=model.placement)

    def note(self, n: int, what: str, why: str) -> None:
        """Says how many were left out, if any."""
        if n:
            _say(f"{n} {what}{'s' if n > 1 else ''} {why}")

    def measure(self, task: Task, own: dict[str, Any], left_out: dict[str, int]) -> None:
        """Everything from the first chat to the last file.

        own: the command's own settings, on which its chats depend
        """
        if not task.n_chats:
            raise KvlocalError("there is no chat to measure: give other dialogues, or join more of them with --concat")
        settings = {
            "task": task.name,
            "kvlocal": kvlocal.__version__,
            "model": self._path.name,
            "model_sha256_of_blocks": self.fingerprint,
            **own,
            **({"nexus_sha256": fingerprint(Path(self.nexus.path))} if self.nexus else {}),
            **({"lora": self._used} if self._used else {}),
            "seed": self.seed,
            **({"budget": self.base.budget} if self.base.budget else {}),
            **{name: getattr(self.base, name) for name in ("window", "stride", "n_sink", "n_ubatch", "type_k", "type_v")},
        }
        key = run_key(settings)
        with WorkFile(self._work_path(key), key) as work, _Progress(task, self._variants, work) as progress:
            try:
                for outcome in outcomes(task, self._variants, work):
                    progress.add(outcome)
            except KeyboardInterrupt:
                progress.interrupted = True
            else:
                found = report.rows(task, self._variants, work.results, self.seed)
                settings |= {"policies": list(dict.fromkeys(variant.spec for variant in self._variants)),
                             "ratios": sorted({variant.ratio for variant in self._variants}),
                             "chats": task.n_chats, "left_out": left_out, "failed": progress.failed}  # fmt: skip
                if self._json_path:
                    atomic_write(self._json_path, json.dumps(report.document(found, settings), indent=2) + "\n")
                if self._plot_path and found:
                    plot.draw(found, self._plot_path)
                if not progress.failed:
                    work.remove()
        if progress.interrupted:
            sys.exit(INTERRUPTED)
        _show(found)
        if progress.failed:
            sys.exit(1)

    def _work_path(self, key: str) -> Path:
        if self._json_path:
            return self._json_path.with_name(self._json_path.name + ".partial")
        make_directory(self.cache)
        return self.cache / f"{key}.partial"


class _Progress:
    """How far the run is, on stderr: a bar on a terminal, else a line now and then; and a line at the end."""

    def __init__(self, task: Task, variants: list[Variant], work: WorkFile) -> None:
        self.interrupted = False
        self.failed = 0
        self._done, self._total = 0, len(pending(task, variants, work))
        self._work = LongWork(task.name, self._total)
        self._before = task.n_chats * len(variants) - self._total

    def __enter__(self) -> Self:
        self._work.__enter__()
        if self._before:
            self._work.say(f"going on after {self._before} measurements made before")
        return self

    def add(self, outcome: object) -> None:
        self._done += 1
        self._work.update(advance=1)
        if isinstance(outcome, ChatFailure):
            self.failed += 1
            where = f"chat {outcome.chat + 1} with {outcome.variant.spec} at {outcome.variant.ratio:g}"
            self._work.say(f"{where}: {outcome.error}")
        if not self._work.with_bar and self._work.is_time():
            left = self._work.seconds / self._done * (self._total - self._done)
            self._work.say(f"{self._done} of {self._total} measurements, {_duration(left)} left")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._work.__exit__()
        if kind is None:
            failed = f", {self.failed} failed" if self.failed else ""
            again = "; the same command goes on from here" if self.interrupted else ""
            interrupted = "interrupted, " if self.interrupted else ""
            self._work.say(f"{interrupted}{self._done} of {self._total} measurements{failed} in {_duration(self._work.seconds)}{again}")


def _show(found: list[report.MetricRow]) -> None:
    """The results on stdout: ruled tables on a terminal, else plain ones."""
    for i, (headers, lines) in enumerate(report.tables(found)):
        if is_terminal(sys.stdout):
            table = Table(*headers)
            for line in lines:
                table.add_row(*line)
            Console(highlight=False, markup=False).print(table)
        else:
            click.echo(f"{chr(10) if i else ''}{report.plain(headers, lines)}")


def _say(text: str) -> None:
    click.echo(f"kvlocal: {text}", err=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

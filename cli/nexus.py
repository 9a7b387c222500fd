"""`kvlocal nexus`: trains Nexus tokens, and says what is in a Nexus file."""

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvlocal.catalogue import resolve
from kvlocal.engine import Model
from kvlocal.errors import KvlocalError
from kvlocal.nexus.container import Container
from kvlocal.nexus.file import NexusFile
from kvlocal_cli.nexus_synth import synth_command
from kvlocal_cli.terminal import INTERRUPTED, waiting

if TYPE_CHECKING:
    from kvlocal.nexus.training import Measurement, Training

REPORT_SECONDS = 30  # between two lines about updates
HELD_OUT = 0.1  # of the conversations, for evaluation
RATIOS = "0.5,0.6,0.7,0.8,0.9"

_DATA = click.Path(exists=True, dir_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group("nexus")
def nexus_group() -> None:
    """Nexus tokens: trained soft tokens that stand for finished turns of a conversation."""


nexus_group.add_command(synth_command)


def _parse_ratios(_ctx: click.Context, _param: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        ratios = ()
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise click.BadParameter(f"{text!r} is not a list of numbers between 0 and 1 such as 0.5,0.8")
    return ratios


@nexus_group.command("train")
@click.argument("model")
@click.option("--data", "data", type=_DATA, required=True, multiple=True, metavar="FILE",
              help='Conversations, one JSON object a line: {"messages": [{"role", "content"}]}; can be repeated.')
@click.option("-o", "--output", type=_FILE, required=True, metavar="FILE",
              help="The Nexus file. It is rewritten at every checkpoint; FILE.partial beside it is what a run goes on from.")
@click.option("--steps", type=click.IntRange(min=1), default=600, show_default=True, metavar="N", help="Updates.")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="Conversations an update.")
@click.option("--k", type=click.IntRange(min=1), default=64, show_default=True, metavar="N", help="Nexus tokens of a turn at most.")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, metavar="N", help="Rank of the LoRA adapter.")
@click.option("--no-lora", is_flag=True, help="Train the embeddings alone.")
@click.option("--ratios", default=RATIOS, show_default=True, callback=_parse_ratios, metavar="LIST",
              help="Compression ratios, one of which each conversation is trained with.")
@click.option("--fixed-ratio", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="X", help="Train for this ratio alone.")
@click.option("--attention-weight", type=click.FloatRange(min=0), default=1.0, show_default=True, metavar="X",
              help="Weight of the attention term beside the KL divergence; 0 leaves it out.")
@click.option("--max-tokens", type=click.IntRange(min=64), default=1024, show_default=True, metavar="N",
              help="Longest conversation; longer ones are cut between turns.")
@click.option("--held-out", type=click.IntRange(min=0), default=16, show_default=True, metavar="N",
              help="Conversations to evaluate on; a tenth of the data is kept for that.")
@click.option("--evaluate-every", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="Updates between evaluations.")
@click.option("--checkpoint-minutes", type=click.FloatRange(min=0), default=5.0, show_default=True, metavar="X", help="Minutes between checkpoints.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), metavar="X",
              help="Stop after so long; the same command goes on from there.  [default: no limit]")
@click.option("--device", metavar="NAME", help="cpu or cuda.  [default: cuda if there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]),
              help="What matrices are multiplied in.  [default: bfloat16 where the hardware has it]")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads.  [default: one per core]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Seed of everything that is random.")
def train_command(
    model: str, data: tuple[Path, ...], output: Path, rank: int, no_lora: bool, ratios: tuple[float, ...], fixed_ratio: float | None,
    held_out: int, evaluate_every: int, checkpoint_minutes: float, minutes: float | None, device: str | None, dtype: str | None,
    threads: int | None, **settings: Any,
) -> None:
    """Train Nexus tokens for MODEL, a name from the catalogue or a GGUF file.

    The model itself teaches: with Nexus tokens in place of finished turns it learns to predict what it predicts with all of the conversation.
    Its own weights stay as they are. Printed are the divergence from the full context (kl, in nats per token) and the difference of the
    attention on compressed turns; on held-out conversations the kl for each ratio with Nexus tokens only, with half of the kept cells
    raw (mixed), with raw cells only, and with nothing.

    A run that was interrupted, also by kill -9, goes on when the same command is given again.
    """
    torch, training, examples = _with_torch()
    path = resolve(model)
    if output.exists() and not output.with_name(output.name + ".partial").exists():
        raise KvlocalError(f"{output} exists: remove it or name another file")
    if threads:
        torch.set_num_threads(threads)
    device = device or training.best_device()
    with waiting("reading the conversations"), Model(path) as tokenizer:
        found = examples.read(tokenizer, data, max_tokens=settings["max_tokens"], held_out=HELD_OUT)
    _say(f"{len(found.training)} conversations to train on, {len(found.held_out)} held out")
    for why, n in found.left_out.items():
        if n:
            _say(f"{n} {_REASONS[why]}")
    chosen = training.Settings(
        **settings, rank=0 if no_lora else rank, ratios=(fixed_ratio,) if fixed_ratio else ratios, n_held_out=held_out,
        dtype=dtype or training.best_dtype(device),
    )  # fmt: skip
    with waiting("loading the weights"):
        run = training.Training(Container(path), path.stem, found, chosen, output, device)
    _say(f"{chosen.dtype} on {device}" + (f", going on after {run.step} updates" if run.step else ""))
    with _Progress(run.step, chosen.steps) as progress, _stops(run) as interrupted:
        run.run(
            progress.add,
            evaluate_every=evaluate_every,
            checkpoint_seconds=60 * checkpoint_minutes,
            limit_seconds=60 * minutes if minutes else math.inf,
        )
    if run.step < chosen.steps:
        _say(f"stopped after {run.step} of {chosen.steps} updates; the same command goes on from here")
    click.echo(output)
    if interrupted:
        sys.exit(INTERRUPTED)


@contextmanager
def _stops(run: "Training") -> Iterator[list[int]]:
    """Ctrl-C in this block ends the run after the update it is at; a second one ends it at once. The list gets what came."""
    came: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, previous)
        run.stop()
        _say("stopping after this update")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, previous)


_REASONS = {
    "empty": "left out because a text is empty or there is no answer",
    "split": "cut into parts because they are longer than --max-tokens",
    "single": "left out because they have only one turn",
    "too_long": "turns left out because they are longer than --max-tokens",
    "repeated": "left out because they are there twice",
}


def _with_torch() -> tuple[Any, Any, Any]:
    """PyTorch, and the modules that need it or are for training alone."""
    try:
        import torch
    except ImportError as error:
        raise KvlocalError("training needs PyTorch: install it with `pip install kvlocal[train]`") from error
    from kvlocal.nexus import examples, training

    return torch, training, examples


@nexus_group.command("info")
@click.argument("file", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the whole training record.")
@click.option("-m", "--model", help="Also check that the file was made for this model, a name from the catalogue or a GGUF file.")
def info_command(file: Path, as_json: bool, model: str | None) -> None:
    """Say what the Nexus file FILE holds and how it was trained."""
    found = NexusFile.load(file)
    if model:
        found.check_base(Container(resolve(model)))
    parameters = found.table.size + sum(half.size for pair in found.adapter.values() for half in pair)
    described = {
        "base_name": found.base_name,
        "base_hash": found.base_hash,
        "architecture": found.architecture,
        "k": found.k,
        "n_embd": found.n_embd,
        "rank": found.rank,
        "parameters": parameters,
        "bytes": file.stat().st_size,
        "ratios": list(found.ratios),
        "segment_rule": found.segment_rule,
    }
    if as_json:
        click.echo(json.dumps(described | {"record": found.record}, indent=2))
        return
    for name, value in described.items():
        click.echo(f"{name.replace('_', ' '):<14}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    for name in ("steps", "seconds", "device"):
        if name in found.record:
            click.echo(f"{name:<14}{found.record[name]}")
    evaluations = found.record.get("evaluations")
    if evaluations:
        click.echo("held out      " + _held_out({name: value for name, value in evaluations[-1].items() if name != "step"}))


class _Progress:
    """How far training is, on stderr: a bar on a terminal, and lines with losses now and then."""

    def __init__(self, done: int, steps: int) -> None:
        console = Console(stderr=True, highlight=False, markup=False)
        columns = (TextColumn("updates"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False)
        self._task = self._bar.add_task("", total=steps, completed=done)
        self._steps = steps
        self._recent: list[Measurement] = []

    def __enter__(self) -> Self:
        self._reported = time.monotonic()
        self._bar.start()
        return self

    def add(self, found: "Measurement") -> None:
        if found.held_out:
            self._flush(found.step)
            self._print(f"update {found.step}: held out {_held_out(found.held_out)}")
            return
        if math.isnan(found.kl):
            return
        self._bar.update(self._task, completed=found.step)
        self._recent.append(found)
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self._flush(found.step)

    def _flush(self, step: int) -> None:
        n = len(self._recent)
        if n:
            kl, attention, seconds = (sum(getattr(one, name) for one in self._recent) / n for name in ("kl", "attention", "seconds"))
            left = (self._steps - step) * seconds / 60
            self._print(f"update {step} of {self._steps}: kl {kl:.4f}, attention {attention:.4f}, {seconds:.2f} s an update, {left:.0f} min left")
        self._recent = []
        self._reported = time.monotonic()

    def _print(self, text: str) -> None:
        self._bar.console.print(f"kvlocal: {text}", soft_wrap=True)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _held_out(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def _say(text: str) -> None:
    click.echo(f"kvlocal: {text}", err=True)

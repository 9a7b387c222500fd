"""`kvlocal nexus train`."""

import functools
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from kvlocal.files.fingerprint import fingerprint
from kvlocal.files.replaceable import check_replaceable
from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import resolve
from kvlocal.llama.model import Model
from kvlocal.nexus.file import NexusFile, is_nexus_file
from kvlocal_cli.options import parse_ratios
from kvlocal_cli.progress import LongWork
from kvlocal_cli.terminal import INTERRUPTED, waiting
from kvlocal_cli.torch_options import compute_options, say, stops

if TYPE_CHECKING:
    from kvlocal.training.examples import Examples
    from kvlocal.training.nexus_training import TrainingReport

REPORT_SECONDS = 30  # between two lines about updates
HELD_OUT = 0.1  # of the conversations, for evaluation
RATIOS = "0.5,0.6,0.7,0.8,0.9"

NEXUS_FILE = click.Path(dir_okay=False, path_type=Path)
_DATA = click.Path(exists=True, dir_okay=False, path_type=Path)


_TORCH_OPTIONS = (
    click.option("--data", "data", type=_DATA, required=True, multiple=True, metavar="FILE",
                 help='Conversations, one JSON object a line: {"messages": [{"role", "content"}]}; can be repeated.'),
    click.option("--max-tokens", type=click.IntRange(min=64), default=1024, show_default=True, metavar="N",
                 help="Longest conversation; longer ones are cut between turns."),
)  # fmt: skip


@dataclass(frozen=True)
class Workplace:
    """What a command that needs PyTorch is given: conversations, and where and how to compute.

    path, container: the base model
    examples: kvlocal.training.examples.Examples
    device, dtype: as PyTorch names them
    """

    path: Path
    container: Container
    examples: "Examples"
    device: str
    dtype: str


def torch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of commands that need PyTorch; the command gets them and its `model` as `place: Workplace`."""

    @functools.wraps(command)
    def with_place(*, model: str, data: tuple[Path, ...], max_tokens: int, device: str, dtype: str, **others: Any) -> Any:
        from kvlocal.training import examples

        path = resolve(model)
        with waiting("reading the conversations"), Model(path) as tokenizer:
            conversations = examples.read(tokenizer, data, max_tokens=max_tokens, held_out=HELD_OUT)
        return command(place=Workplace(path, Container(path), conversations, device, dtype), max_tokens=max_tokens, **others)

    found = compute_options(with_place)
    for option in reversed(_TORCH_OPTIONS):
        found = option(found)
    return found


@click.command("train")
@click.argument("model")
@click.option("-o", "--output", type=NEXUS_FILE, required=True, metavar="FILE",
              help="The Nexus file. It is rewritten at every checkpoint; FILE.partial beside it is what a run goes on from.")
@click.option("--force", is_flag=True, help="Write over FILE if it is there already.")
@click.option("--steps", type=click.IntRange(min=1), default=600, show_default=True, metavar="N", help="Updates.")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="Conversations an update.")
@click.option("--students", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="Compressions of each conversation.")
@click.option("--start", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="Begin with the values of a Nexus file that was trained before.")
@click.option("--k", type=click.IntRange(min=1), default=64, show_default=True, metavar="N", help="Nexus tokens of a turn at most.")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, metavar="N", help="Rank of the LoRA adapter.")
@click.option("--no-lora", is_flag=True, help="Train the embeddings alone.")
@click.option("--ratios", default=RATIOS, show_default=True, callback=parse_ratios, metavar="LIST",
              help="Compression ratios, one of which each conversation is trained with.")
@click.option("--fixed-ratio", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="X", help="Train for this ratio alone.")
@click.option("--attention-weight", type=click.FloatRange(min=0), default=1.0, show_default=True, metavar="X",
              help="Weight of the attention term beside the KL divergence; 0 leaves it out.")
@click.option("--join", type=click.IntRange(min=1), default=2, show_default=True, metavar="N",
              help="Join up to N conversations into one, within --max-tokens.")
@click.option("--recite", type=click.FloatRange(0, 1), default=0.5, show_default=True, metavar="X",
              help="Share of the conversations whose loss is that of repeating one of their turns word for word.")
@click.option("--held-out", type=click.IntRange(min=0), default=16, show_default=True, metavar="N",
              help="Conversations to evaluate on; a tenth of the data is kept for that.")
@click.option("--evaluate-every", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="Updates between evaluations.")
@click.option("--checkpoint-minutes", type=click.FloatRange(min=0), default=5.0, show_default=True, metavar="X", help="Minutes between checkpoints.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), metavar="X",
              help="Stop after so long; the same command goes on from there.  [default: no limit]")
@torch_options
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Seed of everything that is random.")
def train_command(
    place: Workplace, output: Path, force: bool, start: Path | None, rank: int, no_lora: bool, ratios: tuple[float, ...], fixed_ratio: float | None,
    held_out: int, evaluate_every: int, checkpoint_minutes: float, minutes: float | None, **settings: Any,
) -> None:
    """Train Nexus tokens for MODEL, a name from the catalogue or a GGUF file.

    The model itself teaches: with Nexus tokens in place of finished turns it learns to predict what it predicts with all of the conversation.
    Its own weights stay as they are. Printed are the divergence from the full context (kl, in nats per token) and the difference of the
    attention on compressed turns; on held-out conversations the kl for each ratio with Nexus tokens only, with half of the kept cells
    raw (mixed), with raw cells only, and with nothing.

    A run that was interrupted, also by kill -9, goes on when the same command is given again.
    """
    from kvlocal.training.nexus_training import Training, TrainingSettings

    is_begun = output.with_name(output.name + ".partial").exists()
    check_replaceable(output, lambda path: is_begun and is_nexus_file(path), "what this run has left unfinished", force=force)
    found = place.examples
    say(f"{len(found.training)} conversations to train on, {len(found.held_out)} held out")
    for why, n in found.left_out.items():
        if n:
            say(f"{n} {_REASONS[why]}")
    first = None
    if start:
        first = NexusFile.load(start)
        first.check_base(place.container)
    chosen = TrainingSettings(
        **settings,
        rank=0 if no_lora else rank,
        ratios=(fixed_ratio,) if fixed_ratio else ratios,
        n_held_out=held_out,
        dtype=place.dtype,
        start=fingerprint(start) if start else "",
    )
    with waiting("loading the weights"):
        run = Training(place.container, place.path.stem, found, chosen, output, place.device, first)
    say(f"{chosen.dtype} on {place.device}" + (f", going on after {run.step} updates" if run.step else ""))
    with _Progress(run.step, chosen.steps) as progress, stops(run) as interrupted:
        run.run(
            progress.add,
            evaluate_every=evaluate_every,
            checkpoint_seconds=60 * checkpoint_minutes,
            limit_seconds=60 * minutes if minutes else math.inf,
        )
    if run.step < chosen.steps:
        say(f"stopped after {run.step} of {chosen.steps} updates; the same command goes on from here")
    click.echo(output)
    if interrupted:
        sys.exit(INTERRUPTED)


_REASONS = {
    "empty": "left out because a text is empty or there is no answer",
    "split": "cut into parts because they are longer than --max-tokens",
    "single": "left out because they have only one turn",
    "too_long": "turns left out because they are longer than --max-tokens",
    "repeated": "left out because they are there twice",
}


class _Progress:
    """How far training is, on stderr: a bar on a terminal, and lines with losses now and then."""

    def __init__(self, done: int, steps: int) -> None:
        self._work = LongWork("updates", steps, done)
        self._steps = steps
        self._recent: list[TrainingReport] = []

    def __enter__(self) -> Self:
        self._work.__enter__()
        return self

    def add(self, found: "TrainingReport") -> None:
        if found.held_out:
            self._flush(found.step)
            self._work.say(f"update {found.step}: held out {held_out_text(found.held_out)}")
            return
        if math.isnan(found.attention):
            return
        self._work.update(completed=found.step)
        self._recent.append(found)
        if self._work.is_time(REPORT_SECONDS):
            self._flush(found.step)

    def _flush(self, step: int) -> None:
        values = {name: [getattr(one, name) for one in self._recent] for name in ("kl", "recital", "attention", "seconds")}
        means = {name: statistics.fmean(known) for name, found in values.items() if (known := [value for value in found if not math.isnan(value)])}
        if means:
            losses = ", ".join(f"{name} {value:.4f}" for name, value in means.items() if name != "seconds")
            left = (self._steps - step) * means["seconds"] / 60
            self._work.say(f"update {step} of {self._steps}: {losses}, {means['seconds']:.2f} s an update, {left:.0f} min left")
        self._recent = []

    def __exit__(self, *_: object) -> None:
        self._work.__exit__()


def held_out_text(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())

"""`kvlocal adapt distill`."""

import math
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from kvlocal.errors import KvlocalError
from kvlocal.files.fingerprint import fingerprint
from kvlocal.files.replaceable import check_replaceable
from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import resolve
from kvlocal.llama.model import Model
from kvlocal_cli.nexus_synth import written_dialogues
from kvlocal_cli.options import parse_ratios
from kvlocal_cli.progress import LongWork
from kvlocal_cli.terminal import INTERRUPTED, waiting
from kvlocal_cli.torch_options import compute_options, say, stops

if TYPE_CHECKING:
    from kvlocal.training.adapt_training import DistillReport
    from kvlocal.training.chats import Chats

REPORT_SECONDS = 30  # between two lines about updates
HELD_OUT = 0.1  # of the dialogues, for evaluation
POLICIES = "gkv,snapkv,streaming"
RATIOS = "0.5,0.8,0.9"
OWN_TOKENS = 200_000  # of dialogues that the model writes where no others are given

ADAPTED_FILE = click.Path(dir_okay=False, path_type=Path)
DATA_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def parse_policies(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    """Names of policies that can choose in training, with commas between them."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise click.BadParameter("name at least one policy, such as gkv")
    return names


@click.command("distill")
@click.argument("model")
@click.option("-o", "--output", type=ADAPTED_FILE, required=True, metavar="FILE",
              help="The adapter, a LoRA in GGUF. It is rewritten at every checkpoint; FILE.partial beside it is what a run goes on from.")
@click.option("--force", is_flag=True, help="Write over FILE if it is there already.")
@click.option("--data", type=DATA_FILE, multiple=True, metavar="FILE",
              help='Conversations, one JSON object a line: {"messages": [{"role", "content"}]}; can be repeated.  '
                   "[default: dialogues that the model writes with itself, in FILE.dialogues.jsonl]")
@click.option("--own-tokens", type=click.IntRange(min=1000), default=OWN_TOKENS, show_default=True, metavar="N",
              help="Tokens of the dialogues that the model writes where there is no --data.")
@click.option("--policy", "names", default=POLICIES, show_default=True, callback=parse_policies, metavar="LIST",
              help="Policies that choose the cells in training.")
@click.option("--ratio", "ratios", default=RATIOS, show_default=True, callback=parse_ratios, metavar="LIST",
              help="Compression ratios, of which each student has one.")
@click.option("--whole", type=click.FloatRange(0, 1, max_open=True), default=0.15, show_default=True, metavar="X",
              help="Share of the students whose cache is not compressed.")
@click.option("--stride", type=click.IntRange(min=16), default=128, show_default=True, metavar="N",
              help="Tokens by which the cache grows before it is compressed again.")
@click.option("--steps", type=click.IntRange(min=1), default=300, show_default=True, metavar="N", help="Updates.")
@click.option("--batch", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="Chats an update.")
@click.option("--students", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="Compressions of each chat.")
@click.option("--start", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="Begin with an adapter that was trained before.")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, metavar="N", help="Rank of the adapter.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=5e-4, show_default=True, metavar="X", help="Learning rate.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=0.6, show_default=True, metavar="X",
              help="Temperature at which predictions are compared.")
@click.option("--max-tokens", type=click.IntRange(min=256), default=1024, show_default=True, metavar="N", help="Tokens of a chat.")
@click.option("--held-out", type=click.IntRange(min=0), default=8, show_default=True, metavar="N",
              help="Chats to evaluate on; a tenth of the dialogues is kept for that.")
@click.option("--evaluate-every", type=click.IntRange(min=1), default=50, show_default=True, metavar="N", help="Updates between evaluations.")
@click.option("--checkpoint-minutes", type=click.FloatRange(min=0), default=2.0, show_default=True, metavar="X", help="Minutes between checkpoints.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), metavar="X",
              help="Stop after so long; the same command goes on from there.  [default: no limit]")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png",
              help="Draw the loss and the held-out divergences. Needs kvlocal[plot].")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Seed of everything that is random.")
@compute_options
def distill_command(
    model: str, output: Path, force: bool, data: tuple[Path, ...], own_tokens: int, names: tuple[str, ...], ratios: tuple[float, ...],
    start: Path | None, held_out: int, evaluate_every: int, checkpoint_minutes: float, minutes: float | None, plot: Path | None, device: str,
    dtype: str, **settings: Any,
) -> None:
    """Train an adapter with which MODEL predicts from a compressed cache what it predicts from all of it.

    MODEL is a name from the catalogue or a GGUF file. It is its own teacher: without the adapter it reads each chat with all cells, and the student
    reads it with the cells that a policy leaves, compressed during the text as in a chat. The policy chooses by the student's own attention. Use
    what comes of it with `kvlocal chat --lora FILE`.

    A run that was interrupted, also by kill -9, goes on when the same command is given again.
    """
    from kvlocal.evaluation import training_plot
    from kvlocal.evaluation.figure import check, is_figure
    from kvlocal.training.adapt_training import DistillSettings, DistillTraining
    from kvlocal.training.adapted_file import AdaptedFile, is_adapted_file
    from kvlocal.training.training_memory import training_memory

    is_begun = output.with_name(output.name + ".partial").exists()
    check_replaceable(output, lambda path: is_begun and is_adapted_file(path), "what this run has left unfinished", force=force)
    if plot:
        check(plot)
        check_replaceable(plot, is_figure, "a figure", force=force)
    path = resolve(model)
    container = Container(path)
    first = AdaptedFile.load(start, container) if start else None
    chosen = DistillSettings(
        **settings, policies=names, ratios=ratios, n_held_out=held_out, start=fingerprint(start) if start else "", dtype=dtype
    )
    say(f"training takes about {training_memory(container, chosen.max_tokens, chosen.rank, dtype) / 1e9:.1f} GB of memory")
    if not data:
        data = (output.with_name(output.name + ".dialogues.jsonl"),)
        with Model(path) as writer:
            if not written_dialogues(writer, data[0], own_tokens):
                sys.exit(INTERRUPTED)
    chats = read_data(path, data, chosen.max_tokens)
    with waiting("loading the weights"):
        run = DistillTraining(container, path.stem, chats, chosen, output, device, first)
    say(f"{dtype} on {device}" + (f", going on after {run.step} updates" if run.step else ""))
    with _Progress(run.step, chosen.steps) as progress, stops(run) as interrupted:
        run.run(
            progress.add,
            evaluate_every=evaluate_every,
            checkpoint_seconds=60 * checkpoint_minutes,
            limit_seconds=60 * minutes if minutes else math.inf,
        )
    if plot:
        training_plot.draw("KL", run.losses, run.evaluations, plot)
    if run.step < chosen.steps:
        say(f"stopped after {run.step} of {chosen.steps} updates; the same command goes on from here")
    click.echo(output)
    if interrupted:
        sys.exit(INTERRUPTED)


def read_data(path: Path, data: tuple[Path, ...], max_tokens: int) -> "Chats":
    """The dialogues in these files as a model has them.

    Raises KvlocalError if they cannot be used, or chats of so many tokens are longer than the model was trained for.
    """
    from kvlocal.training.chats import read_chats

    with waiting("reading the dialogues"), Model(path) as tokenizer:
        if max_tokens > tokenizer.n_ctx_train:
            raise KvlocalError(f"the model was trained on {tokenizer.n_ctx_train} positions: ask for at most --max-tokens {tokenizer.n_ctx_train}")
        found = read_chats(tokenizer, data, held_out=HELD_OUT)
    say(f"{len(found.training)} dialogues to train on, {len(found.held_out)} held out")
    return found


class _Progress:
    """How far training is, on stderr: a bar on a terminal, and lines with losses now and then."""

    def __init__(self, done: int, steps: int) -> None:
        self._work = LongWork("updates", steps, done)
        self._steps = steps
        self._recent: list[DistillReport] = []

    def __enter__(self) -> Self:
        self._work.__enter__()
        return self

    def add(self, found: "DistillReport") -> None:
        if found.held_out:
            self._flush(found.step)
            self._work.say(f"update {found.step}: held out {held_out_text(found.held_out)}")
        if math.isnan(found.kl):
            return
        self._work.update(completed=found.step)
        self._recent.append(found)
        if self._work.is_time(REPORT_SECONDS):
            self._flush(found.step)

    def _flush(self, step: int) -> None:
        if self._recent:
            kl, seconds = (statistics.fmean(getattr(one, name) for one in self._recent) for name in ("kl", "seconds"))
            left = (self._steps - step) * seconds / 60
            self._work.say(f"update {step} of {self._steps}: kl {kl:.4f}, {seconds:.2f} s an update, {left:.0f} min left")
        self._recent = []

    def __exit__(self, *_: object) -> None:
        self._work.__exit__()


def held_out_text(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())

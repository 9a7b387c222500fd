"""`kvlocal nexus train`."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvlocal.files.fingerprint import fingerprint
from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import resolve
from kvlocal.llama.model import Model
from kvlocal.nexus.file import NexusFile, is_nexus_file
from kvlocal_cli.option_lists import add_options
from kvlocal_cli.options import parse_ratios
from kvlocal_cli.terminal import waiting
from kvlocal_cli.torch_options import compute_options, say
from kvlocal_cli.trained_file import values_text
from kvlocal_cli.training_run import EXISTING_FILE, FILE, Times, check_output, mean, time_options, train

if TYPE_CHECKING:
    from kvlocal.training.examples import Examples
    from kvlocal.training.nexus_training import TrainingReport

HELD_OUT = 0.1  # of the conversations, for evaluation
RATIOS = "0.5,0.6,0.7,0.8,0.9"

_TORCH_OPTIONS = (
    click.option("--data", "data", type=EXISTING_FILE, required=True, multiple=True, metavar="FILE",
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
    return add_options(found, _TORCH_OPTIONS)


@click.command("train")
@click.argument("model")
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE",
              help="The Nexus file. It is rewritten at every checkpoint; FILE.partial beside it is what a run goes on from.")
@click.option("--force", is_flag=True, help="Write over FILE if it is there already.")
@click.option("--steps", type=click.IntRange(min=1), default=600, show_default=True, metavar="N", help="Updates.")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="Conversations an update.")
@click.option("--students", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="Compressions of each conversation.")
@click.option("--start", type=EXISTING_FILE, metavar="FILE",
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
@time_options(evaluate_every=100, checkpoint_minutes=5.0)
@torch_options
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Seed of everything that is random.")
def train_command(
    place: Workplace, output: Path, force: bool, start: Path | None, rank: int, no_lora: bool, ratios: tuple[float, ...], fixed_ratio: float | None,
    held_out: int, times: Times, **settings: Any,
) -> None:
    """Train Nexus tokens for MODEL, a name from the catalogue or a GGUF file.

    The model itself teaches: with Nexus tokens in place of finished turns it learns to predict what it predicts with all of the conversation.
    Its own weights stay as they are. Printed are the divergence from the full context (kl, in nats per token) and the difference of the
    attention on compressed turns; on held-out conversations the kl for each ratio with Nexus tokens only, with half of the kept cells
    raw (mixed), with raw cells only, and with nothing.

    A run that was interrupted, also by kill -9, goes on when the same command is given again.
    """
    from kvlocal.training.nexus_training import Training, TrainingSettings

    check_output(output, is_nexus_file, force)
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
    train(run, chosen.steps, times, _described, output, place=f"{chosen.dtype} on {place.device}")


_REASONS = {
    "empty": "left out because a text is empty or there is no answer",
    "split": "cut into parts because they are longer than --max-tokens",
    "single": "left out because they have only one turn",
    "too_long": "turns left out because they are longer than --max-tokens",
    "repeated": "left out because they are there twice",
}


def _described(updates: "Sequence[TrainingReport]") -> str:
    return values_text({name: mean(updates, name) for name in ("kl", "recital", "attention")})

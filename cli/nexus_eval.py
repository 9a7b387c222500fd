"""`kvlocal nexus eval`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvlocal.errors import KvlocalError
from kvlocal.evaluation.statistics import mean_over_chats, shown
from kvlocal.nexus.file import NexusFile
from kvlocal_cli.nexus_train import RATIOS, Workplace, torch_options
from kvlocal_cli.options import parse_ratios
from kvlocal_cli.progress import LongWork
from kvlocal_cli.terminal import waiting
from kvlocal_cli.training_run import FILE

if TYPE_CHECKING:
    from kvlocal.training.examples import Example


@click.command("eval")
@click.argument("file", type=FILE)
@click.option("-m", "--model", required=True, help="The model it was trained for, a name from the catalogue or a GGUF file.")
@click.option("--ratio", "ratios", default=RATIOS, show_default=True, callback=parse_ratios, metavar="LIST", help="Compression ratios.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="Conversations at most.")
@click.option("--join", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Join N conversations into one, within --max-tokens.")
@click.option("--held-out-only", is_flag=True, help="Only the tenth of the conversations that training leaves out.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with `rows`: kept, ratio, mean, lo, hi, n.")
@torch_options
def eval_command(
    place: Workplace, file: Path, ratios: tuple[float, ...], limit: int, join: int, held_out_only: bool, max_tokens: int, as_json: bool
) -> None:
    """Say what the Nexus tokens in FILE are worth on conversations, as training does on those it holds out.

    All turns but the last are compressed at once. Printed is the divergence from the full context, in nats per token, mean and 95 %
    interval, with Nexus tokens only, with half of the kept cells raw (mixed), with raw cells only (SnapKV's) and with nothing.
    `kvlocal eval` measures the same where it is used: in llama.cpp, turn by turn, with every policy.
    """
    import torch

    from kvlocal.training.decoder import Decoder
    from kvlocal.training.divergence import divergences
    from kvlocal.training.examples import joined
    from kvlocal.training.parameters import Parameters
    from kvlocal.training.weights import Weights

    loaded = NexusFile.load(file)
    loaded.check_base(place.container)
    examples = place.examples.held_out if held_out_only else place.examples.held_out + place.examples.training
    if not examples:
        raise KvlocalError("training would hold out none of these conversations: give more of them, or leave out --held-out-only")
    with waiting("loading the weights"):
        decoder = Decoder(Weights.load(place.container, getattr(torch, place.dtype), place.device))
    parameters = Parameters.of(loaded, decoder.device)
    found = [divergences(decoder, parameters, example, ratios) for example in _tracked(joined(examples[:limit], join, max_tokens))]
    rows = []
    for name in found[0]:
        kept, _, ratio = name.partition("@")
        mean, lo, hi = mean_over_chats([one[name] for one in found], [1] * len(found))
        rows.append({"kept": kept, "ratio": float(ratio) if ratio else None, "mean": mean, "lo": lo, "hi": hi, "n": len(found)})
    if as_json:
        click.echo(json.dumps({"rows": rows}, indent=2))
        return
    for name, row in zip(found[0], rows, strict=True):
        click.echo(f"{name:<14}{shown(row['mean'], row['lo'], row['hi'], digits=4)}")


def _tracked(examples: "list[Example]") -> "Iterator[Example]":
    with LongWork("conversations", len(examples)) as work:
        for done, example in enumerate(examples, 1):
            yield example
            work.update(completed=done)
            if not work.with_bar and work.is_time():
                left = work.seconds / done * (len(examples) - done) / 60
                work.say(f"{done} of {len(examples)} conversations, {left:.0f} min left")

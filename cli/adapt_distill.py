"""`kvlocal adapt distill`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvlocal.errors import KvlocalError
from kvlocal.files.fingerprint import fingerprint
from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import resolve
from kvlocal.llama.model import Model
from kvlocal_cli.nexus_synth import written_dialogues
from kvlocal_cli.options import parse_ratios
from kvlocal_cli.terminal import INTERRUPTED, waiting
from kvlocal_cli.torch_options import compute_options, say
from kvlocal_cli.training_run import EXISTING_FILE, FILE, Times, check_output, check_plot, mean, time_options, train

if TYPE_CHECKING:
    from kvlocal.training.chats import Chats

HELD_OUT = 0.1  # of the dialogues, for evaluation
POLICIES = "gkv,snapkv,streaming"
RATIOS = "0.5,0.8,0.9"
OWN_TOKENS = 200_000  # of dialogues that the model writes where no others are given


def parse_policies(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    """Names of policies that can choose in training, with commas between them."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise click.BadParameter("name at least one policy, such as gkv")
    return names


@click.command("distill")
@click.argument("model")
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE",
              help="The adapter, a LoRA in GGUF. It is rewritten at every checkpoint; FILE.partial beside it is what a run goes on from.")
@click.option("--force", is_flag=True, help="Write over FILE if it is there already.")
@click.option("--data", type=EXISTING_FILE, multiple=True, metavar="FILE",
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
@click.option("--start", type=EXISTING_FILE, metavar="FILE",
              help="Begin with an adapter that was trained before.")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, metavar="N", help="Rank of the adapter.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=5e-4, show_default=True, metavar="X", help="Learning rate.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=0.6, show_default=True, metavar="X",
              help="Temperature at which predictions are compared.")
@click.option("--max-tokens", type=click.IntRange(min=256), default=1024, show_default=True, metavar="N", help="Tokens of a chat.")
@click.option("--held-out", type=click.IntRange(min=0), default=8, show_default=True, metavar="N",
              help="Chats to evaluate on; a tenth of the dialogues is kept for that.")
@time_options(evaluate_every=50, checkpoint_minutes=2.0)
@click.option("--plot", type=FILE, metavar="FILE.png",
              help="Draw the loss and the held-out divergences. Needs kvlocal[plot].")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Seed of everything that is random.")
@compute_options
def distill_command(
    model: str, output: Path, force: bool, data: tuple[Path, ...], own_tokens: int, names: tuple[str, ...], ratios: tuple[float, ...],
    start: Path | None, held_out: int, times: Times, plot: Path | None, device: str, dtype: str, **settings: Any,
) -> None:
    """Train an adapter with which MODEL predicts from a compressed cache what it predicts from all of it.

    MODEL is a name from the catalogue or a GGUF file. It is its own teacher: without the adapter it reads each chat with all cells, and the student
    reads it with the cells that a policy leaves, compressed during the text as in a chat. The policy chooses by the student's own attention. Use
    what comes of it with `kvlocal chat --lora FILE`.

    A run that was interrupted, also by kill -9, goes on when the same command is given again.
    """
    from kvlocal.training.adapt_training import DistillSettings, DistillTraining
    from kvlocal.training.adapted_file import AdaptedFile, is_adapted_file
    from kvlocal.training.training_memory import training_memory

    check_output(output, is_adapted_file, force)
    check_plot(plot, force)
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
    train(
        run, chosen.steps, times, lambda updates: f"kl {mean(updates, 'kl'):.4f}", output,
        place=f"{dtype} on {device}", plot=plot, curve=("KL", float),
    )  # fmt: skip


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

"""`kvlocal adapt rl`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvlocal.doctor.memory_limits import available_memory
from kvlocal.errors import KvlocalError
from kvlocal.files.fingerprint import fingerprint
from kvlocal.gguf.attention import Attention
from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import resolve
from kvlocal.llama.context import MAX_SEQUENCES
from kvlocal.llama.model import Model
from kvlocal_cli.option_lists import add_options
from kvlocal_cli.terminal import waiting
from kvlocal_cli.torch_options import compute_options, say
from kvlocal_cli.training_run import EXISTING_FILE, FILE, Times, check_output, check_plot, mean, time_options, train

if TYPE_CHECKING:
    from kvlocal.training.rl_training import RLReport, RLSettings
    from kvlocal.training.tasks import CheckedTask

KINDS = "recall,correction,sum,copy,format"
_TOKENS = "80-180"
_HELD_OUT = 0.1  # of given tasks, for evaluation


def parse_ratios_or_none(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[float, ...]:
    """`0,0.8` as numbers of at least 0 and less than 1."""
    try:
        ratios = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        ratios = ()
    if not ratios or not all(0 <= ratio < 1 for ratio in ratios):
        raise click.BadParameter(f"{text!r} is not a list of numbers from 0 to below 1 such as 0,0.8")
    return ratios


def parse_range(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[int, int]:
    """`80-180` as two numbers."""
    least, _, most = text.partition("-")
    if not (least.isdigit() and (most or least).isdigit() and 1 <= int(least) <= int(most or least)):
        raise click.BadParameter(f"{text!r} is no range of tokens such as {_TOKENS}")
    return int(least), int(most or least)


def parse_kinds(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not kinds or set(kinds) - set(KINDS.split(",")):
        raise click.BadParameter(f"{text!r} is no list of kinds of tasks: use some of {KINDS}")
    return kinds


MADE_TASKS = (
    click.option("--kinds", default=KINDS, show_default=True, callback=parse_kinds, metavar="LIST", help="Kinds of the tasks that are made."),
    click.option("--task-tokens", default=_TOKENS, show_default=True, callback=parse_range, metavar="MIN-MAX",
                 help="How long their conversations are, about."),
)  # fmt: skip
TASK_OPTIONS = (
    click.option("--tasks", "file_of_tasks", type=EXISTING_FILE, metavar="FILE.jsonl",
                 help='Tasks, one JSON object a line: {"messages": [{"role", "content"}], "check": {"contains": [...], "lacks": [...], "number": N, '
                      '"regex": "..."}}.  [default: tasks that are made from the seed]'),
    *MADE_TASKS,
)  # fmt: skip


def task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --tasks, --kinds and --task-tokens."""
    return add_options(command, TASK_OPTIONS)


@click.command("rl")
@click.argument("model")
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE",
              help="The adapter, a LoRA in GGUF. It is rewritten at every checkpoint; FILE.partial beside it is what a run goes on from.")
@click.option("--force", is_flag=True, help="Write over FILE if it is there already.")
@task_options
@click.option("--policy", default="gkv", show_default=True, metavar="NAME", help="What chooses the cells while answers are drawn.")
@click.option("--ratio", "ratios", default="0.8", show_default=True, callback=parse_ratios_or_none, metavar="LIST",
              help="Compression ratios, one of which each update has; 0 is no compression.")
@click.option("--stride", type=click.IntRange(min=16), default=128, show_default=True, metavar="N",
              help="Tokens by which the cache grows before it is compressed again.")
@click.option("--start", type=EXISTING_FILE, metavar="FILE",
              help="Begin with an adapter that `kvlocal adapt` trained before.")
@click.option("--steps", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="Updates.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, metavar="N", help="Tasks an update.")
@click.option("--answers", type=click.IntRange(min=2), default=8, show_default=True, metavar="N", help="Answers to each task.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=0.8, show_default=True, metavar="X",
              help="Temperature that they are drawn at.")
@click.option("--answer-tokens", "max_tokens", type=click.IntRange(min=1), default=32, show_default=True, metavar="N",
              help="Tokens of an answer at most.")
@click.option("--parallel", type=click.IntRange(1, MAX_SEQUENCES), default=16, show_default=True, metavar="N", help="Answers drawn at a time.")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, metavar="N", help="Rank of the adapter.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=1e-4, show_default=True, metavar="X", help="Learning rate.")
@click.option("--held-out", type=click.IntRange(min=0), default=20, show_default=True, metavar="N",
              help="Tasks to evaluate on, which share nothing with the others; of a file, the last tenth at most.")
@time_options(evaluate_every=25, checkpoint_minutes=2.0, least=0)
@click.option("--plot", type=FILE, metavar="FILE.png",
              help="Draw the rewards of updates and of evaluations. Needs kvlocal[plot].")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Seed of everything that is random.")
@click.option("--gpu-layers", type=click.IntRange(min=-1), default=-1, show_default=True, metavar="N",
              help="Layers that go to the GPU while answers are drawn, -1 for all; without one it has no effect.")
@compute_options
def rl_command(
    model: str, output: Path, force: bool, file_of_tasks: Path | None, kinds: tuple[str, ...], task_tokens: tuple[int, int],
    ratios: tuple[float, ...], start: Path | None, batch: int, held_out: int, times: Times, plot: Path | None, gpu_layers: int, device: str,
    dtype: str, **settings: Any,
) -> None:
    """Train an adapter with which MODEL answers rightly more often from a compressed cache, by reinforcement learning.

    MODEL is a name from the catalogue or a GGUF file. It answers tasks several times, its cache compressed meanwhile as in a chat; what the right
    answers have over the wrong ones becomes more likely (GRPO). Tasks whose answers are all right or all wrong teach nothing. Use what comes of it
    with `kvlocal chat --lora FILE`.

    A run that was interrupted, also by kill -9, goes on when the same command is given again.
    """
    import torch

    from kvlocal.training.adapted_file import AdaptedFile, is_adapted_file
    from kvlocal.training.rewards import cells_for
    from kvlocal.training.rl_training import RLSettings, RLTraining

    check_output(output, is_adapted_file, force)
    check_plot(plot, force)
    path = resolve(model)
    container = Container(path)
    first = AdaptedFile.load(start, container) if start else None
    chosen = RLSettings(**settings, tasks=batch, ratios=ratios, n_held_out=held_out, dtype=dtype, start=fingerprint(start) if start else "")
    tasks, others = _tasks(file_of_tasks, kinds, task_tokens, chosen)
    with waiting("reading the tasks"), Model(path) as tokenizer:
        chosen = replace(chosen, n_cells=cells_for(tokenizer, [*tasks, *others[:held_out]], chosen.max_tokens, chosen.stride))
    _check_memory(container, chosen, len(tasks))
    with waiting("loading the weights"):
        run = RLTraining(
            container, path.stem, tasks, others, chosen, output, device,
            n_gpu_layers=gpu_layers, n_threads=torch.get_num_threads(), start=first,
        )  # fmt: skip
    train(
        run, chosen.steps, times, _described, output,
        place=f"{dtype} on {device}", plot=plot, curve=("mean reward", lambda update: update["reward"]),
    )  # fmt: skip


def _tasks(
    file: Path | None, kinds: tuple[str, ...], task_tokens: tuple[int, int], settings: "RLSettings"
) -> "tuple[Sequence[CheckedTask], Sequence[CheckedTask]]":
    """The tasks to train on, and those to evaluate with."""
    from kvlocal.training.task_maker import make_tasks
    from kvlocal.training.tasks import read_tasks

    if file is None:
        n = settings.steps * settings.tasks
        return make_tasks(n, settings.seed, "training", task_tokens, kinds), make_tasks(
            settings.n_held_out, settings.seed, "held_out", task_tokens, kinds
        )
    found = read_tasks(file).tasks
    n_held_out = min(settings.n_held_out, int(_HELD_OUT * len(found)))
    n = len(found) - n_held_out
    say(f"{n} tasks to train on, {n_held_out} held out")
    return found[:n], found[n:]


def _check_memory(container: Container, settings: "RLSettings", n_tasks: int) -> None:
    """Says how much memory training takes.

    Raises:
        KvlocalError: there is less.
    """
    from kvlocal.training.training_memory import training_memory

    # a conversation with all its answers is one text
    rows = settings.n_cells + (settings.answers - 1) * settings.max_tokens
    need = training_memory(container, rows, settings.rank, settings.dtype)
    attention = Attention.of(container)
    cells = 0 if attention is None else attention.cell_bytes("f16", "f16") * settings.n_cells
    # those that decode together, and a copy of each conversation's
    need += sum(tensor.data.nbytes for tensor in container.tensors.values()) + cells * (settings.parallel + min(settings.tasks, n_tasks))
    say(f"training takes about {need / 1e9:.1f} GB of memory")
    free = available_memory()
    if free is not None and need > free:
        raise KvlocalError(
            f"training takes about {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: give fewer --answers, a smaller --parallel, or "
            "shorter tasks"
        )


def _described(updates: "Sequence[RLReport]") -> str:
    reward, signal, cut, apart = (mean(updates, name) for name in ("reward", "signal", "cut", "mean"))
    told = "" if math.isnan(apart) else f", log-probabilities {apart:.3f} apart"
    return f"reward {reward:.3f}, {signal:.0%} of the tasks teach, {cut:.0%} of the answers cut off{told}"

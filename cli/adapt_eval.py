"""`kvlocal adapt eval`."""

import json
from pathlib import Path

import click

from kvlocal.errors import KvlocalError
from kvlocal.evaluation.statistics import mean_over_chats, shown
from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import resolve
from kvlocal_cli.adapt_distill import POLICIES, RATIOS, parse_policies, read_data
from kvlocal_cli.adapt_rewards import measure_rewards, rows_of, show, students_of, task_options, tasks_of
from kvlocal_cli.options import parse_ratios
from kvlocal_cli.progress import LongWork
from kvlocal_cli.terminal import waiting
from kvlocal_cli.torch_options import compute_options
from kvlocal_cli.training_run import EXISTING_FILE, FILE


@click.command("eval")
@click.argument("file", type=FILE)
@click.option("-m", "--model", required=True, help="The model it was trained for, a name from the catalogue or a GGUF file.")
@click.option("--data", type=EXISTING_FILE, multiple=True, metavar="FILE",
              help='Conversations, one JSON object a line: {"messages": [{"role", "content"}]}; can be repeated.')
@task_options
@click.option("--policy", "names", default=POLICIES, show_default=True, callback=parse_policies, metavar="LIST", help="Policies to measure with.")
@click.option("--ratio", "ratios", default=RATIOS, show_default=True, callback=parse_ratios, metavar="LIST", help="Compression ratios.")
@click.option("--stride", type=click.IntRange(min=16), default=128, show_default=True, metavar="N",
              help="Tokens by which the cache grows before it is compressed again.")
@click.option("--max-tokens", type=click.IntRange(min=256), default=1024, show_default=True, metavar="N", help="Tokens of a chat.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="Chats or tasks at most.")
@click.option("--all", "everything", is_flag=True, help="Also the dialogues that training does not leave out.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with `rows`: student, adapter, mean, lo, hi, n, and of tasks the kind.")
@compute_options
def eval_command(
    file: Path, model: str, data: tuple[Path, ...], names: tuple[str, ...], ratios: tuple[float, ...], stride: int, max_tokens: int, limit: int,
    everything: bool, as_json: bool, tasks: str | None, kinds: tuple[str, ...], task_tokens: tuple[int, int], answers: int, temperature: float,
    answer_tokens: int, parallel: int, device: str, dtype: str,
) -> None:
    """Say what the adapter in FILE is worth on conversations, as training does on those it holds out, or with --tasks on tasks.

    On conversations, printed is the divergence from the model's predictions with all cells and without the adapter, in nats per token of an
    answer, mean and 95 % interval, without and with the adapter; the line `full` is what the adapter changes where nothing is compressed.
    `kvlocal eval dialogue` measures the same where it is used, in llama.cpp.

    On tasks, printed is the share of answers that are right, mean and 95 % interval over tasks, as llama.cpp gives them without and with the
    adapter, and the difference. The line `full` is without compression.
    """
    import torch

    from kvlocal.training.adapt_training import check_policy, divergences
    from kvlocal.training.adapted_file import AdaptedFile
    from kvlocal.training.decoder import Decoder
    from kvlocal.training.parameters import AdapterParameters, pairs_of
    from kvlocal.training.weights import Weights

    if bool(data) == bool(tasks):
        raise click.UsageError("an adapter is measured on conversations or on tasks: give one of --data and --tasks")
    path = resolve(model)
    container = Container(path)
    loaded = AdaptedFile.load(file, container)
    if tasks:
        asked = tasks_of(tasks, kinds, task_tokens, limit)
        measured_rewards = measure_rewards(
            path, file, asked, students_of(names, ratios, stride, torch.get_num_threads()),
            answers=answers, temperature=temperature, answer_tokens=answer_tokens, parallel=parallel,
        )  # fmt: skip
        rewards = rows_of(measured_rewards, asked)
        if as_json:
            click.echo(json.dumps({"rows": rewards}, indent=2))
        else:
            show(rewards)
        return
    for name in names:
        check_policy(name)
    found = read_data(path, data, max_tokens)
    dialogues = found.held_out + found.training if everything else found.held_out
    if not dialogues:
        raise KvlocalError("training would hold out none of these dialogues: give more of them, or measure on --all")
    with waiting("loading the weights"):
        decoder = Decoder(Weights.load(container, getattr(torch, dtype), device))
    adapter = AdapterParameters(pairs_of(loaded.adapter, decoder.device), loaded.alpha).adapter(decoder.dtype)
    chats = found.chats_of(dialogues, limit, max_tokens)
    measured: dict[tuple[str, bool], list[float]] = {}
    with LongWork("chats", len(chats)) as work:
        for i, chat in enumerate(chats):
            for with_it in (False, True):
                for student, kl in divergences(decoder, chat, adapter if with_it else None, names, ratios, stride).items():
                    measured.setdefault((student, with_it), []).append(kl)
            work.update(completed=i + 1)
            if not work.with_bar and work.is_time():
                work.say(f"{i + 1} of {len(chats)} chats")
    means = {which: mean_over_chats(values, [1] * len(values)) for which, values in measured.items()}
    if as_json:
        rows = [
            {"student": student, "adapter": with_it, "mean": mean, "lo": lo, "hi": hi, "n": len(measured[student, with_it])}
            for (student, with_it), (mean, lo, hi) in means.items()
        ]
        click.echo(json.dumps({"rows": rows}, indent=2))
        return
    click.echo(f"{'cells':<16}{'without':<28}with the adapter")
    for student in dict.fromkeys(student for student, _ in means):
        without, adapted = (shown(*means[student, which], digits=4) for which in (False, True))
        click.echo(f"{student:<16}{without:<28}{adapted}")
